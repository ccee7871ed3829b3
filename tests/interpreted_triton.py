"""Tests of triton_attention.py in Triton's interpreter, run by test_triton.py in a process of their own, since
TRITON_INTERPRET=1 must be set before Triton is imported.

Oracle: an fp64 softmax over all keys that a row sees, concatenated. The error bound is twice that of SDPA in the same
dtype on the same keys (test_bifurcated_attention.py). Slots that are not written hold nan.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from conftest import ALIBI, GQA, PROMPT, WINDOW, draws, positions, prefilled, random_model, random_tokens, request
from test_bifurcated_attention import assert_error_at_most_twice
from test_speculate import always  # noqa: F401, a fixture
from torch import Tensor

import cache as caches
from bifurcated_attention import ScoreMod
from cache import KVCache, Link, attend_by_torch, sdpa
from engine.contexts import RowMap
from engine.decoding import Prompt
from engine.engine import Engine
from engine.layouts import Int8Context
from engine.speculate import LayersDraft, Speculation
from layers.rope import alibi_slopes
from layers.triton_attention import attend_chain

TWO = replace(GQA, n_layer=2)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WORST: dict[torch.dtype, float] = {}


@dataclass(frozen=True)
class Case:
    """ancestors: rows and slots of each, nearest first; own: slots of the rows' own; scale: of the queries, since few
    keys that dominate show rounded scores; int8: the ancestor that is in int8."""

    N: int
    S: int
    P: int
    G: int
    D: int
    ancestors: tuple[tuple[int, int], ...]
    own: int
    dtype: torch.dtype = FP32
    scale: float = 1
    window: int | None = None
    alibi: bool = False
    softcap: float | None = None
    int8: int | None = None

    @property
    def mod(self) -> ScoreMod:
        return ScoreMod(self.window, alibi_slopes(self.P * self.G) if self.alibi else None, self.softcap)


# Every N, P and D of the contract, chains of one to four, and lengths that no tile divides.
CASES = [
    Case(1, 1, 1, 1, 64, (), 4097, BF16),
    Case(1, 1, 8, 1, 128, ((1, 4096),), 1, BF16, 4),
    Case(1, 1, 1, 1, 128, ((1, 127),), 300, FP16, 4),
    Case(2, 3, 2, 1, 80, ((1, 129),), 127),
    Case(65, 1, 1, 1, 64, ((1, 257),), 15, BF16),
    Case(33, 1, 2, 1, 96, ((1, 1),), 1),
    Case(5, 1, 4, 1, 96, ((1, 1000),), 129, BF16, 16),
    Case(7, 1, 1, 1, 80, ((3, 65),), 33, FP16),
    Case(7, 2, 2, 2, 64, ((3, 63), (2, 128)), 9),
    Case(3, 1, 8, 1, 59, ((1, 15),), 17, BF16),
    Case(6, 1, 3, 1, 96, ((4, 31), (2, 17), (1, 259)), 10, BF16, 4),
    Case(5, 9, 4, 1, 64, ((2, 70), (1, 15)), 130, BF16),
    Case(5, 1, 2, 2, 64, ((3, 40), (1, 300)), 65, window=70),
    Case(5, 3, 2, 1, 80, ((3, 40), (1, 300)), 200, BF16, window=5),
    Case(3, 3, 2, 2, 64, ((2, 40), (1, 129)), 20, alibi=True),
    Case(3, 1, 2, 2, 128, ((1, 129),), 20, BF16, 4, softcap=5.0),
    Case(3, 2, 4, 1, 64, ((2, 40), (1, 129)), 20, FP32, 1, 50, True, 2.0),
    Case(3, 1, 4, 1, 80, ((1, 300),), 20, BF16, 4, int8=0),
    Case(5, 2, 2, 1, 64, ((3, 40), (1, 129)), 20, FP16, 1, 33, True, 9.0, int8=1),
    Case(5, 1, 1, 2, 128, ((3, 40), (1, 129)), 20, FP32, int8=0),
]  # fmt: skip


def nan_from(cache: KVCache, length: Tensor) -> None:
    """Fill the slots from `length` [R] on with nan, in int8 their scales."""
    for tensor in cache.tensors[:4]:
        if tensor.is_floating_point() and tensor.shape[2] == cache.slots:
            beyond = torch.arange(cache.slots) >= length[:, None]
            tensor.masked_fill_(beyond[:, None, :, None], math.nan)


def build(case: Case, generator: torch.Generator) -> tuple[KVCache, Tensor, Tensor]:
    """Draw a chain of caches, queries [N,H,S,D] and their positions [N,S]. Rows continue random rows of their parent,
    at random lengths, 0 among them."""
    like, rows = torch.empty(0, dtype=case.dtype), [*(R for R, _ in case.ancestors[::-1]), case.N]
    slots, cache = [*(L for _, L in case.ancestors[::-1]), case.own], None
    for at, (R, L) in enumerate(zip(rows, slots, strict=True)):
        parent, length = cache, None
        if parent is None:
            cache = KVCache.empty((1, case.G, case.D), R, L, like)
        else:
            if parent.rows > 1:
                length = torch.randint(0, parent.slots + 1, (parent.rows,), generator=generator)
                length[0] = 0
                nan_from(parent, length)
            index = torch.randint(0, parent.rows, (R,), generator=generator).tolist()
            cache = KVCache.branch(parent, index, L, length=length)
        for tensor in cache.tensors:
            tensor.normal_(generator=generator)
        if case.int8 is not None and at == len(rows) - 2 - case.int8:
            cache = Int8Context.of(cache)
    assert cache is not None
    used = torch.randint(0, case.own - case.S + 1, (case.N, 1), generator=generator) + torch.arange(case.S)  # [N,S]
    nan_from(cache, used[:, -1] + 1)
    q = torch.randn(case.N, case.P * case.G, case.S, case.D, generator=generator) * case.scale
    return cache, q.to(case.dtype), cache.start[:, None] + used


def exact(cache: KVCache) -> tuple[Tensor, Tensor]:
    """Keys and values of the only layer in fp64 [R,G,L,D], for int8 of the numbers stored, unrounded."""
    k, v, *scales = (tensor.double() for tensor in cache.tensors)
    return (k * scales[0] * scales[2], v * scales[1]) if scales else (k, v)


def softmax(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, distance: Tensor, mod: ScoreMod) -> Tensor:
    """fp64 attention of one row: q [H,S,D], k, v [G,L,D], seen, distance [S,L] -> [H,S,D]; 0 if a query sees no key."""
    k, v = (side.repeat_interleave(len(q) // len(k), 0) for side in (k, v))
    scores = q.double() @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if mod.softcap is None else mod.softcap * torch.tanh(scores / mod.softcap)
    scores = scores if mod.slopes is None else scores - mod.slopes.double()[:, None, None] * distance
    return scores.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0) @ v


def written(link: Link, row: int) -> int:
    return link.cache.slots if link.length is None else int(link.length[link.index[row]])


def both(cache: KVCache, q: Tensor, input_pos: Tensor, mod: ScoreMod) -> tuple[Tensor, Tensor]:
    """The oracle, and SDPA in q's dtype, over the concatenation of what each row sees -> [N,H,S,D] twice."""
    expected, plain = [], []
    for row in range(len(q)):
        chain = [(link.cache, int(link.index[row]), written(link, row)) for link in cache.links]
        chain.append((cache, row, int(input_pos[row].max() - cache.start[row]) + 1))
        parts = [[side[at, :, :n] for side in (*exact(each), *each.read(0))] for each, at, n in chain]
        k, v, k_rounded, v_rounded = (torch.cat(side, 1) for side in zip(*parts, strict=True))
        where = torch.cat([each.positions()[at, :n] for each, at, n in chain])  # [L]
        distance = input_pos[row][:, None] - where
        seen = (distance >= 0) & (distance < (mod.window or 10**9))
        expected.append(softmax(q[row], k, v, seen, distance, mod))
        mask = mod.mask(seen[None, None], input_pos[row : row + 1], where[None])
        plain.append(sdpa(q[row : row + 1], k_rounded[None], v_rounded[None], mask, mod.softcap)[0].nan_to_num(0))
    return torch.stack(expected), torch.stack(plain)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.N}x{case.S},{len(case.ancestors) + 1}")
def test_the_merge_contract(case):
    cache, q, input_pos = build(case, torch.Generator().manual_seed(0))
    expected, plain = both(cache, q, input_pos, case.mod)
    found = attend_chain(cache, 0, q, input_pos, case.mod)
    assert found.dtype == case.dtype and found.isfinite().all()
    WORST[case.dtype] = max(WORST.get(case.dtype, 0), (found.double() - expected).abs().max().item())
    print("largest errors", WORST)
    assert_error_at_most_twice(found, plain, expected)


def test_a_query_that_sees_nothing_gives_zero():
    """A row whose ancestor is empty, before its own first slot; the other row sees both."""
    cache, q, _ = build(Case(2, 1, 2, 1, 64, ((2, 9),), 3), torch.Generator().manual_seed(0))
    cache.extend_from(Link(cache.links[0].cache, [0, 1], torch.tensor([0, 9])))
    cache.start.copy_(torch.tensor([0, 9]))
    for tensor in (*cache.tensors, *cache.links[0].cache.tensors):
        tensor.normal_()
    input_pos = cache.start[:, None] + torch.tensor([[-1], [0]])
    found = attend_chain(cache, 0, q, input_pos, None)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1:].double(), both(cache, q, input_pos, ScoreMod())[0][1:], rtol=0, atol=1e-6)


def test_rows_are_seated_anew_in_place():
    """A pool of four rows: unequal shares, an idle row, whose output is not used but must be finite; then other rows,
    lengths and positions in the same tensors. Oracle: fp64."""
    generator = torch.Generator().manual_seed(0)
    pool = KVCache.empty((1, 2, 16), 4, 33, torch.empty(0))
    cache = KVCache.empty((1, 2, 16), 6, 9, torch.empty(0))
    for tensor in (*pool.tensors, *cache.tensors):
        tensor.normal_(generator=generator)
    length, q = torch.tensor([33, 0, 7, 20]), torch.randn(6, 4, 1, 16, generator=generator)
    link = RowMap(pool, length, 6)
    cache.extend_from(link)
    for seats, lengths in (([2, 0, None, 2, 3, 2], [33, 0, 7, 20]), ([3, 1, 2, None, 1, 1], [5, 6, 33, 1])):
        link.seat(seats)
        length.copy_(torch.tensor(lengths))
        cache.start.copy_(length[link.index])
        input_pos = cache.start[:, None] + torch.randint(0, 9, (6, 1), generator=generator)
        found = attend_chain(cache, 0, q, input_pos, None)
        used = [row for row, parent in enumerate(seats) if parent is not None]
        expected, _ = both(cache, q, input_pos, ScoreMod())
        torch.testing.assert_close(found[used].double(), expected[used], rtol=0, atol=1e-6)
        assert found.isfinite().all()


def test_the_operator_is_one_node_of_a_compiled_graph():
    """The fake implementation gives shape, strides and dtype of the real one, and a compiled call has no break.
    Oracles: PyTorch's own check of operators; the eager call."""
    cache, q, input_pos = build(CASES[12], torch.Generator().manual_seed(0))
    call = partial(attend_chain, cache, 0, input_pos=input_pos, mod=CASES[12].mod)
    given: list[tuple] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.bifurcated, "attend_split", lambda *args: given.append(args) or args[0])
        call(q=q)
    operator = torch.ops.bifurcated.attend_split.default
    torch.library.opcheck(operator, given[0], test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(q=q), call(q=q))


class Noting:
    """The operator, which notes the number of positions in each call."""

    def __init__(self, sizes: set[int]) -> None:
        self.sizes, self.operator = sizes, torch.ops.bifurcated.attend_split

    def __call__(self, q: Tensor, *rest: object) -> Tensor:
        self.sizes.add(q.shape[2])
        return self.operator(q, *rest)


@pytest.fixture
def forced(monkeypatch):
    """A function that makes every new cache attend by Triton, or by PyTorch alone."""
    return lambda on: monkeypatch.setattr(caches, "chain_operator", lambda *_: attend_chain if on else None)


def test_gradients_are_those_of_torch(forced):
    forced(True)
    cache, q, input_pos = build(CASES[3], torch.Generator().manual_seed(0))
    for tensor in cache.tensors:
        tensor.nan_to_num_(0)
    with pytest.raises(NotImplementedError, match="no gradients"):
        attend_chain(cache, 0, q.requires_grad_(), input_pos, None)
    (found,) = torch.autograd.grad(cache.over_chain(cache, 0, q, input_pos, None).square().sum(), q)
    (expected,) = torch.autograd.grad(attend_by_torch(cache, 0, q, input_pos, None).square().sum(), q)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("args", [TWO, WINDOW, ALIBI], ids=["GQA", "window", "ALiBi"])
def test_steps_and_drafts_of_a_model_equal_those_by_torch(args, forced):
    """N = 3 behind a context of 13: single tokens, three at once, one. Oracle: the same by PyTorch, in fp32."""
    args = replace(args, n_layer=2, windows=args.windows[:2])
    model, context, decoded = random_model(args, FP32), random_tokens(args, 1, 13), random_tokens(args, 3, 5, seed=2)
    logits = []
    for on in (False, True):
        forced(on)
        cache = KVCache.fork(prefilled(model, context, 5), 3, 7)
        assert (cache.operator is attend_chain) == on
        logits.append([model(decoded[:, a:b], positions(13 + a, 3, b - a), cache) for a, b in ((0, 1), (1, 4), (4, 5))])
    for found, expected in zip(logits[1], logits[0], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kv_dtype,draft,prompts", [("auto", False, 1), ("int8", False, 1), ("auto", True, 2)])
@pytest.mark.usefixtures("always")
def test_the_engine_draws_the_same_tokens(kv_dtype, draft, prompts, forced, monkeypatch):
    """Three samples of each prompt, with the context as it is and in int8, and with a draft of two tokens. Prefill does
    not run by Triton. Oracle: the engine by PyTorch alone, in fp32."""
    sizes, texts = set(), [Prompt(0, PROMPT), Prompt(1, PROMPT[:4] + PROMPT[::-1])][:prompts]
    monkeypatch.setattr(torch.ops.bifurcated, "attend_split", Noting(sizes))
    found = []
    for on in (False, True):
        forced(on)
        engine = Engine(random_model(TWO, FP32), compile=False)
        if draft:
            engine.use(Speculation(LayersDraft(1), 2), 3 * prompts)
        made = engine.generate_many(texts, request(3, 4, kv_dtype=kv_dtype))
        found.append(sorted((each.prompt.id, draws(each.samples)) for each in made))
        assert on or not sizes
    assert found[0] == found[1] and sizes == ({1, 3} if draft else {1})
