"""A command and the system that it runs in: streams that are closed or full, Ctrl-C at any moment, files written whole.

`start` goes before the imports that take seconds, so nothing slow is imported here.
"""

import codecs
import io
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TextIO

LONGEST = 300  # characters of the line that tells an error
INTERRUPTED = 130  # the exit status where the user stopped a command
LONGEST_INPUT = 1 << 30  # bytes; what is piped in may never end
LONG_CALL = 1 << 17  # characters that a tokenizer's library reads in some 0.1 s


def escape(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding lacks by JSON escapes, so that JSON lines stay valid."""
    import json  # not before Ctrl-C ends the imports

    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def escaping(stream: TextIO) -> TextIO:
    """The stream, which escapes the characters that its encoding lacks, unless the user has another way."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        codecs.register_error("escape", escape)
        stream.reconfigure(errors="escape")
    return stream


class Notice(UserWarning):
    """A warning that a command shows, in one line: it goes on, but not as was asked."""


class Stream:
    """stdout. Where it cannot be written the error names it; a reader who has left is no error."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.inside = False  # a line that is not ended

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise OSError(f"stdout cannot be written ({error.strerror}): make room, or send it elsewhere") from error

    def write(self, text: str) -> int:
        clear_status()
        try:
            self.stream.write(text)
        except OSError as error:
            self.failed(error)
        self.inside = not text.endswith("\n") if text else self.inside
        return len(text)

    def flush(self) -> None:
        clear_status()  # input() writes past this object
        try:
            self.stream.flush()
        except OSError as error:
            self.failed(error)


class Notes(Stream):
    """stderr. Where it cannot be written the command goes on: what matters is on stdout and in files."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.null = os.open(os.devnull, os.O_WRONLY)
        self.status = ""  # the line on the screen that tells what the command is doing
        self.quiet = False

    def hush(self) -> None:
        """Show no status and no Notice."""
        self.quiet = True

    def show(self, status: str) -> None:
        """Replace the status line, until anything else is written; only on a terminal, and not inside a line."""
        inside = isinstance(sys.stdout, Stream) and sys.stdout.inside and sys.stdout.isatty()
        if self.quiet or inside or not self.isatty():
            return
        with suppress(OSError):
            self.stream.write("\r\033[K" + (status and f"{status} ..."))
            self.stream.flush()
        self.status = status

    def note(self, message: object, *_: object, **__: object) -> None:
        """Show a Notice, as warnings.showwarning."""
        if not self.quiet:
            print(f"note: {message}", file=self)

    def failed(self, error: OSError) -> None:
        pass

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is written meanwhile goes nowhere, also by a library that has no Python. For one thread at a time."""
        kept = os.dup(2)
        try:
            os.dup2(self.null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def clear_status() -> None:
    if isinstance(sys.stderr, Notes) and sys.stderr.status:
        sys.stderr.show("")


@contextmanager
def showing(status: str) -> Iterator[None]:
    """Show a status line inside the block, then the previous one again."""
    if not isinstance(sys.stderr, Notes):
        yield
        return
    before = sys.stderr.status
    sys.stderr.show(status)
    try:
        yield
    finally:
        if sys.stderr.status:  # nothing else was written
            sys.stderr.show(before)


class Guarded:
    """An object of a library in Rust: where a call fails otherwise than by a ValueError, it is one that names the file.

    Such a library may panic. That is no Exception, and comes with lines of its own on stderr, which a command leaves
    out; stderr is the process's, so where Python is the user's own they stay.
    """

    def __init__(self, path: Path, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.path = path
        self.made = self.call(make, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, getattr(vars(self).get("made"), name))  # none yet while it is unpickled

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with sys.stderr.aside() if isinstance(sys.stderr, Notes) else nullcontext():
                return function(*arguments, **options)
        except (ValueError, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(f"{self.path} cannot be used, its library fails: {error}: fetch it again") from error


def cache_folder() -> Path:
    """Return the user's cache folder, or one in the temporary folder for a user without a home, as in a container."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except (RuntimeError, OSError):
        pass
    from tempfile import gettempdir

    return Path(gettempdir(), f"cache-{os.getuid()}")


def start() -> None:
    """What a command does first: it has all three streams, of warnings only Notices reach the user, and Ctrl-C ends the
    imports without a traceback."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file opened would be one of the streams
        pass
    os.close(null)
    # Started without one of them (">&-"), Python has None there.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = Stream(escaping(sys.stdout or open(os.devnull, "w")))
    sys.stderr = Notes(sys.stderr or open(os.devnull, "w"))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Notice)
        warnings.showwarning = sys.stderr.note
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def begin(quiet: bool) -> None:
    """Tell that what takes seconds begins: imports, then the model; but not if quiet, nor in a rank but the first."""
    if isinstance(sys.stderr, Notes):
        if quiet or os.environ.get("RANK", "0") != "0":
            sys.stderr.hush()
        sys.stderr.show("loading")


def leave(*_: object) -> NoReturn:
    with suppress(RuntimeError):  # in the middle of a write
        clear_status()
    os._exit(INTERRUPTED)


def finish(main: Callable[[], int | None]) -> NoReturn:
    """Runs a command that has started, and ends the process with its exit status."""
    interruptible = signal.getsignal(signal.SIGINT) is leave
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main() or 0
        if interruptible:
            signal.signal(signal.SIGINT, leave)  # what Python tidies up has no traceback either
        if status == 0:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = 0
    except OSError as error:
        status = complain(error)
    clear_status()
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what Python still holds for it would raise again at exit
    sys.exit(status)


def counted(count: int, noun: str) -> str:
    """The count and its noun: 1 sample, 2 samples, 3 processes."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def complain(error: object) -> int:
    """Tells an error on stderr in one line, of a long one the beginning and the end, which has the remedy. Returns the
    exit status, 2."""
    text = " ".join(f"error: {error}".split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[5 - LONGEST // 2 :]}"
    print(text, file=sys.stderr)
    return 2


def identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of a file: links to it, hard links, other spellings. None: there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def check_stays(read: Iterable[Path], output: Path) -> None:
    """Raises ValueError where the output would replace a file that is read, under whatever name."""
    if (found := identity(output)) is not None and found in map(identity, read):
        raise ValueError(f"{output} is read, and would be replaced: give another file")


def check_plain(path: Path) -> None:
    """Raises ValueError where what is to be read is no plain file: a folder, or a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file: put one there")


def decode_text(data: bytes) -> str:
    """The text of UTF-8 bytes, without the byte order mark that some editors put before it. Raises ValueError, which
    says what they are instead."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("UTF-16, not UTF-8: convert it")
    if (at := data.find(0)) >= 0:  # of UTF-16 without a mark every other byte
        raise ValueError(f"not UTF-8 (a NUL at byte {at}, as in UTF-16): convert it")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}): convert it") from error


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError where it is not UTF-8."""
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def read_bytes(path: Path | None) -> bytes:
    """All of a file that may be a pipe; None: of stdin. Raises ValueError where it does not end within LONGEST_INPUT
    bytes, or within memory."""
    data = bytearray()
    with suppress(MemoryError), nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as file:
        while len(data) <= LONGEST_INPUT:
            if not (part := file.read(1 << 20)):
                return bytes(data)
            data += part
    raise ValueError(f"{path or 'stdin'} has not ended after {len(data)} bytes: give a shorter prompt")


def without_newline(data: bytes) -> bytes:
    """The bytes without the line end that echo, or an editor, has put behind them."""
    return data[: -1 - data.endswith(b"\r\n")] if data.endswith(b"\n") else data


def interruptible(function: Callable[..., Any], text: str, **options: Any) -> Any:
    """Call a library that blocks Ctrl-C; for a long text in a thread, which an interrupt abandons."""
    if len(text) < LONG_CALL:
        return function(text, **options)
    from concurrent.futures import Future
    from threading import Thread

    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(text, **options))
        except BaseException as error:  # a panic is no Exception
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result()


def check_writable(path: Path) -> None:
    """Raises ValueError where no file can be written there, in place of one or as a new one."""
    target = os.path.realpath(path)  # what a link names
    try:
        fits = stat.S_ISREG(os.stat(target).st_mode) and os.access(target, os.W_OK)
    except FileNotFoundError:
        fits = not os.path.lexists(target)
    except OSError:  # a name that is too long, a circle of links
        fits = False
    if not (fits and os.access(os.path.dirname(target), os.W_OK)):
        raise ValueError(f"{path} cannot be written: give a plain file in a folder that exists")


def replica_file(output: Path, replica: int) -> Path:
    """Return the file of a replica, which the first one merges into the output at the end."""
    target = Path(os.path.realpath(output))
    return target.with_name(f"{target.name}.replica-{replica}")


def replica_files(output: Path) -> list[Path]:
    """List the replica files that exist."""
    target = Path(os.path.realpath(output))
    return sorted(each for each in target.parent.glob("*.replica-*") if each.name.startswith(f"{target.name}.replica-"))


def check_new(output: Path) -> None:
    """Raises ValueError where an earlier run has begun an output."""
    if found := [each for each in (output, *replica_files(output)) if each.exists()]:
        raise ValueError(f"{found[0]} exists: add --resume to go on with it, or give another file")


def replace_file(written: Path, target: Path) -> None:
    """Replace a file atomically and durably: after a power cut either the old or the new one is there, whole."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    written.replace(target)
    with suppress(OSError):  # not every system opens a folder
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file beside `path`, which then takes its place: whole, or not at all. Raises OSError."""
    from tempfile import TemporaryDirectory  # which takes longer to import than all else here

    target = Path(os.path.realpath(path))  # a link stays one
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
            unfinished = Path(folder, target.name)
            write(unfinished)
            replace_file(unfinished, target)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path} cannot be written ({why}): make room, or give another file") from error
