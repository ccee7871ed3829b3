"""What comes of a run's rows: their tokens to text, where each ends, pieces, the ranking.

Nothing here draws a token: how that is done (plain steps, drafts, another replica) is the caller's.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from scoring import check_finite
from tokenizer import Tokenizer

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
    """A sample's place (1 is best), and how many samples have its text; `sample` is the most likely of them."""

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
    return [Ranked(place, len(group), group[0]) for place, group in enumerate(groups.values(), 1)]


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


@dataclass(frozen=True)
class Ending:
    """What ends a sample: one of these tokens, a stop string in its text, so many tokens."""

    eos_ids: frozenset[int]
    stop: tuple[str, ...]
    length: int

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
        overlap = max(0, len(sample.text) - self.ending.held)
        sample.text += piece
        ends = [at for stop in self.ending.stop if (at := sample.text.find(stop, overlap)) >= 0]
        if ends:
            sample.text, sample.finish_reason = sample.text[: min(ends)], "stop"

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
