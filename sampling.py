"""Sampling: repetition penalty, filters, draw, and random numbers by (seed, sample, position, token).

This file depends on torch only, and can be copied into another repository.

Shapes: N samples (rows), S positions of each, K candidate tokens of a draw, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol, Self

import torch
from torch import Tensor

# Logits processed at a time: on a CPU what fits its cache, on a GPU a bound on memory.
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}

# Name of the drawing rule; a rule that draws other samples from the same seed needs another name.
RULE = "exponential race, Philox4x32-10"

NUMBERS_AT_ONCE = 1 << 18  # tokens per Philox call in PyTorch, which needs about 100 bytes for each

# Philox4x32-10's multipliers and key increments (Salmon et al. 2011, table 2), and the mask of a 32-bit word.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

NOTHING = torch.zeros(0, 0, dtype=torch.bool, device="cpu")  # mask of seen tokens: none


class Filters(Protocol):
    """Sampling parameters, as in request.Sampling. None: that filter is off."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_k(self) -> int | None: ...

    @property
    def top_p(self) -> float | None: ...

    @property
    def min_p(self) -> float | None: ...

    @property
    def repetition_penalty(self) -> float: ...


@dataclass(frozen=True)
class RowFilters:
    """Sampling parameters that differ between rows, each [N,1]; a filter that is off keeps every token. most: how many
    candidates to sort, the largest top_k; None: no row needs them sorted."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    most: int | None

    @classmethod
    def of(cls, rows: Sequence[Filters], vocabulary: int, device: torch.device) -> Self:
        """Collect the parameters of rows."""

        def column(values: Iterable[float | None], off: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([[off if value is None else value] for value in values], dtype=dtype, device=device)

        return cls(
            column((row.temperature for row in rows), 1.0),
            column((row.top_k for row in rows), vocabulary, torch.long),
            column((row.top_p for row in rows), float("inf"), torch.float64),
            column((row.min_p for row in rows), 0.0),
            column((row.repetition_penalty for row in rows), 1.0),
            sorted_candidates([row for row in rows if row.temperature != 0], vocabulary),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """Apply a change of rows to all parameters."""
        columns = self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty
        temperature, top_k, top_p, min_p, penalty = map(change, columns)
        return type(self)(temperature, top_k, top_p, min_p, penalty, self.most)


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Run Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).

    even [2,...]: words 0 and 2 of the counter, odd [2,...]: words 1 and 3, key [2,...]; int64 below 2^32, as are the
    four words returned in the same order. The 64-bit product is built from two of 48 bits, since a compiler may assume
    that signed integers do not overflow.
    """
    second = torch.arange(2, device=even.device).view(2, *[1] * (even.dim() - 1))
    multiplier = MULTIPLIERS[0] + second * (MULTIPLIERS[1] - MULTIPLIERS[0])
    increment = INCREMENTS[0] + second * (INCREMENTS[1] - INCREMENTS[0])
    high, low = multiplier >> 16, multiplier & 0xFFFF
    for _ in range(10):
        bottom = even * low
        top = even * high + (bottom >> 16)  # bits 16 and up of the product
        even = (top >> 16).flip(0) ^ odd ^ key
        odd = ((top & 0xFFFF) << 16 | bottom & 0xFFFF).flip(0)
        key = (key + increment) & WORD
    return even, odd


def uniform(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """Return the random number of each (seed, sample, position): uniform in [0,1), fp64 with 53 bits.

    The arguments are int64 and broadcast; seed has no more dimensions than the others. A number depends on nothing
    else, so a sample is the same for any N, batch, layout, device and number of new tokens.
    """
    sample, position = torch.broadcast_tensors(sample, position)
    key = torch.stack([seed & WORD, seed >> 32]).view(2, *[1] * (sample.dim() - seed.dim()), *seed.shape)
    even, odd = philox(torch.stack([sample & WORD, position & WORD]), torch.stack([sample >> 32, position >> 32]), key)
    return ((even[0] << 21) | (odd[0] >> 11)).double() * 2.0**-53


def token_uniforms(rows: Tensor, tokens: Tensor) -> Tensor:
    """Return the random numbers of tokens [N,K], given each row's number [N] from `uniform`: fp64 [N,K], also uniform.

    A row's 53 bits are the key, and the token the counter, of another Philox4x32-10. So a token's number depends
    neither on its rank nor on the other candidates, and two rows share their numbers with probability 2^-53.
    """
    keys = token_keys(rows)
    parts = tokens.split(max(1, NUMBERS_AT_ONCE // max(1, len(rows))), dim=1)
    return torch.cat([uniform(keys[:, None], part, part.new_zeros(())) for part in parts], 1)


def token_keys(rows: Tensor) -> Tensor:
    """Return the 53 bits of each row's number: fp64 [N] -> int64 [N]."""
    return (rows * 2.0**53).long()


class UniformBlocks:
    """`uniform`, computed for a block of positions of each row at a time: uncompiled, Philox is about 150 small
    operations, whether for one number or a thousand."""

    BLOCK = 32

    def __init__(self) -> None:
        self.samples, self.block, self.first = torch.empty(0), torch.empty(0), torch.empty(0)

    def __call__(self, seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """seed scalar or [N], sample [N], position [N] or [N,S], ascending -> numbers in the shape of position. While
        `sample` is the same tensor, the seed must not change."""
        where = position.view(len(sample), -1)  # [N,S]
        if sample is not self.samples or not self.hold(where):
            self.samples, self.first = sample, where[:, :1]
            ahead = torch.arange(max(self.BLOCK, where.shape[1]), device=position.device)
            self.block = uniform(seed.view(-1, 1), sample[:, None], self.first + ahead)  # [N,BLOCK]
        return self.block.gather(1, where - self.first).view_as(position)

    def hold(self, where: Tensor) -> bool:
        return bool(((where >= self.first) & (where < self.first + self.block.shape[1])).all())


def sorted_candidates(rows: Sequence[Filters], vocabulary: int) -> int | None:
    """Return how many candidates top_k and top_p need sorted; None: no row has either."""
    if all(row.top_k is None and row.top_p is None for row in rows):
        return None
    return max(row.top_k or vocabulary for row in rows)


def deciding(rows: Sequence[Filters]) -> int | None:
    """Return how many of the likeliest tokens decide the draws of all rows, with `candidates`; None: all of the
    vocabulary, as in a row without top_k, or with a repetition penalty, which changes the order."""
    if any(row.repetition_penalty != 1 or (row.temperature and row.top_k is None) for row in rows):
        return None
    return max((row.top_k or 1) if row.temperature else 1 for row in rows)


def likeliest(logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the `most` largest of logits [N,V], descending, as draw_rows takes them: fp32 [N,K], their token ids
    [N,K], and the log-sum-exp of all, fp32 [N,1]. The first is argmax's; of others that are equal any may be kept."""
    values, ids = logits.topk(min(most, logits.shape[-1]))
    first = logits.argmax(-1, keepdim=True)  # not always topk's first
    ids = torch.cat([first, ids.where(ids != first, ids[:, :1])[:, 1:]], 1)
    rows = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    return values.float(), ids, torch.cat([part.float().logsumexp(-1, keepdim=True) for part in logits.split(rows)])


def candidates(logits: Tensor, sampling: Filters | RowFilters) -> tuple[Tensor, Tensor | None]:
    """Return the distribution to draw from: probs [N,K] and their token ids [N,K].

    ids None: K is V and column i is token i. logits [N,V] fp32. Without top_k, top_p has to sort the whole vocabulary.
    """
    temperature, ids = sampling.temperature, None
    most = sampling.most if isinstance(sampling, RowFilters) else sorted_candidates([sampling], logits.shape[-1])
    if most is not None:
        logits, ids = logits.topk(min(most, logits.shape[-1]))  # descending [N,K]
    if isinstance(sampling, RowFilters):
        temperature = sampling.temperature.masked_fill(sampling.temperature == 0, 1)  # their argmax is taken instead
        if ids is not None:
            places = torch.arange(logits.shape[-1], device=logits.device)
            logits = logits.masked_fill(places >= sampling.top_k, float("-inf"))
    probs = (logits / temperature).softmax(-1)
    if ids is not None and sampling.top_p is not None:
        mass = probs.cumsum(-1, dtype=torch.float64)  # keep a token while the likelier ones sum to less than top_p
        probs = probs.masked_fill(mass - probs >= sampling.top_p * mass[:, -1:], 0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def draw(
    logits: Tensor,
    uniform: Tensor,
    sampling: Filters | RowFilters,
    seen: Tensor = NOTHING,
    names: Tensor | None = None,
    numbers: Callable[[Tensor, Tensor], Tensor] = token_uniforms,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run draw_rows in chunks of rows, so that their fp32 logits stay within LOGITS_AT_ONCE. names [V] or [N,V].

    Outputs are allocated first so that they do not fragment what each chunk frees.
    """
    rows = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    tokens, logprobs = (torch.empty_like(uniform, dtype=each) for each in (torch.long, torch.float32))
    names = None if names is None else names.expand(len(logits), -1)
    for part in (slice(first, first + rows) for first in range(0, len(logits), rows)):
        own = sampling.map(itemgetter(part)) if isinstance(sampling, RowFilters) else sampling
        ids, whole = (None if each is None else each[part] for each in (names, total))
        tokens[part], logprobs[part] = draw_rows(logits[part], uniform[part], seen[part], own, ids, numbers, whole)
    return tokens, logprobs


def draw_rows(
    logits: Tensor,
    uniform: Tensor,
    seen: Tensor,
    sampling: Filters | RowFilters,
    names: Tensor | None = None,
    numbers: Callable[[Tensor, Tensor], Tensor] = token_uniforms,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a token per row. logits [N,V], uniform [N] in [0,1), seen: tokens that each row already has, bool [N,V] or
    [N,0], names [N,V]: token id of each logit, None: its index, numbers: `token_uniforms` or a kernel that equals it,
    total [N,1]: log-sum-exp of the whole vocabulary, None: that of `logits` -> tokens [N], log-probabilities [N].

    The draw is a race: each candidate arrives after an exponential time of rate p, so candidate i is first with
    probability p_i, and rounding changes the winner only in near-ties. The log-probability is the model's own, before
    penalty, temperature and filters.
    """
    logits = logits.float()
    scores = penalised(logits, seen, sampling.repetition_penalty)
    if not isinstance(sampling, RowFilters) and sampling.temperature == 0:
        index = scores.argmax(-1, keepdim=True)  # [N,1]
    else:
        probs, ids = candidates(scores, sampling)
        index = exponential_race(probs, numbers(uniform, named(ids, names, probs)))
        index = index if ids is None else ids.gather(-1, index)
    if isinstance(sampling, RowFilters):
        index = torch.where(sampling.temperature == 0, scores.argmax(-1, keepdim=True), index)
    token = index if names is None else names.gather(-1, index)
    total = logits.logsumexp(-1, keepdim=True) if total is None else total
    return token[:, 0], (logits.gather(-1, index) - total)[:, 0]


def named(ids: Tensor | None, names: Tensor | None, probs: Tensor) -> Tensor:
    """Return the token ids [N,K] of the candidates; ids None: every logit is a candidate."""
    if ids is not None:
        return ids if names is None else names.gather(-1, ids)
    return torch.arange(probs.shape[1], device=probs.device).expand_as(probs) if names is None else names


def exponential_race(probs: Tensor, numbers: Tensor) -> Tensor:
    """Return the index [N,1] of the smallest -log(1 - u) / p. probs [N,K] fp32, numbers [N,K] fp64 (overwritten).

    Numbers are multiples of 2^-53, so a time is exact to 2^-53, and even a token of probability 1e-12 wins at its rate
    to within 1e-4. A time of 0 stands for [0,2^-53) and becomes its mean 2^-54, so a token of probability 0 never wins.
    With nan logits any valid index will do: their log-probability is not finite.
    """
    times = numbers.neg_().add_(1).log_().neg_().clamp_min_(2.0**-54)
    return torch.div(probs, times, out=times).argmax(-1, keepdim=True)


def seen_in(texts: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """Build the mask of the tokens that occur in each row's text: bool [N,V]; vocabulary 0: [N,0], nothing is noted."""
    seen = torch.zeros(len(texts), vocabulary, dtype=torch.bool, device=device)
    for row, text in enumerate(texts if vocabulary else ()):
        seen[row, torch.tensor(text, dtype=torch.long, device=device)] = True
    return seen


def add(seen: Tensor, tokens: Tensor) -> Tensor:
    """Add tokens [N,k] to the mask of seen tokens, in place."""
    return seen.scatter_(1, tokens, True) if seen.numel() else seen


def seen_prefixes(seen: Tensor, tokens: Tensor) -> Tensor:
    """Return the mask of seen tokens after each of the following tokens [N,S]: [N,S,V]."""
    several = seen[:, None].repeat(1, tokens.shape[1], 1)  # [N,S,V]
    for place in range(tokens.shape[1]):
        add(several[:, place], tokens[:, : place + 1])
    return several


def penalised(logits: Tensor, seen: Tensor, penalty: float | Tensor) -> Tensor:
    """Penalise tokens that already occur in a row, context included: logits [N,V] above 0 are divided by the penalty,
    others multiplied. seen: bool [N,V], so that a step keeps its shape; [N,0] if nothing is penalised.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, as transformers' RepetitionPenaltyLogitsProcessor.
    """
    if not seen.numel():
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
