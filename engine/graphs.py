"""Decode steps as graphs: torch.compile, and on CUDA a recorded CUDA graph, replayed with one launch.

PyTorch's own CUDA graphs (mode="reduce-overhead") would copy a cache that a step writes to; here the addresses stay
fixed. Everything else works without this file and the lines that call it. Shapes: N rows, S positions, V vocabulary.
"""

import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from cache import KVCache
from layers.notices import Notice, showing
from sampling import NOTHING


class StepInput(NamedTuple):
    """Inputs of a decode step besides the cache. tokens [N,1] at input_pos [N,1]. samples [N]: the sample index of each
    row. seed: a scalar, or [N] if rows have their own. seen: the mask of tokens that each row already has, for the
    repetition penalty (sampling.penalised)."""

    tokens: Tensor
    input_pos: Tensor
    samples: Tensor
    seed: Tensor
    seen: Tensor = NOTHING


Step = Callable[[StepInput, KVCache], tuple[Tensor, Tensor]]
Recording = tuple[Callable[[], None], tuple[Tensor, Tensor]]


def compiled(step: Step) -> Step:
    """Compile a step, at its first call, to one graph for every N >= 2, S >= 2, context and capacity. It runs eagerly
    for chain layouts beyond torch.compile's recompile limit."""
    from torch._dynamo.exc import FailOnRecompileLimitHit  # a second of imports, needed to compile anyway

    def own(inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
        return step(inputs, cache)

    own.__code__ = own.__code__.replace()  # a code object of its own: torch.compile caches graphs by it
    # Only marked sizes are dynamic: a second model in the process must not make its other sizes dynamic too.
    graph, first = torch.compile(own, fullgraph=True, dynamic=False), [showing("compiling")]

    def marked(inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
        mark_dynamic(inputs, cache)
        try:
            with first.pop() if first else nullcontext(), tuned(inputs.tokens):
                return graph(inputs, cache)
        except FailOnRecompileLimitHit:
            warn_once("one step has been compiled for as many layouts as PyTorch keeps: it runs uncompiled for others")
            return step(inputs, cache)

    return marked


def tuned(tokens: Tensor) -> AbstractContextManager[None]:
    """Enable Inductor's coordinate descent tuning for a single token on CUDA: only then does it compile products of
    one row itself, which reach the memory bandwidth. For more rows it would only compile longer."""
    if tokens.numel() > 1 or tokens.device.type != "cuda":
        return nullcontext()
    from torch._inductor import config  # as above

    return config.patch(coordinate_descent_tuning=True)


@functools.cache
def warn_once(text: str) -> None:
    """Warn once per text."""
    warnings.warn(text, Notice, stacklevel=3)


def mark_dynamic(inputs: StepInput, cache: KVCache) -> None:
    """Mark the rows, positions and slots of a step's arguments as dynamic sizes, so that no new value recompiles it.

    A size of 1 cannot be marked: torch.compile always specialises on it.
    """
    marks = [(tensor, 0) for tensor in inputs[:4] if tensor.dim()]
    marks += [(tensor, 1) for tensor in (inputs.tokens, inputs.input_pos)]
    for each in (cache, *(link.cache for link in cache.links)):
        marks += [(tensor, dim) for tensor in each.tensors for dim in (0, 2)] + [(each.start, 0)]
    for link in cache.links:
        marks += [(tensor, 0) for tensor in (link.index, link.length, link.group, link.place) if tensor is not None]
    for tensor, dim in marks:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


@functools.cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream for all recordings: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def record(step: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> Recording:
    """Warm up `step`, which may compile, then record it. Returns the replay function and the tensors that it fills."""
    with torch.cuda.device(device):
        stream = side_stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            outputs = step()
    return graph.replay, outputs


class RecordedStep:
    """A step as a CUDA graph, recorded again when an input's shape or the cache's memory changes: when rows leave or
    more slots come into view. Ranks of a sharded network record the same steps, since a recording runs the step more
    often than a replay, and each run waits for the other ranks' sums.

    Recording also runs the step. To write its keys and values more than once is harmless: a position's slot is fixed.
    """

    def __init__(self, step: Step, record: Callable[..., Recording] = record) -> None:
        self.step, self.record = step, record
        self.layout: list[tuple] = []
        self.recording: Recording | None = None

    def __call__(self, inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
        layout = [(tensor.shape, tensor.dtype) for tensor in inputs] + cache_signature(cache)
        if layout != self.layout:
            self.layout, self.recording = [], None  # frees its memory for the next one
            self.inputs = StepInput(*(tensor.clone() for tensor in inputs))
            self.recording = self.record(lambda: self.step(self.inputs, cache), inputs.tokens.device)
            self.layout = layout  # only now, since recording may run out of memory
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        assert self.recording is not None
        replay, (first, second) = self.recording
        replay()
        return first.clone(), second.clone()


def cache_signature(cache: KVCache) -> list[tuple]:
    """List what a recording depends on in a chain: the type of each cache, and the storage, offset, shape, strides and
    dtype of its tensors. An allocator that gives the memory of a freed tensor to a new one may do so on one rank only,
    so addresses would not change on all ranks together; storages do, as all run the same program."""
    tensors = [(type(cache), tensor) for tensor in (*cache.tensors, cache.start)]
    for link in cache.links:
        own = (*link.cache.tensors, link.cache.start, link.length, link.group, link.place)
        tensors += [(type(link.cache), tensor) for tensor in own if tensor is not None]
    return [
        (kind, StorageWeakRef(each.untyped_storage()), each.storage_offset(), each.shape, each.stride(), each.dtype)
        for kind, each in tensors
    ]
