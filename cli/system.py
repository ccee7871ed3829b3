"""Process and streams of a command: closed or full streams, Ctrl-C at any moment, checks of input and output files.

`start` runs before the imports that take seconds, so nothing slow is imported here.
"""

import codecs
import io
import os
import signal
import stat
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from layers.notices import Notice

LONGEST = 300  # characters of an error line
INTERRUPTED = 130  # exit status if the user interrupted a command
LONGEST_INPUT = 1 << 30  # bytes; piped input may never end


def escape(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that the encoding lacks by JSON escapes, so that JSON lines stay valid."""
    import json  # imported late: Ctrl-C must be handled first

    assert isinstance(error, UnicodeEncodeError)
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def escaping(stream: TextIO) -> TextIO:
    """Make a stream escape the characters that its encoding lacks, unless the user chose otherwise. Returns it."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
        codecs.register_error("escape", escape)
        stream.reconfigure(errors="escape")
    return stream


class Stream:
    """stdout. A failed write raises an error that names it; BrokenPipeError passes, since a reader may leave."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.inside = False  # an unfinished line

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def failed(self, error: OSError) -> None:
        if isinstance(error, BrokenPipeError):
            raise error
        raise OSError(
            f"stdout cannot be written ({error.strerror}): free up disk space, or redirect it elsewhere"
        ) from error

    def write(self, text: str) -> int:
        clear_status()
        try:
            self.stream.write(text)
        except OSError as error:
            self.failed(error)
        self.inside = not text.endswith("\n") if text else self.inside
        return len(text)

    def flush(self) -> None:
        clear_status()  # input() bypasses this object
        try:
            self.stream.flush()
        except OSError as error:
            self.failed(error)


class SafeStderr(Stream):
    """stderr. Failed writes are ignored: what matters is on stdout and in files."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self.null = os.open(os.devnull, os.O_WRONLY)
        self.status = ""  # the status line on the screen
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

    @contextmanager
    def showing(self, status: str) -> Iterator[None]:
        """Show a status line inside the block, then the previous one again."""
        before = self.status
        self.show(status)
        try:
            yield
        finally:
            if self.status:  # nothing else was written
                self.show(before)

    def note(self, message: object, *_: object, **__: object) -> None:
        """Show a Notice, as warnings.showwarning."""
        if not self.quiet:
            print(f"note: {message}", file=self)

    def failed(self, error: OSError) -> None:
        pass

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Discard stderr output inside the block, also of native libraries. For one thread at a time."""
        kept = os.dup(2)
        try:
            os.dup2(self.null, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def clear_status() -> None:
    if isinstance(sys.stderr, SafeStderr) and sys.stderr.status:
        sys.stderr.show("")


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
    """Prepare a command: open all three streams, show no warnings but Notices, and let Ctrl-C end the imports
    without a traceback."""
    while (null := os.open(os.devnull, os.O_RDWR)) <= 2:  # or the next opened file would become one of the streams
        pass
    os.close(null)
    # If one was closed (">&-"), Python has None there.
    sys.stdin = sys.stdin or open(os.devnull)
    sys.stdout = Stream(escaping(sys.stdout or open(os.devnull, "w")))
    sys.stderr = SafeStderr(sys.stderr or open(os.devnull, "w"))
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", Notice)
        warnings.showwarning = sys.stderr.note
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)


def begin(quiet: bool) -> None:
    """Show that slow work begins, imports and then the model; not if quiet, nor on ranks other than 0."""
    if isinstance(sys.stderr, SafeStderr):
        if quiet or os.environ.get("RANK", "0") != "0":
            sys.stderr.hush()
        sys.stderr.show("loading")


def leave(*_: object) -> NoReturn:
    with suppress(RuntimeError):  # interrupted inside a write
        clear_status()
    os._exit(INTERRUPTED)


def finish(main: Callable[[], int | None]) -> NoReturn:
    """Run a started command and exit with its status."""
    interruptible = signal.getsignal(signal.SIGINT) is leave
    try:
        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        status = main() or 0
        if interruptible:
            signal.signal(signal.SIGINT, leave)  # no traceback during Python's cleanup either
        if status == 0:
            sys.stdout.flush()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = 0
    except OSError as error:
        status = print_error(error)
    clear_status()
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python's buffer would raise again at exit
    sys.exit(status)


def print_error(error: object) -> int:
    """Print a one-line error to stderr, eliding the middle of a long one: the remedy is at its end. Returns the exit
    status, 2."""
    text = " ".join(f"error: {error}".split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[5 - LONGEST // 2 :]}"
    print(text, file=sys.stderr)
    return 2


def read_bytes(path: Path | None) -> bytes:
    """Read all of a file, which may be a pipe; None: stdin. Raises ValueError if it is longer than LONGEST_INPUT bytes
    or memory."""
    data = bytearray()
    with suppress(MemoryError), nullcontext(sys.stdin.buffer) if path is None else path.open("rb") as file:
        while len(data) <= LONGEST_INPUT:
            if not (part := file.read(1 << 20)):
                return bytes(data)
            data += part
    raise ValueError(f"{path or 'stdin'} is longer than {len(data)} bytes: pass a shorter prompt")


def without_newline(data: bytes) -> bytes:
    """Strip the line end that echo or an editor has added."""
    return data[: -1 - data.endswith(b"\r\n")] if data.endswith(b"\n") else data


def check_writable(path: Path) -> None:
    """Raise ValueError if a file can be neither created nor replaced there."""
    target = os.path.realpath(path)  # the target of a symlink
    try:
        fits = stat.S_ISREG(os.stat(target).st_mode) and os.access(target, os.W_OK)
    except FileNotFoundError:
        fits = not os.path.lexists(target)
    except OSError:  # name too long, symlink loop
        fits = False
    if not (fits and os.access(os.path.dirname(target), os.W_OK)):
        raise ValueError(f"{path} cannot be written: choose a regular file in an existing folder")


def replica_file(output: Path, replica: int) -> Path:
    """Return the file of a replica, which the first one merges into the output at the end."""
    target = Path(os.path.realpath(output))
    return target.with_name(f"{target.name}.replica-{replica}")


def replica_files(output: Path) -> list[Path]:
    """List the replica files that exist."""
    target = Path(os.path.realpath(output))
    return sorted(each for each in target.parent.glob("*.replica-*") if each.name.startswith(f"{target.name}.replica-"))


def check_new(output: Path) -> None:
    """Raise ValueError if an earlier run has started this output."""
    if found := [each for each in (output, *replica_files(output)) if each.exists()]:
        raise ValueError(f"{found[0]} already exists: pass --resume to continue it, or choose another file")
