"""A shared context whose keys and values are held as int8: half the bytes of bfloat16 while N samples decode from it.

A room of its own because the engine works without it: it is another cache that stands in for the context, and nothing
else knows of it. What the samples decode is small beside the context and stays in the dtype of the network.
Shapes: N rows, G key/value heads, L slots, D head dimension.
"""

import torch
from torch import Tensor

from model import KVCache


class Int8Context(KVCache):
    """A context that is only read. One scale for each head and token, in the dtype of the network: the largest number
    of a key or value becomes 127. In float16, numbers beyond 65,000 would not come back."""

    def __init__(self, context: KVCache) -> None:
        """Takes the place of `context`, which is emptied layer by layer, so that one layer at most is held twice."""
        super().__init__([], [], context.start, context.parent, context.parent_length)
        self.k_scale: list[Tensor] = []
        self.v_scale: list[Tensor] = []
        for tensors, numbers, scales in ((context.k, self.k, self.k_scale), (context.v, self.v, self.v_scale)):
            while tensors:
                number, scale = quantized(tensors.pop(0))
                numbers.append(number)
                scales.append(scale)

    @property
    def dtype(self) -> torch.dtype:
        return self.k_scale[0].dtype

    @property
    def tensors(self) -> list[Tensor]:
        return self.k + self.v + self.k_scale + self.v_scale

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.k[layer].to(self.dtype), self.v[layer].to(self.dtype)
        return k * self.k_scale[layer], v * self.v_scale[layer]


def quantized(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """[N,G,L,D] -> int8 [N,G,L,D] and its scale [N,G,L,1], in the tensor's dtype; what was all 0 stays so."""
    scale = tensor.abs().amax(-1, keepdim=True) / 127  # rounded to the dtype, so that rounding is not lost twice
    divisor = scale.float().masked_fill(scale == 0, 1.0)
    return (tensor.float() / divisor).round().clamp(-127, 127).to(torch.int8), scale
