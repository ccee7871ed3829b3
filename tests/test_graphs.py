"""A recorded step, with a stand-in for the recording. Oracle: the plain step. test_cuda.py has the real one."""

from collections.abc import Callable

import pytest
import torch
from conftest import GQA, PROMPT, draws, random_model, random_tokens, request
from torch import Tensor

from cache import KVCache
from engine import runner
from engine.engine import Engine
from engine.graphs import RecordedStep, Recording, Step, StepInput
from engine.layouts import SDPACache
from engine.request import Sampling
from sampling import draw, uniform

StepOutput = tuple[Tensor, Tensor]


def step_of(model, sampling: Sampling) -> Step:
    """A decode step and its draw, without what the host keeps between two calls."""

    def step(inputs: StepInput, cache: KVCache) -> StepOutput:
        return draw(*runner.decode(model, uniform, inputs, cache), sampling)

    return step


def inputs_of(rows: int, position: int, size: int = 1) -> StepInput:
    where = position + torch.arange(size).expand(rows, size)
    return StepInput(random_tokens(GQA, rows, size, seed=position), where, torch.arange(rows), torch.tensor(3))


@pytest.fixture(scope="module")
def model():
    return random_model(GQA, torch.float32)


@pytest.mark.parametrize("n", [1, 17])
def test_a_step_is_recorded_when_the_cache_changes(model, monkeypatch, n):
    """The same tokens as the plain step's, through compaction and growth, from a recording that is made only then."""
    engine, recordings = Engine(model), []
    asked = request(n, 200, eos_ids=frozenset(range(3, 97, 30)))
    expected = engine.generate(PROMPT, asked)

    def record(step: Callable[[], StepOutput], device: torch.device) -> Recording:
        outputs = step()
        recordings.append(outputs[0].shape)

        def replay() -> None:
            for mine, made in zip(outputs, step(), strict=True):
                mine.copy_(made)

        return replay, outputs

    monkeypatch.setattr(
        Engine, "step", lambda self, plan, filters, _: RecordedStep(step_of(self.model, filters()), record)
    )
    assert draws(engine.generate(PROMPT, asked)) == draws(expected)
    counted, steps = len(recordings), max(len(each.tokens) for each in expected)
    assert 1 <= counted <= 9 and counted < steps / 2  # at most four buckets and five compactions
    engine.generate(PROMPT, asked)
    assert len(recordings) == 2 * counted  # another cache


def kept_to_shapes(step: Step, make: Callable[[], KVCache], counted: list) -> Callable[..., Recording]:
    """A recording that keeps to the shapes and the memory that it has seen, as a graph does, and not to the objects."""

    def record(run: Callable[[], StepOutput], device: torch.device) -> Recording:
        outputs, recorded = run(), make()
        counted.append(recorded)
        inputs = run.__closure__  # the step's own inputs, at their addresses

        def replay() -> None:
            held = next(cell.cell_contents for cell in inputs if isinstance(cell.cell_contents, RecordedStep)).inputs
            for mine, made in zip(outputs, step(held, recorded), strict=True):
                mine.copy_(made)

        return replay, outputs

    return record


def test_memory_that_is_handed_out_again_is_recorded_anew(model):
    """Caches of other lengths, of another kind, and of other links in the same memory: each call gives the plain step's
    tokens."""
    step, counted = step_of(model, Sampling(0.9)), []
    memory = torch.randn(4 * GQA.n_layer, 10000, generator=torch.Generator().manual_seed(0))
    start, rows_of = torch.zeros(3, dtype=torch.long), {}

    def cache_of(kind: type[KVCache], length: int, rows: tuple[int, ...]) -> KVCache:
        """Keys and values at the same addresses for every length."""
        root = KVCache.empty(GQA.kv_shape, 2, length, memory)
        leaf = kind.branch(root, rows, 4)
        parts = iter(memory)
        for cache, count, slots in ((root, 2, length), (leaf, 3, 4)):
            for views in (cache.k, cache.v):
                views[:] = [next(parts)[: count * 2 * slots * 10].view(count, 2, slots, 10) for _ in views]
        leaf.start = start.fill_(length)
        root.start = rows_of.setdefault("root", root.start)
        return leaf

    current: list = []
    recorded = RecordedStep(step, kept_to_shapes(step, lambda: cache_of(*current), counted))
    calls = [(KVCache, 13, (0, 1, 1)), (KVCache, 14, (0, 1, 1)), (SDPACache, 14, (0, 1, 1)), (SDPACache, 14, (0, 1, 1))]
    calls += [(KVCache, 14, (1, 1, 0))]
    for call in calls:
        current[:] = call
        given = inputs_of(3, call[1])
        found, expected = recorded(given, cache_of(*call)), step(given, cache_of(*call))
        assert all(map(torch.equal, found, expected)), call
    assert len(counted) >= 4


def test_ranks_record_together_whatever_their_allocators_do(model):
    """A cache is replaced by one of the same shapes, on one rank in the same memory and on the other elsewhere: both
    record anew. While it stays, also by views made anew, both replay."""
    step, memory = step_of(model, Sampling(0.9)), [bytearray(1 << 16) for _ in range(2 * (2 * GQA.n_layer + 1))]

    def cache_over(buffers: list[bytearray]) -> KVCache:
        cache, parts = KVCache.empty(GQA.kv_shape, 3, 0, torch.empty(0), 4), iter(buffers)
        for views in cache.buffers:
            views[:] = [
                torch.frombuffer(next(parts), dtype=torch.float32)[: each.numel()].view_as(each) for each in views
            ]
        cache.start = torch.frombuffer(next(parts), dtype=torch.long)[:3]
        cache.resize(4)
        return cache

    seen = []
    for later in (memory[: len(memory) // 2], memory[len(memory) // 2 :]):
        first, counted = cache_over(memory[: len(memory) // 2]), []
        record = lambda step, device: counted.append(1) or (lambda: None, step())  # noqa: E731, B023
        recorded, pattern = RecordedStep(step, record), []
        for cache in (first, first, cache_over(later)):
            recorded(inputs_of(3, 2), cache)
            cache.resize(3)
            cache.resize(4)
            pattern.append(len(counted))
        seen.append(pattern)
    assert seen == [[1, 1, 2], [1, 1, 2]]


def test_tokens_of_another_shape_are_recorded_anew(model):
    """Three positions, then one of the same cache, then one of fewer rows: none is broadcast into the other's place."""
    root, counted = KVCache.empty(GQA.kv_shape, 1, 9, model.norm.weight), []
    for tensor in root.tensors:
        tensor.normal_(generator=torch.Generator().manual_seed(0))
    cache = KVCache.fork(root, 3, 8)
    step = step_of(model, Sampling(0.9))
    recorded = RecordedStep(step, kept_to_shapes(step, lambda: cache, counted))
    for size, position in ((3, 9), (1, 12), (1, 13), (3, 9), (2, 12)):
        given = inputs_of(3, position, size)
        found, expected = recorded(given, cache), step(given, cache)
        assert all(map(torch.equal, found, expected)), (size, position)
    assert len(counted) == 4


def test_a_seed_and_samples_that_change_are_not_those_of_the_recording(model):
    """They are inputs, as the tokens are: what a recording drew before is not drawn again."""
    root, counted = KVCache.empty(GQA.kv_shape, 1, 9, model.norm.weight), []
    cache, step = KVCache.fork(root, 17, 8), step_of(model, Sampling(1.5))
    recorded, given, seen = RecordedStep(step, kept_to_shapes(step, lambda: cache, counted)), inputs_of(17, 9), set()
    for seed, samples in ((3, given.samples), (4, given.samples), (4, given.samples + 17)):
        given = given._replace(seed=torch.tensor(seed), samples=samples)
        found = recorded(given, cache)
        assert torch.equal(found[0], step(given, cache)[0])
        seen.add(tuple(found[0].tolist()))
    assert len(counted) == 1 and len(seen) == 3
