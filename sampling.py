"""From logits to tokens: filters, the draw, and random numbers that belong to (seed, sample, position).

Shapes: N samples (rows), S positions of each, K candidate tokens of a draw, V vocabulary.
"""

import torch
from torch import Tensor

from repetition import NOTHING, penalised
from request import Sampling

# Logits worked on at a time: what stays in a CPU's cache; on a GPU, what bounds memory.
LOGITS_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 26}

# Philox4x32-10's multipliers and key increments (Salmon et al. 2011, table 2), and a word of 32 bits.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF


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


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The distribution to draw from: probs [N,K] and the token ids [N,K] they belong to, in ascending order of id.

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
    if ids is not None:
        # By id, so that rounding which swaps two near-equal logits cannot move every boundary between tokens.
        ids, order = ids.sort(-1)
        probs = probs.gather(-1, order)
    return probs, ids


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling, seen: Tensor = NOTHING) -> tuple[Tensor, Tensor]:
    """draw_rows, so many rows at a time that their fp32 logits stay within LOGITS_AT_ONCE.

    What is kept is made first: small blocks amid those that a part frees would keep the next part from them.
    """
    rows = max(1, LOGITS_AT_ONCE[logits.device.type] // logits.shape[-1])
    tokens, logprobs = (torch.empty_like(uniform, dtype=each) for each in (torch.long, torch.float32))
    for part in (slice(first, first + rows) for first in range(0, len(logits), rows)):
        tokens[part], logprobs[part] = draw_rows(logits[part], uniform[part], seen[part], sampling)
    return tokens, logprobs


def draw_rows(logits: Tensor, uniform: Tensor, seen: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws a token per row. logits [N,V], uniform [N] in [0,1), seen: the tokens that each row has already, bool [N,V]
    or [N,0] -> tokens [N], log-probabilities [N].

    The inverse of the cumulative distribution, in fp64, at one number per row: one pass over the vocabulary, where
    noise on every logit costs a random number for each. The log-probability is that of the untempered, unfiltered
    model.
    """
    logits = logits.float()
    scores = penalised(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token = scores.argmax(-1, keepdim=True)  # [N,1]
    else:
        probs, ids = candidates(scores, sampling)
        cdf = probs.cumsum(-1, dtype=torch.float64)  # [N,K]
        # 1 - uniform is in (0,1], so the first entry that reaches the target has a probability above 0.
        # Where logits are nan none does: any token that exists will do, since their log-probability is not finite.
        token = torch.searchsorted(cdf, (1 - uniform[:, None]) * cdf[:, -1:]).clamp_max(cdf.shape[-1] - 1)  # [N,1]
        token = token if ids is None else ids.gather(-1, token)
    return token[:, 0], (logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]
