"""What comes of a run's rows: their tokens to text, where each ends, pieces, the ranking.

Nothing here draws a token: how that is done (plain steps, drafts, another replica) is the caller's.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from os.path import commonprefix
from typing import Self

import torch

from engine.request import Request
from loading.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes that are not (yet) UTF-8 decode to


@dataclass
class Sample:
    """One continuation. logprobs: of each token under the untempered model. finish_reason: eos, stop or length, or
    interrupted, where the user stopped it. text: None where there is no tokenizer. seed: of the request."""

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
        """Whether it did not end by itself."""
        return self.finish_reason in ("length", "interrupted", None)

    @property
    def text_tokens(self) -> list[int]:
        """The tokens without that which ended them."""
        return self.tokens[:-1] if self.finish_reason == "eos" else self.tokens


@dataclass(frozen=True)
class Piece:
    """What has come of a sample since its last piece. finish_reason: None while it goes on."""

    sample: int
    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None


@dataclass(frozen=True)
class Ranked:
    """A sample's place (1 is best), and how many samples have its text; `sample` is the most likely of them, and of
    those of equal tokens the one of the lowest index, since rounding may tell them apart."""

    rank: int
    count: int
    sample: Sample


def rank(samples: Sequence[Sample], order: str = "ended") -> list[Ranked]:
    """Samples by mean log-probability, best first; those of identical text (or tokens, where there is none) as one.

    order: "ended" puts those that ended by themselves before those that their length cut; "mean" does not ask.
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
    """The text of one row, piece by piece as its tokens come. A character that spans tokens is held until it is whole.

    A tokenizer may decode a token differently at the start of a text (SentencePiece drops a leading space), so a few
    tokens of what came before are decoded along and their text is taken off again.
    """

    CONTEXT = 8  # tokens; more than any character spans
    HELD = 3  # U+FFFD at the end that may still become a character, which has at most four bytes

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.window = list(context[-8 * self.CONTEXT :])
        self.text = tokenizer.decode(self.window)
        self.given = len(self.text)  # characters

    def push(self, tokens: Iterable[int]) -> str:
        """The text that these further tokens complete; empty while a character is not whole."""
        tokens = list(tokens)
        window = [*self.window, *tokens]
        text, given = self.tokenizer.decode(window), self.given
        if text == self.text and not self.tokenizer.decode([*tokens, *tokens]):
            return ""  # control tokens, which need not be remembered; twice, since a first space may be dropped
        if not text.startswith(self.text[:given]):  # the context ended within a character
            given = len(commonprefix([text, self.text[:given]]))
        end = max(given, len(text.rstrip(REPLACEMENT)), len(text) - self.HELD)
        self.window, self.text, self.given = window, text, end
        if len(window) > 4 * self.CONTEXT:
            self.shorten()
        return text[given:end]

    def shorten(self) -> None:
        """Forgets all but the last tokens, from where their text is the same without those before: within a character
        it is not."""
        for size in range(self.CONTEXT, self.CONTEXT + 4):
            text = self.tokenizer.decode(self.window[-size:])
            if len(text) > len(self.text) - self.given and self.text.endswith(text):
                self.given -= len(self.text) - len(text)
                self.window, self.text = self.window[-size:], text
                break

    def flush(self) -> str:
        """What is still held at the end: bytes that never became a character, as U+FFFD."""
        return self.text[self.given :]


def continuation_text(tokenizer: Tokenizer, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text of tokens as they read after context."""
    stream = TextStream(tokenizer, context)
    return stream.push(tokens) + stream.flush()


def check_finite(logprob: float) -> None:
    """Raises FloatingPointError for a log-probability of logits that hold nan or infinity. The host asks, which reads
    the number anyhow: the device is not waited for."""
    if not math.isfinite(logprob):
        raise FloatingPointError("the logits are not finite: damaged weights, or too large ones for this dtype")


def not_finite(weights: object, dtype: torch.dtype, error: FloatingPointError) -> ValueError:
    """The error of `check_finite` with the file of the weights, and what may help."""
    where = f"{weights} in {str(dtype).removeprefix('torch.')}"
    return ValueError(f"{where}: {error}: give --dtype bfloat16 or float32, or fetch the model again")


@dataclass(frozen=True)
class Ending:
    """What ends a sample: one of these tokens, a stop string in its text, so many tokens. names: of control tokens,
    which have no text, where a stop string holds one."""

    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    length: int
    names: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, request: Request, eos_ids: frozenset[int], tokenizer: Tokenizer | None) -> Self:
        """Build from a request. eos_ids: used where it names none. A stop string that is the name of a control token
        is that token too. Raises ValueError where there is no tokenizer for stop strings."""
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
        """Characters at the end of a text that may turn out to begin a stop string."""
        return max(map(len, self.stop), default=1) - 1


class Row:
    """A sample while it is drawn."""

    def __init__(
        self,
        index: int,
        ending: Ending,
        tokenizer: Tokenizer | None,
        history: Sequence[int],
        live: bool,
        seed: int | None = None,
    ) -> None:
        """history: the tokens that it continues. live: its text is needed as it comes, and not only at its end."""
        self.sample = Sample(index, text=None if tokenizer is None else "", seed=seed)
        self.ending, self.tokenizer, self.history = ending, tokenizer, history
        self.stream = TextStream(tokenizer, history) if tokenizer and (live or ending.stop) else None
        self.shown = 0  # characters that pieces have given
        self.searched = ""  # for stop strings: the text, with the names of control tokens in it
        self.named: list[tuple[int, int]] = []  # where they begin there, and their lengths

    def record(self, token: int, logprob: float) -> None:
        """Adds a token to an unfinished sample, and finishes it where its end is reached. Raises FloatingPointError
        where its logits were not finite."""
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
        # A stop string may begin in text that came before this piece.
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
        """The sample as far as it has come, if it is unfinished: the user has stopped it, maybe within `record`."""
        sample = self.sample
        if sample.finish_reason is None:
            del sample.tokens[len(sample.logprobs) :]
            sample.finish_reason = "interrupted"
            if self.tokenizer:
                sample.text = continuation_text(self.tokenizer, self.history, sample.tokens)
        return sample

    def piece(self, before: int) -> Piece:
        """What is new since the sample had `before` tokens. What may begin a stop string is held back."""
        sample, text = self.sample, self.sample.text or ""
        end = len(text) if sample.finish_reason is not None else max(self.shown, len(text) - self.ending.held)
        shown, self.shown = self.shown, end
        return Piece(sample.index, text[shown:end], tuple(sample.tokens[before:]), sample.finish_reason)
