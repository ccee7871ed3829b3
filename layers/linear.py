"""Other ways to hold the weight of a linear layer than plainly: packed by oneDNN, int8, int4. They enter a network
through `swap_linears`; what multiplies by a quantised weight, `make_linear` chooses, once, at construction.

oneDNN reorders a plain bfloat16 weight at every product; a packed one was reordered once. A plain fp32 product is not
oneDNN's at all; packed, it is, and is faster from some rows on. A packed weight is opaque to torch.compile, so a graph
holds its number, and an operator of our own looks the number up.

Nothing else knows of these kernels: where choose_kernel always says "dequantised", all else works.

Shapes: N rows, S positions; out and in: the features of a layer; groups: runs of `in` that share a scale.
"""

import ctypes
import itertools
import math
import mmap
import platform
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from bifurcated_attention import differentiated
from layers.kernels import check_gradients, linear_shape, multiplies
from layers.moe import GroupedLinear

# Matrices below this many numbers are multiplied as fast as they are (2 cores), and the operator costs some 5 us.
SMALLEST = 1 << 17

BLOCK = 1 << 19  # numbers dequantised at a time, so that they stay in a CPU's cache

IS_X86 = platform.machine() in ("x86_64", "AMD64")


def multiplies_bfloat16() -> bool:
    """Whether the CPU has instructions for products of bfloat16 numbers. On plain AVX-512 oneDNN does without: a step
    of one row, which reads more than it multiplies, takes two thirds of the time of fp32 there, but one of 64 rows four
    times as long (docs/benchmarks.md), and reading a prompt is all multiplying."""
    if IS_X86:
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


class HeldLinear(nn.Module):
    """A linear layer for inference whose weight is not held plainly. kernel: what multiplies by it.

    Operators have no gradients: where autograd asks for those of the input or the bias, PyTorch's product runs."""

    kernel: str


def swap_linears(model: nn.Module, make: Callable[[str, nn.Linear], nn.Module | None]) -> None:
    """Replaces every nn.Linear by make(its name, it), where that is not None: one after another, so that one weight
    at most is held twice.

    A weight that other modules use too, such as a tied embedding, stays as it is: it would be held twice for good.
    """
    used = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    parents = [(name, module) for name, module in model.named_modules() if not isinstance(module, nn.Linear)]
    for prefix, parent in parents:
        for name in list(parent._modules):
            child = parent._modules[name]
            if isinstance(child, nn.Linear) and used[id(child.weight)] == 1:
                made = make(f"{prefix}.{name}" if prefix else name, child)
                if made is not None:
                    replace_module(parent, name, made)


def replace_module(parent: nn.Module, name: str, made: nn.Module) -> None:
    """Puts a layer in the place of a child, whose hooks it keeps, such as the gathering of a divided output."""
    made._forward_hooks.update(parent._modules[name]._forward_hooks)  # type: ignore[union-attr]
    setattr(parent, name, made)


def kernels(model: nn.Module) -> dict[str, int]:
    """How many linear layers each kernel multiplies, by its name."""
    linears = (module for module in model.modules() if isinstance(module, nn.Linear | HeldLinear | GroupedLinear))
    return dict(Counter(getattr(linear, "kernel", "plain") for linear in linears))


class MappedFiles:
    """The files that are mapped into this process, so that pages of theirs whose numbers are now held in another form
    can go. Read again, they would come back. Where the system does not list its mappings, as Linux does, they stay."""

    DONTNEED = 4  # madvise's number for that

    def __init__(self) -> None:
        maps = Path("/proc/self/maps")
        lines = [line.split(maxsplit=5) for line in (maps.read_text().splitlines() if maps.exists() else ())]
        files = [line[0].split("-") for line in lines if line[4] != "0"]  # by their inode
        self.ranges = [(int(begin, 16), int(end, 16)) for begin, end in files]

    def convert(self, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """tensor.to(device, dtype), some rows at a time, whose pages then go."""
        if (tensor.device, tensor.dtype) == (torch.device(device), dtype):
            return tensor
        made, rows = torch.empty_like(tensor, device=device, dtype=dtype), max(1, (BLOCK << 2) // tensor[0].numel())
        for mine, theirs in zip(made.split(rows), tensor.split(rows), strict=True):
            mine.copy_(theirs)
            self.release(theirs)
        return made

    def release(self, tensor: Tensor) -> None:
        """Gives back the whole pages that hold a tensor, where they are a file's."""
        page, first = mmap.PAGESIZE, tensor.data_ptr()
        begin, end = -(-first // page) * page, (first + tensor.nbytes) // page * page
        if begin < end and tensor.is_contiguous() and any(low <= begin and end <= high for low, high in self.ranges):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), self.DONTNEED)


NUMBERS = itertools.count()
WEIGHTS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def multiply(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """x [N,S,in] times the packed weight of that number -> [N,S,out]."""
    check_gradients("packed_linear", x, bias)
    return torch.ops.mkldnn._linear_pointwise(x, WEIGHTS[number], bias, "none", [], "")


def multiply_shape(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """What torch.compile needs to know of `multiply`."""
    return x.new_empty(*x.shape[:-1], features)


class StreamedLinear(nn.Linear):
    """nn.Linear, of whose weight one or two rows are multiplied by the operator of kernels.py."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.kernel = f"{getattr(linear, 'kernel', 'plain')}, streamed"
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if differentiated(x, self.weight, self.bias):
            return super().forward(x)
        return torch.ops.bifurcated.streamed_linear(x, self.weight, self.bias)


def streams(device: torch.device, dtype: torch.dtype, inputs: int) -> bool:
    """Whether a plain weight is read faster so: on a CPU, but not in bfloat16 where oneDNN has instructions for it."""
    fast = dtype == torch.bfloat16 and multiplies_bfloat16()
    return device.type == "cpu" and not fast and multiplies(dtype, inputs, inputs)


def stream_linears(model: nn.Module) -> None:
    """Makes one or two rows stream the weight of every plain linear layer that is large enough, shared ones too."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Linear) and type(child).forward is nn.Linear.forward:
                large = child.weight.numel() >= SMALLEST and not child.weight.requires_grad  # or it is being trained
                if large and streams(child.weight.device, child.weight.dtype, child.in_features):
                    replace_module(parent, name, StreamedLinear(child))


class PackedLinear(HeldLinear):
    """nn.Linear, its weight packed by oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.kernel = f"{getattr(linear, 'kernel', 'plain').removesuffix(', streamed')}, packed"
        self.bias, self.features, self.number = linear.bias, linear.out_features, next(NUMBERS)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        WEIGHTS[self.number] = self.packed

    def forward(self, x: Tensor) -> Tensor:
        if differentiated(x, self.bias):
            return F.linear(x, self.packed.to_dense(), self.bias)
        return torch.ops.bifurcated.packed_linear(x, self.bias, self.number, self.features)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing may pay here: on an x86 CPU (measured with AVX-512), in a dtype that oneDNN takes there."""
    if device.type != "cpu" or not IS_X86:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, tied_output: bool = False) -> None:
    """Packs every plain linear layer, or one that was dequantised, that is large enough. tied_output: an output that is
    the embedding too, which then is held twice."""
    files = MappedFiles()

    def pack(name: str, linear: nn.Linear) -> nn.Module | None:
        if linear.weight.numel() < SMALLEST:
            return None
        packed = PackedLinear(linear)
        files.release(linear.weight)
        return packed

    swap_linears(model, pack)
    if tied_output:
        replace_module(model, "output", PackedLinear(model.output))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Int8Weight:
    """values int8 [out,in] times scales bfloat16 [out]: symmetric, a scale per output channel."""

    kind: ClassVar[str] = "int8"
    values: Tensor
    scales: Tensor

    @classmethod
    def empty(cls, outputs: int, inputs: int, groupsize: int = 0) -> "Int8Weight":
        """Without memory: for its shapes and sizes."""
        return cls(*empty_tensors((outputs, inputs), torch.int8, (outputs,), 1))

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def expand(self, dtype: torch.dtype) -> Tensor:
        """[out,in] in dtype, rounded from fp32."""
        return self.values.float().mul_(self.scales.float()[:, None]).to(dtype)

    def narrow(self, dim: int, begin: int, end: int) -> "Int8Weight":
        """The outputs (dim 0) or inputs (dim 1) from begin to end, in memory of its own."""
        scales = self.scales if dim else self.scales[begin:end]
        return Int8Weight(self.values.narrow(dim, begin, end - begin).clone(), scales.clone())


@dataclass(frozen=True)
class Int4Weight:
    """(code - 8) * scale + zero, with the codes 0 to 15 of two inputs in a byte, the even one in its upper half.

    values uint8 [out,in/2], scales and zeros bfloat16 [out,groups]. The same on every device; packed at construction
    of a layer for what multiplies there.
    """

    kind: ClassVar[str] = "int4"
    values: Tensor
    scales: Tensor
    zeros: Tensor

    @classmethod
    def empty(cls, outputs: int, inputs: int, groupsize: int) -> "Int4Weight":
        """Without memory: for its shapes and sizes."""
        return cls(*empty_tensors((outputs, inputs // 2), torch.uint8, (outputs, inputs // groupsize), 2))

    @classmethod
    def from_codes(cls, codes: Tensor, scales: Tensor, zeros: Tensor) -> "Int4Weight":
        """codes uint8 [out,in], of 0 to 15."""
        return cls(codes[:, ::2] << 4 | codes[:, 1::2], scales, zeros)

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], 2 * self.values.shape[1]

    @property
    def groupsize(self) -> int:
        return self.shape[1] // self.scales.shape[1]

    def codes(self) -> Tensor:
        """uint8 [out,in], of 0 to 15."""
        return torch.stack((self.values >> 4, self.values & 15), -1).flatten(1)

    def expand(self, dtype: torch.dtype) -> Tensor:
        """[out,in] in dtype, rounded from fp32."""
        steps = self.codes().float().sub_(8).unflatten(1, (-1, self.groupsize))  # [out,groups,groupsize]
        return torch.addcmul(self.zeros.float()[..., None], steps, self.scales.float()[..., None]).flatten(1).to(dtype)

    def narrow(self, dim: int, begin: int, end: int) -> "Int4Weight":
        """As Int8Weight.narrow. Where a cut falls inside a group of inputs, groups become smaller."""
        if dim == 0:
            return Int4Weight(*(tensor[begin:end].clone() for tensor in tensors_of(self).values()))
        size = math.gcd(self.groupsize, begin, end)
        if size % 2:
            raise ValueError(f"inputs {begin} to {end} of an int4 weight cannot be held alone: two share a byte")
        grid = (t.repeat_interleave(self.groupsize // size, 1) for t in (self.scales, self.zeros))
        scales, zeros = (each[:, begin // size : end // size].clone() for each in grid)
        return Int4Weight(self.values[:, begin // 2 : end // 2].clone(), scales, zeros)


Quantised = Int8Weight | Int4Weight
KINDS: dict[str, type[Quantised]] = {"int8": Int8Weight, "int4": Int4Weight}


def empty_tensors(values: tuple[int, int], dtype: torch.dtype, scales: tuple[int, ...], count: int) -> list[Tensor]:
    meta = [torch.empty(scales, dtype=torch.bfloat16, device="meta") for _ in range(count)]
    return [torch.empty(values, dtype=dtype, device="meta"), *meta]


def tensors_of(weight: Quantised) -> dict[str, Tensor]:
    """Its tensors by the names under which a checkpoint holds them, behind the name of the layer."""
    return {field.name: getattr(weight, field.name) for field in fields(weight)}


def blocks(weight: Quantised) -> Iterator[tuple[int, int, Quantised]]:
    """(begin, end, its outputs from begin to end), some BLOCK numbers each."""
    outputs, inputs = weight.shape
    step = max(1, BLOCK // inputs)
    for begin in range(0, outputs, step):
        end = min(outputs, begin + step)
        yield begin, end, type(weight)(*(tensor[begin:end] for tensor in tensors_of(weight).values()))


def dequantise(weight: Quantised, dtype: torch.dtype) -> Tensor:
    """[out,in] in dtype, rounded from fp32."""
    whole = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    for begin, end, part in blocks(weight):
        whole[begin:end] = part.expand(dtype)
    return whole


def multiply_expanded(x: Tensor, weight: Quantised) -> Tensor:
    """x [rows,in] -> [rows,out] in x's dtype, a block of the weight at a time. The products are in fp32 where the CPU
    has no instructions for those of x's dtype: that is several times as fast there."""
    dtype = x.dtype if multiplies_bfloat16() else torch.float32
    product, wide = x.new_empty(x.shape[0], weight.shape[0]), x.to(dtype)
    for begin, end, part in blocks(weight):
        product[:, begin:end] = F.linear(wide, part.expand(dtype))
    return product


# Rows of one product from which on dequantising the weight for it is faster than the operator, which dequantises in
# its inner loop for every few rows. 1 core with AVX2, in bfloat16, matrices of 768 x 2048 to 5632 x 2048.
EXPAND_FROM = {"int8": 24, "int4": 96}


def multiply_int8(x: Tensor, values: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x bfloat16 [N,S,in], an Int8Weight -> [N,S,out]."""
    check_gradients("int8_linear", x, scales, bias)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    if flat.shape[0] < EXPAND_FROM["int8"]:
        product = torch.ops.aten._weight_int8pack_mm(flat, values, scales)
    else:
        product = multiply_expanded(flat, Int8Weight(values, scales))
    product = product.view(*x.shape[:-1], values.shape[0])
    return product if bias is None else product.add_(bias)


def multiply_int4(
    x: Tensor, packed: Tensor, packed_scales: Tensor, values: Tensor, scales: Tensor, zeros: Tensor, bias: Tensor | None
) -> Tensor:
    """x bfloat16 [N,S,in], an Int4Weight, packed and as it is -> [N,S,out]. packed_scales [groups,out,2]."""
    check_gradients("int4_linear", x, scales, zeros, bias)
    flat, weight = x.reshape(-1, x.shape[-1]).contiguous(), Int4Weight(values, scales, zeros)
    if flat.shape[0] < EXPAND_FROM["int4"]:
        product = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, packed, weight.groupsize, packed_scales)
    else:
        product = multiply_expanded(flat, weight)
    product = product.view(*x.shape[:-1], values.shape[0])
    return product if bias is None else product.add_(bias)


def multiply_int4_shape(x: Tensor, packed: Tensor, packed_scales: Tensor, values: Tensor, *rest: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


OPERATORS = torch.library.Library("bifurcated", "DEF")
OPERATORS.define("packed_linear(Tensor x, Tensor? bias, int number, int features) -> Tensor")
OPERATORS.impl("packed_linear", multiply, "CPU")
OPERATORS.impl("packed_linear", multiply_shape, "Meta")
OPERATORS.define("int8_linear(Tensor x, Tensor values, Tensor scales, Tensor? bias) -> Tensor")
OPERATORS.impl("int8_linear", multiply_int8, "CPU")
OPERATORS.impl("int8_linear", linear_shape, "Meta")
OPERATORS.define(
    "int4_linear(Tensor x, Tensor packed, Tensor packed_scales, Tensor values, Tensor scales, Tensor zeros, "
    "Tensor? bias) -> Tensor"
)
OPERATORS.impl("int4_linear", multiply_int4, "CPU")
OPERATORS.impl("int4_linear", multiply_int4_shape, "Meta")


class DequantisedLinear(nn.Linear):
    """A plain layer whose weight was dequantised once: as large and as fast as one that never was quantised."""

    kernel = "dequantised"

    def __init__(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.weight = Parameter(dequantise(weight, dtype), requires_grad=False)
        self.register_parameter("bias", None if bias is None else Parameter(bias, requires_grad=False))


class QuantisedLinear(HeldLinear):
    """Holds a quantised weight as it is, and dequantises it at each product, which torch.compile may fuse with it."""

    kernel = "dequantised at each product"

    def __init__(self, weight: Quantised, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.held = type(weight)
        self.bias: Tensor | None
        for name, tensor in tensors_of(weight).items():
            self.register_buffer(name, tensor.contiguous())  # GPTQ leaves it transposed
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Quantised:
        return self.held(*(getattr(self, field.name) for field in fields(self.held)))

    def forward(self, x: Tensor) -> Tensor:
        return self.expanded(x) if differentiated(x, self.bias) else self.multiply(x)

    def expanded(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.expand(x.dtype), self.bias)

    multiply = expanded


class Int8PackLinear(QuantisedLinear):
    """PyTorch's operator for int8 weights on a CPU; many rows, such as a prompt's, dequantise block by block."""

    kernel = "int8pack"

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.bifurcated.int8_linear(x, self.values, self.scales, self.bias)


class Int4PackLinear(QuantisedLinear):
    """PyTorch's operator for int4 weights on a CPU, which has an order of its own; many rows dequantise block by block
    from what the checkpoint holds: on a CPU those are pages of its file, in memory only while they are used."""

    kernel = "int4pack"

    def __init__(self, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self.packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes().int(), 1)
        self.packed_scales = torch.stack((weight.scales, weight.zeros), -1).transpose(0, 1).contiguous()

    def multiply(self, x: Tensor) -> Tensor:
        return torch.ops.bifurcated.int4_linear(
            x, self.packed, self.packed_scales, self.values, self.scales, self.zeros, self.bias
        )


class WidenedLinear(QuantisedLinear):
    """The operator of kernels.py: a weight is read in its few bytes, and widened in registers, at any row count."""

    kernel = "widened"

    def multiply(self, x: Tensor) -> Tensor:
        zeros = getattr(self, "zeros", None)
        return torch.ops.bifurcated.quantised_linear(x, self.values, self.scales, zeros, self.bias)


class TinygemmLinear(HeldLinear):
    """PyTorch's operator for int4 weights on CUDA."""

    kernel = "tinygemm"

    def __init__(self, weight: Int4Weight, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.features, self.groupsize, self.bias = weight.shape[0], weight.groupsize, bias
        tiles = next(tiles for tiles in (8, 4, 2) if weight.shape[1] % (16 * tiles) == 0)
        self.packed = torch.ops.aten._convert_weight_to_int4pack(weight.values, tiles)
        self.packed_scales = torch.stack((weight.scales, weight.zeros), -1).transpose(0, 1).contiguous()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        product = torch.ops.aten._weight_int4pack_mm(flat, self.packed, self.groupsize, self.packed_scales)
        product = product.view(*x.shape[:-1], self.features)
        return product if self.bias is None else product + self.bias


LINEARS: dict[str, Callable[..., nn.Module]] = {
    linear.kernel: linear
    for linear in (
        DequantisedLinear,
        QuantisedLinear,
        Int8PackLinear,
        Int4PackLinear,
        WidenedLinear,
        TinygemmLinear,
    )
}

# The sizes of groups that PyTorch's operators for int4 take.
PACK_GROUPS = (32, 64, 128, 256)

# The fewest and the most rows of a decode step at which PyTorch's operators for a CPU beat a dequantised weight in
# bfloat16, by whether the CPU has instructions for it (AVX-512, 2 cores) or not (AVX2: a whole step of 12 layers takes
# 1.4 times as long at one row, two thirds at 8 and 64). In fp32 and float16 they are several times slower.
PACK_ROWS = {
    ("int8", True): (1, 4),
    ("int4", True): (1, 8),
    ("int8", False): (2, math.inf),
    ("int4", False): (2, math.inf),
}


# The most rows of a decode step at which the operator of kernels.py beats all others, by the same. Where there are
# instructions for bfloat16 it has not been measured, and an estimate stands here.
WIDEN_ROWS = {True: 16, False: math.inf}


def choose_kernel(weight: Quantised, device: torch.device, dtype: torch.dtype, rows: int) -> str:
    """What multiplies fastest in decode steps of so many rows: a key of LINEARS."""
    outputs, inputs = weight.shape
    groups = isinstance(weight, Int8Weight) or weight.groupsize in PACK_GROUPS
    if device.type == "cpu":
        groupsize = inputs if isinstance(weight, Int8Weight) else weight.groupsize
        if rows <= WIDEN_ROWS[multiplies_bfloat16()] and multiplies(dtype, inputs, groupsize):
            return "widened"
        # Of other sizes the operators raise, and the one for int8 reads past the end of its weight.
        fits = groups and inputs % 32 == 0 and (weight.kind == "int8" or outputs % 16 == 0)
        fewest, most = PACK_ROWS[weight.kind, multiplies_bfloat16()]
        wins = IS_X86 and dtype == torch.bfloat16 and fewest <= rows <= most
        return f"{weight.kind}pack" if fits and wins else "dequantised"
    if weight.kind == "int4" and has_tinygemm(device, dtype) and groups and inputs % 32 == outputs % 8 == 0:
        return "tinygemm"
    return "dequantised at each product"


def has_tinygemm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the CUDA device can run it: in bfloat16, from compute capability 8.0 on."""
    return device.type == "cuda" and dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)


def make_linear(
    weight: Quantised, bias: Tensor | None, device: torch.device, dtype: torch.dtype, rows: int
) -> nn.Module:
    """The layer x [N,S,in] -> [N,S,out] that runs best where decode steps have `rows` rows; right for any number.

    device: where the weight and the bias are already.
    """
    return LINEARS[choose_kernel(weight, device, dtype, rows)](weight, bias, dtype)


def held_bytes(weight: Quantised, device: torch.device, dtype: torch.dtype, rows: int) -> int:
    """Bytes that a decode step reads of what make_linear makes of this weight."""
    if choose_kernel(weight, device, dtype, rows) == "dequantised":
        return math.prod(weight.shape) * dtype.itemsize
    return sum(tensor.nbytes for tensor in tensors_of(weight).values())
