"""Rows and samples: detokenising, stop conditions, streaming, ranking.

Tokens are sampled elsewhere: by plain steps, with drafts, or on another replica.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Self

import torch

from engine.request import Request
from loading.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what invalid or incomplete UTF-8 decodes to


@dataclass
class Sample:
    """One continuation and its log-probabilities. logprobs: per token, from the raw logits. finish_reason: eos, stop,
    length, or interrupted by the user; None: unfinished. text: None without a tokenizer. seed: of the request."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None
    seed: int | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / max(1, len(self.logprobs))

    @property
    def is_cut(self) -> bool:
        """Whether it was cut off instead of ending by itself."""
        return self.finish_reason in ("length", "interrupted", None)

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without the final EOS."""
        return self.tokens[:-1] if self.finish_reason == "eos" else self.tokens


@dataclass(frozen=True)
class Piece:
    """Streaming chunk: a sample's new text and tokens. finish_reason: None while generating. prompt: its id in a
    batch."""

    sample: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    prompt: str | int = 0


@dataclass(frozen=True)
class Ranked:
    """One distinct text of a ranking. rank: 1 is best. count: samples with that text. sample: the most likely of them;
    of samples with equal tokens the lowest index, since rounding may separate their log-probabilities."""

    rank: int
    count: int
    sample: Sample


def rank(samples: Sequence[Sample], order: str = "ended") -> list[Ranked]:
    """Rank samples by mean log-probability, best first, merging those of identical text (or tokens, without text).

    order: "ended" puts samples that ended by themselves before those cut off; "mean" makes no difference between them.
    """
    groups: dict[object, list[Sample]] = {}
    for each in sorted(samples, key=lambda sample: (order == "ended" and sample.is_cut, -sample.mean_logprob)):
        groups.setdefault(tuple(each.tokens) if each.text is None else each.text, []).append(each)
    ranked = []
    for place, group in enumerate(groups.values(), 1):
        equal = [each for each in group if each.tokens == group[0].tokens]
        ranked.append(Ranked(place, len(group), min(equal, key=lambda each: each.index)))
    return ranked


class TextStream:
    """Streaming detokeniser of one row. A character that spans tokens is held back until it is complete.

    A tokenizer may decode a token differently at the start of a text (SentencePiece drops a leading space), so a few
    preceding tokens are decoded too, and their text is stripped again.
    """

    CONTEXT = 8  # tokens; more than any character spans
    HELD = 3  # trailing U+FFFD that may still become a character, which has at most four bytes

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.window = list(context[-8 * self.CONTEXT :])
        self.text = tokenizer.decode(self.window)
        self.given = len(self.text)  # characters of it already returned

    def push(self, tokens: Iterable[int]) -> str:
        """Add tokens and return the text that they complete; empty while a character is incomplete."""
        tokens = list(tokens)
        window = [*self.window, *tokens]
        text, given = self.tokenizer.decode(window), self.given
        if text == self.text and not self.tokenizer.decode([*tokens, *tokens]):
            return ""  # control tokens, not kept; decoded twice, since a leading space may be dropped
        if not text.startswith(self.text[:given]):  # the context ended within a character
            given = len(commonprefix([text, self.text[:given]]))
        end = max(given, len(text.rstrip(REPLACEMENT)), len(text) - self.HELD)
        self.window, self.text, self.given = window, text, end
        if len(window) > 4 * self.CONTEXT:
            self.shorten()
        return text[given:end]

    def shorten(self) -> None:
        """Drop all but the last tokens, cutting where these decode to the same text alone, so not inside a
        character."""
        for size in range(self.CONTEXT, self.CONTEXT + 4):
            text = self.tokenizer.decode(self.window[-size:])
            if len(text) > len(self.text) - self.given and self.text.endswith(text):
                self.given -= len(self.text) - len(text)
                self.window, self.text = self.window[-size:], text
                break

    def flush(self) -> str:
        """Return what is still held back at the end: bytes that never became a character, as U+FFFD."""
        return self.text[self.given :]


def continuation_text(tokenizer: Tokenizer, context: Sequence[int], tokens: Sequence[int]) -> str:
    """Decode tokens to their text as a continuation of the context."""
    stream = TextStream(tokenizer, context)
    return stream.push(tokens) + stream.flush()


def check_finite(logprob: float) -> None:
    """Raise FloatingPointError if a log-probability shows that its logits hold nan or infinity. Checked on the host,
    which reads the number anyway: no extra sync."""
    if not math.isfinite(logprob):
        raise FloatingPointError("the logits are not finite: damaged weights, or too large ones for this dtype")


def not_finite(weights: object, dtype: torch.dtype, error: FloatingPointError) -> ValueError:
    """Convert `check_finite`'s error to one that names the weights, their dtype and what may help."""
    where = f"{weights} in {str(dtype).removeprefix('torch.')}"
    return ValueError(f"{where}: {error}: pass --dtype bfloat16 or float32, or download the model again")


@dataclass(frozen=True)
class StopConditions:
    """Stop conditions: an EOS token, a stop string in the text, a length in tokens. names: of the control tokens, which
    decode to no text; filled if a stop string contains one."""

    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    length: int
    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, eos_ids: frozenset[int], tokenizer: Tokenizer | None) -> Self:
        """Build from a request. eos_ids: used if the request gives none. A stop string that is a control token's name
        adds that token to the EOS ids. Raises ValueError if there are stop strings but no tokenizer."""
        ends = eos_ids if request.eos_ids is None else request.eos_ids
        if not request.stop:
            return cls(ends, (), request.max_new_tokens)
        if tokenizer is None:
            raise ValueError(f"stop strings {request.stop} need a tokenizer")
        specials = tokenizer.specials
        named = any(name in stop for name in specials for stop in request.stop)
        names = {id: name for name, id in specials.items() if named}
        ends |= {specials[stop] for stop in request.stop if stop in specials}
        return cls(ends, request.stop, request.max_new_tokens, names)

    @property
    def held(self) -> int:
        """Characters to hold back at the end of a text, since they may begin a stop string."""
        return max(map(len, self.stop), default=1) - 1


class Row:
    """A sample being generated."""

    def __init__(
        self,
        index: int,
        ending: StopConditions,
        tokenizer: Tokenizer | None,
        history: Sequence[int],
        live: bool,
        seed: int | None = None,
    ) -> None:
        """history: the tokens that it continues. live: its text is streamed, not only needed at its end."""
        self.sample = Sample(index, text=None if tokenizer is None else "", seed=seed)
        self.ending, self.tokenizer, self.history = ending, tokenizer, history
        self.stream = TextStream(tokenizer, history) if tokenizer and (live or ending.stop) else None
        self.shown = 0  # characters streamed so far
        self.searched = ""  # for stop strings: the text with the names of control tokens
        self.named: list[tuple[int, int]] = []  # start and length of each such name

    def record(self, token: int, logprob: float) -> None:
        """Append a token to an unfinished sample, and finish the sample if a stop condition is met. Raises
        FloatingPointError if the logits were not finite."""
        check_finite(logprob)
        sample, stream = self.sample, self.stream
        sample.tokens.append(token)
        sample.logprobs.append(logprob)
        if token in self.ending.eos_ids:
            sample.finish_reason = "eos"
        elif len(sample.tokens) == self.ending.length:
            sample.finish_reason = "length"
        if stream is None or sample.text is None:
            if self.tokenizer and sample.finish_reason is not None:
                sample.text = continuation_text(self.tokenizer, self.history, sample.text_tokens)
            return
        piece = "" if sample.finish_reason == "eos" else stream.push([token])
        if sample.finish_reason is not None:
            piece += stream.flush()
        # A stop string may begin in earlier text.
        overlap = max(0, len(self.searched) - self.ending.held)
        sample.text += piece
        self.searched += piece
        if sample.finish_reason != "eos" and token in self.ending.names:
            name = self.ending.names[token]
            self.named.append((len(self.searched), len(name)))
            self.searched += name
        ends = [at for stop in self.ending.stop if (at := self.searched.find(stop, overlap)) >= 0]
        if ends:
            end = min(ends)
            end -= sum(min(length, end - at) for at, length in self.named if at < end)
            sample.text, sample.finish_reason = sample.text[:end], "stop"

    def cut(self) -> Sample:
        """Finish the sample as interrupted, if unfinished, and return it. Ctrl-C may have come within `record`."""
        sample = self.sample
        if sample.finish_reason is None:
            del sample.tokens[len(sample.logprobs) :]
            sample.finish_reason = "interrupted"
            if self.tokenizer:
                sample.text = continuation_text(self.tokenizer, self.history, sample.tokens)
        return sample

    def piece(self, before: int, prompt: str | int = 0) -> Piece:
        """Return what is new since the sample had `before` tokens. Text that may begin a stop string is held back."""
        sample, text = self.sample, self.sample.text or ""
        end = len(text) if sample.finish_reason is not None else max(self.shown, len(text) - self.ending.held)
        shown, self.shown = self.shown, end
        return Piece(sample.index, text[shown:end], tuple(sample.tokens[before:]), sample.finish_reason, prompt)
