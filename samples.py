"""What comes of the rows: their tokens to text, where each of them ends, its pieces, and the ranking.

Nothing here knows of a model or a cache: what draws tokens (plain steps, drafts, another replica) is the caller's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizer import TextStream, Tokenizer, continuation_text


@dataclass
class Sample:
    """One continuation. logprobs: of each token under the untempered model. finish_reason: eos, stop or length.
    text: None where there is no tokenizer."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / max(1, len(self.logprobs))

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


def rank(samples: Sequence[Sample]) -> list[Ranked]:
    """Samples by mean log-probability, best first; those of identical text (or tokens, where there is none) as one."""
    groups: dict[object, list[Sample]] = {}
    for each in sorted(samples, key=lambda sample: -sample.mean_logprob):
        groups.setdefault(tuple(each.tokens) if each.text is None else each.text, []).append(each)
    return [Ranked(place, len(group), group[0]) for place, group in enumerate(groups.values(), 1)]


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
        self, index: int, ending: Ending, tokenizer: Tokenizer | None, history: Sequence[int], live: bool
    ) -> None:
        """history: the tokens that it continues. live: its text is needed as it comes, and not only at its end."""
        self.sample = Sample(index, text=None if tokenizer is None else "")
        self.ending, self.tokenizer, self.history = ending, tokenizer, history
        self.stream = TextStream(tokenizer, history) if tokenizer and (live or ending.stop) else None
        self.shown = 0  # characters that pieces have given

    def record(self, token: int, logprob: float) -> None:
        """Adds a token to an unfinished sample, and finishes it where its end is reached."""
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

    def piece(self, before: int) -> Piece:
        """What is new since the sample had `before` tokens. What may begin a stop string is held back."""
        sample, text = self.sample, self.sample.text or ""
        end = len(text) if sample.finish_reason is not None else max(self.shown, len(text) - self.ending.held)
        shown, self.shown = self.shown, end
        return Piece(sample.index, text[shown:end], tuple(sample.tokens[before:]), sample.finish_reason)
