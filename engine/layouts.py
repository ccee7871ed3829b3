"""Other context layouts than KVCache's: int8, and the baselines, which copy the context for each row or at each step.

Without this file all samples still share one context. Shapes: N rows, S positions, G key/value heads, T context length,
L slots of one cache, D head dimension.
"""

from collections.abc import Callable
from typing import NoReturn, Self

import torch
from torch import Tensor

from bifurcated_attention import ScoreMod
from cache import KVCache, Link, sdpa
from engine.request import LAYOUT_NAMES


class SDPACache(KVCache):
    """Baseline and oracle: one scaled_dot_product_attention over all keys that a row sees, concatenated.

    Without ancestors (`copied`) this is the *contiguous* layout; with them (`fork`) the *expanded* layout: the
    context is stored once, but expanded by reference and concatenated with the row's own keys at every step.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        self.write(layer, k, v, input_pos)
        mask = self.visible(input_pos)  # [N,1,S,L]
        k, v, positions = self.k[layer], self.v[layer], self.positions()  # [N,G,L,D] twice, [N,L]
        for link in self.links:
            visible = link.visible()
            visible = mask.new_ones(link.cache.rows, 1, 1, link.cache.slots) if visible is None else visible
            mask = torch.cat([link.expand(visible, len(q)).expand(-1, -1, mask.shape[2], -1), mask], -1)
            positions = torch.cat([link.expand(link.cache.positions(), len(q)), positions], 1)
            parent_k, parent_v = (link.expand(tensor, len(q)) for tensor in link.cache.read(layer))  # [N,G,T,D]
            k, v = torch.cat([parent_k, k], 2), torch.cat([parent_v, v], 2)
        return sdpa(q, k, v, mask) if mod is None else sdpa(q, k, v, mod.mask(mask, input_pos, positions), mod.softcap)


def copied(
    context: KVCache,
    n: int,
    slots: int,
    reserve: int = 0,
    length: Tensor | None = None,
    kind: type[KVCache] = SDPACache,
) -> KVCache:
    """Build the unshared layout: n copies of each row of `context`, ancestors included, with `slots` further slots.

    length [context rows]: how many of the context's slots are written; None: all. kind: class of the new cache.
    """
    chain = [*reversed(context.links), Link(context, range(context.rows), length)]
    lengths = [link.lengths() for link in chain]
    total = max(map(sum, zip(*lengths, strict=True)))
    k, start = context.k[0], chain[0].cache.start[chain[0].index].repeat_interleave(n)
    shape = (n * context.rows, k.shape[1], total + slots, k.shape[3])
    made = kind(context.like, len(context.k), shape, start, total + max(slots, reserve))
    for layer in range(len(context.k)):
        sides = zip(made.read(layer), *(link.cache.read(layer) for link in chain), strict=True)  # keys, then values
        for mine, *theirs in sides:
            for row in range(context.rows):
                parts = zip(theirs, chain, lengths, strict=True)
                seen = torch.cat([part[link.rows[row], :, : each[row]] for part, link, each in parts], 1)  # [G,T,D]
                mine[row * n : row * n + n, :, : seen.shape[1]] = seen
    return made


class Int8Context(KVCache):
    """Read-only contexts in int8: half the bytes of bfloat16 while samples decode from them.

    One scale per head and token, in the dtype of the network: the largest magnitude in a key or value becomes 127. Each
    channel of the keys is first divided by the square root of its largest magnitude: a few channels may be much larger
    than all others (the biases of Qwen2), and a few tokens too, hence the root. In float16, values beyond 65,000 would
    not be restored. What the samples decode stays in the dtype of the network.
    """

    def __init__(
        self, like: Tensor, layers: int, shape: tuple[int, int, int, int], start: Tensor, reserve: int = 0
    ) -> None:
        """Allocate as a KVCache; `store` fills the rows."""
        rows, heads, slots, head_dim = shape
        self.start, self.like, self.links = start, like.new_empty(0), ()
        room = rows, heads, max(slots, reserve) + 1  # one slot more, as in KVCache
        self.buffers = [[like.new_empty((*room, head_dim), dtype=torch.int8) for _ in range(layers)] for _ in range(2)]
        self.buffers += [[like.new_zeros((*room, 1)) for _ in range(layers)] for _ in range(2)]
        self.k_channel = [like.new_ones((rows, heads, 1, head_dim)) for _ in range(layers)]
        self.resize(slots)

    @classmethod
    def of(cls, context: KVCache) -> Self:
        """Replace `context`, which is emptied layer by layer, so that at most one layer is stored twice."""
        k = context.k[0]
        made = cls(context.like, len(context.k), (*k.shape,), context.start)
        made.links = context.links
        made.store(slice(None), context)
        return made

    def store(self, row: int | slice, context: KVCache) -> None:
        """Quantise a context into a row (or rows); it is emptied layer by layer."""
        for layer, channel in enumerate(self.k_channel):
            k, v = context.k.pop(0), context.v.pop(0)
            for buffers in context.buffers:
                buffers.pop(0)
            channel[row] = channel_sizes(k)[0 if isinstance(row, int) else row]
            for side, (values, divisor) in enumerate(((k, channel[row]), (v, v.new_ones(())))):
                found = quantized(values[0] if isinstance(row, int) else values, divisor)  # int8, scales
                for buffers, each in zip(self.buffers[side::2], found, strict=True):
                    buffers[layer][row, ..., : k.shape[2], :] = each

    @property
    def tensors(self) -> list[Tensor]:
        return self.k + self.v + self.k_scale + self.v_scale + self.k_channel

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        scales = self.k_scale[layer], self.v_scale[layer]  # [N,G,L,1]
        k, v = (t[layer].to(scale.dtype) * scale for t, scale in zip((self.k, self.v), scales, strict=True))
        return k * self.k_channel[layer], v

    def resize(self, slots: int) -> None:
        """Make the first `slots` slots visible. Raises TypeError if they were not reserved."""
        if slots >= self.buffers[0][0].shape[2]:
            self.refuse()
        views = [[buffer[:, :, :slots] for buffer in buffers] for buffers in self.buffers]
        self.k, self.v, self.k_scale, self.v_scale = views

    def refuse(self, *_: object) -> NoReturn:
        raise TypeError("a context in int8 is only read: fork it, and write to the fork")

    keep = append = row = write = refuse  # type: ignore[assignment]


def channel_sizes(keys: Tensor) -> Tensor:
    """Compute the divisor of each channel: keys [N,G,L,D] -> [N,G,1,D], in their dtype."""
    size = keys.abs().amax(2, keepdim=True).sqrt()
    return size.masked_fill(size == 0, 1.0)


def quantized(tensor: Tensor, channel: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a tensor [...,L,D], after division by `channel` -> int8 [...,L,D], scales [...,L,1] in the tensor's
    dtype. All-zero vectors stay zero."""
    numbers = tensor.float() / channel.float()
    scale = (numbers.abs().amax(-1, keepdim=True) / 127).to(tensor.dtype)  # rounded before it is used
    divisor = scale.float().masked_fill(scale == 0, 1.0)
    return numbers.div_(divisor).round_().clamp_(-127, 127).to(torch.int8), scale


CONTIGUOUS = "contiguous"

# How N rows store one context: (context, N, visible slots, slots to reserve) -> cache. Bifurcated is the engine's own;
# contiguous, a copy for each row, and expanded, a copy at each step, are baselines.
LAYOUTS: dict[str, Callable[[KVCache, int, int, int], KVCache]] = dict(
    zip(LAYOUT_NAMES, (KVCache.fork, copied, SDPACache.fork), strict=True)
)


def own_cache(layout: str) -> type[KVCache]:
    """Return the class of the cache that a layout's rows decode into."""
    return KVCache if layout == "bifurcated" else SDPACache
