"""Experts: a linear layer with an expert dimension, the router, and the order in which rows meet their experts.

Rows are sorted by expert, so that each expert multiplies one run of them, and an expert that no token chose is neither
read nor multiplied. Where each run ends is known only on the device: PyTorch's grouped product takes that as a tensor
(CUDA), and elsewhere a loop over the experts that are present is one operator, opaque to torch.compile.

Shapes: M tokens, N rows times S positions; E experts, K of them for each token; R = M K rows, one for each token and
expert; out and in: the features of a layer.
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
    """The shape of the mixtures of a network: experts of a width, of which each token is sent to `used`.

    renormalised: the weights of a token's experts sum to 1, which is a softmax over them alone; otherwise they are as
    the softmax over all experts has them. shared: the width of an expert that every token passes besides, 0 for none.
    dense: the layers that have a plain feed-forward part instead.
    """

    experts: int
    used: int
    width: int
    renormalised: bool
    shared: int = 0
    dense: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.used > self.experts:
            raise ValueError(f"a token cannot be sent to {self.used} of {self.experts} experts")

    def expected(self, rows: int) -> float:
        """How many distinct experts so many tokens are expected to choose, were every expert equally likely."""
        return self.experts * (1 - (1 - self.used / self.experts) ** rows)

    def has(self, name: str) -> bool:
        """Whether a tensor of that name belongs to an expert, of which a step reads those that are chosen."""
        found = re.match(r"layers\.(\d+)\.feed_forward\.w\d", name)
        return found is not None and int(found[1]) not in self.dense

    def rows_of(self, name: str, rows: int) -> int:
        """Rows that a layer of that name multiplies in a step of `rows` rows: of an expert, as many as are expected."""
        return max(1, round(rows * self.used / self.experts)) if self.has(name) else rows


NUMBERS = itertools.count()
EXPERTS: "weakref.WeakValueDictionary[int, ExpertLinear]" = weakref.WeakValueDictionary()


def multiply(x: Tensor, ends: Tensor, number: int, features: int) -> Tensor:
    """x [R,in], sorted by expert, those of each before ends [E], times the weights of that number -> [R,out]."""
    product, begin = x.new_empty(x.shape[0], features), 0
    for linear, end in zip(EXPERTS[number], ends.tolist(), strict=True):
        if end > begin:
            product[begin:end] = linear(x[begin:end])
        begin = end
    return product


def multiply_shape(x: Tensor, ends: Tensor, number: int, features: int) -> Tensor:
    """What torch.compile needs to know of `multiply`."""
    return x.new_empty(x.shape[0], features)


OPERATORS = torch.library.Library("bifurcated", "FRAGMENT")
OPERATORS.define("expert_linear(Tensor x, Tensor ends, int number, int features) -> Tensor")
OPERATORS.impl("expert_linear", multiply, "CPU")
OPERATORS.impl("expert_linear", multiply, "CUDA")
OPERATORS.impl("expert_linear", multiply_shape, "Meta")


class ExpertLinear(nn.ModuleList):
    """A linear layer with an expert dimension: one layer for each expert, which may hold its weight in any way
    (linear.py). A graph holds its number, and the operator looks the number up."""

    features: int

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        super().__init__(linears)
        self.features, self.number = self[0].get_parameter("weight").shape[0], next(NUMBERS)
        EXPERTS[self.number] = self

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.number = next(NUMBERS)  # a copy has weights of its own
        EXPERTS[self.number] = self

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        if torch.is_grad_enabled() and differentiated(x, *self.parameters()):  # the operator has no gradients
            return multiply(x, ends, self.number, self.features)
        return torch.ops.bifurcated.expert_linear(x, ends, self.number, self.features)


class GroupedLinear(nn.Module):
    """ExpertLinear with all weights in one tensor [E,out,in], multiplied by PyTorch's grouped product: on CUDA one
    kernel, which does not wait for the host."""

    kernel = "grouped"

    def __init__(self, experts: ExpertLinear) -> None:
        super().__init__()
        self.weight = Parameter(
            torch.stack([linear.get_parameter("weight") for linear in experts]), requires_grad=False
        )

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return torch._grouped_mm(x, self.weight.transpose(1, 2), offs=ends)


def can_group(weight: Tensor) -> bool:
    """Whether the device has a grouped product of such weights [out,in]: of bfloat16, at compute capability 9 or 10,
    their rows at multiples of 16 bytes. Elsewhere PyTorch's own is a loop, which waits for the host."""
    fast = weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device)[0] in (9, 10)
    return fast and weight.dtype == torch.bfloat16 and all(size % 8 == 0 for size in weight.shape)


def group_experts(model: nn.Module, can: Callable[[Tensor], bool] = can_group) -> None:
    """Replaces every ExpertLinear of plain weights that the device can group: one after another, so that the weights of
    one at most are held twice."""
    parents = [module for module in model.modules() if not isinstance(module, ExpertLinear | nn.Linear)]
    for parent in parents:
        for name in list(parent._modules):
            child = parent._modules[name]
            if isinstance(child, ExpertLinear) and all(
                isinstance(each, nn.Linear) and can(each.weight) for each in child
            ):
                setattr(parent, name, GroupedLinear(child))
                del child
                torch.cuda.empty_cache()  # memory of single experts is in blocks too small for the next one


def is_recordable(model: nn.Module) -> bool:
    """Whether a step can be a recorded CUDA graph: a loop over experts waits for the host to know who is present."""
    return not any(isinstance(module, ExpertLinear) for module in model.modules())


class Gate(nn.Module):
    """A small matrix [out,in] that decides or weighs: not an nn.Linear, so that it is never quantised nor packed."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = Parameter(torch.empty(outputs, inputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Router(nn.Module):
    """Which experts each token is sent to, and with which weights."""

    def __init__(self, mixture: MoEConfig, dim: int) -> None:
        super().__init__()
        self.mixture, self.weight = mixture, Parameter(torch.empty(mixture.experts, dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [M,dim] -> the weights of each token's experts, in fp32 or more, and their numbers, the best first [M,K].
        Of equal ones the first are taken."""
        logits = F.linear(x, self.weight).to(torch.promote_types(x.dtype, torch.float32))  # [M,E]
        chosen = logits.sort(dim=-1, descending=True, stable=True).indices[:, : self.mixture.used]
        weights = logits.softmax(-1).gather(1, chosen)
        return weights / weights.sum(-1, keepdim=True) if self.mixture.renormalised else weights, chosen


def by_expert(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """chosen [M,K] -> its order by expert, then by token [R], and where each expert's rows end in it, int32 [E]."""
    found, order = chosen.flatten().sort(stable=True)
    numbers = torch.arange(experts, device=chosen.device)
    return order, torch.searchsorted(found, numbers, right=True, out_int32=True)


def by_token(rows: Tensor, order: Tensor, weights: Tensor) -> Tensor:
    """rows [R,dim] in the order of by_expert -> the weighted sum of each token's [M,dim], in the weights' dtype."""
    found = rows[order.argsort()].unflatten(0, weights.shape)  # [M,K,dim]
    return (found * weights[..., None]).sum(1).to(rows.dtype)


class MixtureOfExperts(nn.Module):
    """Gated linear units, of which each token passes those that a router chooses; Jiang et al. 2024
    (arXiv 2401.04088)."""

    def __init__(
        self,
        mixture: MoEConfig,
        dim: int,
        activation: Callable[[Tensor], Tensor],
        linear: type[nn.Linear],
        shared: nn.Module | None,
    ) -> None:
        """shared: a feed-forward part that every token passes besides."""
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
