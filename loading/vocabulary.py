"""Added tokens and their names in text, byte tokens, and the metadata files that define them."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Self

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
            raise ValueError(f"{path} is not what it must be{why}: fetch it again") from error
    return found
