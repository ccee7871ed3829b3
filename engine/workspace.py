"""Temporary memory of a run besides weights, keys and values: scores, masks, copies of keys, activations, logits.
Estimated in bytes, from plain values.

Counted is whatever grows with rows, context or vocabulary on the path that will run: kernels.cpp and PyTorch's fused
kernels hold no scores, partial_attention holds those of one head, a compiled step those of all heads. Not counted:
buffers internal to libraries, freed blocks that an allocator keeps (glibc: those below 32 MiB), a draft's workspace
(mostly below its target's), and weights dequantised for a product.

Shapes: N rows, S positions, H query heads, G key/value heads, P = H // G query heads per key/value head, T context
length, L slots of one cache, D head dimension, V vocabulary; R rows of keys.
"""

from dataclasses import dataclass

import torch

from bifurcated_attention import SCORES_AT_ONCE, has_fused
from engine.request import Workload
from layers.kernels import takes
from model import ModelArgs
from sampling import LOGITS_AT_ONCE


@dataclass(frozen=True)
class Workspace:
    """Temporary memory of a workload. may_compile: count the larger need of a compiled and an eager step."""

    args: ModelArgs
    work: Workload
    device: torch.device
    dtype: torch.dtype
    may_compile: bool

    def reading(self, linked: bool = False) -> int:
        """Return the bytes for prefill in chunks, or for the conversion to int8 after it, whichever is larger. linked:
        after a context that prompts share, which PyTorch's attention cannot reach."""
        args, work = self.args, self.work
        scaling = args.rope_scaling
        whole = scaling is not None and scaling.by_length  # as in Engine.prefill
        chunk = work.context if whole else min(work.prefill_chunk, work.context)
        held = chunk * self.activations
        if not self.has_kernel and not (self.is_fused and not any(args.windows)):
            near = max(work.context if window is None else window for window in args.windows or [None])
            seen = min(work.context, near + chunk)
            held += chunk * seen * self.masked(chunk < work.context) + self.by_sdpa(1, chunk, seen)
        if linked and not self.has_kernel and not self.is_fused:
            held += self.scores(1, chunk, work.context)
        # int8: two fp32 copies of the keys, or values, of one layer.
        return max(held, 8 * work.context * args.n_kv_head * args.head_dim if work.kv_dtype == "int8" else 0)

    def decoding(self, rows: int, contexts: int = 1, folded: int = 0) -> int:
        """Return the bytes for a step of N rows after R contexts. folded: rows, padding included, in the product with
        the contexts."""
        tokens = rows * (1 + self.work.drafted)  # [N,S]
        attention = self.attention(rows, contexts, folded or rows) + tokens * self.activations
        seen = rows * self.args.vocab_size * (self.work.sampling.repetition_penalty != 1)  # bool [N,V]
        held = seen + max(attention, self.logits(tokens))
        return held * (2 if self.device.type == "cuda" else 1)  # a recorded step also has its own memory pool

    @property
    def has_kernel(self) -> bool:
        return takes(self.device, self.dtype, self.args.head_dim)

    @property
    def layer_token(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.args.n_kv_head * self.args.head_dim * self.dtype.itemsize

    @property
    def activations(self) -> int:
        """Bytes per token in one layer: queries, rotated queries in fp32 and attention output; then the feed-forward
        part, with what an allocator keeps of the first."""
        args, mixture = self.args, self.args.mixture
        width = mixture.used * (mixture.width + args.dim) + mixture.shared if mixture else args.hidden_dim
        return 24 * args.n_head * args.head_dim + (3 * width + 4 * args.dim) * self.dtype.itemsize

    def attention(self, rows: int, contexts: int, folded: int) -> int:
        """Return the bytes for attention in one layer. Dequantising an int8 context peaks at 3/2 of its K/V."""
        work, positions = self.work, 1 + self.work.drafted
        total, layer = work.context + work.own_slots, work.context * self.layer_token
        if work.attention == "bifurcated":
            if self.has_kernel:
                return 0
            widened = layer if work.kv_dtype == "int8" else 0
            scores = folded * positions * work.context * self.masked(False)
            if not self.is_fused:
                context = self.scores(contexts, folded * positions, work.context)
                scores += max(context, self.scores(rows, rows * positions, work.own_slots))
            return max(3 * widened // 2, widened + scores)
        scores = rows * positions * total * self.masked(True) + self.by_sdpa(rows, rows * positions, total)
        if work.attention == "expanded":  # all keys of a layer, contiguous
            return rows * total * self.layer_token + scores
        return max(layer, scores)  # or the row copied, of one layer

    @property
    def is_scored(self) -> bool:
        """Whether scores are modified in a way that PyTorch's attention does not support: ALiBi or a soft cap."""
        return self.args.alibi or self.args.score_softcap is not None

    @property
    def is_fused(self) -> bool:
        return not self.is_scored and has_fused(self.device, self.dtype, self.args.head_dim)

    def masked(self, by_sdpa: bool) -> int:
        """Return the mask bytes per query and key: windows as int64 distances and bools; ALiBi biases of all heads,
        computed and reordered; by_sdpa: PyTorch's mask as bool and in the network's dtype."""
        windows = 10 if any(self.args.windows) else 0
        return windows + 8 * self.args.n_head * self.args.alibi + (1 + self.dtype.itemsize) * by_sdpa

    def by_sdpa(self, cached: int, queries: int, slots: int) -> int:
        """Return the bytes for cache.sdpa: scores if it calls partial_attention, and on CUDA with grouped heads, where
        a mask leaves PyTorch only plain products, over keys and values repeated for each head."""
        args = self.args
        if self.is_scored:
            return self.scores(cached, queries, slots)
        if self.device.type != "cuda" or args.n_head == args.n_kv_head:
            return 0
        return 8 * slots * args.n_head * (queries + cached * args.head_dim)

    def scores(self, cached: int, queries: int, slots: int) -> int:
        """Return the bytes for partial_attention: N*S `queries` per head, L `slots` of R `cached` rows."""
        args, wide = self.args, self.dtype.itemsize
        of_head = queries * args.n_head // args.n_kv_head * slots  # [N,P,S,L]
        at_once = args.n_kv_head * of_head
        if not self.may_compile:
            at_once = min(at_once, max(of_head, SCORES_AT_ONCE[self.device.type]))
        # Scores in fp32; for bfloat16 also a product in it, and that product widened to be added.
        held = at_once * (10 if self.dtype == torch.bfloat16 else 4)
        # Copies of keys: contiguous for a compiled product; in fp32 for float16 or a single query.
        single = wide == 2 and (self.dtype == torch.float16 or queries * args.n_head == cached * args.n_kv_head)
        copied = max(wide * self.may_compile, 4 * single)
        return held + cached * slots * args.n_kv_head * args.head_dim * copied

    def logits(self, tokens: int) -> int:
        """Return the bytes for the logits of `tokens` tokens [N*S,V], and for drawing in chunks. Measured per logit:
        log-sum-exp in fp32; probabilities and cumulative sums in fp64; without top_k, all sorted for top_p."""
        args, sampling = self.args, self.work.sampling
        held = tokens * args.vocab_size * self.dtype.itemsize * (1 if args.logit_softcap is None else 3)
        few = sampling.temperature == 0 or sampling.top_k is not None
        drawn = 10 if few else 26 if sampling.top_p is None else 56
        if sampling.repetition_penalty != 1:
            drawn += 14
            held += tokens * args.vocab_size * (self.work.drafted > 0)  # seen tokens, for each position
        return held + drawn * min(tokens * args.vocab_size, max(args.vocab_size, LOGITS_AT_ONCE[self.device.type]))
