"""Prompts of a batch job: lines of JSON or plain texts, checked and encoded one by one.

A file of any length takes little memory: what is read is kept in temporary files, and comes back in windows.
"""

import argparse
import json
import os
import pickle
import re
import stat
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import torch

from cli.options import as_number, as_texts, as_whole, open_prompts
from cli.system import LONGEST_INPUT, without_newline
from engine.chat import ChatEncoder, Messages, parse_messages
from engine.request import Request
from engine.scheduler import Prompt, rejection
from engine.sizes import Asked
from loading.files import decode_text
from model import ModelArgs

Id = str | int
T = TypeVar("T")
RESERVED_FIELDS = frozenset(
    "id prompt messages seed rank of sample count text tokens logprobs finish_reason mean_logprob error".split()
)
DEEPEST = 100  # nesting levels of a line of JSON
BLOCK = 1 << 20  # bytes read at once
SPOOL = 1 << 24  # bytes of prompts that are kept in memory
# Most prompts and tokens of a window, which is held in memory and whose prompts share prefixes.
WINDOW, WINDOW_TOKENS = 1 << 14, 1 << 22


class Spool(Generic[T]):
    """A list in a temporary file, if it is too long for memory: appended to first, then read from its beginning by each
    iteration. Each method raises ValueError if the temporary folder cannot hold it."""

    def __init__(self) -> None:
        self.file, self.count = tempfile.SpooledTemporaryFile(SPOOL), 0

    @contextmanager
    def writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            why = f"the prompts do not fit into the temporary folder ({error.strerror or error})"
            raise ValueError(f"{why}: set TMPDIR to another one") from error

    def append(self, item: T) -> None:
        with self.writing():
            pickle.dump(item, self.file, pickle.HIGHEST_PROTOCOL)
        self.count += 1

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[T]:
        with self.writing():  # what is still in a buffer
            self.file.seek(0)
        for _ in range(self.count):
            yield pickle.load(self.file)


@dataclass(frozen=True)
class Record:
    """One prompt of the input file. number: of its line, from 1. said: a text, or the messages of a conversation.
    fields: copied to the output. settings: those among them that change the request, by the name of its field."""

    number: int
    id: Id
    said: str | Messages
    fields: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)

    def plain(self) -> tuple[Any, ...]:
        """Return what determines the samples, as plain values."""
        said = self.said if isinstance(self.said, str) else asdict(self.said)
        return (self.id, said, self.settings) if self.settings else (self.id, said)

    def request(self, request: Request) -> Request | None:
        """Return the request of this line; None: that of all. Raises ValueError if a setting is out of range."""
        if not self.settings:
            return None
        own = {name: value for name, value in self.settings.items() if name in SAMPLING}
        rest = {name: value for name, value in self.settings.items() if name not in SAMPLING}
        return replace(request, **rest | {"sampling": replace(request.sampling, **own), "seed": None})


def nests_deeper_than(value: object, levels: int) -> bool:
    """Return whether lists and objects nest deeper than `levels`."""
    layer = [value]
    for _ in range(levels):
        held = [each.values() if isinstance(each, dict) else each for each in layer if isinstance(each, dict | list)]
        layer = [part for parts in held for part in parts]
    return any(isinstance(each, dict | list) for each in layer)


def parse_json(line: str) -> Any:
    """Parse a line of JSON that can be written again. Raises ValueError if it is not JSON, UnicodeError if an escape is
    half of a surrogate pair."""
    try:
        value = json.loads(line)
        if nests_deeper_than(value, DEEPEST):
            raise RecursionError
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError:
        raise ValueError(f"it nests more than {DEEPEST} levels deep") from None
    text.encode()
    return value


SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
# Fields of a line that change its request: the request's name, the expected kind and its parser.
SETTINGS: dict[str, tuple[str, str, Callable[[object], Any]]] = {
    **{name: (name, "a number", as_number) for name in SAMPLING if name != "top_k"},
    "top_k": ("top_k", "a whole number, 0 for off", lambda value: as_whole(value, 0) or None),
    "max_new_tokens": ("max_new_tokens", "a whole number from 1 on", partial(as_whole, least=1)),
    "max_tokens": ("max_new_tokens", "a whole number from 1 on", partial(as_whole, least=1)),
    "n": ("num_samples", "a whole number from 1 on", partial(as_whole, least=1)),
    "stop": ("stop", "a text or a list of texts", as_texts),
}
# Settings of other engines, refused by name instead of copied to the output.
UNKNOWN = frozenset(
    "best_of beam_width frequency_penalty length_penalty logit_bias min_new_tokens min_tokens num_beams "
    "num_return_sequences num_samples presence_penalty stop_token_ids typical_p use_beam_search".split()
)


def parse_settings(fields: dict[str, Any]) -> dict[str, Any]:
    """Parse the fields of a line that change its request. Raises ValueError if one is malformed or not known."""
    if unknown := sorted(fields.keys() & UNKNOWN):
        raise ValueError(f"the setting {unknown[0]} is not known: use {', '.join(SETTINGS)}")
    found = {}
    for name in fields.keys() & SETTINGS.keys():
        target, kind, read = SETTINGS[name]
        try:
            found[target] = read(fields[name])
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"{name} {fields[name]!r} is not {kind}") from None
    return dict(sorted(found.items()))


MEANT = {"[": "write each part of the array on its own line", "{": "write each object on one line"}


def parse_prompt(line: str) -> Any:
    """Parse a line of prompts as `parse_json` does; the error says how to fix what the line seems to be."""
    try:
        return parse_json(line)
    except UnicodeError:
        raise
    except ValueError as error:
        plain = r"for plain text pass --prompt_separator, such as '\n'"
        raise ValueError(f"{error}; {MEANT.get(line.strip()[:1], plain)}") from error


def parse(number: int, line: str) -> Record:
    """Parse a JSON line: a text, or an object with prompt or messages. Raises ValueError if it is neither."""
    value = parse_prompt(line)
    if isinstance(value, list):
        raise ValueError(f"a whole array; {MEANT['[']}")
    value = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(value, dict) or ("prompt" in value) == ("messages" in value):
        raise ValueError("neither a text nor an object with one of prompt and messages")
    said = value.get("prompt", value.get("messages"))
    if "prompt" in value and not isinstance(said, str):
        raise ValueError("the prompt is not a text")
    if not said:
        raise ValueError("the prompt is empty: pass some text")
    if "messages" in value:
        said = parse_messages(said, value.get("tools"))
    id = value.get("id", number)
    if isinstance(id, bool) or not isinstance(id, str | int):
        raise ValueError(f"id {json.dumps(id)} is neither a text nor a whole number")
    fields = {name: each for name, each in value.items() if name not in ("id", "prompt", "messages")}
    if taken := sorted(fields.keys() & RESERVED_FIELDS):
        raise ValueError(f"the field {taken[0]} is reserved for the output: rename it")
    return Record(number, id, said, fields, parse_settings(fields))


def parts_of(file: BinaryIO, separator: str | None) -> Iterator[bytes]:
    """Split a file into lines, or at a separator. A newline in the separator matches LF and CRLF. Raises ValueError if
    a part is longer than LONGEST_INPUT bytes, or all of a pipe."""
    between = re.compile(b"\n")
    if separator is not None:
        escaped = re.escape(separator.replace("\r\n", "\n").encode())
        between = re.compile(escaped.replace(b"\\\n", b"\r?\n"))
    held, size, ends = b"", 0, has_end(file)
    while block := file.read(max(BLOCK, min(len(held), LONGEST_INPUT - len(held)))):
        size += len(block)
        *parts, held = between.split(held + block)
        yield from parts
        if len(held) > LONGEST_INPUT:
            raise ValueError(f"a prompt is longer than {LONGEST_INPUT} bytes: pass shorter ones")
        if not ends and size > LONGEST_INPUT:
            raise ValueError(f"the piped prompts are longer than {LONGEST_INPUT} bytes: save them in a file")
    # The last line may lack its newline, which may also end a separator.
    *parts, last = between.split(held if held.endswith(b"\n") else held + b"\n")
    yield from (*parts, without_newline(last))


def has_end(file: BinaryIO) -> bool:
    """Return whether a file is a regular one, rather than a pipe or a device."""
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except OSError:  # in memory
        return False


class BadLines:
    """Invalid lines of the prompts: with --skip_bad a warning for each, otherwise one error."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.first, self.count = options, "", 0

    def add(self, error: str) -> None:
        self.count += 1
        if not self.options.skip_bad:
            self.first = self.first or error
        elif not self.options.quiet:
            print(f"warning: {self.options.prompts}, {error}: skipped", file=sys.stderr)

    def check(self) -> None:
        """Raise ValueError if there are any that may not be skipped."""
        if self.first:
            more = f" (and {self.count - 1} more)" if self.count > 1 else ""
            raise ValueError(f"{self.options.prompts}, {self.first}{more}: fix the line, or pass --skip_bad")


def read_records(file: BinaryIO, separator: str | None, bad: BadLines) -> Spool[Record]:
    """Read the prompts of a file. separator: between plain texts; None: the file is JSON lines. Empty lines, and empty
    texts between separators, are skipped; invalid lines go to `bad`."""
    found: Spool[Record] = Spool()
    keys = array("q")
    for number, part in enumerate(parts_of(file, separator), 1):
        if not part.strip():
            continue
        try:
            text = decode_text(part)
            record = parse(number, text) if separator is None else Record(number, number, text, {})
        except UnicodeError as error:
            bad.add(f"line {number}: not UTF-8 ({error.reason})")  # type: ignore[attr-defined]
        except ValueError as error:
            bad.add(f"line {number}: {error}")
        else:
            found.append(record)
            keys.append(hash_of(record.id))
    ordered = torch.tensor(keys).sort().values
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    return found if len(repeated) == 0 else without_repeats(found, frozenset(repeated.tolist()), bad)


def records_of(options: argparse.Namespace, piped: bytes | None) -> Spool[Record]:
    """Read the lines of --prompts. Raises ValueError if one is invalid."""
    bad = BadLines(options)
    file = open_prompts(options, piped)
    with nullcontext() if file is getattr(sys.stdin, "buffer", None) else file:
        records = read_records(file, options.prompt_separator, bad)
    bad.check()
    return records


def hash_of(id: Id) -> int:
    """Hash an id to 64 bits: a million ids take 8 MB."""
    return int.from_bytes(blake2b(json.dumps(id).encode(), digest_size=8).digest(), signed=True)


def without_repeats(records: Iterable[Record], hashes: frozenset[int], bad: BadLines) -> Spool[Record]:
    """Copy records, except those whose id an earlier one has. hashes: of the ids that may repeat."""
    found: Spool[Record] = Spool()
    lines: dict[str, int] = {}
    for record in records:
        key = json.dumps(record.id)
        if hash_of(record.id) in hashes and lines.setdefault(key, record.number) != record.number:
            bad.add(f"line {record.number}: id {key} is also that of line {lines[key]}: ids must be unique")
        else:
            found.append(record)
    return found


def encode(record: Record, spoken: ChatEncoder, plain: ChatEncoder, request: Request) -> Prompt:
    """Encode a prompt, messages with `spoken` and texts with `plain`. request: that of lines without settings. Raises
    ValueError if it cannot be encoded or has a setting out of range."""
    said = record.said
    tokens = plain.encode_turn(said) if isinstance(said, str) else spoken.encode_messages(said)
    return Prompt(record.id, tokens, record.request(request))


class Line(NamedTuple):
    """A prompt and the fields that are copied to its output."""

    prompt: Prompt
    fields: dict[str, Any]


class Prompts:
    """Encoded prompts, in the order of their lines. asked: how many of each length and request can be run."""

    def __init__(self) -> None:
        self.lines: Spool[Line] = Spool()
        self.asked: Asked = Counter()

    def append(self, line: Line, args: ModelArgs, request: Request) -> None:
        """args: of the model that they are for. request: that of prompts without their own."""
        self.lines.append(line)
        if rejection(args, request, line.prompt) is None:
            self.asked[len(line.prompt.tokens), line.prompt.request or request] += 1

    def __len__(self) -> int:
        return len(self.lines)

    def windows(self) -> Iterator[list[Line]]:
        """Yield the prompts in lists of WINDOW prompts, fewer if they have more than WINDOW_TOKENS tokens."""
        window: list[Line] = []
        tokens = 0
        for line in self.lines:
            size = len(line.prompt.tokens)
            if window and (len(window) == WINDOW or tokens + size > WINDOW_TOKENS):
                yield window
                window, tokens = [], 0
            window.append(line)
            tokens += size
        if window:
            yield window
