"""Bifurcated attention: N rows of queries share one context, whose keys and values are read once.

Athiwaratkun et al., "Bifurcated Attention: Accelerating Massively Parallel Decoding with Shared Prefixes in LLMs",
arXiv 2403.08845 (2024), section 4. The paper splits the two matrix products of attention at the border between the
shared context and each row's own decoded tokens. Here each side is a *partial attention* with its own softmax, and the
sides are merged by their log-sum-exp. The result is the same, no score tensor spans both sides, any number of parts can
be merged (a tree of prefixes), and each side can use its own kernel.

This file depends on torch only, and can be copied into another repository.

Shapes: N rows, S query positions, H query heads, G key/value heads, P = H // G query heads per key/value head,
T context length, L slots of decoded keys, D head dimension; R rows of keys, each shared by N // R rows of queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Partial = tuple[Tensor, Tensor]

# Scores computed at a time in eager mode: on a CPU what fits its cache, on a GPU a bound on memory.
SCORES_AT_ONCE = {"cpu": 1 << 20, "cuda": 1 << 28}

# PyTorch's fused kernels that also return the log-sum-exp. On CUDA, the one without a mask splits long contexts over
# all multiprocessors; the one with a mask is the memory-efficient kernel.
FLASH = {
    "cuda": torch.ops.aten._scaled_dot_product_flash_attention,
    "cpu": torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
}
MASKED = {
    "cuda": lambda q, k, v, bias: torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True),
    "cpu": lambda q, k, v, bias: FLASH["cpu"](q, k, v, attn_mask=bias),
}


def differentiated(*tensors: Tensor | None) -> bool:
    """Return whether autograd would record an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def has_fused(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether to use the fused kernels: on CUDA (compute capability 8.0 and up), for the dtypes and head sizes
    that they support. On a CPU the matrix products of partial_attention are faster for few queries."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim % 8 or head_dim > 256:
        return False
    return torch.cuda.get_device_properties(device).major >= 8


def fused_partial(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Partial:
    """Compute partial_attention with a fused kernel, which stores no scores. q [B,H,Q,D], k, v [B,H,L,D], L at least 1;
    mask bool [B or 1,H or 1,Q or 1,L], or causal -> out [B,H,Q,D], lse [B,H,Q,1], fp32 (fp64 for fp64).

    The kernel rounds `out` to q's dtype. The caller folds queries that share keys into Q: for grouped heads with one
    query the kernel's log-sum-exp is unreliable.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    if mask is None:
        out, lse = FLASH[q.device.type](q, k, v, is_causal=causal)[:2]  # [B,H,Q,D] [B,H,Q]
        return out.to(dtype), lse[..., None].to(dtype)
    L = mask.shape[-1]
    # The kernel needs rows aligned to 16 bytes. Never contiguous: torch.compile would guard on L being a multiple of 8.
    bias = q.new_zeros(*mask.shape[:-1], (L // 8 + 1) * 8)[..., :L]
    bias = bias.masked_fill_(~mask, -math.inf).expand(*q.shape[:3], L)
    out, lse = MASKED[q.device.type](q, k, v, bias)[:2]
    seen = mask.any(-1, keepdim=True)  # [...,1]; the kernel returns nan for a query that sees no key
    lse = lse[..., : q.shape[2], None].to(dtype).masked_fill(~seen, -math.inf)
    return out.to(dtype).masked_fill(~seen, 0), lse


def raw_scores(q: Tensor, k: Tensor) -> Tensor:
    """Compute q k^T in fp32 (fp64 for fp64): q [B,G,Q,D], k [B,G,L,D] -> [B,G,Q,L].

    A product of bfloat16 matrices is rounded to bfloat16: a score of 20 is then off by up to 0.06, enough for shared
    and unshared decoding to drift apart. A second product minus the first, accumulated in fp32, recovers the rounding
    error, so the sum has about 16 bits. Three cases are widened instead: float16, which
    would overflow on the way; a single query, whose conversion a compiled matrix-vector product fuses at no cost; and
    queries that require gradients, since the second product would be differentiated too.
    """
    if q.dtype != torch.bfloat16 or q.shape[-2] == 1 or q.requires_grad:
        dtype = torch.promote_types(q.dtype, torch.float32)
        return q.to(dtype) @ k.to(dtype).mT
    B, G = k.shape[:2]
    q, k = q.flatten(0, 1), k.flatten(0, 1)  # [B*G,Q,D] [B*G,L,D]
    product = torch.bmm(q, k.mT)  # [B*G,Q,L]
    scores = product.float()
    scores.add_(product.baddbmm_(q, k.mT, beta=-1))  # the rounding error of the first product
    return scores.unflatten(0, (B, G))


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, softcap: float | None = None
) -> Partial:
    """Compute attention over one block of keys, and the log-sum-exp that merges it with other blocks.

    q [B,G,Q,D], k [B,G,L,D], v [B,G,L,D], mask [B or 1,G or 1,Q or 1,L]: bool, True where a key is visible, or a bias
    in the scores' dtype that is added to them. softcap: scores become softcap * tanh(score / softcap) before the mask.
    Returns out [B,G,Q,D] and lse [B,G,Q,1], the natural log of the sum of exponentiated scores; both fp32 (fp64 for
    fp64 inputs). If a query sees no key, its out is 0 and its lse -inf. Scores are scaled by 1 / sqrt(D).

    On CUDA a fused kernel is used, elsewhere matrix products and a softmax: compiled on a CPU, they are faster than the
    fused kernels (docs/benchmarks.md). In eager mode large scores are computed a few heads at a time: no key is read
    twice, and at most SCORES_AT_ONCE scores, or one head's, are held. If q, k or v requires gradients, both results
    have them: matrix products are used, whose scores are recomputed in the backward pass instead of stored.
    """
    B, G, Q, D = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    if mask is not None and mask.dim() != 4:
        raise ValueError(f"mask has shape {tuple(mask.shape)}: expected four dimensions, [B or 1,G or 1,Q or 1,L]")
    if k.shape[-2] == 0:  # amax rejects an empty dimension
        return q.new_zeros(q.shape, dtype=dtype), q.new_full((B, G, Q, 1), -math.inf, dtype=dtype)
    boolean = mask is None or mask.dtype == torch.bool  # a fused kernel would round a bias to q's dtype
    records = differentiated(q, k, v)
    if boolean and softcap is None and not records and has_fused(q.device, q.dtype, D):
        return fused_partial(q, k, v, mask)  # its log-sum-exp has no gradient
    again = partial(checkpoint, attend_heads, use_reentrant=False, preserve_rng_state=False)
    attend = again if records else attend_heads
    at_once = SCORES_AT_ONCE.get(q.device.type, 1 << 28)
    if torch.compiler.is_compiling() or B * G * Q * k.shape[-2] <= at_once:
        return attend(q, k, v, mask, softcap)
    heads = max(1, at_once // max(1, B * Q * k.shape[-2]))
    out, lse = q.new_empty(q.shape, dtype=dtype), q.new_empty((B, G, Q, 1), dtype=dtype)
    for first in range(0, G, heads):
        part = slice(first, first + heads)
        own = mask[:, part] if mask is not None and mask.shape[1] > 1 else mask
        out[:, part], lse[:, part] = attend(q[:, part], k[:, part], v[:, part], own, softcap)
    return out, lse


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float | None) -> Partial:
    """Compute partial_attention over all heads at once, for at least one key. Differentiable: nothing that autograd
    reads again is overwritten, and the peak is detached, since the results do not depend on it."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    scores = raw_scores(q, k).mul_(1 / math.sqrt(q.shape[-1]))  # [B,G,Q,L]
    if softcap is not None:
        scores = scores.div_(softcap).tanh_()
        scores = scores * softcap if scores.requires_grad else scores.mul_(softcap)
    if mask is not None:
        scores = scores.masked_fill_(~mask, -math.inf) if mask.dtype == torch.bool else scores.add_(mask)
    peak = scores.detach().amax(-1, keepdim=True)  # [B,G,Q,1]
    # A finite floor avoids (-inf) - (-inf) = nan in rows that see no key. In all others the peak itself contributes 1.
    weights = scores.sub_(peak.clamp_min(torch.finfo(dtype).min)).exp_()
    total = weights.sum(-1, keepdim=True).clamp_min(1)  # [B,G,Q,1]
    v = v if v.dtype == torch.bfloat16 else v.to(dtype)  # float16 would overflow in the sum over the keys
    out = (weights.to(v.dtype) @ v).to(dtype) / total  # [B,G,Q,D]
    return out, peak + total.log()


def merge_partials(partials: Sequence[Partial]) -> Partial:
    """Merge partial attentions over disjoint blocks of keys into the attention over all of them.

    partials: (out [..., D], lse [..., 1]) each, as partial_attention returns them. Returns (out, lse) of the union, so
    merging is associative; merging with a block without visible keys (lse -inf) returns the other block unchanged.
    """
    if len(partials) == 1:
        return partials[0]
    # No stack of the parts: compiled on CUDA it is a kernel for each.
    peak = reduce(torch.maximum, (lse.detach() for _, lse in partials))  # detached and floored as in attend_heads
    floor = peak.clamp_min(torch.finfo(peak.dtype).min)
    weights = [(lse - floor).exp() for _, lse in partials]
    total = sum(weights[1:], weights[0]).clamp_min(1)
    out = sum(out * weight for (out, _), weight in zip(partials, weights, strict=True))
    return out / total, peak + total.log()


def shared_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, softcap: float | None = None
) -> Partial:
    """Compute partial attention of N query rows over R rows of keys, each shared by N // R consecutive query rows.

    q [N,H,S,D], k [R,G,L,D], v [R,G,L,D], mask [N, R or 1,H or 1,S or 1,L]: per query row, per key row, or one for all;
    mask and softcap as in partial_attention. Returns out [N,H,S,D], lse [N,H,S,1]. The query rows that share a key, and
    the P query heads of its group, fold into the query dimension of one product: every key is read once, whatever N and
    P are, for multi-head, grouped-query and multi-query attention alike. Raises ValueError if the shapes do not fit.
    """
    N, H, S, D = q.shape
    R, G = k.shape[:2]
    n, P = N // max(R, 1), H // max(G, 1)
    if n * R != N or P * G != H or k.shape[-1] != D or v.shape != k.shape or (mask is not None and mask.dim() != 4):
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)} and v {tuple(v.shape)}: expected q [N,H,S,D], "
            "k, v [R,G,L,D] with N a multiple of R and H a multiple of G, and a mask of four dimensions"
        )
    q = q.reshape(R, n, G, P, S, D).transpose(1, 2).reshape(R, G, n * P * S, D)
    if mask is not None and mask.shape[0] in (1, R) and (mask.shape[1] == 1 or P == 1):
        mask = mask.repeat(1, 1, n * P, 1) if mask.shape[2] > 1 else mask  # [R or 1,G or 1,n*P*S or 1,L]
    elif mask is not None:
        mask = mask.repeat_interleave(N // mask.shape[0], 0)
        heads = G if mask.shape[1] > 1 else 1
        mask = mask.expand(N, heads * P, S, -1).reshape(R, n, heads, P, S, -1).transpose(1, 2).flatten(2, 4)
    out, lse = partial_attention(q, k, v, mask, softcap)  # [R,G,n*P*S,D] [R,G,n*P*S,1]
    out = out.reshape(R, G, n, P, S, D).transpose(1, 2).reshape(N, H, S, D)
    lse = lse.reshape(R, G, n, P, S, 1).transpose(1, 2).reshape(N, H, S, 1)
    return out, lse


@dataclass(frozen=True)
class ScoreMod:
    """Modification of a layer's scores beyond causality; None in its place: plain causal attention.

    window: sliding-window size, current token included. slopes: ALiBi's fp32 [H]. softcap: scores become softcap *
    tanh(score / softcap).
    """

    window: int | None = None
    slopes: Tensor | None = None
    softcap: float | None = None

    def mask(self, visible: Tensor | None, input_pos: Tensor, key_pos: Tensor) -> Tensor | None:
        """Build the mask or bias. visible bool [R,1,S or 1,L] or None (all), input_pos [N,S], key_pos [R,L], each of R
        rows of keys shared by N // R consecutive query rows. Returns the mask of visible keys, bool [N,1,S,L] or None;
        with slopes the bias to add to the scores, fp32 [N,H,S,L] or [R,H,1,L]."""
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
        """Return the ALiBi bias: input_pos [N,S], key_pos [M,L] -> fp32 [M,H,1,L]. Distances are to the last position
        of the call: this shifts all scores of a query alike, in all caches, and cancels in the softmax."""
        assert self.slopes is not None
        return self.slopes[:, None, None] * (key_pos - input_pos.max())[:, None, None]


def repeat_rows(tensor: Tensor, n: int) -> Tensor:
    """Repeat each row n times consecutively: [R,...] -> [R*n,...]; a view if R is 1."""
    return tensor[:, None].expand(-1, n, *tensor.shape[1:]).flatten(0, 1)


def bifurcated_attention(
    q: Tensor, k_context: Tensor, v_context: Tensor, k_decoded: Tensor, v_decoded: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Attend with N samples to one shared context and to their own decoded tokens: the paper's operation.

    q [N,H,S,D], k_context and v_context [1,G,T,D] (or [R,G,T,D]: R contexts, each shared by N // R consecutive rows),
    k_decoded and v_decoded [N,G,L,D], mask bool [N or 1,1,S or 1,L], True where a decoded key is visible (None: all
    are). Returns [N,H,S,D] in q's dtype; softmax and merge are in fp32. All tensors share one dtype.

    Raises ValueError if the shapes do not fit. Source: arXiv 2403.08845, section 4.2 and appendix E.
    """
    if k_decoded.shape[0] != q.shape[0]:
        raise ValueError(f"q has {q.shape[0]} rows and k_decoded {k_decoded.shape[0]}: expected the same number")
    context = shared_attention(q, k_context, v_context)
    decoded = shared_attention(q, k_decoded, v_decoded, mask)
    return merge_partials([context, decoded])[0].to(q.dtype)
