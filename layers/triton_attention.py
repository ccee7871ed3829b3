"""Attention of a decode step over a chain of caches, in Triton, for CUDA.

`attend_part` runs once per ancestor: all queries that continue one of its rows fold into one matrix product, so that
each key is read once, and the keys are split over programs. It runs a last time over each row's own keys, which it
merges with all splits. Lengths and positions are read on the device: a recorded CUDA graph serves them all.

The reference is attend_by_torch (cache.py), which runs where this file or Triton is missing. In Triton's interpreter
(TRITON_INTERPRET=1) the kernel runs on a CPU.

Shapes: N rows, S positions, H query heads, G key/value heads, P = H // G, L slots and R rows of one cache, D head
dimension.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from bifurcated_attention import ScoreMod
from layers.kernels import LARGEST_HEAD_DIM, Chain, check_gradients

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def dot(a, b, total):
    """Multiply, and add in fp32; the interpreter would multiply bfloat16 as integers."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """Round to dtype; the interpreter would cut bfloat16 off instead, and reinterpret integers as its bits."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tanh(x):
    """Compute tanh; near 0, where the difference of exponentials cancels, by its series."""
    y, square = tl.exp(-2 * tl.abs(x)), x * x
    far = tl.where(x < 0, y - 1, 1 - y) / (1 + y)
    return tl.where(tl.abs(x) < 0.2, x * (1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315)))), far)


@triton.jit
def attend_keys(
    x, pos, slope, k, v, k_scale, v_scale, key_stride, key_start, first, last,
    D: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Attend from x [BM,BD] to the slots [first, last) of one row and head -> the peak and the sum of the weights [BM],
    base 2, and the weighted sum of the values [BM,BD]."""
    d, n = tl.arange(0, x.shape[1]), tl.arange(0, BN)
    peak, total = tl.full([x.shape[0]], float("-inf"), tl.float32), tl.zeros([x.shape[0]], tl.float32)
    out = tl.zeros(x.shape, tl.float32)
    for at in range(first, last, BN):
        slot = at + n
        written = slot < last
        where, there = slot[:, None] * key_stride + d, written[:, None] & (d < D)
        keys = narrow(tl.load(k + where, mask=there, other=0.0), x.dtype)
        scores = dot(x, tl.trans(keys), tl.zeros([x.shape[0], BN], tl.float32)) * (D**-0.5)
        if k_scale is not None:
            scores *= tl.load(k_scale + slot, mask=written, other=0.0).to(tl.float32)
        if SOFTCAP > 0:
            scores = SOFTCAP * tanh(scores / SOFTCAP)
        distance, seen = pos[:, None] - (key_start + slot), written[None]
        if slope is not None:
            scores -= slope[:, None] * distance
        if CAUSAL:
            seen = seen & (distance >= 0)
        if WINDOW > 0:
            seen = seen & (distance < WINDOW)
        scores = tl.where(seen, scores * LOG2E, float("-inf"))
        before, peak = peak, tl.maximum(peak, tl.max(scores, 1))
        floor = tl.where(peak == float("-inf"), 0.0, peak)  # no (-inf) - (-inf)
        weights, old = tl.exp2(scores - floor[:, None]), tl.exp2(before - floor)
        total = total * old + tl.sum(weights, 1)
        if v_scale is not None:
            weights *= tl.load(v_scale + slot, mask=written, other=0.0).to(tl.float32)
        values = narrow(tl.load(v + where, mask=there, other=0.0), x.dtype)
        out = dot(narrow(weights, x.dtype), values, out * old[:, None])
    return peak, total, out


@triton.jit
def visible_slots(at, valid, slots, WINDOW: tl.constexpr, CAUSAL: tl.constexpr):
    """Bound the slots that a block's queries see, of those written: first and last, last excluded. at [BM]: each
    query's position in slots. valid [BM]: False for padding."""
    first = 0
    if CAUSAL:
        slots = tl.minimum(slots, tl.max(tl.where(valid, at + 1, 0)))
    if WINDOW > 0:
        first = tl.maximum(first, tl.min(tl.where(valid, at, 2**30)) - WINDOW + 1)
    return first, tl.where(tl.max(valid.to(tl.int32)) > 0, tl.maximum(slots, first), first)


@triton.jit
def merge(peak, total, out, outs, lses, query, every, splits, valid, inside, D: tl.constexpr):
    """Add the splits of a block's queries to what attend_keys returned -> the sum of the weights and the weighted sum
    of the values. query [BM]: index in a split; every: their number in one."""
    for i in tl.range(0, splits, loop_unroll_factor=2):
        lse = tl.load(lses + i * every + query, mask=valid, other=float("-inf"))
        there = inside & (lse > float("-inf"))[:, None]  # others are not written
        part = tl.load(outs + (i * every + query)[:, None] * D + tl.arange(0, out.shape[1]), mask=there, other=0.0)
        before, peak = peak, tl.maximum(peak, lse)
        floor = tl.where(peak == float("-inf"), 0.0, peak)
        old, weight = tl.exp2(before - floor), tl.exp2(lse - floor)
        total, out = total * old + weight, out * old[:, None] + part * weight[:, None]
    return total, out


# Not compiled anew for values of 1 and multiples of 16, which come and go as caches grow.
@triton.jit(do_not_specialize=["slots", "n", "S", "first_split", "all_splits", "N", "scale_row", "scale_head"])
def attend_part(
    q, k, v, k_scale, v_scale, k_channel, start, length, group, place, input_pos, slopes, outs, lses, y,
    slots, n, S, first_split, all_splits, N, q_row, q_head, q_pos, row_stride, head_stride, key_stride,
    scale_row, scale_head, G: tl.constexpr, P: tl.constexpr, D: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, CAUSAL: tl.constexpr, MERGE: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Attend from the queries of a block, of up to n rows that continue one row of a cache, to one split of its slots.

    Tensors as in Part; input_pos [N,S], slopes [H]. Stores out and lse, base 2, in outs [splits,N,H,S,D] and lses
    [splits,N,H,S]; with MERGE instead all splits and this part, merged, in y [N,S,H,D]."""
    blocks, block, split = tl.cdiv(n * S * P, BM), tl.program_id(0), tl.program_id(1)
    r, g = (block // blocks // G).to(tl.int64), (block // blocks % G).to(tl.int64)
    m, d = block % blocks * BM + tl.arange(0, BM), tl.arange(0, BD)
    valid, at, s, head = m < n * S * P, r * n + m // (S * P), m // P % S, g * P + m % P
    row = at
    if group is not None:  # its padding repeats rows that have their place elsewhere
        row = tl.load(group + at, mask=valid, other=0)
        valid = valid & (tl.load(place + row) == at)
    pos, key_start = tl.load(input_pos + row * S + s, mask=valid, other=0).to(tl.int32), tl.load(start + r).to(tl.int32)
    if length is not None:
        slots = tl.minimum(slots, tl.load(length + r).to(tl.int32))
    first, last = visible_slots(pos - key_start, valid, slots, WINDOW, CAUSAL)
    each = tl.cdiv(tl.cdiv(last - first, BN), tl.num_programs(1)) * BN
    first, last = first + split * each, tl.minimum(last, first + (split + 1) * each)
    inside = valid[:, None] & (d < D)
    x = tl.load(q + (row * q_row + head * q_head + s * q_pos)[:, None] + d, mask=inside, other=0.0)
    slope = tl.load(slopes + head) if slopes is not None else None
    base, scales = r * row_stride + g * head_stride, r * scale_row + g * scale_head
    if k_channel is not None:
        channel = tl.load(k_channel + (r * G + g) * D + d, mask=d < D, other=0.0)
        x = narrow(x.to(tl.float32) * channel.to(tl.float32), x.dtype)
        k_scale += scales
        v_scale += scales
    peak, total, out = attend_keys(
        x, pos, slope, k + base, v + base, k_scale, v_scale, key_stride, key_start, first, last,
        D, WINDOW, SOFTCAP, CAUSAL, BN,
    )  # fmt: skip
    query, every = (row * G * P + head) * S + s, N.to(tl.int64) * G * P * S
    if MERGE:
        total, out = merge(peak, total, out, outs, lses, query, every, all_splits, valid, inside, D)
    some = tl.where(total == 0, 1.0, total)  # of a query that sees nothing, out is 0
    out = out / some[:, None]
    if MERGE:
        tl.store(y + ((row * S + s) * G * P + head)[:, None] * D + d, narrow(out, y.dtype.element_ty), mask=inside)
    else:
        query += (first_split + split) * every
        tl.store(outs + query[:, None] * D + d, out, mask=inside & (total > 0)[:, None])
        tl.store(lses + query, peak + tl.log2(some), mask=valid)


class Part(NamedTuple):
    """One cache of a chain: k, v [R,G,L,D] and, if they are int8, k_scale, v_scale [R,G,L,1] and k_channel [R,G,1,D].
    start [R]: position of each row's first slot. length [R]: number of written slots; None: all. group [R*n], place
    [N]: the rows that continue each of its rows, as in Link; None: consecutive, equal shares."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    k_channel: Tensor | None
    start: Tensor
    length: Tensor | None
    group: Tensor | None
    place: Tensor | None


def tile(queries: int, head_dim: int, itemsize: int) -> tuple[int, int, int, int]:
    """Choose the tile for queries that share keys -> queries, padded head dimension, keys, warps. Registers hold it,
    and shared memory (99 KB on compute capability 8.9) three stages of keys. A product needs 16 of each."""
    width = max(16, triton.next_power_of_2(head_dim))
    keys = min(64, max(16, (1 << 15) // (width * itemsize**2)))
    BM = 16 if itemsize == 4 else min(keys, max(16, triton.next_power_of_2(queries)))
    return BM, width, keys, 4 if BM == 16 and width * itemsize <= 512 else 8


def split_count(slots: int, programs: int, multiprocessors: int) -> int:
    """Choose into how many splits the slots of each row and head are divided: as many as fill the device once, at two
    programs on a multiprocessor, of at least 128 slots each. programs: without a split."""
    return max(1, min(2 * multiprocessors // programs, slots // 128, 64))


def takes(device: torch.device, dtype: torch.dtype, head_dim: int = 1) -> bool:
    """Return whether Triton's kernels support such tensors on this device: CUDA, from compute capability 8.0 on."""
    fits = dtype in (torch.float32, torch.bfloat16, torch.float16) and head_dim <= LARGEST_HEAD_DIM
    return device.type == "cuda" and fits and torch.cuda.get_device_properties(device).major >= 8


def attend_chain(cache: Chain, layer: int, q: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
    """Attend from q [N,H,S,D] at input_pos [N,S] to a cache and all its ancestors -> [N,H,S,D]."""
    tensors: list[Tensor | None] = []
    for each, *link in [(cache, None, None, None)] + [(a.cache, a.length, a.group, a.place) for a in cache.links]:
        k, v, *scales = each.tensors[layer :: len(each.k)]
        tensors += [k, v, *(scales or [None] * 3), each.start, *link]
    mod = mod or ScoreMod()
    return torch.ops.bifurcated.attend_split(q, tensors, input_pos, mod.slopes, mod.window or 0, mod.softcap or 0.0)


def attend_split(
    q: Tensor, tensors: Sequence[Tensor | None], input_pos: Tensor, slopes: Tensor | None, window: int, softcap: float
) -> Tensor:
    """Implement the operator. tensors: the fields of all parts, concatenated, the rows' own first. Raises ValueError if
    a part does not fit the queries."""
    check_gradients("attention in Triton", q, slopes, *tensors)
    size, (N, H, S, D) = len(Part._fields), q.shape
    own, *links = (Part(*tensors[i : i + size]) for i in range(0, len(tensors), size))  # type: ignore[arg-type]
    q, input_pos = q if q.stride(3) == 1 else q.contiguous(), input_pos.contiguous()
    G, launches, done = own.k.shape[1], [], 0
    cores = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 16
    for part in (own, *links):
        n = (N if part.group is None else len(part.group)) // len(part.k)
        queries = n * S * (H // G)
        *sizes, warps = tile(min(queries, 32) if part is own else queries, D, q.element_size())
        programs = len(part.k) * G * triton.cdiv(queries, sizes[0])
        splits = split_count(part.k.shape[2], programs, cores)
        launches.append((part, n, sizes, warps, programs, splits))
    merges = (*launches[0][:-1], 1)  # last, over the own slots unless these are split too
    launches, slots = (launches[1:], own.k.shape[2]) if launches[0][-1] == 1 else (launches, 0)
    total, y = sum(splits for *_, splits in launches), attend_shape(q)
    outs = q.new_empty(total, N, H, S, D, dtype=torch.float32)
    lses = outs.new_empty(total, N, H, S)
    if any(part.group is not None for part in links):
        lses.fill_(-math.inf)  # rows that continue no row of a link
    for part, n, sizes, warps, programs, splits in (*launches, merges):
        k, v, *others = part
        if k.shape[1:] != (G, k.shape[2], D) or k.stride() != v.stride() or k.stride(3) != 1 or H % G:
            raise ValueError(f"keys {list(k.shape)} and values {list(v.shape)} do not fit queries {list(q.shape)}")
        scales = (0, 0) if part.k_scale is None else part.k_scale.stride()[:2]
        with torch.cuda.device_of(q):
            attend_part[(programs, splits)](
                q, k, v, *others, input_pos, slopes, outs, lses, y, slots if done == total else k.shape[2], n, S,
                done, total, N, *q.stride()[:3], *k.stride()[:3], *scales, G, H // G, D, window, softcap,
                part is own, done == total, *sizes, num_warps=warps,
            )  # fmt: skip
        done += splits
    return y


def attend_shape(q: Tensor, *_: object) -> Tensor:
    """Allocate the output; also the meta implementation. The heads of a position are adjacent, for the next linear."""
    N, H, S, D = q.shape
    return q.new_empty(N, S, H, D).transpose(1, 2)


OPERATORS = torch.library.Library("bifurcated", "FRAGMENT")
OPERATORS.define(
    "attend_split(Tensor q, Tensor?[] tensors, Tensor input_pos, Tensor? slopes, int window, float softcap) -> Tensor",
    tags=(torch.Tag.flexible_layout,),  # or a compiled step would copy the keys and values that it has written
)
OPERATORS.impl("attend_split", attend_split, "CPU" if INTERPRETED.value else "CUDA")
OPERATORS.impl("attend_split", attend_shape, "Meta")
