"""From logits to tokens: penalty, filters, the draw, and random numbers of (seed, sample, position, token).

This file needs torch and nothing else. Copy it into another repository and use it there.

Shapes: N samples (rows), S positions of each, K candidate tokens of a draw, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

# Logits worked on at a time: what stays in a CPU's cache; on a GPU, what bounds memory.
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}

# Names the rule of the draw: another one, by which a seed draws other samples, takes another name.
RULE = "exponential race, Philox4x32-10"

NUMBERS_AT_ONCE = 1 << 18  # of tokens, made in PyTorch: of each, Philox holds some 100 bytes

# Philox4x32-10's multipliers and key increments (Salmon et al. 2011, table 2), and a word of 32 bits.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF

NOTHING = torch.zeros(0, 0, dtype=torch.bool, device="cpu")  # no row has seen a token


class Filters(Protocol):
    """How a token is drawn, as request.Sampling has it. None: that filter is off."""

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


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3).

    even [2,...]: words 0 and 2 of the counter, odd [2,...]: words 1 and 3, key [2,...]; int64 below 2^32, and so are
    the four words that it returns in the same order. The 64-bit product is made of two of 48 bits, since a compiler may
    take it that signed integers do not overflow.
    """
    second = torch.arange(2, device=even.device).view(2, *[1] * (even.dim() - 1))
    multiplier = MULTIPLIERS[0] + second * (MULTIPLIERS[1] - MULTIPLIERS[0])
    increment = INCREMENTS[0] + second * (INCREMENTS[1] - INCREMENTS[0])
    high, low = multiplier >> 16, multiplier & 0xFFFF
    for _ in range(10):
        bottom = even * low
        top = even * high + (bottom >> 16)  # the product's bits from 16 on
        even = (top >> 16).flip(0) ^ odd ^ key
        odd = ((top & 0xFFFF) << 16 | bottom & 0xFFFF).flip(0)
        key = (key + increment) & WORD
    return even, odd


def uniform(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """The random number of each (seed, sample, position): uniform in [0,1), fp64 of 53 bits.

    int64, broadcast against each other; seed has no more dimensions than the others. A number depends on nothing else,
    so a sample is the same for every N, wave, layout and device, and for every length that it is drawn to.
    """
    sample, position = torch.broadcast_tensors(sample, position)
    key = torch.stack([seed & WORD, seed >> 32]).view(2, *[1] * (sample.dim() - seed.dim()), *seed.shape)
    even, odd = philox(torch.stack([sample & WORD, position & WORD]), torch.stack([sample >> 32, position >> 32]), key)
    return ((even[0] << 21) | (odd[0] >> 11)).double() * 2.0**-53


def of_tokens(rows: Tensor, tokens: Tensor) -> Tensor:
    """The random numbers of tokens [N,K] in rows of the numbers [N], which `uniform` gives: fp64 [N,K], as those are.

    A row's 53 bits are the key, and the token the counter, of another Philox4x32-10. So a token's number depends
    neither on its rank nor on which others are candidates, and two rows share theirs with odds of 2^-53.
    """
    keys = token_keys(rows)
    parts = tokens.split(max(1, NUMBERS_AT_ONCE // max(1, len(rows))), dim=1)
    return torch.cat([uniform(keys[:, None], part, part.new_zeros(())) for part in parts], 1)


def token_keys(rows: Tensor) -> Tensor:
    """The 53 bits of each row's number: fp64 [N] -> int64 [N]."""
    return (rows * 2.0**53).long()


class UniformBlocks:
    """`uniform`, made for a block of positions of each row at a time: uncompiled, Philox is some 150 small operations,
    for one number as for a thousand."""

    BLOCK = 32

    def __init__(self) -> None:
        self.samples, self.block, self.first = torch.empty(0), torch.empty(0), torch.empty(0)

    def __call__(self, seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
        """seed scalar or [N], sample [N], position [N] or [N,S], rising -> the same. As long as `sample` is the same
        tensor, so must be the seed."""
        where = position.view(len(sample), -1)  # [N,S]
        if sample is not self.samples or not self.hold(where):
            self.samples, self.first = sample, where[:, :1]
            ahead = torch.arange(max(self.BLOCK, where.shape[1]), device=position.device)
            self.block = uniform(seed.view(-1, 1), sample[:, None], self.first + ahead)  # [N,BLOCK]
        return self.block.gather(1, where - self.first).view_as(position)

    def hold(self, where: Tensor) -> bool:
        return bool(((where >= self.first) & (where < self.first + self.block.shape[1])).all())


def candidates(logits: Tensor, sampling: Filters) -> tuple[Tensor, Tensor | None]:
    """The distribution to draw from: probs [N,K] and the token ids [N,K] they belong to.

    ids None: K is V and column i is token i. logits [N,V] fp32. Without top_k, top_p has to sort the whole vocabulary.
    """
    ids = None
    if sampling.top_k is not None or sampling.top_p is not None:
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        logits, ids = logits.topk(k)  # descending [N,K]
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        mass = probs.cumsum(-1, dtype=torch.float64)  # a token is kept while the likelier ones hold less than top_p
        probs = probs.masked_fill(mass - probs >= sampling.top_p * mass[:, -1:], 0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    return probs, ids


def draw(
    logits: Tensor,
    uniform: Tensor,
    sampling: Filters,
    seen: Tensor = NOTHING,
    names: Tensor | None = None,
    numbers: Callable[[Tensor, Tensor], Tensor] = of_tokens,
) -> tuple[Tensor, Tensor]:
    """draw_rows, so many rows at a time that their fp32 logits stay within LOGITS_AT_ONCE.

    What is kept is made first: small blocks amid those that a part frees would keep the next part from them.
    """
    rows = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    tokens, logprobs = (torch.empty_like(uniform, dtype=each) for each in (torch.long, torch.float32))
    for part in (slice(first, first + rows) for first in range(0, len(logits), rows)):
        tokens[part], logprobs[part] = draw_rows(logits[part], uniform[part], seen[part], sampling, names, numbers)
    return tokens, logprobs


def draw_rows(
    logits: Tensor,
    uniform: Tensor,
    seen: Tensor,
    sampling: Filters,
    names: Tensor | None = None,
    numbers: Callable[[Tensor, Tensor], Tensor] = of_tokens,
) -> tuple[Tensor, Tensor]:
    """Draws a token per row. logits [N,V], uniform [N] in [0,1), seen: the tokens that each row has already, bool [N,V]
    or [N,0], names [V]: the token of each logit, None: its index, numbers: `of_tokens` or a kernel that gives the same
    -> tokens [N], log-probabilities [N].

    The first to arrive in a race of the candidates, each after an exponential time of rate p: it is i with probability
    p_i, and rounding changes it only where two nearly tie. The log-probability is that of the untempered, unfiltered
    model.
    """
    logits = logits.float()
    scores = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        index = scores.argmax(-1, keepdim=True)  # [N,1]
    else:
        probs, ids = candidates(scores, sampling)
        index = first_to_arrive(probs, numbers(uniform, named(ids, names, probs)))
        index = index if ids is None else ids.gather(-1, index)
    token = index if names is None else names[index]
    return token[:, 0], (logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True))[:, 0]


def named(ids: Tensor | None, names: Tensor | None, probs: Tensor) -> Tensor:
    """The tokens [N,K] of the candidates; ids None: each logit is one."""
    if ids is not None:
        return ids if names is None else names[ids]
    names = torch.arange(probs.shape[1], device=probs.device) if names is None else names
    return names.expand_as(probs)


def first_to_arrive(probs: Tensor, numbers: Tensor) -> Tensor:
    """The index [N,1] of the smallest -log(1 - u) / p. probs [N,K] fp32, numbers [N,K] fp64, which are overwritten.

    Numbers are multiples of 2^-53, so a time is exact to 2^-53 and a token of probability 1e-12 is drawn at its rate to
    1e-4. Zero stands for what is below, half of that at the mean: no time is 0, so nothing of probability 0 arrives.
    Where logits are nan any token that exists will do, since their log-probability is not finite.
    """
    times = numbers.neg_().add_(1).log_().neg_().clamp_min_(2.0**-54)
    return torch.div(probs, times, out=times).argmax(-1, keepdim=True)


def seen_in(context: Sequence[int], rows: Tensor, penalty: float, vocabulary: int) -> Tensor:
    """The tokens of a context that rows [N] continue: bool [N,V], or [N,0] without a penalty."""
    seen = torch.zeros(len(rows), vocabulary if penalty != 1 else 0, dtype=torch.bool, device=rows.device)
    if seen.numel():
        seen[:, torch.tensor(context, device=rows.device)] = True
    return seen


def add(seen: Tensor, tokens: Tensor) -> Tensor:
    """Add tokens [N,k] to the mask of seen tokens, in place."""
    return seen.scatter_(1, tokens, True) if seen.numel() else seen


def seen_prefixes(seen: Tensor, tokens: Tensor) -> Tensor:
    """The seen tokens at each position of tokens [N,S] that follow: [N,S,V]."""
    several = seen[:, None].repeat(1, tokens.shape[1], 1)  # [N,S,V]
    for place in range(tokens.shape[1]):
        add(several[:, place], tokens[:, : place + 1])
    return several


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Penalise the tokens that a text has already, its context included: logits [N,V] above 0 are divided by the
    penalty, others multiplied. seen: bool [N,V], so that a step keeps its shape; [N,0] where nothing is penalised.

    Keskar et al. 2019 (CTRL, arXiv 1909.05858), section 4.1, as transformers' RepetitionPenaltyLogitsProcessor.
    """
    if not seen.numel():
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
