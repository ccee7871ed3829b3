"""Quantise weights to int8 or int4: by rounding to nearest, or by GPTQ, which compensates for rounding errors.

Shapes: out, in: a layer's features; groups: runs of `in` that share a scale.
"""

import torch
from torch import Tensor

from layers.linear import Int4Weight, Int8Weight

COLUMNS = 128  # GPTQ's block size, a multiple of every groupsize: later columns are updated once per block
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # scale of an all-zero group


def quantise_int8(weight: Tensor) -> Int8Weight:
    """Round weight [out,in] to int8; no element is off by more than half its channel's scale."""
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).clamp_min(SMALLEST_SCALE).bfloat16()
    return Int8Weight((weight / scales.float()[:, None]).round_().to(torch.int8), scales)


def int4_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a grid to each group: groups fp32 [...,groupsize] -> scales, zeros bfloat16 [...]. Every element is within
    half a scale of one of the 16 values: the scale also covers the rounding of the zero to bfloat16."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales = torch.maximum((high - low) / 15, torch.maximum(-low, high) / 240).clamp_min(SMALLEST_SCALE).bfloat16()
    return scales, ((low + high + scales.float()) / 2).bfloat16()


def int4_codes(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """Round to the nearest codes, 0 to 15, in fp32. The shapes must broadcast."""
    return ((weight - zeros.float()) / scales.float() + 8).round_().clamp_(0, 15)


def quantise_int4(weight: Tensor, groupsize: int) -> Int4Weight:
    """Round weight [out,in] to int4, with one scale and zero per `groupsize` inputs."""
    groups = weight.float().unflatten(1, (-1, groupsize))  # [out,groups,groupsize]
    scales, zeros = int4_grid(groups)
    codes = int4_codes(groups, scales[..., None], zeros[..., None])
    return Int4Weight.from_codes(codes.flatten(1).to(torch.uint8), scales, zeros)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Compute the upper Cholesky factor of a damped Hessian's inverse [in,in]; damping grows until that succeeds."""
    damping = (0.01 * hessian.diagonal().mean()).clamp_min(1e-12)  # positive even if all inputs are 0
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * torch.eye(len(hessian)))
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not (failed or failed_too):
            return upper
        damping *= 10
    raise ValueError("the calibration text leads to activations that are not finite: use --mode int4")


def gptq(weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = False) -> Int4Weight:
    """Quantise to int4 with little change of the layer's outputs; Frantar et al. 2022 (arXiv 2210.17323), algorithm 1.

    weight: fp32 [out,in]. hessian: the sum of x x^T over the calibration inputs x, fp32 [in,in]. act_order: quantise
    the columns of the largest inputs first, with group grids from the original weight. Each column is rounded and its
    error compensated in the columns after it. The column of an input that is always 0 is rounded to nearest: the
    damping alone decouples it from the others.
    """
    by_size = hessian.diagonal().argsort(descending=True, stable=True)
    order = by_size if act_order else torch.arange(len(hessian))
    scales, zeros = int4_grid(weight.unflatten(1, (-1, groupsize)))  # [out,groups]
    upper = inverse_factor(hessian[order][:, order])
    columns = weight.t()[order].contiguous()  # [in,out]
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for begin in range(0, len(columns), COLUMNS):
        end = min(begin + COLUMNS, len(columns))
        errors = torch.empty_like(columns[begin:end])
        for i in range(begin, end):
            group = int(order[i]) // groupsize
            if not act_order and i % groupsize == 0:
                scales[:, group], zeros[:, group] = int4_grid(columns[i : i + groupsize].t())
            scale, zero = scales[:, group].float(), zeros[:, group].float()
            code = int4_codes(columns[i], scale, zero)
            errors[i - begin] = (columns[i] - ((code - 8) * scale + zero)) / upper[i, i]
            columns[i + 1 : end] -= upper[i, i + 1 : end, None] * errors[i - begin]
            codes[order[i]] = code.to(torch.uint8)
        columns[end:] -= upper[begin:end, end:].t() @ errors
    return Int4Weight.from_codes(codes.t(), scales, zeros)
