"""Text to token ids and back: SentencePiece, tiktoken or tokenizer.json behind one interface, chosen by content.

Text that a user gives is text: the name of a special token inside it ("<s>", "<|eot_id|>") is never turned into one.
"""

import base64
import binascii
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


class Tokenizer(Protocol):
    """bos_id: prepended to a prompt, None if the model has none. eos_ids: ids that end a text, as far as it knows."""

    bos_id: int | None
    eos_ids: frozenset[int]
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Ids of the text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out, bytes that are not UTF-8 become U+FFFD."""


class SentencePieceTokenizer:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self.processor = SentencePieceProcessor(model_file=str(path))
        bos, eos = self.processor.bos_id(), self.processor.eos_id()
        self.bos_id = bos if bos >= 0 else None
        self.eos_ids = frozenset([eos] if eos >= 0 else [])
        self.vocab_size = self.processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        # Ids beyond the pieces come from models whose vocabulary is padded.
        return self.processor.decode([id for id in ids if id < self.vocab_size])


# The Llama 3 vocabulary file holds the merges alone; the split pattern and the 256 special tokens that follow the
# merges are part of the format (https://github.com/meta-llama/llama-models, llama3 tokenizer).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = {
    "<|begin_of_text|>": 0,
    "<|end_of_text|>": 1,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "<|eom_id|>": 8,
    "<|eot_id|>": 9,
    "<|python_tag|>": 10,
}


class TiktokenTokenizer:
    def __init__(self, path: Path) -> None:
        import tiktoken

        ranks = {}
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token)] = int(rank)
        base = len(ranks)
        self.specials = {name: base + offset for name, offset in LLAMA3_SPECIALS.items()}
        self.encoding = tiktoken.Encoding(
            "llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=self.specials
        )
        self.base = base
        self.bos_id = self.specials["<|begin_of_text|>"]
        self.eos_ids = frozenset(self.specials[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"))
        self.vocab_size = base + 256

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.encoding.decode([id for id in ids if id < self.base])


class JSONTokenizer:
    """tokenizer.json of the tokenizers library. The special tokens come from the names that families use."""

    BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>")
    EOS_NAMES = ("</s>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|endoftext|>", "<|im_end|>", "<end_of_turn>")

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.backend = Backend.from_file(str(path))
        self.backend.encode_special_tokens = True  # as plain text
        ids = self.backend.token_to_id
        self.bos_id = next((ids(name) for name in self.BOS_NAMES if ids(name) is not None), None)
        self.eos_ids = frozenset(ids(name) for name in self.EOS_NAMES if ids(name) is not None)
        self.vocab_size = self.backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)


def is_tiktoken(path: Path) -> bool:
    """Whether the file is lines of `base64 rank`; a SentencePiece model is a binary protobuf."""
    with path.open("rb") as file:
        fields = file.readline(1024).split()
    try:
        base64.b64decode(fields[0], validate=True)
        return len(fields) == 2 and fields[1].isdigit()
    except (IndexError, binascii.Error):
        return False


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.model (SentencePiece or tiktoken), else tokenizer.json.

    Raises FileNotFoundError where there is neither, ValueError where the file cannot be read as one.
    """
    for name in ("tokenizer.model", "tokenizer.json"):
        path = folder / name
        if not path.exists():
            continue
        try:
            if path.suffix == ".json":
                return JSONTokenizer(path)
            return TiktokenTokenizer(path) if is_tiktoken(path) else SentencePieceTokenizer(path)
        except Exception as error:  # each library raises its own kinds, tokenizers bare Exception
            raise ValueError(f"{path} is not a tokenizer that can be read: {error}") from error
    raise FileNotFoundError(f"no tokenizer.model or tokenizer.json in {folder}: put the model's tokenizer there")


class TextStream:
    """The text of one row, piece by piece as its tokens come. A character that spans tokens is held until it is whole.

    A tokenizer may decode a token differently at the start of a text (SentencePiece drops a leading space), so a few
    tokens of what came before are decoded along and their text is taken off again.
    """

    CONTEXT = 8  # tokens; more than any character spans

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.restart(list(context[-8 * self.CONTEXT :]))

    def restart(self, tokens: list[int]) -> None:
        """Forgets all but the last tokens, if their text is the same without those before: no run of bytes is cut."""
        text, tail = self.tokenizer.decode(tokens), self.tokenizer.decode(tokens[-self.CONTEXT :])
        self.window, self.delivered = (
            (tokens[-self.CONTEXT :], len(tail)) if text.endswith(tail) else (tokens, len(text))
        )

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these further tokens complete; empty while a character is not whole."""
        self.window.extend(tokens)
        text = self.tokenizer.decode(self.window)
        if text.endswith(REPLACEMENT):
            return ""
        piece = text[self.delivered :]
        self.restart(self.window)
        return piece

    def flush(self) -> str:
        """What is still held at the end: bytes that never became a character, as U+FFFD."""
        return self.tokenizer.decode(self.window)[self.delivered :]


def continuation_text(tokenizer: Tokenizer, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens as they read after context."""
    stream = TextStream(tokenizer, context)
    return stream.push(tokens) + stream.flush()
