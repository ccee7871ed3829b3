"""Linear layers of the same input as one product: it takes fewer launches, and a wide matrix fills a device better.

A network is built, loaded, quantised and trained with these layers apart, under the names that files have.
linear.join_linears joins them in a loaded one that is only run.

Shapes: N rows, S positions; out, in: a layer's features.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch.nn as nn
from torch import Tensor


class JoinedLinear(nn.Module):
    """One layer with the outputs of several side by side: x [N,S,in] -> [N,S,out] of each. sizes: out of each."""

    def __init__(self, whole: nn.Module, sizes: Sequence[int]) -> None:
        super().__init__()
        self.whole, self.sizes = whole, list(sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.whole(x).split(self.sizes, -1)


class Joinable(nn.Module):
    """Base for modules that can join the layers `names`, which take the same input, into one product."""

    names: ClassVar[tuple[str, ...]]

    def __init__(self) -> None:
        super().__init__()
        self.products: Callable[[Tensor], Sequence[Tensor]] = self.apart

    def apart(self, x: Tensor) -> Sequence[Tensor]:
        """Multiply by each layer: x [N,S,in] -> [N,S,out] of each."""
        return [self.get_submodule(name)(x) for name in self.names]

    def join(self, make: Callable[[Sequence[nn.Module]], JoinedLinear | None]) -> None:
        """Replace the layers by make(layers), unless they are joined already or it is None."""
        parts = [module for name, module in self.named_children() if name in self.names]
        if parts and (joined := make(parts)) is not None:
            self.products = joined
            for name in self.names:
                delattr(self, name)
