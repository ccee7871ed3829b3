"""The network: a Llama-style decoder, and the chained key/value cache that its attention reads through.

The model knows nothing of how samples share a context. Every attention layer hands its queries, keys and values to
`cache.attend(layer, q, k, v, input_pos)`; what is held, read and shared is decided by the cache that the caller passes.

Shapes: N rows, S positions in this call, H query heads, G key/value heads, T context length, L slots of one cache,
D head dimension, V vocabulary. Positions are absolute and count from 0 at the first token of the context.
"""

import math
from dataclasses import dataclass
from typing import Protocol, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bifurcated_attention import merge_partials, shared_attention


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the rotary wavelengths beyond the context that the model was first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a network. head_dim need not be dim // n_head; n_kv_head divides n_head (1: MQA, n_head: MHA)."""

    dim: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    context_limit: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tied_output: bool = False

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")

    @property
    def kv_values_per_token(self) -> int:
        """Numbers in the keys and values of one token, all layers together."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim


class Attend(Protocol):
    """What the network asks of a cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        """q [N,H,S,D], k [N,G,S,D], v [N,G,S,D], input_pos [N,S] -> [N,H,S,D] in q's dtype."""


class NoCache:
    """Plain causal attention within the call, nothing kept: for training, scoring, and as an oracle."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


class KVCache:
    """Keys and values of some rows, and through `parent` those of the shared contexts that they continue.

    k, v: per layer [N,G,L,D]. start [N]: the absolute position of each row's first slot. The parent's rows are shared
    by N // parent rows consecutive children each. parent_length [parent rows]: how many of the parent's slots are
    written; None where all are. A chain of one is plain decoding, of two bifurcated attention, of more a prefix tree.

    `input_pos` is the only clock: the cache has no cursor, rows may be at different positions, and a position that is
    written again replaces what was there.
    """

    def __init__(
        self,
        k: list[Tensor],
        v: list[Tensor],
        start: Tensor,
        parent: "KVCache | None" = None,
        parent_length: Tensor | None = None,
    ) -> None:
        self.k, self.v, self.start, self.parent, self.parent_length = k, v, start, parent, parent_length

    @classmethod
    def empty(cls, args: ModelArgs, rows: int, slots: int, like: Tensor) -> Self:
        """Room for `slots` positions from 0 on, in the dtype and on the device of the tensor `like`."""
        shape = (rows, args.n_kv_head, slots, args.head_dim)
        # Zeros, not empty: a masked slot is multiplied by weight 0, and 0 * nan is nan.
        k, v = ([like.new_zeros(shape) for _ in range(args.n_layer)] for _ in range(2))
        return cls(k, v, torch.zeros(rows, dtype=torch.long, device=like.device))

    @property
    def rows(self) -> int:
        return self.k[0].shape[0]

    @property
    def slots(self) -> int:
        return self.k[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of this cache's own keys and values, without its ancestors'."""
        return sum(tensor.nbytes for tensor in self.k + self.v)

    @classmethod
    def fork(cls, parent: "KVCache", n: int, slots: int, length: Tensor | None = None) -> Self:
        """n children per row of `parent`, with `slots` positions of their own, which read the parent without a copy.

        length [parent rows]: how many of the parent's slots are written, where rows differ; None: all.
        """
        start = (parent.start + (parent.slots if length is None else length)).repeat_interleave(n)
        shape = (parent.rows * n, parent.k[0].shape[1], slots, parent.k[0].shape[3])
        k, v = ([tensor.new_zeros(shape) for tensor in tensors] for tensors in (parent.k, parent.v))
        return cls(k, v, start, parent, length)

    @classmethod
    def copy(cls, context: "KVCache", n: int, slots: int) -> Self:
        """The unshared layout: one cache of n copies of each row of `context`, with `slots` further positions."""
        grow = (0, 0, 0, slots)
        k, v = ([F.pad(t.repeat_interleave(n, 0), grow) for t in tensors] for tensors in (context.k, context.v))
        return cls(k, v, context.start.repeat_interleave(n))

    def reserve(self, slots: int) -> None:
        """Grows to `slots` slots, layer by layer, so that one layer at most is held twice."""
        grow = (0, 0, 0, slots - self.slots)
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = F.pad(tensor, grow)

    def row(self, row: int, begin: int) -> "KVCache":
        """A copy of what one row holds from the position `begin` on, without ancestors."""
        first = begin - int(self.start[row])
        k, v = ([t[row : row + 1, :, first:].clone() for t in tensors] for tensors in (self.k, self.v))
        return KVCache(k, v, self.start.new_tensor([begin]))

    def append(self, other: "KVCache", length: int) -> None:
        """Takes over the first `length` slots of another cache of one row, which begins where this one ends."""
        for mine, theirs in ((self.k, other.k), (self.v, other.v)):
            for layer, tensor in enumerate(theirs):
                mine[layer] = torch.cat([mine[layer], tensor[:, :, :length]], 2)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but the given ones, layer by layer. rows [n]: indices; a parent, if any, has one row."""
        assert self.parent is None or self.parent.rows == 1, "rows of a ragged tree cannot be dropped"
        for tensors in (self.k, self.v):
            for layer, tensor in enumerate(tensors):
                tensors[layer] = tensor[rows]
        self.start = self.start[rows]

    def write(self, layer: int, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        """Stores k, v [N,G,S,D] at input_pos [N,S]; returns bool [N,1,S,L]: the own slots that each position sees."""
        slot = input_pos - self.start[:, None]  # [N,S]
        rows = torch.arange(self.rows, device=slot.device)[:, None]  # [N,1]
        self.k[layer][rows, :, slot] = k.transpose(1, 2)
        self.v[layer][rows, :, slot] = v.transpose(1, 2)
        return (torch.arange(self.slots, device=slot.device) <= slot[..., None])[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        """Writes k, v, then one partial attention per cache of the chain, merged (Attend.attend for the shapes)."""
        visible = self.write(layer, k, v, input_pos)
        partials = [shared_attention(q, self.k[layer], self.v[layer], visible)]
        cache = self
        while cache.parent is not None:
            partials.append(shared_attention(q, cache.parent.k[layer], cache.parent.v[layer], cache.parent_visible()))
            cache = cache.parent
        return merge_partials(partials)[0].to(q.dtype)

    def parent_visible(self) -> Tensor | None:
        """bool [parent rows,1,1,L of the parent]: its written slots; None where all are."""
        if self.parent_length is None:
            return None
        slots = torch.arange(self.parent.slots, device=self.start.device)
        return (slots < self.parent_length[:, None])[:, None, None]


def share_rows(tensor: Tensor, n: int) -> Tensor:
    """[R,...] -> [R*n,...], each row n times in a row: by reference where R is 1."""
    return tensor[:, None].expand(-1, n, *tensor.shape[1:]).flatten(0, 1)


class SDPACache(KVCache):
    """The baselines and oracles: one scaled_dot_product_attention over every key that a row sees, side by side.

    Without a parent (`SDPACache.copy`) this is the *contiguous* layout; with one (`fork`) the *expanded* layout: the
    context is held once, but expanded by reference and concatenated with the row's own keys at every step.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        mask = self.write(layer, k, v, input_pos)  # [N,1,S,L]
        k, v = self.k[layer], self.v[layer]  # [N,G,L,D]
        cache = self
        while cache.parent is not None:
            each = self.rows // cache.parent.rows
            visible = cache.parent_visible()
            if visible is None:
                visible = mask.new_ones(cache.parent.rows, 1, 1, cache.parent.slots)
            visible = share_rows(visible, each).expand(-1, -1, mask.shape[2], -1)
            mask = torch.cat([visible, mask], -1)
            k = torch.cat([share_rows(cache.parent.k[layer], each), k], 2)
            v = torch.cat([share_rows(cache.parent.v[layer], each), v], 2)
            cache = cache.parent
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


class Prefill:
    """A cache of one row while its next `length` positions are written: causal SDPA over what is there by then.

    begin: the slot of the first of them. The visible keys are known on the host, so that SDPA applies: without a mask
    for the first chunk, with one for those after it.
    """

    def __init__(self, cache: KVCache, begin: int, length: int) -> None:
        self.cache, self.begin, self.end = cache, begin, begin + length
        visible = torch.ones(length, self.end, dtype=torch.bool, device=cache.start.device)
        self.mask = visible.tril(begin) if begin else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor) -> Tensor:
        self.cache.k[layer][:, :, self.begin : self.end] = k
        self.cache.v[layer][:, :, self.begin : self.end] = v
        k, v = self.cache.k[layer][:, :, : self.end], self.cache.v[layer][:, :, : self.end]
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None, enable_gqa=shared)


def rotary_frequencies(args: ModelArgs) -> Tensor:
    """Radians per position of each pair of a head, fp32 [D/2]; Su et al. 2021 (arXiv 2104.09864), section 3.4.2.

    With rope_scaling, wavelengths beyond original_context / low_freq_factor are stretched by `factor`, those below
    original_context / high_freq_factor are kept, and those between are blended (Llama 3.1).
    """
    pairs = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / args.rope_theta ** (pairs / args.head_dim)  # [D/2]
    scaling = args.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_context * frequencies / (2 * math.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = keep.clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (i, i + D/2) of every head: x [N,H,S,D], cos and sin [N,1,S,D/2] fp32 -> [N,H,S,D]."""
    a, b = x.chunk(2, -1)  # [N,H,S,D/2] each; the products promote to fp32
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, args.head_dim
        self.wq = nn.Linear(args.dim, args.n_head * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_head * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_head * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_head * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)  # [N,H,S,D] [N,G,S,D]
        y = cache.attend(self.layer, q, k, v, input_pos)  # [N,H,S,D]
        return self.wo(y.transpose(1, 2).flatten(2))  # [N,S,dim]


class FeedForward(nn.Module):
    """SwiGLU; Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = nn.Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), cos, sin, input_pos, cache)
        return x + self.feed_forward(self.ffn_norm(x))


class Transformer(nn.Module):
    """tokens [N,S] at input_pos [N,S] -> logits [N,S,V], reading and writing keys and values through `cache`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer) for layer in range(args.n_layer))
        self.norm = nn.RMSNorm(args.dim, args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        self.tie_output()
        self.frequencies = rotary_frequencies(args)

    def _apply(self, fn, recurse: bool = True) -> Self:
        # The frequencies follow the device but never the dtype: as a buffer, .to(bfloat16) would round the angles.
        super()._apply(fn, recurse)
        self.frequencies = rotary_frequencies(self.args).to(self.tok_embeddings.weight.device)
        return self

    def tie_output(self) -> None:
        """Shares the embedding table with the output, where the model is made so. Loading by assignment unties it."""
        if self.args.tied_output:
            self.output.weight = self.tok_embeddings.weight

    def hidden(self, tokens: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        """The last layer's output [N,S,dim], before the final norm: for callers that need few of the logits."""
        x = self.tok_embeddings(tokens)  # [N,S,dim]
        angles = input_pos[:, None, :, None] * self.frequencies  # [N,1,S,D/2] fp32
        cos, sin = angles.cos(), angles.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, input_pos, cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N,S,dim] -> [N,S,V]."""
        return self.output(self.norm(hidden))

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        return self.logits(self.hidden(tokens, input_pos, cache))
