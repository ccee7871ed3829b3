"""What a run holds for a while beside weights, keys and values: scores, masks, copies of keys, activations, logits.
From plain values, in bytes.

Counted is what grows with the rows, the context or the vocabulary, as the path that will run makes it: kernels.cpp and
PyTorch's fused kernels hold no scores, partial_attention holds those of a head, a compiled step those of all heads. Not
counted is what a library keeps for itself, what an allocator keeps of blocks that were freed (glibc: of those below 32
MiB), a draft's own workspace, mostly below its target's, and weights that are dequantised for a product.

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
    """That of a workload. may_compile: where it is not known, the larger of both is taken."""

    args: ModelArgs
    work: Workload
    device: torch.device
    dtype: torch.dtype
    may_compile: bool

    def reading(self, linked: bool = False) -> int:
        """While the prompt is read, a chunk at a time; or, after that, brought into int8. linked: behind a context that
        other prompts share, to which PyTorch's attention does not reach."""
        args, work = self.args, self.work
        scaling = args.rope_scaling
        whole = scaling is not None and scaling.by_length  # as Engine.prefill has it
        chunk = work.context if whole else min(work.prefill_chunk, work.context)
        held = chunk * self.activations
        if not self.has_kernel and not (self.is_fused and not any(args.windows)):
            near = max(work.context if window is None else window for window in args.windows or [None])
            seen = min(work.context, near + chunk)
            held += chunk * seen * self.masked(chunk < work.context) + self.by_sdpa(1, chunk, seen)
        if linked and not self.has_kernel and not self.is_fused:
            held += self.scores(1, chunk, work.context)
        # Two copies of one layer's keys, or values, in fp32.
        return max(held, 8 * work.context * args.n_kv_head * args.head_dim if work.kv_dtype == "int8" else 0)

    def decoding(self, rows: int, contexts: int = 1, folded: int = 0) -> int:
        """In a step of N rows behind R contexts. folded: of which so many, those of no use included, are multiplied by
        theirs."""
        tokens = rows * (1 + self.work.drafted)  # [N,S]
        attention = self.attention(rows, contexts, folded or rows) + tokens * self.activations
        seen = rows * self.args.vocab_size * (self.work.sampling.repetition_penalty != 1)  # bool [N,V]
        held = seen + max(attention, self.logits(tokens))
        return held * (2 if self.device.type == "cuda" else 1)  # a recorded step has a pool of its own, too

    @property
    def has_kernel(self) -> bool:
        return takes(self.device, self.dtype, self.args.head_dim)

    @property
    def layer_token(self) -> int:
        """Keys and values of a token in one layer."""
        return 2 * self.args.n_kv_head * self.args.head_dim * self.dtype.itemsize

    @property
    def activations(self) -> int:
        """Of a token in one layer: queries, those turned, in fp32, and what comes of them; then the feed-forward part,
        beside what an allocator keeps of the first."""
        args, mixture = self.args, self.args.mixture
        width = mixture.used * (mixture.width + args.dim) + mixture.shared if mixture else args.hidden_dim
        return 24 * args.n_head * args.head_dim + (3 * width + 4 * args.dim) * self.dtype.itemsize

    def attention(self, rows: int, contexts: int, folded: int) -> int:
        """Of one layer. Where a context in int8 is widened, so are its keys and half of its values, or all of both."""
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
        if work.attention == "expanded":  # all keys of a layer side by side
            return rows * total * self.layer_token + scores
        return max(layer, scores)  # or, of a layer, the row that is copied

    @property
    def is_scored(self) -> bool:
        """Whether scores are changed by what PyTorch's attention does not know."""
        return self.args.alibi or self.args.score_softcap is not None

    @property
    def is_fused(self) -> bool:
        return not self.is_scored and has_fused(self.device, self.dtype, self.args.head_dim)

    def masked(self, by_sdpa: bool) -> int:
        """Of a query and a key: distances in int64, and which are near; biases of all heads, made and put in order; for
        PyTorch's attention what is visible, as bool and in the network's dtype."""
        windows = 10 if any(self.args.windows) else 0
        return windows + 8 * self.args.n_head * self.args.alibi + (1 + self.dtype.itemsize) * by_sdpa

    def by_sdpa(self, cached: int, queries: int, slots: int) -> int:
        """cache.sdpa, which holds scores where partial_attention does its work, and on CUDA where heads are grouped: a
        mask then leaves PyTorch nothing but plain products, over keys and values repeated for each head."""
        args = self.args
        if self.is_scored:
            return self.scores(cached, queries, slots)
        if self.device.type != "cuda" or args.n_head == args.n_kv_head:
            return 0
        return 8 * slots * args.n_head * (queries + cached * args.head_dim)

    def scores(self, cached: int, queries: int, slots: int) -> int:
        """partial_attention of so many queries, N*S, of each head to L slots of R rows."""
        args, wide = self.args, self.dtype.itemsize
        of_head = queries * args.n_head // args.n_kv_head * slots  # [N,P,S,L]
        at_once = args.n_kv_head * of_head
        if not self.may_compile:
            at_once = min(at_once, max(of_head, SCORES_AT_ONCE[self.device.type]))
        # fp32; beside them a product in bfloat16, and that as it is widened to be added.
        held = at_once * (10 if self.dtype == torch.bfloat16 else 4)
        # Keys that a compiled product wants side by side, those of float16 and those of a single query in fp32.
        single = wide == 2 and (self.dtype == torch.float16 or queries * args.n_head == cached * args.n_kv_head)
        copied = max(wide * self.may_compile, 4 * single)
        return held + cached * slots * args.n_kv_head * args.head_dim * copied

    def logits(self, tokens: int) -> int:
        """Of so many tokens [N*S,V], and the draw, of some of them at a time. That is in bytes of a logit, as measured:
        its log-sum-exp in fp32; probabilities and their sums in fp64; without top_k all of them sorted for top_p."""
        args, sampling = self.args, self.work.sampling
        held = tokens * args.vocab_size * self.dtype.itemsize * (1 if args.logit_softcap is None else 3)
        few = sampling.temperature == 0 or sampling.top_k is not None
        drawn = 10 if few else 26 if sampling.top_p is None else 56
        if sampling.repetition_penalty != 1:
            drawn += 14
            held += tokens * args.vocab_size * (self.work.drafted > 0)  # what is seen at each position
        return held + drawn * min(tokens * args.vocab_size, max(args.vocab_size, LOGITS_AT_ONCE[self.device.type]))
