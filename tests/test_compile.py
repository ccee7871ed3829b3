"""The compiled step. Oracles: torch.compile's own refusal to compile again; the eager step's numbers in fp32."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import ALIBI, GQA, MQA, PROMPT, draws, random_model, random_tokens, request, slow
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import sampling
from cache import KVCache
from cli.console import Stopwatch
from engine import decoding, runner
from engine.engine import Engine
from engine.graphs import StepInput, compiled, warn_once
from engine.layouts import Int8Context
from engine.request import Sampling
from engine.speculate import DraftController, LayersDraft, Speculation
from layers.notices import Notice
from model import ModelArgs, Transformer
from sampling import uniform

PLAIN = replace(GQA, n_layer=1)
DISTANT = replace(ALIBI, n_layer=1, windows=(5,))


@pytest.fixture(autouse=True)
def afresh():
    torch.compiler.reset()


@pytest.mark.parametrize("args", [PLAIN, DISTANT], ids=["plain", "ALiBi, window"])
def test_one_compiled_step_serves_every_n_context_and_capacity(args):
    """Also through compaction, which changes N on the way, and growth, which changes the slots in view. What is not
    finite is noticed as in any step."""
    model, eos = random_model(args, torch.float32), frozenset(range(3, 97, 30))
    by_mode = {mode: Engine(model, compile=mode) for mode in (True, False)}

    def draw(n: int, context: int, length: int, mode: bool) -> tuple[list, Stopwatch]:
        prompt, watch = random_tokens(GQA, context, seed=context).tolist(), Stopwatch()
        asked = request(n, length, Sampling(0.9, top_k=30), seed=n, eos_ids=eos)
        return [each.tokens for each in by_mode[mode].generate(prompt, asked, watch)], watch

    draw(5, 13, 6, True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, context, length in ((2, 2, 5), (3, 200, 80), (17, 33, 140), (64, 129, 12)):
            tokens, watch = draw(n, context, length, True)
            assert tokens == draw(n, context, length, False)[0]
            assert len(watch.step_s) > 1
        first = {row[0] for row in draw(3, 13, 1, False)[0]} - set(random_tokens(GQA, 13, seed=13).tolist())
        model.tok_embeddings.weight[list(first)] = torch.nan  # the prompt is sound, the first step is not
        with pytest.raises(FloatingPointError, match="the logits are not finite"):
            draw(3, 13, 5, True)


def filled(cache: KVCache, seed: int) -> KVCache:
    generator = torch.Generator().manual_seed(seed)
    for tensor in cache.tensors:
        tensor.normal_(generator=generator)
    return cache


def root_of(args: ModelArgs, length: int) -> KVCache:
    return filled(KVCache.empty(args.kv_shape, 1, length, torch.empty(0)), length)


def no_numbers(seed: Tensor, sample: Tensor, position: Tensor) -> Tensor:
    """In place of `uniform`, which takes most of the time to compile and has a test of its own."""
    return sample * position + seed


class Both:
    """The compiled step and the eager one."""

    def __init__(self, model: Transformer) -> None:
        self.eager = partial(runner.decode, model, no_numbers)
        self.compiled = compiled(self.eager)

    def difference(self, cache: KVCache, position: int | None = None) -> float:
        """Of the logits of a step at the position, or at each row's own start."""
        n = cache.rows
        where = cache.start[:, None].clone() if position is None else torch.full((n, 1), position)
        inputs = StepInput(random_tokens(GQA, n, 1), where, torch.arange(n), torch.tensor(3))
        (logits, numbers), (expected, drawn) = self.compiled(inputs, cache), self.eager(inputs, cache)
        assert torch.equal(numbers, drawn)
        return (logits - expected).abs().max().item()


@pytest.fixture
def quickly(monkeypatch):
    """Traced and guarded as ever, without the C++ compiler: what is asked is whether it compiles again."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))


def test_a_step_of_one_key_head_does_not_compile_again(quickly):
    """MQA, whose dimension of one is no N: a chain of one row at N = 1, a fork at N >= 2, each in one form."""
    args = replace(MQA, n_layer=1)
    both = Both(random_model(args, torch.float32))

    def check(length: int, slots: int, n: int) -> None:
        context = root_of(args, length)
        if n == 1:
            context.resize(length + slots)
        cache = context if n == 1 else KVCache.fork(context, n, slots)
        assert both.difference(cache, length) < 1e-4

    check(13, 64, 1)
    check(13, 64, 5)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length, slots, n in ((2, 64, 1), (200, 128, 1), (31, 7, 1), (2, 2, 2), (200, 64, 3), (29, 128, 17)):
            check(length, slots, n)


@pytest.mark.parametrize("args,form", [(DISTANT, "equal shares"), (PLAIN, "unequal shares")], ids=["equal", "unequal"])
def test_one_compiled_step_serves_trees_of_any_size(quickly, args, form):
    """Three caches: R questions of their own lengths behind one context, whose children are shared out equally or not;
    R, the lengths, the children and all slots vary. Oracle: the eager step."""
    both = Both(random_model(args, torch.float32))

    def tree(context: int, lengths: list[int], share: int, slots: int) -> KVCache:
        root, R = root_of(args, context), len(lengths)
        middle = filled(KVCache.fork(root, R, 9), R)
        rows = [row for row in range(R) for _ in range(share)]
        rows = rows if form == "equal shares" else [*rows[::-1], 0, 0]
        return KVCache.branch(middle, rows, slots, length=torch.tensor(lengths))

    assert both.difference(tree(13, [4, 2, 5], 2, 64)) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        for R, share, context, slots in ((2, 3, 29, 64), (5, 2, 200, 5), (7, 4, 2, 128), (17, 2, 33, 64)):
            assert both.difference(tree(context, [1 + row % 9 for row in range(R)], share, slots)) < 1e-4


def test_one_compiled_step_reads_a_context_in_int8():
    both = Both(random_model(PLAIN, torch.float32))

    def difference(n: int, length: int) -> float:
        return both.difference(KVCache.fork(Int8Context.of(root_of(PLAIN, length)), n, 4))

    assert difference(5, 29) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3, 77) < 1e-4 and difference(17, 200) < 1e-4


@pytest.fixture
def counter(monkeypatch) -> CompileCounter:
    """Counts graphs, without the C++ compiler. Simpler random numbers: Philox takes long to trace."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    for module in (runner, decoding, sampling):
        monkeypatch.setattr(module, "uniform", lambda seed, *at: (seed + at[0] * 7919 + at[1] * 104729) % 997 / 997.0)
    warn_once.cache_clear()
    return counter


def test_many_engines_of_one_process_compile_each_its_step(counter):
    """More than torch.compile may keep graphs of a function: fp32, N = 3. Oracle: the eager engine."""
    models = [random_model(PLAIN, torch.float32, seed) for seed in range(2)]
    for model in models:
        with torch._dynamo.config.patch(recompile_limit=1):
            compiling, eager = (Engine(model, compile=mode) for mode in (True, False))
            assert draws(compiling.generate(PROMPT, request(3, 5))) == draws(eager.generate(PROMPT, request(3, 5)))
    assert counter.frame_count == 2


def test_more_layouts_than_graphs_are_kept_run_eagerly_with_one_note(counter):
    both = Both(random_model(PLAIN, torch.float32))
    root = root_of(PLAIN, 13)
    middle = KVCache.fork(root, 2, 9)
    forms = [KVCache.fork(root, 3, 7), KVCache.fork(root, 1, 7), KVCache.fork(middle, 2, 7), root_of(PLAIN, 77)]
    keeps = torch._dynamo.config.patch(recompile_limit=2)
    with keeps, pytest.warns(Notice, match="as many layouts as PyTorch keeps") as told:
        assert max(both.difference(filled(form, 3)) for form in forms[:3] * 2) < 1e-4
    assert len(told) == 1 and counter.frame_count == 2


@slow
def test_one_verifying_step_serves_every_draft_length(counter, monkeypatch):
    """The plain, the verifying and the draft's step, each once. Oracle: plain decoding, eager."""
    for name, value in (("SETTLE", 2), ("TIMED", -1), ("PATIENCE", float("inf"))):
        monkeypatch.setattr(DraftController, name, value)
    model = random_model(replace(GQA, n_layer=2), torch.float32)
    plain, engine, steps = Engine(model, compile=False), Engine(model, compile=True), {}
    for k in (3, 1, 8):
        speculation = Speculation(LayersDraft(1), k)
        speculation.steps = steps
        engine.use(speculation, 3)
        asked = request(3, 12, seed=k)
        assert draws(engine.generate(PROMPT, asked)) == draws(plain.generate(PROMPT, asked))
    assert counter.frame_count == 3


def test_compiled_numbers_beyond_32_bits_are_the_eager_ones():
    """Every bit: compiled code may not take a product for one that does not overflow."""
    graph = torch.compile(uniform, fullgraph=True)
    words = torch.tensor([0, 1, 0xFFFF, 0xFFFFFFFF, 2**32, 2**32 + 5, 0x4F1BBCDCBFA53E0A, 2**63 - 1])
    for seed in words:
        found, expected = (each(seed, words[:, None], words) for each in (graph, uniform))
        assert torch.equal(found, expected)
    assert isinstance(found, Tensor) and found.unique().numel() == 64


def test_only_a_single_row_on_a_gpu_is_tuned_by_coordinate_descent(monkeypatch):
    """Inductor's own option, while a graph is called, by device, rows and positions; and not afterwards. Oracle:
    Inductor's decomposition of a product, which without it leaves one of a single row to a library."""
    from torch._inductor.decomposition import mm

    seen, made = [], partial(torch.empty, device="meta")

    def fuses() -> bool:
        return mm(made(1, 8), made(8, 5)) is not NotImplemented

    class OnCuda(Tensor):
        @property
        def device(self) -> torch.device:
            return torch.device("cuda")

    monkeypatch.setattr(torch, "compile", lambda step, **flags: lambda inputs, cache: seen.append(fuses()))
    step = compiled(lambda inputs, cache: None)
    for rows, size in ((1, 1), (3, 1), (1, 4)):
        cache = KVCache.empty((1, 2, 10), rows, 9, made(0))
        for tokens in (made(rows, size), made(rows, size).as_subclass(OnCuda)):
            step(StepInput(tokens, tokens, made(rows), made(())), cache)
    assert seen == [False, True, False, False, False, False] and not fuses()
