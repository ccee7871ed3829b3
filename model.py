"""The network: a Llama-style decoder, and the chained key/value cache that its attention reads through.

The model knows nothing of how samples share a context. Every attention layer hands its queries, keys and values to
`cache.attend(layer, q, k, v, input_pos)`; what is held, read and shared is decided by the cache that the caller passes.

Shapes: N rows, S positions in this call, H query heads, G key/value heads, T context length, L slots of one cache,
D head dimension, V vocabulary. Positions are absolute and count from 0 at the first token of the context.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bifurcated_attention import flash_partial, has_flash, merge_partials, shared_attention
from rotary import RopeScaling, alibi_slopes, rotary_frequencies, rotate


@dataclass(frozen=True)
class ModelArgs:
    """The shape of a network. head_dim need not be dim // n_head; n_kv_head divides n_head (1: MQA, n_head: MHA).

    windows: per layer, how many positions back a position sees, itself included; None: all. () is None for every layer.
    alibi: positions weigh by distance instead of turning queries and keys. norm_offset: what is added to the weight of
    every norm. post_norms: a norm also after attention and after the feed-forward part, before each is added.
    """

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
    windows: tuple[int | None, ...] = ()
    alibi: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    post_norms: bool = False
    score_softcap: float | None = None
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary embedding turns pairs")

    @property
    def kv_values_per_token(self) -> int:
        """Numbers in the keys and values of one token, all layers together."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim


@dataclass(frozen=True)
class Rule:
    """What a layer's scores depend on besides queries, keys and causality; None in its place: nothing.

    window: positions seen, itself included. slopes: ALiBi's fp32 [H]. softcap: scores become softcap * tanh(score /
    softcap).
    """

    window: int | None = None
    slopes: Tensor | None = None
    softcap: float | None = None

    def mask(self, visible: Tensor, input_pos: Tensor, key_pos: Tensor) -> Tensor:
        """visible bool [N or 1,1,S or 1,L], input_pos [N,S], key_pos [N or 1,L] -> bool [N,1,S,L], or with slopes what
        to add to the scores, fp32 [N,H,S,L]."""
        if self.window is not None:
            distance = input_pos[:, None, :, None] - key_pos[:, None, None]  # [N,1,S,L]
            visible = visible & (distance < self.window)
        return visible if self.slopes is None else self.bias(input_pos, key_pos).masked_fill(~visible, float("-inf"))

    def bias(self, input_pos: Tensor, key_pos: Tensor) -> Tensor:
        """ALiBi: input_pos [N,S], key_pos [M,L] -> fp32 [M,H,1,L]. Distances are to the last position of the call: what
        they miss is the same for all keys of a query, in every cache of the chain, and so of no effect."""
        return self.slopes[:, None, None] * (key_pos - input_pos.max())[:, None, None]

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """Attention over all keys of a row. SDPA knows no soft cap, and would round what is added to q's dtype."""
        if self.slopes is None and self.softcap is None:
            return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])
        return shared_attention(q, k, v, mask, self.softcap)[0].to(q.dtype)


class Attend(Protocol):
    """What the network asks of a cache."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rule: Rule | None) -> Tensor:
        """q [N,H,S,D], k [N,G,S,D], v [N,G,S,D], input_pos [N,S] -> [N,H,S,D] in q's dtype."""


class NoCache:
    """Plain causal attention within the call, nothing kept: for training, scoring, and as an oracle."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rule: Rule | None) -> Tensor:
        if rule is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        causal = (input_pos[:, :, None] >= input_pos[:, None])[:, None]  # [N,1,S,S]
        return rule.attention(q, k, v, rule.mask(causal, input_pos, input_pos))


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
    def dtype(self) -> torch.dtype:
        return self.k[0].dtype

    @property
    def tensors(self) -> list[Tensor]:
        """All that is held for keys and values, each [N,G,L,...]."""
        return self.k + self.v

    @property
    def nbytes(self) -> int:
        """Bytes of this cache's own keys and values, without its ancestors'."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, [N,G,L,D] each, in the dtype of the network."""
        return self.k[layer], self.v[layer]

    @classmethod
    def fork(cls, parent: "KVCache", n: int, slots: int, length: Tensor | None = None) -> Self:
        """n children per row of `parent`, with `slots` positions of their own, which read the parent without a copy.

        length [parent rows]: how many of the parent's slots are written, where rows differ; None: all.
        """
        start = (parent.start + (parent.slots if length is None else length)).repeat_interleave(n)
        shape = (parent.rows * n, parent.k[0].shape[1], slots, parent.k[0].shape[3])
        k, v = ([t.new_zeros(shape, dtype=parent.dtype) for t in tensors] for tensors in (parent.k, parent.v))
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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rule: Rule | None) -> Tensor:
        """Writes k, v, then one partial attention per cache of the chain, merged (Attend.attend for the shapes)."""
        visible, partials, cache = self.write(layer, k, v, input_pos), [], self
        while True:
            partials.append(self.attend_link(q, cache, layer, visible, input_pos, rule))
            if cache.parent is None:
                return merge_partials(partials)[0].to(q.dtype)
            visible, cache = cache.parent_visible(), cache.parent

    def attend_link(
        self, q: Tensor, link: "KVCache", layer: int, visible: Tensor | None, input_pos: Tensor, rule: Rule | None
    ) -> tuple[Tensor, Tensor]:
        """The partial attention to one cache of the chain. visible bool [link rows,1,S or 1,L]; None: all slots."""
        if rule is None:
            return shared_attention(q, *link.read(layer), visible)
        if rule.window is None and visible is None:  # an ancestor: one bias serves all rows, or none is needed
            mask = None if rule.slopes is None else rule.bias(input_pos, link.positions())
        else:
            each = self.rows // link.rows
            visible = link.everything() if visible is None else visible
            mask = rule.mask(share_rows(visible, each), input_pos, share_rows(link.positions(), each))
        return shared_attention(q, *link.read(layer), mask, rule.softcap)

    def positions(self) -> Tensor:
        """The positions of the own slots, [N,L]."""
        return self.start[:, None] + torch.arange(self.slots, device=self.start.device)

    def everything(self) -> Tensor:
        """bool [N,1,1,L], True: all own slots."""
        return torch.ones(self.rows, 1, 1, self.slots, dtype=torch.bool, device=self.start.device)

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
    """One scaled_dot_product_attention over every key that a row sees, side by side: a baseline, an oracle, and what is
    faster where little is shared.

    Without a parent (`SDPACache.copy`) this is the *contiguous* layout; with one (`fork`) the *expanded* layout: the
    context is held once, but expanded by reference and concatenated with the row's own keys at every step.
    """

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rule: Rule | None) -> Tensor:
        mask = self.write(layer, k, v, input_pos)  # [N,1,S,L]
        k, v, positions = self.k[layer], self.v[layer], self.positions()  # [N,G,L,D] twice, [N,L]
        cache = self
        while cache.parent is not None:
            each, visible, cache = self.rows // cache.parent.rows, cache.parent_visible(), cache.parent
            visible = share_rows(cache.everything() if visible is None else visible, each)
            mask = torch.cat([visible.expand(-1, -1, mask.shape[2], -1), mask], -1)
            positions = torch.cat([share_rows(cache.positions(), each), positions], 1)
            k, v = (torch.cat([share_rows(a, each), b], 2) for a, b in zip(cache.read(layer), (k, v), strict=True))
        if rule is not None:
            return rule.attention(q, k, v, rule.mask(mask, input_pos, positions))
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=q.shape[1] != k.shape[1])


# A decode step: tokens [N,1], input_pos [N,1], cache -> logits [N,V].
Step = Callable[[Tensor, Tensor, KVCache], Tensor]

# How N rows hold one context. Bifurcated is the engine; contiguous, a copy for each row, is faster where little is
# shared; expanded, which copies at each step, is there to be compared with.
LAYOUTS: dict[str, Callable[[KVCache, int, int], KVCache]] = {
    "bifurcated": KVCache.fork,
    "contiguous": SDPACache.copy,
    "expanded": SDPACache.fork,
}


class Prefill:
    """A cache of one row while its next `length` positions are written: causal SDPA over what is there by then.

    begin: the slot of the first of them. The visible keys are known on the host, so that SDPA applies: without a mask
    for the first chunk, with one for those after it. With a mask SDPA has no fast kernel on CUDA; there the chunk and
    what came before it are two partial attentions.
    """

    def __init__(self, cache: KVCache, begin: int, length: int) -> None:
        self.cache, self.begin, self.end = cache, begin, begin + length
        like = cache.k[0]
        self.in_parts = begin > 0 and has_flash(like.device, like.dtype, like.shape[-1])
        masked = begin > 0 and not self.in_parts
        self.mask = torch.ones(length, self.end, dtype=torch.bool, device=like.device).tril(begin) if masked else None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, rule: Rule | None) -> Tensor:
        self.cache.k[layer][:, :, self.begin : self.end] = k
        self.cache.v[layer][:, :, self.begin : self.end] = v
        if rule is None and self.in_parts:
            past = shared_attention(q, *(t[layer][:, :, : self.begin] for t in (self.cache.k, self.cache.v)))
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))  # [1,H,S,D]
            return merge_partials([past, flash_partial(q, k, v, causal=True)])[0].to(q.dtype)
        first = 0 if rule is None or rule.window is None else max(0, self.begin - rule.window + 1)
        k, v = self.cache.k[layer][:, :, first : self.end], self.cache.v[layer][:, :, first : self.end]
        if rule is not None:
            positions = self.cache.positions()[:, first : self.end]  # [1,L]
            causal = (input_pos[:, :, None] >= positions[:, None])[:, None]  # [1,1,S,L]
            return rule.attention(q, k, v, rule.mask(causal, input_pos, positions))
        shared = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, self.mask, is_causal=self.mask is None, enable_gqa=shared)


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm whose weight is stored less `offset`, and applied in fp32 (Gemma)."""

    def __init__(self, size: int, eps: float, offset: float) -> None:
        super().__init__(size, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


def make_norm(args: ModelArgs, size: int) -> nn.RMSNorm:
    return OffsetRMSNorm(size, args.norm_eps, args.norm_offset) if args.norm_offset else nn.RMSNorm(size, args.norm_eps)


class Linear(nn.Linear):
    """Uninitialised: its weights are loaded, and to draw them on the meta device takes a second of imports."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Uninitialised, as Linear is."""

    def reset_parameters(self) -> None:
        pass


ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.rotary = layer, args.head_dim, not args.alibi
        self.rule: Rule | None = None  # Transformer.place_constants
        self.wq = Linear(args.dim, args.n_head * args.head_dim, bias=args.qkv_bias)
        self.wk = Linear(args.dim, args.n_kv_head * args.head_dim, bias=args.qkv_bias)
        self.wv = Linear(args.dim, args.n_kv_head * args.head_dim, bias=args.qkv_bias)
        self.wo = Linear(args.n_head * args.head_dim, args.dim, bias=False)
        self.q_norm, self.k_norm = (make_norm(args, args.head_dim) if args.qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.q_norm(q), self.k_norm(k)  # [N,H,S,D] [N,G,S,D]
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = cache.attend(self.layer, q, k, v, input_pos, self.rule)  # [N,H,S,D]
        return self.wo(y.transpose(1, 2).flatten(2))  # [N,S,dim]


class FeedForward(nn.Module):
    """A gated linear unit; Shazeer 2020 (arXiv 2002.05202)."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[args.activation]
        self.w1 = Linear(args.dim, args.hidden_dim, bias=False)
        self.w3 = Linear(args.dim, args.hidden_dim, bias=False)
        self.w2 = Linear(args.hidden_dim, args.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = FeedForward(args)
        self.attention_norm = make_norm(args, args.dim)
        self.ffn_norm = make_norm(args, args.dim)
        self.attention_post_norm, self.ffn_post_norm = (
            make_norm(args, args.dim) if args.post_norms else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), cos, sin, input_pos, cache))
        return x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """tokens [N,S] at input_pos [N,S] -> logits [N,S,V], reading and writing keys and values through `cache`.

    The weights are uninitialised until they are loaded or drawn.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, layer) for layer in range(args.n_layer))
        self.norm = make_norm(args, args.dim)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        self.tie_output()
        self.place_constants()

    def place_constants(self) -> None:
        """Makes what is neither learned nor rounded to the model's dtype, on the device of the weights."""
        args, weight = self.args, self.tok_embeddings.weight
        self.frequencies = rotary_frequencies(args.head_dim, args.rope_theta, args.rope_scaling).to(weight.device)
        slopes = alibi_slopes(args.n_head).to(weight.device) if args.alibi else None
        for layer, window in zip(self.layers, args.windows or [None] * args.n_layer, strict=True):
            plain = window is None and slopes is None and args.score_softcap is None
            layer.attention.rule = None if plain else Rule(window, slopes, args.score_softcap)
        # The models that scale embeddings were trained with the scale rounded to their dtype.
        self.embedding_scale = torch.tensor(args.embedding_scale, dtype=weight.dtype, device="cpu").item()

    def _apply(self, fn, recurse: bool = True) -> Self:
        # Not buffers: .to(bfloat16) would round them.
        super()._apply(fn, recurse)
        self.place_constants()
        return self

    def tie_output(self) -> None:
        """Shares the embedding table with the output, where the model is made so. Loading by assignment unties it."""
        if self.args.tied_output:
            self.output.weight = self.tok_embeddings.weight

    def hidden(self, tokens: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        """The last layer's output [N,S,dim], before the final norm: for callers that need few of the logits."""
        x = self.tok_embeddings(tokens) * self.embedding_scale  # [N,S,dim]
        cos, sin = self.rotation(input_pos)
        for layer in self.layers:
            x = layer(x, cos, sin, input_pos, cache)
        return x

    def rotation(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles by which queries and keys turn: input_pos [N,S] -> [N,1,S,D/2] fp32, twice."""
        scaling, frequencies = self.args.rope_scaling, self.frequencies
        if scaling is not None and scaling.kind == "dynamic":
            frequencies = rotary_frequencies(self.args.head_dim, self.args.rope_theta, scaling, input_pos.max() + 1)
        angles = input_pos[:, None, :, None] * frequencies
        scale = 1.0 if scaling is None else scaling.attention_factor
        return angles.cos() * scale, angles.sin() * scale

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [N,S,dim] -> [N,S,V]."""
        logits = self.output(self.norm(hidden))
        cap = self.args.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        return self.logits(self.hidden(tokens, input_pos, cache))


def empty_model(args: ModelArgs) -> Transformer:
    """The network without memory for its weights."""
    with torch.device("meta"):
        return Transformer(args)
