"""Mixture of experts: router, token permutation, expert linears.

Rows are sorted by expert: each expert multiplies one contiguous run, and the weights of an expert that no token chose
are not read. Only the device knows where the runs end: on CUDA, PyTorch's grouped GEMM takes the ends as a tensor;
elsewhere a loop over the chosen experts is one op, opaque to torch.compile.

Shapes: M tokens (N rows times S positions), E experts, K experts per token, R = M K rows, one per token and expert;
out, in: a layer's features.
"""

import itertools
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from bifurcated_attention import differentiated


@dataclass(frozen=True)
class MoEConfig:
    """Shape of a network's MoE layers: `experts` experts of hidden size `width`, `used` of them per token.

    renormalised: a token's expert weights are a softmax over its chosen experts and sum to 1; otherwise they are taken
    from the softmax over all experts. shared: hidden size of an expert that every token uses as well, 0: none.
    dense: layers with a plain feed-forward instead.
    """

    experts: int
    used: int
    width: int
    renormalised: bool
    shared: int = 0
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.used > self.experts:
            raise ValueError(f"{self.used} experts per token: expected at most {self.experts}, the number of experts")

    def expected(self, rows: int) -> float:
        """Expected number of distinct experts that `rows` tokens choose, assuming uniform routing."""
        return self.experts * (1 - (1 - self.used / self.experts) ** rows)

    def has(self, name: str) -> bool:
        """Return whether the named tensor is of a routed expert: a step reads only the chosen ones."""
        found = re.match(r"layers\.(\d+)\.feed_forward\.w\d", name)
        return found is not None and int(found[1]) not in self.dense

    def rows_of(self, name: str, rows: int) -> int:
        """Rows that a layer of that name multiplies in a step of `rows` rows; for an expert, the expected number."""
        return max(1, round(rows * self.used / self.experts)) if self.has(name) else rows


NUMBERS = itertools.count()
EXPERTS: "weakref.WeakValueDictionary[int, ExpertLinear]" = weakref.WeakValueDictionary()


def multiply(x: Tensor, ends: Tensor, number: int, features: int) -> Tensor:
    """Multiply x [R,in], sorted by expert in runs that end at ends [E], by the ExpertLinear `number` -> [R,out]."""
    product, begin = x.new_empty(x.shape[0], features), 0
    for linear, end in zip(EXPERTS[number], ends.tolist(), strict=True):
        if end > begin:
            product[begin:end] = linear(x[begin:end])
        begin = end
    return product


def multiply_shape(x: Tensor, ends: Tensor, number: int, features: int) -> Tensor:
    """Meta implementation of `multiply`."""
    return x.new_empty(x.shape[0], features)


OPERATORS = torch.library.Library("bifurcated", "FRAGMENT")
OPERATORS.define("expert_linear(Tensor x, Tensor ends, int number, int features) -> Tensor")
OPERATORS.impl("expert_linear", multiply, "CPU")
OPERATORS.impl("expert_linear", multiply, "CUDA")
OPERATORS.impl("expert_linear", multiply_shape, "Meta")


class ExpertLinear(nn.ModuleList):
    """Linear layer with an expert dimension: one layer per expert, of any kind in linear.py. A torch.compile graph
    holds its number, and the custom op looks the layers up."""

    features: int

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        super().__init__(linears)
        self.features, self.number = self[0].get_parameter("weight").shape[0], next(NUMBERS)
        EXPERTS[self.number] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.number = next(NUMBERS)  # a copy has its own weights
        EXPERTS[self.number] = self

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if torch.is_grad_enabled() and differentiated(x, *self.parameters()):  # the op has no gradients
            return multiply(x, ends, self.number, self.features)
        return torch.ops.bifurcated.expert_linear(x, ends, self.number, self.features)


class GroupedLinear(nn.Module):
    """ExpertLinear with all weights in one tensor [E,out,in], multiplied by PyTorch's grouped GEMM: on CUDA one kernel,
    without a host sync."""

    kernel = "grouped"

    def __init__(self, experts: ExpertLinear) -> None:
        super().__init__()
        self.weight = Parameter(
            torch.stack([linear.get_parameter("weight") for linear in experts]), requires_grad=False
        )

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=ends)


def can_group(weight: Tensor) -> bool:
    """Return whether the device has a grouped GEMM for such weights [out,in]: bfloat16 at compute capability 9 or 10,
    with rows aligned to 16 bytes. Elsewhere PyTorch's is a loop that syncs with the host."""
    fast = weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    return fast and weight.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape)


def can_capture_graph(model: nn.Module) -> bool:
    """Return whether a step can be captured as a CUDA graph: the loop over experts syncs with the host."""
    return not any(isinstance(module, ExpertLinear) for module in model.modules())


class Gate(nn.Module):
    """Small gating linear [out,in]; not an nn.Linear, so that it is never quantised or packed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Router(nn.Module):
    """Top-k router: each token's experts and their weights."""

    def __init__(self, mixture: MoEConfig, dim: int) -> None:
        super().__init__()
        self.mixture, self.weight = mixture, Parameter(torch.empty(mixture.experts, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Route x [M,dim] -> expert weights, in fp32 or wider, and expert numbers, best first, both [M,K]. Ties go to
        the lower number."""
        logits = F.linear(x, self.weight).to(torch.promote_types(x.dtype, torch.float32))  # [M,E]
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.mixture.used]
        weights = logits.softmax(-1).gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.mixture.renormalised else weights, chosen


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort chosen [M,K] by expert, then by token -> the order [R] and the end of each expert's run, int32 [E]."""
    found, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    return order, torch.searchsorted(found, numbers, right=True, out_int32=True)


def by_token(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """Undo by_expert's order and sum each token's weighted rows, in the weights' dtype. rows [R,dim] -> [M,dim]"""
    found = rows[order.argsort()].unflatten(0, weights.shape)  # [M,K,dim]
    return (found * weights[..., None]).sum(1).to(rows.dtype)


class MixtureOfExperts(nn.Module):
    """Gated feed-forward experts, K of them per token chosen by a router; Jiang et al. 2024 (arXiv 2401.04088)."""

    def __init__(
        self,
        mixture: MoEConfig,
        dim: int,
        activation: Callable[[Tensor], Tensor],
        linear: type[nn.Linear],
        shared: nn.Module | None,
    ) -> None:
        """shared: feed-forward part that every token uses as well."""
        super().__init__()
        self.mixture, self.activation = mixture, activation
        self.router = Router(mixture, dim)
        enter, leave = (dim, mixture.width), (mixture.width, dim)
        self.w1, self.w3, self.w2 = (
            ExpertLinear(linear(*sizes, bias=False) for _ in range(mixture.experts)) for sizes in (enter, enter, leave)
        )
        if shared is not None:
            self.shared, self.shared_gate = shared, Gate(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)  # [M,dim]
        weights, chosen = self.router(tokens)  # [M,K]
        order, ends = by_expert(chosen, self.mixture.experts)  # [R] [E]
        rows = tokens[order // self.mixture.used]  # [R,dim]
        rows = self.w2(self.activation(self.w1(rows, ends)) * self.w3(rows, ends), ends)  # [R,dim]
        y = by_token(rows, order, weights)  # [M,dim]
        if self.mixture.shared:
            y = y + self.shared_gate(tokens).sigmoid() * self.shared(tokens)
        return y.view_as(x)  # [N,S,dim]
