"""Text to token ids and back: SentencePiece, tiktoken or tokenizer.json behind one interface, chosen by content.

Text that a user gives is text: the name of a special token inside it ("<s>", "<|eot_id|>") is never turned into one.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from system import Guarded


class Tokenizer(Protocol):
    """bos_id: prepended to a prompt, None if nothing is. eos_ids: ids that end a text, as far as it knows.

    specials: control tokens by name. They come from a chat template, never from text, and decode to nothing.
    """

    bos_id: int | None
    eos_ids: frozenset[int]
    vocab_size: int
    specials: dict[str, int]

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""


def as_name(token: str | dict[str, Any] | None) -> str | None:
    return token if token is None or isinstance(token, str) else token["content"]


def read_metadata(folder: Path) -> dict[str, Any]:
    """What stands beside a tokenizer: tokenizer_config.json over special_tokens_map.json, tokens by their names.

    specials: the control tokens that it adds to the tokenizer's own. Raises ValueError that names an unreadable file.
    """
    found: dict[str, Any] = {"specials": {}}
    for name in ("added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        try:
            entries = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            if name == "added_tokens.json":
                entries = {"specials": {token: int(id) for token, id in entries.items()}}
            for id, token in entries.pop("added_tokens_decoder", {}).items():
                found["specials"] |= {token["content"]: int(id)} if token.get("special") else {}
            found |= entries | {key: as_name(entries[key]) for key in ("bos_token", "eos_token") if key in entries}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            why = f" ({error})" if isinstance(error, ValueError) else ""  # in Python's own words it says nothing
            raise ValueError(f"{path} is not what it must be{why}: fetch it again") from error
    return found


def inside(names: Iterable[str]) -> re.Pattern[str]:
    """Matches behind the first character of each name. Text cut there holds none of them whole."""
    return re.compile("|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names) or "(?!)")


class SentencePieceTokenizer:
    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        from sentencepiece import SentencePieceProcessor

        self.processor = processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = processor.vocab_size()
        own = {processor.id_to_piece(id): id for id in range(self.vocab_size) if processor.is_control(id)}
        self.specials = own | metadata["specials"]
        self.control = frozenset(self.specials.values())
        bos, eos = processor.bos_id(), self.specials.get(metadata.get("eos_token"), -1)
        self.bos_id = bos if bos >= 0 and metadata.get("add_bos_token") is not False else None
        self.eos_ids = frozenset(id for id in (processor.eos_id(), eos) if id >= 0)
        # Gemma's control tokens are pieces that the processor finds in text.
        self.cuts = inside(name for name, id in self.specials.items() if id in processor.encode(name))

    def encode(self, text: str) -> list[int]:
        return [id for part in self.cuts.split(text) for id in self.processor.encode(part)]

    def decode(self, ids: Sequence[int]) -> str:
        # Ids beyond the pieces come from models whose vocabulary is padded.
        return self.processor.decode([id for id in ids if id < self.vocab_size and id not in self.control])


# The Llama 3 vocabulary file holds the merges alone; the split pattern and the 256 special tokens that follow the
# merges are part of the format (https://github.com/meta-llama/llama-models, llama3 tokenizer).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = dict(begin_of_text=0, end_of_text=1, start_header_id=6, end_header_id=7, eom_id=8, eot_id=9)
LLAMA3_LONGEST = 400_000  # characters; Meta's tokenizer cuts there too, and a million spaces would overflow a stack


class TiktokenTokenizer:
    def __init__(self, path: Path) -> None:
        from tiktoken import Encoding

        lines = filter(None, path.read_bytes().splitlines())
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        self.base = base = len(ranks)
        if sorted(ranks.values()) != list(range(base)) or not {bytes([byte]) for byte in range(256)} <= ranks.keys():
            raise ValueError("it is truncated or damaged: not every byte is there, or the ranks do not count up")
        self.specials = {f"<|{name}|>": base + offset for name, offset in LLAMA3_SPECIALS.items()}
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


class JSONTokenizer:
    """tokenizer.json of the tokenizers library.

    BOS is what its post-processor prepends, as in transformers 5; else, as in transformers 4, the bos_token of a
    tokenizer_config.json with `add_bos_token: true`.
    """

    EOS_NAMES = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|endoftext|>", "<|im_end|>", "<end_of_turn>")

    def __init__(self, path: Path, metadata: dict[str, Any]) -> None:
        from tokenizers import Tokenizer as Backend

        self.backend = backend = Guarded(path, Backend.from_file, str(path))
        backend.no_truncation()  # the file may ask for both
        backend.no_padding()
        bos, eos = metadata.get("bos_token"), metadata.get("eos_token")
        backend.add_special_tokens([name for name in (bos, eos) if name and backend.token_to_id(name) is not None])
        backend.made.encode_special_tokens = True  # as plain text
        self.specials = {token.content: id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        begun = backend.encode(".")
        first = begun.ids[0] if begun.special_tokens_mask[:1] == [1] else None
        self.bos_id = self.specials.get(bos or "") if first is None and metadata.get("add_bos_token") else first
        self.eos_ids = frozenset(self.specials[name] for name in (*self.EOS_NAMES, eos) if name in self.specials)
        self.vocab_size = backend.get_vocab_size()
        # Some models of that library hold the names as words.
        self.cuts = inside([])
        self.cuts = inside([name for name, id in self.specials.items() if id in self.encode(name)])

    def encode(self, text: str) -> list[int]:
        return [id for part in self.cuts.split(text) for id in self.backend.encode(part, add_special_tokens=False).ids]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


def is_tiktoken(path: Path) -> bool:
    """Whether the file is lines of `base64 rank`; a SentencePiece model is a binary protobuf."""
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+={0,2}\s+\d+\s*", file.readline(1024)) is not None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.model (SentencePiece or tiktoken), else tokenizer.json.

    Raises FileNotFoundError where there is neither, ValueError where a file cannot be read as what it must be.
    """
    metadata = read_metadata(folder)
    for path in filter(Path.is_file, (folder / "tokenizer.model", folder / "tokenizer.json")):
        try:
            if path.suffix == ".json":
                return JSONTokenizer(path, metadata)
            return TiktokenTokenizer(path) if is_tiktoken(path) else SentencePieceTokenizer(path, metadata)
        except Exception as error:  # each library raises its own kinds, tokenizers bare Exception
            why = error.__cause__ or error  # of a panic the library's own words
            raise ValueError(f"{path} is not a tokenizer that can be read: {why}: fetch it again") from error
    raise FileNotFoundError(f"no tokenizer.model or tokenizer.json in {folder}: put the model's tokenizer there")
