"""Linear weights prepacked for oneDNN (x86): the same products in less time (BENCHMARKS.md).

oneDNN reorders a plain bfloat16 weight at every product; a packed one was reordered once. A plain fp32 product is not
oneDNN's at all; packed, it is, and is faster from some rows on. A packed weight is opaque to torch.compile, so a graph
holds its number, and an operator of our own looks the number up.

Nothing else knows of oneDNN: without this file and the lines that call it all else works. Shapes: N rows, S positions.
"""

import itertools
import platform
import weakref
from collections import Counter

import torch
import torch.nn as nn
from torch import Tensor

# Matrices below this many numbers are multiplied as fast as they are (2 cores), and the operator costs some 5 us.
SMALLEST = 1 << 17

IS_X86 = platform.machine() in ("x86_64", "AMD64")

NUMBERS = itertools.count()
WEIGHTS: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


def multiply(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """x [N,S,inputs] times the packed weight of that number -> [N,S,features]."""
    return torch.ops.mkldnn._linear_pointwise(x, WEIGHTS[number], bias, "none", [], "")


def multiply_shape(x: Tensor, bias: Tensor | None, number: int, features: int) -> Tensor:
    """What torch.compile needs to know of `multiply`."""
    return x.new_empty(*x.shape[:-1], features)


OPERATORS = torch.library.Library("bifurcated", "DEF")
OPERATORS.define("packed_linear(Tensor x, Tensor? bias, int number, int features) -> Tensor")
OPERATORS.impl("packed_linear", multiply, "CPU")
OPERATORS.impl("packed_linear", multiply_shape, "Meta")


class PackedLinear(nn.Module):
    """nn.Linear for inference, its weight packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias, self.features, self.number = linear.bias, linear.out_features, next(NUMBERS)
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        WEIGHTS[self.number] = self.packed

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.bifurcated.packed_linear(x, self.bias, self.number, self.features)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether packing may pay here: on an x86 CPU (measured with AVX-512), in a dtype that oneDNN takes there."""
    if device.type != "cpu" or not IS_X86:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module) -> None:
    """Replaces every nn.Linear that is large enough, one after another, so that one weight at most is held twice.

    A weight that other modules use too, such as a tied embedding, stays as it is: it would be held twice for good.
    """
    used = Counter(id(weight) for module in model.modules() for weight in module._parameters.values())
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    for parent in parents:
        for name in list(parent._modules):
            child = parent._modules[name]
            if isinstance(child, nn.Linear) and child.weight.numel() >= SMALLEST and used[id(child.weight)] == 1:
                setattr(parent, name, PackedLinear(child))
