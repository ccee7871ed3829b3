"""A decode step recorded once as a CUDA graph and replayed: one launch instead of some hundreds.

A room of its own because it is for CUDA alone: without this file and the line that calls it all else works. PyTorch's
own graphs (mode="reduce-overhead") would copy a cache that a step writes to; here the step keeps to its addresses.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model import KVCache, Step


def record(step: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Runs `step`, which may compile, then records it. Returns what replays it, and the tensor that it then fills."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    return graph.replay, output


class RecordedStep:
    """tokens [N,1], input_pos [N,1], cache -> logits [N,V], which the next call overwrites.

    Recorded anew when the cache's tensors change, as they do when rows leave it or its slots grow. Recording runs the
    step; that it writes its keys and values more than once changes nothing, since a position's place is fixed.
    """

    def __init__(self, step: Step, record: Callable[..., tuple[Callable[[], None], Tensor]] = record) -> None:
        self.step, self.record = step, record
        self.addresses: tuple[int, ...] = ()

    def __call__(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        addresses = (cache.rows, cache.slots, *addresses_of(cache))
        if addresses != self.addresses:
            self.replay = self.logits = None  # what the last recording holds is free for the next
            self.tokens, self.input_pos, self.addresses = tokens.clone(), input_pos.clone(), addresses
            self.replay, self.logits = self.record(lambda: self.step(self.tokens, self.input_pos, cache))
        self.tokens.copy_(tokens)
        self.input_pos.copy_(input_pos)
        self.replay()
        return self.logits


def addresses_of(cache: KVCache | None) -> list[int]:
    """Where a cache and its ancestors keep what a step reads and writes."""
    addresses: list[int] = []
    while cache is not None:
        tensors = [*cache.tensors, cache.start]
        tensors += [] if cache.parent_length is None else [cache.parent_length]
        addresses += [tensor.data_ptr() for tensor in tensors]
        cache = cache.parent
    return addresses
