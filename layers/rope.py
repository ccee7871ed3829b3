"""Position encodings: rotary embeddings (RoPE) with their published scalings, and ALiBi slopes.

Shapes: N rows, S positions, H query heads, D head dimension.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeConfig:
    """RoPE variants: partial rotary, NoPE layers, local theta.

    share: rotated fraction of each head, from its start. layers: per layer "global" (the model's theta and scaling),
    "local" (local_theta, unscaled) or "none"; (): all global. scale: multiplies queries and keys alike.
    """

    share: float = 1.0
    layers: tuple[str, ...] = ()
    local_theta: float | None = None
    scale: float = 1.0

    def size(self, head_dim: int) -> int:
        """Rotary dimension."""
        return int(head_dim * self.share)

    def rotates(self, layer: int) -> bool:
        return not self.layers or self.layers[layer] != "none"

    def angle_slice(self, layer: int, head_dim: int) -> slice | None:
        """Slice of the angles of both thetas, [...,D], that a layer uses; None: all, as there is only one theta."""
        if self.local_theta is None:
            return None
        half = self.size(head_dim) // 2
        return slice(half, None) if self.layers[layer] == "local" else slice(half)


@dataclass(frozen=True)
class RopeScaling:
    """RoPE scaling for positions beyond `original_context`, the length that the model was first trained on.

    kind: "linear" divides all frequencies by `factor` (Chen et al. 2023, arXiv 2306.15595); "dynamic" increases theta
    with the longest position so far (NTK-aware scaling); "llama3" and "yarn" (Peng et al. 2023, arXiv 2309.00071)
    divide frequencies with fewer than `low_rotations` within the original context, keep those with more than
    `high_rotations`, and interpolate between them; "longrope" (Ding et al. 2024, arXiv 2402.13753) divides each by its
    own factor, from `short` up to the original context and from `long` beyond. attention_factor: multiplies queries and
    keys alike (yarn, longrope).
    """

    kind: str
    factor: float
    original_context: int
    low_rotations: float = 1.0
    high_rotations: float = 1.0
    attention_factor: float = 1.0
    short: tuple[float, ...] = ()
    long: tuple[float, ...] = ()

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the length so far."""
        return self.kind in ("dynamic", "longrope")

    def regime(self, length: int) -> int:
        """Return a key that is equal for lengths with the same rotation."""
        longer = max(0, length - self.original_context) if self.by_length else 0
        return longer if self.kind == "dynamic" else int(longer > 0)

    def crosses(self, first: int, last: int) -> bool:
        """Return whether the cache goes stale between lengths `first` and `last`, as in transformers' Phi-3: keys
        rotated by the short factors do not match queries rotated by the long ones."""
        return self.kind == "longrope" and first <= self.original_context < last


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Radians per position of each pair of a head, fp32 [D/2]; Su et al. 2021 (arXiv 2104.09864), section 3.4.2.

    If they depend on the length, [2,D/2]: for longrope, the frequencies up to the original context and beyond it; for
    dynamic, the unscaled frequencies and the exponents of the stretch that multiplies them.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (pairs / head_dim)  # [D/2]
    if scaling is None:
        return frequencies
    if scaling.kind == "longrope":
        return frequencies / torch.tensor([scaling.short, scaling.long], device="cpu")
    if scaling.kind == "dynamic":  # theta grows by stretch^(D/(D-2))
        return torch.stack([frequencies, pairs / (2 - head_dim)])
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    low, high = scaling.low_rotations, scaling.high_rotations
    if scaling.kind == "llama3":
        rotations = scaling.original_context * frequencies / (2 * math.pi)
        keep = ((rotations - low) / (high - low)).clamp(0, 1)
    else:
        # YaRN interpolates by pair index, between the pairs with `high` and `low` rotations.
        first, last = (
            head_dim * math.log(scaling.original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))
            for rotations in (high, low)
        )
        first, last = max(math.floor(first), 0), min(math.ceil(last), head_dim - 1)
        keep = 1 - ((pairs / 2 - first) / max(last - first, 0.001)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def all_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, rope: RopeConfig) -> Tensor:
    """Frequencies of all layers, as rotary_frequencies; computed once, so that a step creates no constants. With a
    local theta, its unscaled frequencies follow on the last axis, doubling it."""
    size = rope.size(head_dim)
    found = rotary_frequencies(size, theta, scaling)
    if rope.local_theta is None:
        return found
    local = rotary_frequencies(size, rope.local_theta)
    if scaling is not None and scaling.by_length:
        local = torch.stack([local, torch.zeros_like(local) if scaling.kind == "dynamic" else local])
    return torch.cat([found, local], -1)


def angles(input_pos: Tensor, frequencies: Tensor, scaling: RopeScaling | None, scale: float) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotation angles of queries and keys. frequencies: from all_frequencies.
    input_pos [N,S] -> fp32 [N,1,S,D/2], twice"""
    if scaling is not None and scaling.by_length:
        length = input_pos.amax(1)[:, None, None, None] + 1  # of each row, so far
        if scaling.kind == "longrope":
            frequencies = torch.where(length > scaling.original_context, frequencies[1], frequencies[0])
        else:
            stretch = scaling.factor * length.clamp_min(scaling.original_context) / scaling.original_context
            frequencies = frequencies[0] * (stretch - (scaling.factor - 1)) ** frequencies[1]  # [N,1,1,D/2]
    radians = input_pos[:, None, :, None] * frequencies
    scale *= 1.0 if scaling is None else scaling.attention_factor
    return radians.cos() * scale, radians.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head; with cos and sin of fewer pairs, the rest of a head is unchanged.
    x [N,H,S,D], cos and sin fp32 [N,1,S,D/2] -> [N,H,S,D]"""
    size = 2 * cos.shape[-1]
    a, b = x[..., :size].chunk(2, -1)  # [N,H,S,D/2] each; the products promote to fp32
    rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return rotated if size == x.shape[-1] else torch.cat([rotated, x[..., size:]], -1)


def alibi_slopes(heads: int) -> Tensor:
    """ALiBi slope of each head, fp32 [H]; Press et al. 2022 (arXiv 2108.12409), section 3.

    2^(-8/n), 2^(-16/n), ... for n heads; if n is not a power of two, the slopes of the next lower power, then every
    second slope of the next higher one.
    """
    lower = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / lower) for i in range(lower)]
    slopes += [2 ** (-4 * (2 * i + 1) / lower) for i in range(heads - lower)]
    return torch.tensor(slopes, dtype=torch.float32, device="cpu")
