"""A decode step recorded once as a CUDA graph and replayed: one launch instead of some hundreds.

A room of its own because it is for CUDA alone: without this file and the line that calls it all else works. PyTorch's
own graphs (mode="reduce-overhead") would copy a cache that a step writes to; here the step keeps to its addresses.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from model import KVCache, Step

Recording = tuple[Callable[[], None], Tensor]


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
    """Runs `step`, which may compile, then records it. Returns what replays it, and the tensor that it then fills."""
    with torch.cuda.device(device):
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = step()
    return graph.replay, output


class RecordedStep:
    """tokens [N,1], input_pos [N,1], cache -> logits [N,V], which the next call overwrites.

    Recorded anew when the cache's tensors change, as they do when rows leave it or its slots grow. Recording runs the
    step; that it writes its keys and values more than once changes nothing, since a position's place is fixed.
    """

    def __init__(self, step: Step, record: Callable[[Callable[[], Tensor], torch.device], Recording] = record) -> None:
        self.step, self.record = step, record
        self.layout: list[tuple] = []

    def __call__(self, tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        layout = layout_of(cache)
        if layout != self.layout:
            self.layout, self.replay, self.logits = [], None, None  # what the last recording holds is free for the next
            self.tokens, self.input_pos = tokens.clone(), input_pos.clone()
            self.replay, self.logits = self.record(lambda: self.step(self.tokens, self.input_pos, cache), tokens.device)
            self.layout = layout  # now, since recording may run out of memory
        self.tokens.copy_(tokens)
        self.input_pos.copy_(input_pos)
        self.replay()
        return self.logits


def layout_of(cache: KVCache | None) -> list[tuple]:
    """All that a recording depends on: the kind of each cache of the chain, and where its tensors lie. Freed memory is
    handed out again, so an address alone does not tell a new cache from an old one."""
    layout: list[tuple] = []
    while cache is not None:
        tensors = [*cache.tensors, cache.start]
        tensors += [] if cache.parent_length is None else [cache.parent_length]
        layout += [(type(cache), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]
        cache = cache.parent
    return layout
