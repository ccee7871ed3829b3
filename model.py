"""Llama-style decoder.

Sharing of contexts is invisible here: every attention layer passes its queries, keys and values to `cache.attend`, and
the caller's cache (cache.py) decides what is stored, read and shared.

Shapes: N rows, S positions in this call, H query heads, G key/value heads, D head dimension, V vocabulary. Positions
are absolute and count from 0 at the first token of the context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from bifurcated_attention import ScoreMod
from layers.joined import Joinable
from layers.moe import MixtureOfExperts, MoEConfig
from layers.rope import RopeConfig, RopeScaling, alibi_slopes, all_frequencies, angles, rotate


@dataclass(frozen=True)
class ModelArgs:
    """Model hyperparameters. head_dim need not be dim // n_head; n_kv_head divides n_head (1: MQA, n_head: MHA).

    windows: sliding-window size per layer, current token included; None: full attention; (): full attention in every
    layer. alibi: ALiBi instead of rotary embeddings. norm_offset: added to the weight of every norm. pre_norms,
    post_norms: norms before, and after, attention and feed-forward. qk_norm: norm of queries and keys per head;
    qk_norm_whole: over all heads at once. mixture: mixture of experts as feed-forward. max_positions:
    max_position_embeddings of the config, if rope scaling extends it to context_limit; None: context_limit.
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
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    activation: str = "silu"
    embedding_scale: float = 1.0
    norm_offset: float = 0.0
    pre_norms: bool = True
    post_norms: bool = False
    score_softcap: float | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    mixture: MoEConfig | None = None
    max_positions: int | None = None

    def __post_init__(self) -> None:
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if (size := self.rope.size(self.head_dim)) % 2 or not size:
            raise ValueError(f"RoPE rotates {size} dimensions of head_dim {self.head_dim}: expected an even number")

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Shape of a KVCache: layers, key/value heads G, head dimension D."""
        return self.n_layer, self.n_kv_head, self.head_dim

    @property
    def kv_values_per_token(self) -> int:
        """Elements of the keys and values of one token, summed over layers."""
        return 2 * self.n_layer * self.n_kv_head * self.head_dim


class Attend(Protocol):
    """Interface of a cache to the attention layers."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        """Compute attention: q [N,H,S,D], k, v [N,G,S,D], input_pos [N,S] -> [N,H,S,D] in q's dtype."""


class OffsetRMSNorm(nn.RMSNorm):
    """RMSNorm scaled by (weight + offset), in fp32 (Gemma)."""

    def __init__(self, size: tuple[int, ...], eps: float, offset: float) -> None:
        super().__init__(size, eps)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


def make_norm(args: ModelArgs, *size: int) -> nn.RMSNorm:
    return OffsetRMSNorm(size, args.norm_eps, args.norm_offset) if args.norm_offset else nn.RMSNorm(size, args.norm_eps)


class Linear(nn.Linear):
    """Uninitialised: weights are loaded, and initialising on the meta device costs a second of imports."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """Uninitialised, as Linear is."""

    def reset_parameters(self) -> None:
        pass


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}


class Attention(Joinable):
    names = "wq", "wk", "wv"

    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim, self.angle_slice = layer, args.head_dim, args.rope.angle_slice(layer, args.head_dim)
        self.rotary = not args.alibi and args.rope.rotates(layer)
        self.score_mod: ScoreMod | None = None  # set by Transformer.place_constants
        self.wq = Linear(args.dim, args.n_head * args.head_dim, bias=args.qkv_bias)
        self.wk = Linear(args.dim, args.n_kv_head * args.head_dim, bias=args.qkv_bias)
        self.wv = Linear(args.dim, args.n_kv_head * args.head_dim, bias=args.qkv_bias)
        self.wo = Linear(args.n_head * args.head_dim, args.dim, bias=args.out_bias)
        self.q_norm, self.k_norm = (
            make_norm(args, *[heads] * args.qk_norm_whole, args.head_dim) if args.qk_norm else nn.Identity()
            for heads in (args.n_head, args.n_kv_head)
        )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in self.products(x))
        q, k, v = (y.transpose(1, 2) for y in (self.q_norm(q), self.k_norm(k), v))  # [N,H,S,D] [N,G,S,D] twice
        if self.angle_slice is not None:
            cos, sin = cos[..., self.angle_slice], sin[..., self.angle_slice]
        if self.rotary:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = cache.attend(self.layer, q, k, v, input_pos, self.score_mod)  # [N,H,S,D]
        return self.wo(y.transpose(1, 2).flatten(2))  # [N,S,dim]


class FeedForward(Joinable):
    """Gated linear unit; Shazeer 2020 (arXiv 2002.05202)."""

    names = "w1", "w3"

    def __init__(self, args: ModelArgs, width: int) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[args.activation]
        self.w1, self.w3 = (Linear(args.dim, width, bias=args.mlp_bias) for _ in range(2))
        self.w2 = Linear(width, args.dim, bias=args.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.products(x)
        return self.w2(self.activation(gate) * up)


def make_feed_forward(args: ModelArgs, layer: int) -> FeedForward | MixtureOfExperts:
    mixture = args.mixture
    if mixture is None or layer in mixture.dense:
        return FeedForward(args, args.hidden_dim)
    shared = FeedForward(args, mixture.shared) if mixture.shared else None
    return MixtureOfExperts(mixture, args.dim, ACTIVATIONS[args.activation], Linear, shared)


class Block(nn.Module):
    def __init__(self, args: ModelArgs, layer: int) -> None:
        super().__init__()
        self.attention = Attention(args, layer)
        self.feed_forward = make_feed_forward(args, layer)
        there = args.pre_norms, args.pre_norms, args.post_norms, args.post_norms
        norms = (make_norm(args, args.dim) if each else nn.Identity() for each in there)
        self.attention_norm, self.ffn_norm, self.attention_post_norm, self.ffn_post_norm = norms

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        x = x + self.attention_post_norm(self.attention(self.attention_norm(x), cos, sin, input_pos, cache))
        return x + self.ffn_post_norm(self.feed_forward(self.ffn_norm(x)))


class Transformer(nn.Module):
    """Decoder: tokens [N,S] at input_pos [N,S] -> logits [N,S,V], reading and writing keys and values through `cache`.

    The weights are uninitialised until they are loaded or drawn at random.
    """

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = Embedding(args.vocab_size, args.dim)
        self.layers: Sequence[Block] = nn.ModuleList(Block(args, i) for i in range(args.n_layer))  # type: ignore
        self.norm = make_norm(args, args.dim)
        self.output = Linear(args.dim, args.vocab_size, bias=False)
        self.tie_output()
        self.place_constants()

    def place_constants(self) -> None:
        """Recompute the fp32 constants (RoPE, ALiBi) on the device of the weights."""
        args, weight = self.args, self.tok_embeddings.weight
        frequencies = all_frequencies(args.head_dim, args.rope_theta, args.rope_scaling, args.rope)
        self.frequencies = frequencies.to(weight.device)
        slopes = alibi_slopes(args.n_head).to(weight.device) if args.alibi else None
        for block, window in zip(self.layers, args.windows or [None] * args.n_layer, strict=True):
            plain = window is None and slopes is None and args.score_softcap is None
            block.attention.score_mod = None if plain else ScoreMod(window, slopes, args.score_softcap)
        # Models that scale embeddings were trained with the scale rounded to their dtype.
        self.embedding_scale = torch.tensor(args.embedding_scale, dtype=weight.dtype, device="cpu").item()

    def _apply(self, fn, recurse: bool = True) -> Self:
        # The constants are not buffers, since .to(bfloat16) would round them.
        super()._apply(fn, recurse)
        self.place_constants()
        return self

    def tie_output(self, begin: int = 0, end: int | None = None) -> None:
        """Share the embedding table, or a view of its rows from `begin` to `end`, with the output layer if
        args.tied_output. Loading by assignment unties it."""
        table = self.tok_embeddings.weight
        if self.args.tied_output:
            self.output.weight = table if end is None else nn.Parameter(table[begin:end], requires_grad=False)

    def hidden(self, tokens: Tensor, input_pos: Tensor, cache: Attend, layers: int | None = None) -> Tensor:
        """Return the last layer's output [N,S,dim] before the final norm, for callers that need few logits. layers:
        number of layers to run; None: all."""
        x = self.tok_embeddings(tokens) * self.embedding_scale  # [N,S,dim]
        cos, sin = self.rotation(input_pos)
        for layer in list(self.layers)[:layers]:
            x = layer(x, cos, sin, input_pos, cache)
        return x

    def rotation(self, input_pos: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotary angles: input_pos [N,S] -> [N,1,S,D/2] fp32, twice."""
        return angles(input_pos, self.frequencies, self.args.rope_scaling, self.args.rope.scale)

    def logits(self, hidden: Tensor, own: bool = False) -> Tensor:
        """Apply the final norm and the output layer: hidden [N,S,dim] -> [N,S,V]. own: without the hooks that gather
        the parts of a divided vocabulary (tp.py)."""
        cap, scale, x = self.args.logit_softcap, self.args.logit_scale, self.norm(hidden)
        output = self.output.forward if own else self.output
        logits = output(x if scale == 1 else x * scale)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def forward(self, tokens: Tensor, input_pos: Tensor, cache: Attend) -> Tensor:
        return self.logits(self.hidden(tokens, input_pos, cache))


def empty_model(args: ModelArgs) -> Transformer:
    """Build the network on the meta device, without memory for its weights."""
    with torch.device("meta"):
        return Transformer(args)
