"""Products with quantised weights, and with the experts of a mixture, in Triton, for CUDA.

The kernel reads int8 or int4 codes and widens them in registers; scales and zeros multiply sums of products, in fp32.
A mixture's rows are sorted by expert, and each program finds its expert from the ends of the runs on the device: the
host need not wait, and a recorded CUDA graph serves every routing. Tiles are estimated, not measured.

The reference is a product with the dequantised weight (linear.py), for a mixture the loop of moe.py; they run where
this file or Triton is missing. In Triton's interpreter (TRITON_INTERPRET=1) the kernel runs on a CPU.

Shapes: R rows, E experts; out, in: a layer's features; groups: runs of `in` that share a scale.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from layers.kernels import check_gradients
from layers.triton_attention import INTERPRETED, dot, narrow

SMALLEST_GROUP = 32  # a product needs 16 inputs in each half of the bytes of a group


@triton.jit
def rows_of_block(ends, block, E: tl.constexpr, BM: tl.constexpr):
    """Find the rows of a block, which are of one expert -> the expert, the first row, and the end of the expert's run.
    Blocks beyond the last have no rows."""
    e = tl.arange(0, triton.next_power_of_2(E))
    end = tl.load(ends + e, mask=e < E, other=0)
    begin = tl.load(ends + e - 1, mask=(e > 0) & (e < E), other=0)
    blocks = tl.cdiv(tl.where(e < E, end - begin, 0), BM)
    upto = tl.cumsum(blocks)
    expert = tl.sum((upto <= block).to(tl.int32))
    mine = e == expert
    row = tl.sum(tl.where(mine, begin + (block - upto + blocks) * BM, 0))
    return tl.minimum(expert, E - 1), row, tl.sum(tl.where(mine, end, 0))


# Not compiled anew for values of 1 and multiples of 16, which come and go as samples end.
@triton.jit(do_not_specialize=["R"])
def multiply_rows(
    x, values, scales, zeros, bias, ends, y, R, outputs, inputs, E: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Multiply a block of rows of x [R,in] by a block of an expert's outputs -> y [R,out].

    Tensors as in `widened_linear`. GROUP: inputs that share a scale and a zero; they are read in runs of BK."""
    block = tl.program_id(1)
    expert, row, end = tl.zeros([], tl.int32), block * BM, R
    if ends is not None:
        expert, row, end = rows_of_block(ends, block, E, BM)
    if row >= end:
        return
    m, n = row.to(tl.int64) + tl.arange(0, BM), tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    k, there, inside = tl.arange(0, BK), (m < end)[:, None], n < outputs
    out = expert.to(tl.int64) * outputs + n  # a row of values [E*out,in]
    total = tl.zeros([BM, BN], tl.float32)
    for at in tl.range(0, inputs, BK, loop_unroll_factor=UNROLL):
        rows = tl.load(x + m[:, None] * inputs + at + k, mask=there & (at + k < inputs), other=0.0)
        if zeros is not None:  # two codes in a byte
            h = tl.arange(0, BK // 2)
            codes = tl.load(values + out[:, None] * (inputs // 2) + at // 2 + h, mask=inside[:, None], other=0)
            even, odd = tl.split(tl.reshape(rows, [BM, BK // 2, 2]))
            part = dot(even, tl.trans(narrow(codes >> 4, rows.dtype)), tl.zeros([BM, BN], tl.float32))
            part = dot(odd, tl.trans(narrow(codes & 15, rows.dtype)), part)
            group = out * (inputs // GROUP) + at // GROUP
            scale = tl.load(scales + group, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros + group, mask=inside, other=0.0).to(tl.float32) - 8 * scale
            total += part * scale[None] + tl.sum(rows.to(tl.float32), 1)[:, None] * zero[None]
        else:
            there_too = inside[:, None] & (at + k < inputs)
            codes = tl.load(values + out[:, None] * inputs + at + k, mask=there_too, other=0)
            total = dot(rows, tl.trans(narrow(codes, rows.dtype)), total)
    if zeros is None and scales is not None:
        total *= tl.load(scales + out, mask=inside, other=0.0).to(tl.float32)[None]
    if bias is not None:
        total += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None]
    tl.store(y + m[:, None] * outputs + n, narrow(total, y.dtype.element_ty), mask=there & inside[None])


class Tile(NamedTuple):
    """Rows, outputs and inputs that a program multiplies at a time, how often it does so in an iteration, its warps,
    and the iterations whose loads are in flight."""

    BM: int
    BN: int
    BK: int
    unroll: int
    warps: int
    stages: int


def tile(rows: int, itemsize: int, code_bytes: int, group: int) -> Tile:
    """Choose the tile for so many rows by one weight. itemsize: bytes of an input. code_bytes: of a value. group:
    inputs that share a zero, 0: none. Few rows are limited by the memory, and need many programs and loads in flight;
    shared memory is 99 KB on compute capability 8.9, some of it for widened values."""
    BM = min(64 if itemsize == 2 else 32, max(16, triton.next_power_of_2(rows)))
    BN, BK = 32 if BM == 16 or itemsize == 4 else 64, 32 if itemsize == 4 else 128 // code_bytes
    BK = min(BK, group & -group) if group else BK
    unroll = 128 // BK if group and BM == 16 and itemsize == 2 else 1
    loaded = BK * unroll * (BM * itemsize + BN * code_bytes // (2 if group else 1))
    return Tile(BM, BN, BK, unroll, 8 if BM == 64 else 4, min(5, (72 << 10) // loaded))


def widened_linear(
    x: Tensor, values: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None, ends: Tensor | None
) -> Tensor:
    """Implement the operator: multiply x [R,in] by values [out,in] of x's dtype, or int8 with scales [out], or, two in
    a byte, by uint8 [out,in/2] with scales and zeros [out,groups], as linear.py stores them; add bias [out].

    ends [E], int32: multiply rows sorted by expert in runs that end there by their experts' values, all tensors but x
    and ends with another first dimension E. Raises ValueError if a weight does not fit x."""
    check_gradients("a product in Triton", x, values, bias)
    R, inputs = x.shape
    E, outputs = 1 if ends is None else len(ends), values.shape[-2]
    halves, group = 1 + (zeros is not None), 0 if zeros is None or scales is None else inputs // scales.shape[-1]
    if values.shape[-1] * halves != inputs or group % SMALLEST_GROUP or values.numel() * halves != E * outputs * inputs:
        raise ValueError(f"values {list(values.shape)} in groups of {group} do not fit {E} experts and {list(x.shape)}")
    x, y = x.contiguous(), x.new_empty(R, outputs)
    if R:
        BM, BN, BK, unroll, warps, stages = tile(-(-R // E), x.element_size(), values.element_size(), group)
        blocks = (R + min(E, R) * (BM - 1)) // BM  # the most that runs of R rows in all can have
        with torch.cuda.device_of(x):
            multiply_rows[(triton.cdiv(outputs, BN), blocks)](
                x, values, scales, zeros, bias, ends, y, R, outputs, inputs, E, group, BM, BN, BK, unroll,
                num_warps=warps, num_stages=stages,
            )  # fmt: skip
    return y


def widened_shape(x: Tensor, values: Tensor, *_: object) -> Tensor:
    """Meta implementation of `widened_linear`."""
    return x.new_empty(x.shape[0], values.shape[-2])


OPERATORS = torch.library.Library("bifurcated", "FRAGMENT")
OPERATORS.define(
    "widened_linear(Tensor x, Tensor values, Tensor? scales, Tensor? zeros, Tensor? bias, Tensor? ends) -> Tensor"
)
OPERATORS.impl("widened_linear", widened_linear, "CPU" if INTERPRETED.value else "CUDA")
OPERATORS.impl("widened_linear", widened_shape, "Meta")
