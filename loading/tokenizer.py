"""Tokenizers: SentencePiece, tiktoken or tokenizer.json behind one interface, chosen by file content.

User text is only text: the name of a special token in it ("<s>", "<|eot_id|>") is never encoded as that token.
"""

import base64
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self

from loading.files import read_text

SPACE = re.compile(r"\s*")


@dataclass(frozen=True)
class AddedToken:
    """Added token, matched in text by its name. special: a control token, not text. The other flags are those of the
    tokenizers library: it absorbs white space before (lstrip) or after it (rstrip), or matches only if no word
    character is adjacent (single_word)."""

    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


def merge(own: Mapping[str, AddedToken], metadata: Mapping[str, Any]) -> dict[str, AddedToken]:
    """Merge a tokenizer's own tokens with its metadata's; its own control tokens and those named there are special."""
    given: dict[str, AddedToken] = metadata["added"]
    control = {name for name, token in own.items() if token.special} | metadata["named"]
    return {**own} | {name: replace(token, special=token.special or name in control) for name, token in given.items()}


def added_by(backend: Any, named: Iterable[str]) -> dict[str, AddedToken]:
    """Added tokens of a tokenizers-library backend, after making the `named` ones control tokens."""
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens([known.get(name, name) for name in named if backend.token_to_id(name) is not None])
    found = backend.get_added_tokens_decoder().items()
    return {t.content: AddedToken(id, t.special, t.lstrip, t.rstrip, t.single_word) for id, t in found}


class Names:
    """Splits text at token names, as the tokenizers library does."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self.tokens = tokens
        longest_first = sorted(map(re.escape, tokens), key=len, reverse=True)
        self.pattern = re.compile("|".join(longest_first) or "(?!)")

    @classmethod
    def of_control(cls, added: Mapping[str, AddedToken]) -> Self:
        """Select the control tokens. A name of one character is left out: it is ordinary text too."""
        return cls({name: token for name, token in added.items() if token.special and len(name) > 1})

    def cut(self, text: str) -> list[str]:
        """Split into text, name, text, name, ..., text."""
        parts, begin = [], 0
        for found in self.pattern.finditer(text):
            name, start, stop = found[0], *found.span()
            token = self.tokens[name]
            if token.single_word and re.search(r"\w", text[max(0, start - 1) : start] + text[stop : stop + 1]):
                continue
            before = text[begin:start]
            parts += [before.rstrip() if token.lstrip else before, name]
            space = SPACE.match(text, stop)
            begin = space.end() if space and token.rstrip else stop
        return [*parts, text[begin:]]

    def encode(self, text: str, encode: Callable[[str], list[int]], prefixes_all: bool) -> list[int]:
        """Encode text with names as tokens. prefixes_all: encode each part between them like a prompt, which may get a
        prefix space; otherwise only the first part."""
        ids: list[int] = []
        for index, part in enumerate(self.cut(text)):
            if index % 2:
                ids.append(self.tokens[part].id)
            else:
                ids += encode(part) if prefixes_all or index == 0 else continued(encode, part)
        return ids


def inside(names: Iterable[str]) -> re.Pattern[str]:
    """Pattern that matches after the first character of each name; text split there contains no whole name."""
    return re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names) or "(?!)")


BARRIER = "\ue000"  # no token spans this character and what follows it


def continued(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Encode text that follows other text, without the space that SentencePiece prepends to a prompt."""
    before, ids = encode(BARRIER), encode(BARRIER + text)
    return ids[len(before) :] if ids[: len(before)] == before else encode(text)


def encode_parts(encode: Callable[[str], list[int]], parts: Sequence[str]) -> list[int]:
    """Encode the parts of a split text, so that no token spans two parts."""
    return encode(parts[0]) + [id for part in parts[1:] for id in continued(encode, part)]


class ByteTokens:
    """Tokens of the 256 bytes, which encode characters missing from the vocabulary."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids, self.values = ids, {id: byte for byte, id in enumerate(ids)}

    def mended(self, ids: Sequence[int]) -> list[int]:
        """Replace invalid UTF-8 bytes by U+FFFD. The tokenizers library would replace the whole run of bytes, so that
        the text of a token would depend on the tokens after it."""
        found: list[int] = []
        for is_byte, run in groupby(ids, self.values.__contains__):
            if is_byte:
                text = bytes(map(self.values.__getitem__, run)).decode("utf-8", "replace")
                run = map(self.ids.__getitem__, text.encode())
            found += run
        return found


def as_name(token: str | dict[str, Any] | None) -> str | None:
    return token if token is None or isinstance(token, str) else token["content"]


def named(entries: dict[str, Any]) -> set[str]:
    """Names of the control tokens in a metadata file: bos_token etc., but not unk_token."""
    found = [value for key, value in entries.items() if key.endswith("_token") and key != "unk_token"]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = entries.get(key) or []
        found += more.values() if isinstance(more, dict) else more
    return {name for token in found if isinstance(token, str | dict) and (name := as_name(token))}


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read a tokenizer's metadata, with bos_token and eos_token as names; tokenizer_config.json overrides
    special_tokens_map.json.

    added: added tokens by name; those of added_tokens.json, which has no flags, are control tokens unless
    tokenizer_config.json defines them. named: names of control tokens. Raises ValueError naming an unreadable file.
    """
    added: dict[str, AddedToken] = {}
    found: dict[str, Any] = {"added": added, "named": set()}
    flags = ("special", "lstrip", "rstrip", "single_word")
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        try:
            entries = json.loads(read_text(path)) if path.is_file() else {}
            if name == "added_tokens.json":
                added |= {token: AddedToken(int(id)) for token, id in entries.items() if token}
                continue
            for id, token in entries.pop("added_tokens_decoder", {}).items():
                if token["content"]:
                    added[token["content"]] = AddedToken(int(id), **{flag: bool(token.get(flag)) for flag in flags})
            found["named"] |= named(entries)
            found |= entries | {key: as_name(entries[key]) for key in ("bos_token", "eos_token") if key in entries}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""  # messages of other types do not help
            raise ValueError(f"{path} is invalid{why}: download it again") from error
    return found


LONG_CALL = 1 << 17  # characters that a tokenizer library encodes in some 0.1 s


class Guarded:
    """Wrapper of a Rust library's object: any failure but ValueError becomes a ValueError naming the file.

    Such a library may panic: that raises no Exception, and prints lines to stderr. A command drops these lines
    (cli/system.py); in a user's own program, which owns stderr, they stay.
    """

    def __init__(self, path: Path, make: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.path = path
        self.made = self.call(make, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return partial(self.call, getattr(vars(self).get("made"), name))  # missing during unpickling

    def call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            with getattr(sys.stderr, "aside", nullcontext)():
                return function(*arguments, **options)
        except (ValueError, KeyboardInterrupt, MemoryError):
            raise
        except BaseException as error:
            raise ValueError(f"the tokenizer library failed on {self.path} ({error}): download it again") from error


def interruptible(function: Callable[..., Any], text: str, **options: Any) -> Any:
    """Call a library that blocks Ctrl-C; a long text runs in a thread, which an interrupt abandons."""
    if len(text) < LONG_CALL:
        return function(text, **options)
    from concurrent.futures import Future
    from threading import Thread

    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(function(text, **options))
        except BaseException as error:  # a panic is not an Exception
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future.result()


class Tokenizer(Protocol):
    """Interface of a tokenizer. bos_id: prepended to a prompt, or None. eos_ids: ids that it knows to end a text.

    specials: control tokens by name; they come from a chat template, never from text, and decode to nothing. names:
    splits a template's output at them.
    """

    bos_id: int | None
    eos_ids: frozenset[int]
    vocab_size: int
    specials: dict[str, int]
    names: Names

    def encode(self, text: str) -> list[int]:
        """Encode text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids; special tokens are dropped, invalid UTF-8 bytes become U+FFFD."""


class ControlTokens:
    """Control tokens of a tokenizer. In user text their names are ordinary text, although the library may match them:
    in some models they are pieces, or entries of the vocabulary."""

    def __init__(self, added: Mapping[str, AddedToken], encode: Callable[[str], list[int]]) -> None:
        """encode: the library's."""
        self.specials = {name: token.id for name, token in added.items() if token.special}
        self.names, self.control = Names.of_control(added), frozenset(self.specials.values())
        self.cuts = inside(name for name, token in self.names.tokens.items() if token.id in encode(name))


class SentencePieceTokenizer(ControlTokens):
    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.processor = processor = SentencePieceProcessor(model_file=str(path))
        self.pieces = processor.vocab_size()
        names = [processor.id_to_piece(id) for id in range(self.pieces) if processor.is_control(id)]
        own = {name: AddedToken(processor.piece_to_id(name)) for name in (*names, *metadata["named"])}
        added = merge({name: token for name, token in own.items() if processor.id_to_piece(token.id) == name}, metadata)
        super().__init__(added, processor.encode)
        # Gemma's added tokens have no flags and are pieces that the processor finds itself.
        texts = {name: token for name, token in added.items() if not token.special}
        found = {name for name, t in texts.items() if t == AddedToken(t.id, False) and t.id in processor.encode(name)}
        self.texts = Names({name: token for name, token in texts.items() if name not in found})
        self.spelled = {token.id: name for name, token in self.texts.tokens.items()}
        self.vocab_size = max([self.pieces, *(1 + token.id for token in added.values())])
        self.prefixes_all = metadata.get("legacy") is not False
        bos, eos = processor.bos_id(), self.specials.get(metadata.get("eos_token") or "", -1)
        self.bos_id = bos if bos >= 0 and metadata.get("add_bos_token") is not False else None
        self.eos_ids = frozenset(id for id in (processor.eos_id(), eos) if id >= 0)

    def encode(self, text: str) -> list[int]:
        return self.texts.encode(text, self.encode_words, self.prefixes_all)

    def encode_words(self, text: str) -> list[int]:
        return encode_parts(partial(interruptible, self.processor.encode), self.cuts.split(text))

    def decode(self, ids: Sequence[int]) -> str:
        # Models with a padded vocabulary may give ids beyond the pieces.
        known = [id for id in ids if (id < self.pieces or id in self.spelled) and id not in self.control]
        if self.spelled.keys().isdisjoint(known):
            return self.processor.decode(known)
        # Given strings, the processor decodes those that are not pieces as text.
        return self.processor.decode([self.spelled.get(id) or self.processor.id_to_piece(id) for id in known])


# The Llama 3 vocabulary file has only the merges; the split pattern and the 256 special tokens after the merges are
# part of the format (https://github.com/meta-llama/llama-models, llama3 tokenizer).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = dict(begin_of_text=0, end_of_text=1, start_header_id=6, end_header_id=7, eom_id=8, eot_id=9)
LLAMA3_LONGEST = 400_000  # characters; Meta's tokenizer splits there too: a million spaces would overflow a stack


class TiktokenTokenizer:
    def __init__(self, path: Path) -> None:
        from tiktoken import Encoding

        lines = filter(None, path.read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        self.base = base = len(ranks)
        if sorted(ranks.values()) != list(range(base)) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
            raise ValueError("it is truncated or damaged: a byte is missing, or the ranks are not consecutive")
        self.specials = {f"<|{name}|>": base + offset for name, offset in LLAMA3_SPECIALS.items()}
        self.names = Names.of_control({name: AddedToken(id) for name, id in self.specials.items()})
        parts = {"pat_str": LLAMA3_PATTERN, "mergeable_ranks": ranks, "special_tokens": self.specials}
        self.encoding = Guarded(path, Encoding, "llama3", **parts)
        self.bos_id: int | None = self.specials["<|begin_of_text|>"]
        self.eos_ids = frozenset(self.specials[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
        self.vocab_size = base + 256

    def encode(self, text: str) -> list[int]:
        parts = (text[first : first + LLAMA3_LONGEST] for first in range(0, len(text), LLAMA3_LONGEST))
        return [id for part in parts for id in self.encoding.encode_ordinary(part)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([id for id in ids if id < self.base])


class JSONTokenizer(ControlTokens):
    """tokenizer.json of the tokenizers library.

    BOS is the token its post-processor prepends, as in transformers 5; else, as in transformers 4, the bos_token of a
    tokenizer_config.json with `add_bos_token: true`.
    """

    EOS_NAMES = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|endoftext|>", "<|im_end|>", "<end_of_turn>")

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self.backend = backend = Guarded(path, Backend.from_str, read_text(path))
        backend.no_truncation()  # the file may enable both
        backend.no_padding()
        bos, eos = metadata.get("bos_token"), metadata.get("eos_token")
        added = added_by(backend, metadata["named"])
        backend.made.encode_special_tokens = True  # their names, as plain text
        super().__init__(added, self.encode_words)
        begun = backend.encode(".")
        first = begun.ids[0] if begun.special_tokens_mask[:1] == [1] else None
        self.bos_id = self.specials.get(bos or "") if first is None and metadata.get("add_bos_token") else first
        self.eos_ids = frozenset(self.specials[name] for name in (*self.EOS_NAMES, eos) if name in self.specials)
        self.vocab_size = backend.get_vocab_size()
        spelled = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.bytes = ByteTokens(spelled) if None not in spelled and backend.decode([spelled[10]]) == "\n" else None

    def encode(self, text: str) -> list[int]:
        return encode_parts(self.encode_words, self.cuts.split(text))

    def encode_words(self, text: str) -> list[int]:
        made = self.backend.made

        def encode(text: str, **options: Any) -> Any:
            # For a long text, so that Ctrl-C can end it, the method that releases the GIL; it is not fork-safe.
            return (
                made.encode(text, **options) if len(text) < LONG_CALL else made.encode_batch_fast([text], **options)[0]
            )

        return self.backend.call(interruptible, encode, text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        known = [id for id in ids if id not in self.control]
        return self.backend.decode(self.bytes.mended(known) if self.bytes else known)


def is_tiktoken(path: Path) -> bool:
    """Return whether a file has lines of `base64 rank`; a SentencePiece model is a binary protobuf."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2}\s+\d+\s*", file.readline(1024)) is not None


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load a checkpoint's tokenizer: tokenizer.json first, as in transformers, since a tokenizer.model beside it may be
    the base model's; else tokenizer.model (SentencePiece or tiktoken).

    Raises FileNotFoundError if there is neither, ValueError if a file is invalid.
    """
    metadata = read_metadata(folder)
    for path in filter(Path.is_file, (folder / "tokenizer.json", folder / "tokenizer.model")):
        try:
            if path.suffix == ".json":
                return JSONTokenizer(path, metadata)
            return TiktokenTokenizer(path) if is_tiktoken(path) else SentencePieceTokenizer(path, metadata)
        except Exception as error:  # each library raises its own types, tokenizers bare Exception
            why = error.__cause__ or error  # for a panic, the library's message
            raise ValueError(f"{path} is not a valid tokenizer ({why}): download it again") from error
    raise FileNotFoundError(f"no tokenizer.model or tokenizer.json found in {folder}: put the model's tokenizer there")
