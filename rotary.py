"""How positions enter attention: rotary frequencies and their published scalings, ALiBi's slopes, windows, soft caps.

Shapes: N rows, S positions, H query heads, L slots, D head dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond `original_context`, the length that the model was first trained on, are rotated.

    kind: "linear" divides all frequencies by `factor` (Chen et al. 2023, arXiv 2306.15595); "dynamic" enlarges theta
    with the longest position so far (NTK-aware scaling); "llama3" and "yarn" (Peng et al. 2023, arXiv 2309.00071)
    divide those that turn fewer than `low_turns` times within the original context, keep those that turn more than
    `high_turns` times, and blend between them. attention_factor: multiplies queries and keys alike (yarn).
    """

    kind: str
    factor: float
    original_context: int
    low_turns: float = 1.0
    high_turns: float = 1.0
    attention_factor: float = 1.0


@dataclass(frozen=True)
class ScoreMod:
    """What a layer's scores depend on besides queries, keys and causality; None in its place: nothing.

    window: positions seen, itself included. slopes: ALiBi's fp32 [H]. softcap: scores become softcap * tanh(score /
    softcap).
    """

    window: int | None = None
    slopes: Tensor | None = None
    softcap: float | None = None

    def mask(self, visible: Tensor | None, input_pos: Tensor, key_pos: Tensor) -> Tensor | None:
        """visible bool [R,1,S or 1,L] or None (all), input_pos [N,S], key_pos [R,L], each of R rows of keys shared by
        N // R consecutive rows of queries. Returns what is visible, bool [N,1,S,L] or None; with slopes what to add to
        the scores, fp32 [N,H,S,L] or [R,H,1,L]."""
        if self.window is None and visible is None:  # one bias serves all rows, or none is needed
            return None if self.slopes is None else self.bias(input_pos, key_pos)
        n = input_pos.shape[0] // key_pos.shape[0]
        key_pos = repeat_rows(key_pos, n)
        visible = key_pos.new_ones(1, 1, 1, 1, dtype=torch.bool) if visible is None else repeat_rows(visible, n)
        if self.window is not None:
            distance = input_pos[:, None, :, None] - key_pos[:, None, None]  # [N,1,S,L]
            visible = visible & (distance < self.window)
        return visible if self.slopes is None else self.bias(input_pos, key_pos).masked_fill(~visible, float("-inf"))

    def bias(self, input_pos: Tensor, key_pos: Tensor) -> Tensor:
        """ALiBi: input_pos [N,S], key_pos [M,L] -> fp32 [M,H,1,L]. Distances are to the last position of the call: what
        they miss is the same for all keys of a query, in every cache of the chain, and so of no effect."""
        assert self.slopes is not None
        return self.slopes[:, None, None] * (key_pos - input_pos.max())[:, None, None]


def repeat_rows(tensor: Tensor, n: int) -> Tensor:
    """[R,...] -> [R*n,...], each row n times in a row: by reference where R is 1."""
    return tensor[:, None].expand(-1, n, *tensor.shape[1:]).flatten(0, 1)


def rotary_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, length: Tensor | None = None
) -> Tensor:
    """Radians per position of each pair of a head, fp32 [D/2]; Su et al. 2021 (arXiv 2104.09864), section 3.4.2.

    length [...,1]: for dynamic scaling, the positions so far, as a tensor, so that the host need not know it; the
    frequencies are then [...,D/2].
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu" if length is None else length.device)
    if scaling is not None and scaling.kind == "dynamic" and length is not None:
        stretch = scaling.factor * length.clamp_min(scaling.original_context) / scaling.original_context
        base = theta * (stretch - (scaling.factor - 1)) ** (head_dim / (head_dim - 2))
        return 1.0 / base ** (pairs / head_dim)  # [...,D/2]
    frequencies = 1.0 / theta ** (pairs / head_dim)  # [D/2]
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_turns, scaling.high_turns
    if scaling.kind == "llama3":
        turns = scaling.original_context * frequencies / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
    else:
        # YaRN blends by the index of a pair, between the pairs that turn `high` and `low` times.
        first, last = (
            head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))
            for turns in (high, low)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
        keep = 1 - ((pairs / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of every head: x [N,H,S,D], cos and sin [N,1,S,D/2] fp32 -> [N,H,S,D]."""
    a, b = x.chunk(2, -1)  # [N,H,S,D/2] each; the products promote to fp32
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def alibi_slopes(heads: int) -> Tensor:
    """The weight of distance in each head, fp32 [H]; Press et al. 2022 (arXiv 2108.12409), section 3.

    2^(-8/n), 2^(-16/n), ... for n heads; where n is no power of two, those of the next lower one, then every second
    slope of the next higher one.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2 ** (-4 * (2 * i + 1) / lower) for i in range(heads - lower)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
