"""KV cache: the chain of caches that samples decode from, and prefill.

A cache is forked into children that read it without a copy. A chain of one cache is plain decoding, of two bifurcated
attention, of more a prefix tree. The network only calls `attend`.

Shapes: N rows, S positions in this call, H query heads, G key/value heads, T context length, L slots of one cache,
D head dimension; R rows of an ancestor cache.
"""

from collections.abc import Callable, Sequence
from copy import copy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from bifurcated_attention import (
    Partial,
    ScoreMod,
    differentiated,
    fused_partial,
    has_fused,
    merge_partials,
    shared_attention,
)

try:
    from layers import kernels
except ImportError:  # this file and bifurcated_attention.py also work alone
    kernels = None  # type: ignore[assignment]


def chain_operator(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """Choose the function that attends over whole chains: of kernels.py, on CUDA of triton_attention.py; None: PyTorch
    runs instead."""
    if kernels is None:
        return None
    if device.type != "cuda":
        return kernels.attend_chain if kernels.takes(device, dtype, head_dim) else None
    try:
        from layers import triton_attention  # imports Triton, which only CUDA needs
    except ImportError:
        return None
    return triton_attention.attend_chain if triton_attention.takes(device, dtype, head_dim) else None


def causal(input_pos: Tensor, key_pos: Tensor) -> Tensor:
    """Build the causal mask: input_pos [N,S], key_pos [N,L] -> bool [N,1,S,L], True at or before each position."""
    return (input_pos[:, :, None] >= key_pos[:, None])[:, None]


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None = None) -> Tensor:
    """Compute attention over all keys of a row with PyTorch's scaled_dot_product_attention; with partial attention for
    soft caps, which SDPA lacks, or biases, which it would round to q's dtype. mask None: causal, S = L."""
    if softcap is None and (mask is None or mask.dtype == torch.bool):
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)
    return shared_attention(q, k, v, mask, softcap)[0].to(q.dtype)


class NoCache:
    """Plain causal attention within the call, storing nothing: for training, scoring and as a test oracle."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        if mod is None:
            return sdpa(q, k, v, None)
        return sdpa(q, k, v, mod.mask(causal(input_pos, input_pos), input_pos, input_pos), mod.softcap)


class KVCache:
    """Keys and values of some rows, and through `links` those of the ancestor caches that the rows extend.

    k, v: per layer [N,G,L,D], the visible slots of over-allocated buffers. start [N]: absolute position of each row's
    first slot. `input_pos` alone selects the slot: rows may be at different positions, and writing a position again
    overwrites it.
    """

    def __init__(
        self, like: Tensor, layers: int, shape: tuple[int, int, int, int], start: Tensor, reserve: int = 0
    ) -> None:
        """shape: [N,G,L,D]; reserve: slots to allocate, if more than L. Dtype and device are those of `like`."""
        rows, heads, slots, head_dim = shape
        self.start, self.like = start, like.new_empty(0)
        self.links: tuple[Link, ...] = ()
        self.operator = chain_operator(like.device, like.dtype, head_dim)
        self.over_chain = attend_by_torch if self.operator is None else attend_by_kernel
        # Over-allocate one slot so that the view is never contiguous: torch.compile would guard on it.
        room = (rows, heads, max(slots, reserve) + 1, head_dim)
        self.buffers = [[like.new_empty(room) for _ in range(layers)] for _ in range(2)]
        self.k, self.v = ([buffer[:, :, :0] for buffer in buffers] for buffers in self.buffers)
        self.resize(slots)

    @classmethod
    def empty(cls, shape: tuple[int, int, int], rows: int, slots: int, like: Tensor, reserve: int = 0) -> Self:
        """Allocate `slots` positions from 0 on, with the dtype and device of the tensor `like`. shape: layers, G, D."""
        layers, heads, head_dim = shape
        start = torch.zeros(rows, dtype=torch.long, device=like.device)
        return cls(like, layers, (rows, heads, slots, head_dim), start, reserve)

    @classmethod
    def fork(cls, parent: "KVCache", n: int, slots: int, reserve: int = 0, length: Tensor | None = None) -> Self:
        """Create n children per row of `parent`, with `slots` slots of their own, that read the parent without a copy.

        length [parent rows]: written slots of each parent row, if they differ; None: all.
        """
        return cls.branch(parent, [row for row in range(parent.rows) for _ in range(n)], slots, reserve, length)

    @classmethod
    def branch(
        cls, parent: "KVCache", rows: Sequence[int], slots: int, reserve: int = 0, length: Tensor | None = None
    ) -> Self:
        """Create one child per entry of `rows`, the parent row that it extends; otherwise as `fork`."""
        index = torch.tensor(rows, device=parent.start.device)
        start = (parent.start + (parent.slots if length is None else length))[index]
        k = parent.k[0]
        child = cls(parent.like, len(parent.k), (len(rows), k.shape[1], slots, k.shape[3]), start, reserve)
        child.links = (Link(parent, rows, length), *(link.keep(rows) for link in parent.links))
        return child

    @property
    def rows(self) -> int:
        return self.k[0].shape[0]

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]

    @property
    def tensors(self) -> list[Tensor]:
        """Visible keys, then values, of all layers, each [N,G,L,...]."""
        return self.k + self.v

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer, each [N,G,L,D], in the network's dtype."""
        return self.k[layer], self.v[layer]

    def resize(self, slots: int) -> None:
        """Make the first `slots` slots visible; copy into larger buffers if these lack room for them."""
        if slots == self.slots:
            return
        for views, buffers in zip((self.k, self.v), self.buffers, strict=True):
            for layer, (view, buffer) in enumerate(zip(views, buffers, strict=True)):
                if slots >= buffer.shape[2]:
                    buffer = buffer.new_empty((*buffer.shape[:2], slots + 1, buffer.shape[3]))
                    buffer[:, :, : view.shape[2]] = view
                # Zeroed since a masked slot is multiplied by a weight of 0, and 0 * nan is nan; only now since reserved
                # memory that is not yet written costs nothing.
                buffer[:, :, view.shape[2] : slots].zero_()
                views[layer], buffers[layer] = buffer[:, :, :slots], buffer

    def keep(self, rows: Sequence[int]) -> None:
        """Compact the cache to the given rows, layer by layer, within the same buffers."""
        index = torch.tensor(rows, device=self.start.device)
        for views, buffers in zip((self.k, self.v), self.buffers, strict=True):
            for layer, (view, buffer) in enumerate(zip(views, buffers, strict=True)):
                buffers[layer] = buffer[: len(rows)]
                views[layer] = buffers[layer][:, :, : view.shape[2]].copy_(view[index])
        self.start = self.start[index]
        self.links = tuple(link.keep(rows) for link in self.links)

    def row(self, row: int, begin: int, length: int) -> "KVCache":
        """Copy `length` positions of one row, from `begin` on, into a cache without ancestors."""
        first = begin - int(self.start[row])
        k = self.k[0]
        shape = (1, k.shape[1], length, k.shape[3])
        made = KVCache(k, len(self.k), shape, self.start.new_tensor([begin]))
        for mine, theirs in zip(made.tensors, self.tensors, strict=True):
            mine.copy_(theirs[row : row + 1, :, first : first + length])
        return made

    def row_view(self, row: int, slots: int, links: tuple["Link", ...]) -> "KVCache":
        """View one row as a cache of its own, with its first `slots` slots, behind `links`."""
        view = copy(self)
        view.start, view.links = self.start[row : row + 1], links
        view.k, view.v = ([each[row : row + 1, :, :slots] for each in side] for side in (self.k, self.v))
        return view

    def extend_from(self, *links: "Link") -> None:
        """Set the ancestors that the rows extend, nearest first."""
        self.links = links

    def append(self, other: "KVCache", length: int) -> None:
        """Append the first `length` slots of another one-row cache, which begins where this one ends."""
        end = self.slots
        self.resize(end + length)
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine[:, :, end:] = theirs[:, :, :length]

    def write(self, layer: int, k: Tensor, v: Tensor, input_pos: Tensor) -> None:
        """Write k, v [N,G,S,D] at input_pos [N,S]."""
        slot = input_pos - self.start[:, None]  # [N,S]
        rows = torch.arange(self.rows, device=slot.device)[:, None]  # [N,1]
        self.k[layer][rows, :, slot] = k.transpose(1, 2)
        self.v[layer][rows, :, slot] = v.transpose(1, 2)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        """Write k, v, then attend to the whole chain; shapes as in Attend.attend."""
        self.write(layer, k, v, input_pos)
        return self.over_chain(self, layer, q, input_pos, mod)

    def partial(
        self, layer: int, q: Tensor, visible: Tensor | None, input_pos: Tensor, mod: ScoreMod | None
    ) -> Partial:
        """Compute partial attention to this cache alone; its rows are shared equally by consecutive query rows.
        visible: bool [own rows,1,S or 1,L]; None: all slots."""
        if mod is None:
            return shared_attention(q, *self.read(layer), visible)
        return shared_attention(q, *self.read(layer), mod.mask(visible, input_pos, self.positions()), mod.softcap)

    def positions(self) -> Tensor:
        """Return the absolute positions of this cache's slots, [N,L]."""
        return self.start[:, None] + torch.arange(self.slots, device=self.start.device)

    def visible(self, input_pos: Tensor) -> Tensor:
        """Build the causal mask over this cache's slots: input_pos [N,S] -> bool [N,1,S,L]."""
        return causal(input_pos, self.positions())


def attend_by_torch(cache: KVCache, layer: int, q: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
    """Merge one partial attention per cache of the chain. q [N,H,S,D], input_pos [N,S] -> [N,H,S,D]."""
    partials = [cache.partial(layer, q, cache.visible(input_pos), input_pos, mod)]
    partials += [link.attend(layer, q, input_pos, mod) for link in cache.links]
    return merge_partials(partials)[0].to(q.dtype)


def attend_by_kernel(cache: KVCache, layer: int, q: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
    """As attend_by_torch, with the cache's operator; if gradients are needed, which it lacks, with PyTorch."""
    assert cache.operator is not None
    if torch.is_grad_enabled():
        chain = cache, *(link.cache for link in cache.links)
        if differentiated(q, *(tensor for each in chain for tensor in each.tensors)):
            return attend_by_torch(cache, layer, q, input_pos, mod)
    return cache.operator(cache, layer, q, input_pos, mod)


class Link:
    """An ancestor cache plus the map from our rows to its rows.

    rows: the ancestor's row that each of our rows extends. length [R]: written slots of each ancestor row; None: all.
    If the ancestor's rows have equal, consecutive shares of our rows, as a single ancestor row always has, queries fold
    into one product by a reshape. Otherwise `group` [R*n] gathers them, padded to the largest share n, and `place` [N]
    restores the order of the results.
    """

    def __init__(self, cache: KVCache, rows: Sequence[int], length: Tensor | None) -> None:
        self.cache, self.rows, self.length = cache, list(rows), length
        self.index = torch.tensor(self.rows, device=cache.start.device)  # [N]
        self.group: Tensor | None = None
        self.place: Tensor | None = None
        shares = [[row for row, parent in enumerate(self.rows) if parent == each] for each in range(cache.rows)]
        n = max(map(len, shares))
        group = [row for share in shares for row in (share + [0] * n)[:n]]
        if group != list(range(len(group))):
            place = [parent * n + shares[parent].index(row) for row, parent in enumerate(self.rows)]
            self.group, self.place = (torch.tensor(each, device=self.index.device) for each in (group, place))

    def keep(self, rows: Sequence[int]) -> "Link":
        """Return the link for the given rows only."""
        return Link(self.cache, [self.rows[row] for row in rows], self.length)

    def lengths(self) -> list[int]:
        """Return how many of the ancestor's slots each row sees."""
        written = [self.cache.slots] * self.cache.rows if self.length is None else self.length.tolist()
        return [written[row] for row in self.rows]

    def visible(self) -> Tensor | None:
        """Return the mask of the ancestor's written slots, bool [R,1,1,L]; None: all are written."""
        if self.length is None:
            return None
        slots = torch.arange(self.cache.slots, device=self.length.device)
        return (slots < self.length[:, None])[:, None, None]

    def expand(self, tensor: Tensor, n: int) -> Tensor:
        """Index by each row's ancestor row: [R,...] -> [n,...] for all n rows; a view if R is 1."""
        return tensor.expand(n, *tensor.shape[1:]) if self.cache.rows == 1 else tensor[self.index]

    def attend(self, layer: int, q: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Partial:
        """Attend from all rows to the ancestor's keys, reading each once: out [N,H,S,D], lse [N,H,S,1]."""
        if self.group is None or self.place is None:
            return self.cache.partial(layer, q, self.visible(), input_pos, mod)
        q, input_pos = q[self.group], input_pos[self.group]  # [R*n,H,S,D] [R*n,S]
        out, lse = self.cache.partial(layer, q, self.visible(), input_pos, mod)
        return out[self.place], lse[self.place]


class Prefill:
    """A one-row cache while `length` slots from `begin` on are written: causal attention to all written so far, in the
    cache and its ancestors.

    The visible keys are known on the host, so SDPA applies: without a mask for the first chunk, with one for later
    chunks. On CUDA, where SDPA has no fast kernel for a mask, and if there are ancestors, the chunk and what precedes
    it are partial attentions. The operator of kernels.py also reads whole chunks; Triton's is for a decode step alone.
    """

    def __init__(self, cache: KVCache, begin: int, length: int) -> None:
        assert cache.rows == 1 and cache.k[0].is_floating_point(), "prefill needs a cache of one row, not int8"
        self.cache, self.begin, self.end = cache, begin, begin + length
        like = cache.k[0]
        fused = has_fused(like.device, like.dtype, like.shape[-1])
        self.in_parts = fused and begin > 0 or bool(cache.links) and (fused or like.device.type == "cpu")
        by_kernel = kernels is not None and cache.operator is kernels.attend_chain
        self.over_chain = attend_by_kernel if by_kernel else attend_by_torch
        self.as_chain = by_kernel or bool(cache.links) and not self.in_parts
        masked = begin > 0 and not self.in_parts and not self.as_chain
        self.mask = torch.ones(length, self.end, dtype=torch.bool, device=like.device).tril(begin) if masked else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        cache = self.cache
        cache.k[layer][:, :, self.begin : self.end] = k
        cache.v[layer][:, :, self.begin : self.end] = v
        records = self.in_parts and differentiated(q, k, v)  # a fused kernel's log-sum-exp has no gradient
        if self.as_chain or records or cache.links and mod is not None:
            return self.over_chain(cache, layer, q, input_pos, mod)
        if mod is None and self.in_parts:
            return self.attend_in_parts(layer, q, k, v, input_pos)
        first = 0 if mod is None or mod.window is None else max(0, self.begin - mod.window + 1)
        k, v = cache.k[layer][:, :, first : self.end], cache.v[layer][:, :, first : self.end]
        if mod is None:
            return sdpa(q, k, v, self.mask)
        positions = cache.positions()[:, first : self.end]  # [1,L]
        return sdpa(q, k, v, mod.mask(causal(input_pos, positions), input_pos, positions), mod.softcap)

    def attend_in_parts(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        """Merge attention within the chunk, to the earlier slots of the cache, and to each ancestor."""
        past = self.cache.k[layer][:, :, : self.begin], self.cache.v[layer][:, :, : self.begin]
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))  # [1,H,S,D]
        partials = [fused_partial(q, k, v, causal=True)]
        partials += [shared_attention(q, *past)] if self.begin else []
        partials += [link.attend(layer, q, input_pos, None) for link in self.cache.links]
        return merge_partials(partials)[0].to(q.dtype)
