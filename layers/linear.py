"""Linear layers: how a weight is held, and by which kernel it is multiplied.

`choose_way` alone decides, and names each way as the report does. `make_linear` makes the layer of an int8 or int4
weight; `hold_linears` replaces plain layers, or dequantised ones, by streamed or packed ones. oneDNN reorders a plain
bfloat16 weight at every product, a packed one only once. Plain fp32 products do not use oneDNN; packed ones do, and are
faster above some number of rows. A packed weight is opaque to torch.compile, so a graph holds its number, and a custom
op looks the weight up.

No other file depends on these kernels: if choose_way returned "plain" or "dequantised", everything would still work.

Shapes: N rows, S positions; out, in: a layer's features; groups: runs of `in` that share a scale.
"""

import ctypes
import itertools
import math
import mmap
import platform
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from bifurcated_attention import differentiated
from layers.joined import Joinable, JoinedLinear
from layers.kernels import STREAMED_ROWS, check_gradients, multiplies
from layers.moe import ExpertLinear, GroupedLinear, MixtureOfExperts, can_group

# Elements below which packing gains nothing (2 cores): the op call itself costs some 5 us.
MIN_PACK_ELEMENTS = 1 << 17

BLOCK = 1 << 19  # elements dequantised at a time, to stay in a CPU's cache

IS_X86 = platform.machine() in ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Return whether the CPU has bfloat16 multiply instructions. Without them (plain AVX-512) oneDNN's bfloat16 takes
    two thirds of the time of fp32 for a step of one row, which is memory-bound, but four times as long for 64 rows
    (docs/benchmarks.md), and prefill is compute-bound."""
    if IS_X86:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class HeldLinear(nn.Module):
    """Linear layer for inference whose weight is packed or quantised. kernel: name of the kernel that multiplies by it.

    Custom ops have no gradients: if autograd needs those of the input or the bias, F.linear runs instead."""

    kernel: str


def swap_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None], shared: bool = False) -> None:
    """Replace every nn.Linear by make(name, linear), unless that is None; one at a time, so that at most one weight is
    held twice.

    shared: also those whose weight is an embedding's, or a part of it: a copy would be in memory twice.
    """
    tables = {storage_of(module) for module in model.modules() if isinstance(module, nn.Embedding)}
    parents = [(name, module) for name, module in model.named_modules() if not isinstance(module, nn.Linear)]
    for prefix, parent in parents:
        for name in list(parent._modules):
            child = parent._modules[name]
            if isinstance(child, nn.Linear) and (shared or storage_of(child) not in tables):
                made = make(f"{prefix}.{name}" if prefix else name, child)
                if made is not None:
                    replace_module(parent, name, made)


def storage_of(module: nn.Linear | nn.Embedding) -> StorageWeakRef:
    """Return the identity of the memory that holds a module's weight."""
    return StorageWeakRef(module.weight.untyped_storage())


def replace_module(parent: nn.Module, name: str, made: nn.Module) -> None:
    """Replace a child module and keep its forward hooks, such as the all-gather of a sharded output."""
    made._forward_hooks.update(parent._modules[name]._forward_hooks)  # type: ignore[union-attr]
    setattr(parent, name, made)


def kernels(model: nn.Module) -> dict[str, int]:
    """Count linear layers by the way that they are held."""
    linears = (
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | HeldLinear | GroupedLinear | TritonExperts)
    )
    return dict(Counter(map(kernel_of, linears)))


def kernel_of(linear: nn.Module) -> str:
    return getattr(linear, "kernel", "plain")


def form_of(linear: nn.Module) -> str:
    """Return "plain" or "dequantised", however the layer multiplies."""
    return kernel_of(linear).partition(", ")[0]


class MappedFiles:
    """Files mapped into this process, to free pages whose tensors have been converted or packed. A freed page is read
    from its file again on access. Linux only: elsewhere mappings are not listed, and pages stay."""

    DONTNEED = 4  # MADV_DONTNEED

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = [line.split(maxsplit=5) for line in (maps.read_text().splitlines() if maps.exists() else ())]
        files = [line[0].split("-") for line in lines if line[4] != "0"]  # inode 0: not a file
        self.ranges = [(int(begin, 16), int(end, 16)) for begin, end in files]

    def convert(self, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """tensor.to(device, dtype), a block of rows at a time, freeing its pages after each."""
        if (tensor.device, tensor.dtype) == (torch.device(device), dtype):
            return tensor
        made, rows = torch.empty_like(tensor, device=device, dtype=dtype), max(1, (BLOCK << 2) // tensor[0].numel())
        for mine, theirs in zip(made.split(rows), tensor.split(rows), strict=True):
            mine.copy_(theirs)
            self.release(theirs)
        return made

    def hold(self, tensor: Tensor) -> bool:
        """Return whether a tensor is mapped from a file."""
        if tensor.device.type != "cpu":
            return False
        return any(begin <= tensor.data_ptr() < end for begin, end in self.ranges)

    def release(self, tensor: Tensor) -> None:
        """Free the whole pages that a tensor covers, if they are mapped from a file."""
        page, first = mmap.PAGESIZE, tensor.data_ptr()
        begin, end = -(-first // page) * page, (first + tensor.nbytes) // page * page
        if begin < end and tensor.is_contiguous() and any(low <= begin and end <= high for low, high in self.ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), self.DONTNEED)


NUMBERS = itertools.count()
WEIGHTS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def multiply(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """Multiply x [N,S,in] by the packed weight with this number -> [N,S,out]."""
    check_gradients("packed_linear", x, bias)
    return torch.ops.mkldnn._linear_pointwise(x, WEIGHTS[number], bias, "none", [], "")


def multiply_shape(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """Meta implementation of `multiply`."""
    return x.new_empty(*x.shape[:-1], features)


class StreamedLinear(nn.Linear):
    """nn.Linear using our GEMV (kernels.py) for one or two input rows."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.kernel = f"{form_of(linear)}, streamed"
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if differentiated(x, self.weight, self.bias):
            return super().forward(x)
        return torch.ops.bifurcated.streamed_linear(x, self.weight, self.bias)


class PackedLinear(HeldLinear):
    """Linear layer with a weight prepacked by oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel = f"{form_of(linear)}, packed"
        self.bias, self.features, self.number = linear.bias, linear.out_features, next(NUMBERS)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        WEIGHTS[self.number] = self.packed

    def forward(self, x: Tensor) -> Tensor:
        if differentiated(x, self.bias):
            return F.linear(x, self.packed.to_dense(), self.bias)
        return torch.ops.bifurcated.packed_linear(x, self.bias, self.number, self.features)


meta = partial(torch.empty, device="meta")


@dataclass(frozen=True)
class Int8Weight:
    """Symmetric int8 weight with a scale per output channel: values int8 [out,in] times scales bfloat16 [out]."""

    kind: ClassVar[str] = "int8"
    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, outputs: int, inputs: int, groupsize: int = 0) -> "Int8Weight":
        """Make a weight on the meta device, for its shapes and sizes."""
        return cls(meta(outputs, inputs, dtype=torch.int8), meta(outputs, dtype=torch.bfloat16))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def groupsize(self) -> int:
        return self.shape[1]

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Dequantise to [out,in] in dtype, rounded from fp32."""
        return self.values.float().mul_(self.scales.float()[:, None]).to(dtype)

    def narrow(self, dim: int, begin: int, end: int) -> "Int8Weight":
        """Copy the outputs (dim 0) or inputs (dim 1) from begin to end."""
        scales = self.scales if dim else self.scales[begin:end]
        return Int8Weight(self.values.narrow(dim, begin, end - begin).clone(), scales.clone())


@dataclass(frozen=True)
class Int4Weight:
    """Group-wise int4 weight, (code - 8) * scale + zero; codes 0 to 15, two per byte, the even input in the upper half.

    values uint8 [out,in/2], scales and zeros bfloat16 [out,groups]. The layout is the same on every device;
    TinygemmLinear repacks it.
    """

    kind: ClassVar[str] = "int4"
    values: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def empty(cls, outputs: int, inputs: int, groupsize: int) -> "Int4Weight":
        """Make a weight on the meta device, for its shapes and sizes."""
        scales, zeros = (meta(outputs, inputs // groupsize, dtype=torch.bfloat16) for _ in range(2))
        return cls(meta(outputs, inputs // 2, dtype=torch.uint8), scales, zeros)

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor) -> "Int4Weight":
        """Pack codes, 0 to 15, uint8 [out,in]."""
        return cls(codes[:, ::2] << 4 | codes[:, 1::2], scales, zeros)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def groupsize(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def codes(self) -> Tensor:
        """Unpack the codes, 0 to 15, uint8 [out,in]."""
        return torch.stack((self.values >> 4, self.values & 15), -1).flatten(1)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """Dequantise to [out,in] in dtype, rounded from fp32."""
        steps = self.codes().float().sub_(8).unflatten(1, (-1, self.groupsize))  # [out,groups,groupsize]
        return torch.addcmul(self.zeros.float()[..., None], steps, self.scales.float()[..., None]).flatten(1).to(dtype)

    def narrow(self, dim: int, begin: int, end: int) -> "Int4Weight":
        """As Int8Weight.narrow. A cut inside a group of inputs makes the groups smaller."""
        if dim == 0:
            return Int4Weight(*(tensor[begin:end].clone() for tensor in tensors_of(self).values()))
        size = math.gcd(self.groupsize, begin, end)
        if size % 2:
            raise ValueError(
                f"an int4 weight cannot be split at inputs {begin} and {end}, since two share a byte: use another --tp"
            )
        grid = (t.repeat_interleave(self.groupsize // size, 1) for t in (self.scales, self.zeros))
        scales, zeros = (each[:, begin // size : end // size].clone() for each in grid)
        return Int4Weight(self.values[:, begin // 2 : end // 2].clone(), scales, zeros)


Quantised = Int8Weight | Int4Weight
KINDS: dict[str, type[Quantised]] = {"int8": Int8Weight, "int4": Int4Weight}


def tensors_of(weight: Quantised) -> dict[str, Tensor]:
    """Tensors of a weight by field name; a checkpoint stores them as "layer.field"."""
    return {field.name: getattr(weight, field.name) for field in fields(weight)}


def dequantise(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """Dequantise to [out,in] in dtype, about BLOCK elements at a time, rounded from fp32."""
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    rows = max(1, BLOCK // weight.shape[1])
    parts = zip(*(tensor.split(rows) for tensor in tensors_of(weight).values()), strict=True)
    for mine, theirs in zip(whole.split(rows), parts, strict=True):
        mine.copy_(type(weight)(*theirs).expand(dtype))
    return whole


OPERATORS = torch.library.Library("bifurcated", "DEF")
OPERATORS.define("packed_linear(Tensor x, Tensor? bias, int number, int features) -> Tensor")
OPERATORS.impl("packed_linear", multiply, "CPU")
OPERATORS.impl("packed_linear", multiply_shape, "Meta")


class FixedLinear(nn.Linear):
    """nn.Linear of a given weight, without gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, kernel: str) -> None:
        nn.Module.__init__(self)
        self.kernel, (self.out_features, self.in_features) = kernel, weight.shape
        self.weight = Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else Parameter(bias, requires_grad=False))


class DequantisedLinear(FixedLinear):
    """nn.Linear with a weight dequantised at construction: as large and as fast as an unquantised one."""

    def __init__(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(dequantise(weight, dtype), bias, "dequantised")


class QuantisedLinear(HeldLinear):
    """Linear layer that dequantises its weight at each product; torch.compile may fuse the two."""

    kernel = "dequantised at each product"

    def __init__(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.held, self.names = type(weight), tuple(tensors_of(weight))  # torch.compile does not trace fields()
        self.bias: Tensor | None
        self.scales: Tensor
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor.contiguous())  # GPTQ leaves it transposed
        self.register_buffer("bias", bias)

    @property
    def features(self) -> int:
        return self.weight.shape[0]

    @property
    def groupsize(self) -> int:
        return self.weight.groupsize

    def joined(self, parts: Sequence[Any], bias: Tensor | None) -> Self:
        """Make a layer with the outputs of all `parts`, each a layer such as this."""
        tensors = (torch.cat([getattr(part, name) for part in parts]) for name in self.names)
        return type(self)(self.held(*tensors), bias, self.scales.dtype)

    @property
    def weight(self) -> Quantised:
        return self.held(*(getattr(self, name) for name in self.names))

    def forward(self, x: Tensor) -> Tensor:
        return self.expanded(x) if differentiated(x, self.bias) else self.multiply(x)

    def expanded(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.expand(x.dtype), self.bias)

    multiply = expanded


class WidenedLinear(QuantisedLinear):
    """Linear layer using the op of kernels.py: reads quantised bytes and widens them in registers, for any N."""

    kernel = "widened"

    def multiply(self, x: Tensor) -> Tensor:
        zeros = getattr(self, "zeros", None)
        return torch.ops.bifurcated.quantised_linear(x, self.values, self.scales, zeros, self.bias)


class TritonLinear(QuantisedLinear):
    """Linear layer using the op of triton_linear.py, as WidenedLinear does on a CPU, for up to TRITON_ROWS rows. More
    rows, as a prompt has, are multiplied by the dequantised weight."""

    kernel = "widened in Triton"
    values: Tensor

    def multiply(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] > TRITON_ROWS:  # compiled: another graph
            return self.expanded(x)
        zeros = getattr(self, "zeros", None)
        product = torch.ops.bifurcated.widened_linear(flat, self.values, self.scales, zeros, self.bias, None)
        return product.view(*x.shape[:-1], self.values.shape[0])


def storage(linear: nn.Module) -> tuple[str, ...]:
    """Return the names of the tensors that hold a layer's weight, plain or quantised."""
    return linear.names if isinstance(linear, QuantisedLinear) else ("weight",)


class TritonExperts(nn.Module):
    """ExpertLinear with all weights, plain or quantised alike, stacked and multiplied by the op of triton_linear.py:
    one kernel, without a host sync. The op has no gradients: if autograd needs them, a loop runs instead."""

    kernel = "grouped in Triton"

    def __init__(self, experts: ExpertLinear) -> None:
        super().__init__()
        self.names = storage(experts[0])
        self.held: Callable[..., Quantised] | None = getattr(experts[0], "held", None)
        for name in self.names:
            self.register_buffer(name, torch.stack([getattr(linear, name).detach() for linear in experts]))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        tensors = [getattr(self, name) for name in self.names]
        if differentiated(x):
            parts = x.tensor_split(ends[:-1].tolist())
            experts = zip(parts, zip(*tensors, strict=True), strict=True)
            return torch.cat([F.linear(part, self.expand(each, x.dtype)) for part, each in experts])
        return torch.ops.bifurcated.widened_linear(x, *tensors, *[None] * (4 - len(tensors)), ends)

    def expand(self, tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Dequantise one expert's weight to [out,in] in dtype."""
        return tensors[0] if self.held is None else self.held(*tensors).expand(dtype)


class TinygemmLinear(QuantisedLinear):
    """Linear layer using PyTorch's CUDA op for int4 weights, for up to TINYGEMM_ROWS rows. The op reads a copy of the
    weight in its own layout; more rows, as a prompt has, are multiplied by the dequantised weight."""

    kernel = "tinygemm"
    values: Tensor
    scales: Tensor

    def __init__(self, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        tiles = next(tiles for tiles in (8, 4, 2) if weight.shape[1] % (16 * tiles) == 0)
        self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack(weight.values, tiles))
        scales = torch.stack((weight.scales, weight.zeros), -1).transpose(0, 1).contiguous()
        self.register_buffer("packed_scales", scales)

    def multiply(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if flat.shape[0] > TINYGEMM_ROWS:  # compiled: another graph
            return self.expanded(x)
        group = x.shape[-1] // self.scales.shape[1]
        product = torch.ops.aten._weight_int4pack_mm(flat, self.packed, group, self.packed_scales)
        product = product.view(*x.shape[:-1], self.values.shape[0])
        return product if self.bias is None else product + self.bias


# Layers that hold a weight in int8 or int4, by kernel name. All others hold the network's dtype.
QUANTISED_LINEARS: dict[str, Callable[..., nn.Module]] = {
    linear.kernel: linear for linear in (QuantisedLinear, WidenedLinear, TritonLinear, TinygemmLinear)
}

TINYGEMM_GROUPS = (32, 64, 128, 256)

# Most rows for which tinygemm beats a product with the dequantised weight: an estimate, not measured.
TINYGEMM_ROWS = 32

# Most rows for which the op of triton_linear.py beats a product with the dequantised weight: estimated, not measured.
TRITON_ROWS = 64

# Most rows of a decode step for which the op of kernels.py beats all others, by whether the CPU has bfloat16
# instructions. With them it has not been measured: 16 is an estimate.
WIDEN_ROWS = {True: 16, False: math.inf}

# Decode steps that amortise packing, which costs some 0.5 ns a byte; each step saves 0.02 to 0.03 ns a byte.
MIN_STEPS_TO_PACK = 20


def choose_way(
    weight: Quantised | nn.Linear,
    device: torch.device,
    dtype: torch.dtype,
    rows: int = 1,
    expert: bool = False,
    pack: bool = False,
) -> str:
    """Choose the fastest way to hold a weight and to multiply by it in decode steps of `rows` rows, correct for any.

    The ways in QUANTISED_LINEARS hold int8 or int4. All others hold `dtype`: "plain" or "dequantised" are multiplied by
    PyTorch, either with ", streamed" by our GEMV if there are one or two rows, with ", packed" by oneDNN. weight: a
    quantised one, or a layer that holds `dtype`. expert: whether it is of a mixture. pack: as pays_to_pack.
    """
    if isinstance(weight, nn.Linear):
        form, (outputs, inputs), is_trained = form_of(weight), weight.weight.shape, weight.weight.requires_grad
    else:
        form, (outputs, inputs), is_trained = "dequantised", weight.shape, False
        if device.type != "cpu":
            return choose_quantised(weight, device, dtype, rows, expert)
        if rows <= WIDEN_ROWS[multiplies_bfloat16()] and multiplies(dtype, inputs, weight.groupsize):
            return "widened"
    if outputs * inputs < MIN_PACK_ELEMENTS:
        return form
    if pack:
        return f"{form}, packed"
    return f"{form}, streamed" if streams(device, dtype, inputs) and not is_trained else form


def choose_quantised(weight: Quantised, device: torch.device, dtype: torch.dtype, rows: int, expert: bool) -> str:
    """Choose as choose_way for a quantised weight on CUDA, which stays quantised for any number of rows: its size may
    be why the model fits. A compiled product of one row with int8 fuses the widening. Experts that Triton groups need
    no copy in another layout."""
    outputs, inputs = weight.shape
    fits = weight.kind == "int4" and weight.groupsize in TINYGEMM_GROUPS and inputs % 32 == outputs % 8 == 0
    by_tinygemm = fits and has_tinygemm(device, dtype)
    one_row = rows == 1 and not expert and (by_tinygemm or weight.kind == "int8")
    if not one_row and has_triton(device, dtype) and suits_triton(weight):
        return TritonLinear.kernel
    return TinygemmLinear.kernel if by_tinygemm and rows <= TINYGEMM_ROWS else QuantisedLinear.kernel


def has_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether triton_linear.py multiplies by weights on this device, and Triton is installed."""
    if device.type != "cuda":
        return False
    try:
        # They import Triton, which only CUDA needs; the second registers the operator.
        from layers import triton_attention, triton_linear  # noqa: F401
    except ImportError:
        return False
    return triton_attention.takes(device, dtype)


def suits_triton(weight: object) -> bool:
    """Return whether triton_linear.py multiplies by a weight of this shape."""
    return not isinstance(weight, Int4Weight) or weight.groupsize % 32 == 0


def streams(device: torch.device, dtype: torch.dtype, inputs: int) -> bool:
    """Return whether the GEMV is faster for a plain weight: on a CPU, except in bfloat16 with native instructions."""
    fast = dtype == torch.bfloat16 and multiplies_bfloat16()
    return device.type == "cpu" and not fast and multiplies(dtype, inputs, inputs)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether packing may pay off: on an x86 CPU (measured with AVX-512), in a dtype that oneDNN supports."""
    if device.type != "cpu" or not IS_X86:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pays_to_pack(shape: tuple[int, int], device: torch.device, dtype: torch.dtype, rows: int, steps: int) -> bool:
    """Return whether packing pays off over `steps` decode steps of `rows` rows: if the weights, mostly of this shape
    [out,in], are large enough, the cost is amortised, and the rows are too many to stream plain weights."""
    few = rows <= STREAMED_ROWS and streams(device, dtype, shape[1])
    large = math.prod(shape) >= MIN_PACK_ELEMENTS
    return can_pack(device, dtype) and large and steps >= MIN_STEPS_TO_PACK and not few


def has_tinygemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the device can run tinygemm: CUDA with compute capability 8.0 or higher, in bfloat16."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)


def bytes_read(weight: Quantised, device: torch.device, dtype: torch.dtype, rows: int, expert: bool = False) -> int:
    """Return the bytes that a decode step reads of make_linear's layer."""
    if choose_way(weight, device, dtype, rows, expert) in QUANTISED_LINEARS:
        return sum(tensor.nbytes for tensor in tensors_of(weight).values())
    return math.prod(weight.shape) * dtype.itemsize


def make_linear(
    weight: Quantised,
    bias: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    expert: bool = False,
) -> nn.Module:
    """Make the layer of a quantised weight. x [N,S,in] -> [N,S,out]

    device: where the weight and the bias already are. rows, expert: as choose_way.
    """
    way = choose_way(weight, device, dtype, rows, expert)
    if way in QUANTISED_LINEARS:
        return QUANTISED_LINEARS[way](weight, bias, dtype)
    return held(DequantisedLinear(weight, bias, dtype), way)


def held(linear: nn.Linear, way: str) -> nn.Module:
    """Return a layer that holds the same weight in this way, plain, streamed or packed."""
    if way == kernel_of(linear):
        return linear
    return PackedLinear(linear) if way.endswith("packed") else StreamedLinear(linear)


def joined(parts: Sequence[nn.Module], files: MappedFiles, pack: bool) -> JoinedLinear | None:
    """Join layers of the same input. None if they are held in different ways, trained, hooked, or plain and mapped from
    a file: a copy would read the file at once and take memory. pack: plain weights will be copied anyway."""
    first = parts[0]
    ways = {(type(part), kernel_of(part), getattr(part, "groupsize", None)) for part in parts}
    biases = [bias for part in parts if isinstance(bias := getattr(part, "bias", None), Tensor)]
    trained = any(parameter.requires_grad for part in parts for parameter in part.parameters())
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    if len(ways) > 1 or trained or hooked or len(biases) not in (0, len(parts)):
        return None
    bias = torch.cat(biases) if biases else None
    if isinstance(first, QuantisedLinear):
        return JoinedLinear(first.joined(parts, bias), [int(part.features) for part in parts])  # type: ignore[arg-type]
    if type(first).forward not in (nn.Linear.forward, StreamedLinear.forward):
        return None
    weights: list[Tensor] = [part.get_parameter("weight") for part in parts]
    if len({weight.dtype for weight in weights}) > 1 or not pack and any(map(files.hold, weights)):
        return None
    return JoinedLinear(FixedLinear(torch.cat(weights), bias, form_of(first)), [len(weight) for weight in weights])


def join_linears(model: nn.Module, pack: bool = False) -> None:
    """Make one product of layers of the same input, such as w1 and w3, a few at a time, so that only their weights are
    held twice. Their names and parameters are gone, so this is for a model that is only run. pack: as in `joined`."""
    make = partial(joined, files=MappedFiles(), pack=pack)
    for module in [each for each in model.modules() if isinstance(each, Joinable)]:
        module.join(make)
        torch.cuda.empty_cache()  # the parts' blocks are too small to reuse for the next


def hold_linears(model: nn.Module, pack: bool = False, tied_output: bool = False) -> None:
    """Replace every plain or dequantised layer by one that holds its weight in the way that choose_way finds. Packing
    copies weights, so layers of the same input are joined, and shared weights are left as they are; tied_output: pack
    the output that is tied to the embedding."""
    files = MappedFiles()
    if pack:
        join_linears(model, pack)

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        if type(linear).forward not in (nn.Linear.forward, StreamedLinear.forward):  # a subclass of the user's
            return None
        made = held(linear, choose_way(linear, linear.weight.device, linear.weight.dtype, pack=pack))
        if isinstance(made, PackedLinear):
            files.release(linear.weight)
        return made

    swap_linears(model, make, shared=not pack)
    if tied_output:
        replace_module(model, "output", PackedLinear(model.output))  # type: ignore[arg-type]


def choose_grouped(experts: ExpertLinear, dtype: torch.dtype) -> Callable[[ExpertLinear], nn.Module] | None:
    """Choose the layer that multiplies by all experts at once; None: the loop over them stays. dtype: of the input."""
    weights = [linear.weight for linear in experts]
    if all(isinstance(weight, Tensor) and can_group(weight) for weight in weights):
        return GroupedLinear
    first, *others = ([getattr(linear, name) for name in storage(linear)] for linear in experts)
    alike = all([t.shape for t in each] == [t.shape for t in first] for each in others)
    plain = all(linear.bias is None for linear in experts) and first[0].dtype in (dtype, torch.int8, torch.uint8)
    fits = alike and plain and suits_triton(weights[0]) and has_triton(first[0].device, dtype)
    return TritonExperts if fits else None


def group_experts(model: nn.Module, choose: Callable[..., Callable | None] = choose_grouped) -> None:
    """Replace every ExpertLinear that can be multiplied by at once; one at a time, so that the weights of at most one
    are held twice. choose: as choose_grouped."""
    for parent in [module for module in model.modules() if isinstance(module, MixtureOfExperts)]:
        for name in ("w1", "w3", "w2"):
            experts = getattr(parent, name)
            made = choose(experts, parent.router.weight.dtype) if isinstance(experts, ExpertLinear) else None
            if made is not None:
                setattr(parent, name, made(experts))
                del experts
                torch.cuda.empty_cache()  # single experts' blocks are too small to reuse for the next stack
