"""Tests of triton_linear.py in Triton's interpreter, run by test_triton_linear.py in a process of their own, since
TRITON_INTERPRET=1 must be set before Triton is imported.

Oracle: an fp64 product with the dequantised weight. The error bound is twice that of PyTorch's product in the same
dtype, as in test_linear.py.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import GQA, random_model, random_tokens
from test_linear import random_weight
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from cache import NoCache
from layers import linear as held
from layers import triton_linear
from layers.linear import TritonExperts, TritonLinear, choose_grouped, dequantise, group_experts, kernels, swap_linears
from layers.moe import ExpertLinear, MoEConfig, can_capture_graph

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
WORST: dict[torch.dtype, float] = {}
# By kind: outputs, inputs and inputs in a group; no tile divides them but where a group has to.
WEIGHTS = {
    "int8": ("int8", 37, 75, 0), "int8, wide": ("int8", 70, 259, 0), "int4, 32": ("int4", 31, 160, 32),
    "int4, 64": ("int4", 67, 192, 64), "int4, 96": ("int4", 35, 96, 96), "int4, 128": ("int4", 33, 256, 128),
}  # fmt: skip


def rows_of(R: int, size: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(R, size, generator=torch.Generator().manual_seed(R)).to(dtype)


def assert_near(found: Tensor, x: Tensor, exact: Tensor, bias: Tensor | None = None) -> None:
    """Compare a product of x [...,in] with the fp64 product, and its error with that of PyTorch's in x's dtype."""
    assert found.dtype == x.dtype and found.isfinite().all()
    expected = F.linear(x.double(), exact, None if bias is None else bias.double())
    plain = F.linear(x, exact.to(x.dtype), bias)
    error, bound = ((each.double() - expected).norm() for each in (found, plain))
    WORST[x.dtype] = max(WORST.get(x.dtype, 0), (error / expected.norm()).item())
    print("largest errors", WORST)
    assert error <= 2 * bound + 1e-7 * expected.norm()


@pytest.mark.parametrize("name,dtype", [*product(WEIGHTS, [BF16, FP32]), ("int8", FP16), ("int4, 32", FP16)])
def test_few_rows_by_codes_widened_in_registers(name, dtype, monkeypatch):
    """Of [N,S,in], contiguous or not, with a bias and without; the weight is never dequantised. A zero far from 0 takes
    part in every product."""
    weight = random_weight(*WEIGHTS[name])
    if weight.kind == "int4":
        weight = replace(weight, zeros=weight.zeros * 9 - 2)
    exact = dequantise(weight, torch.float64)
    for N, S, bias in ((2, 1, rows_of(1, len(exact), dtype)[0]), (1, 3, None), (17, 1, None)):
        x = rows_of(N * S, exact.shape[1], dtype).view(S, N, -1).transpose(0, 1)
        linear = TritonLinear(weight, bias, dtype)
        with monkeypatch.context() as patch:
            patch.setattr(type(weight), "expand", lambda *_: pytest.fail("the weight is dequantised"))
            found = linear(x)
        assert_near(found, x, exact, bias)


@pytest.mark.parametrize("name", ["int8, wide", "int4, 64"])
def test_rows_up_to_the_limit_and_beyond(name, monkeypatch):
    """64 rows and positions are the kernel's, of 65 and of a prompt each product dequantises: by the shape alone."""
    weight, seen = random_weight(*WEIGHTS[name]), []
    linear, exact = TritonLinear(weight, None, BF16), dequantise(weight, torch.float64)
    operator = torch.ops.bifurcated.widened_linear
    monkeypatch.setattr(
        torch.ops.bifurcated, "widened_linear", lambda x, *rest: seen.append(len(x)) or operator(x, *rest)
    )
    for N, S in ((64, 1), (65, 1), (13, 5), (11, 3), (1, 200)):
        x = rows_of(N * S, exact.shape[1], BF16).view(N, S, -1)
        assert_near(linear(x), x, exact)
    assert seen == [64, 33]


def test_few_rows_and_many_are_two_graphs():
    """And none besides, whatever their numbers. Oracle: the eager layer."""
    linear, counter = TritonLinear(random_weight(*WEIGHTS["int4, 32"]), None, FP32), CompileCounter()
    torch.compiler.reset()
    graph = torch.compile(linear.multiply, backend=counter, fullgraph=True, dynamic=False)
    for N in (2, 31, 64, 65, 100):
        x = rows_of(N, 160, FP32)[:, None]
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(graph(x), linear(x))
    assert counter.frame_count == 2


def experts_of(kind: str, E: int, dtype: torch.dtype) -> tuple[ExpertLinear, Tensor]:
    """Make experts, plain or quantised, and their dequantised weights, fp64 [E,out,in]."""
    generator = torch.Generator().manual_seed(E)
    experts = ExpertLinear(nn.Linear(75 if kind != "int4" else 192, 37, bias=False, dtype=dtype) for _ in range(E))
    for number, linear in enumerate(experts):
        linear.requires_grad_(False).weight.normal_(generator=generator)
        if kind != "plain":
            weight = random_weight(kind, 37, linear.in_features, 64)
            weight = replace(weight, scales=weight.scales + number)
            experts[number] = held.QuantisedLinear(weight, None, dtype)
    exact = [each.weight.double() if kind == "plain" else dequantise(each.weight, torch.float64) for each in experts]
    return experts, torch.stack(exact)


# Rows of each expert: none of some, all of one, one alone, and more than a tile of rows.
ROUTINGS = [[3, 0, 17, 1, 0], [0, 0, 29, 0], [2], [0, 70, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_sorted_rows_by_their_experts(kind, dtype):
    for counts in ROUTINGS if dtype == BF16 else ROUTINGS[:2]:
        experts, exact = experts_of(kind, len(counts), dtype)
        ends, x = torch.tensor(counts).cumsum(0, dtype=torch.int32), rows_of(sum(counts), exact.shape[2], dtype)
        found = TritonExperts(experts)(x, ends)
        for number, (mine, theirs) in enumerate(zip(found.split(counts), x.split(counts), strict=True)):
            assert_near(mine, theirs, exact[number])


def test_a_block_writes_the_rows_of_its_expert_alone():
    """The first of two experts has three rows; those of the second, in the same tile, are another program's."""
    x, y, ends = rows_of(20, 75, FP32), torch.full((20, 37), torch.nan), torch.tensor([3, 20], dtype=torch.int32)
    given = x, torch.ones(2, 37, 75), None, None, None, ends, y, 20, 37, 75, 2, 0
    triton_linear.multiply_rows[(1, 1)](*given, *triton_linear.Tile(16, 64, 32, 1, 4, 2)[:4])
    assert y[:3].isfinite().all() and y[3:].isnan().all()


def test_the_operator_is_one_node_of_a_compiled_graph():
    """For any number of rows. Oracles: PyTorch's own check of operators; the eager call."""
    experts, _ = experts_of("int4", 3, FP32)
    grouped, counter = TritonExperts(experts), CompileCounter()
    operator = torch.ops.bifurcated.widened_linear.default
    given = rows_of(5, 192, FP32), *grouped.buffers(), None, torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    torch.compiler.reset()
    graph = torch.compile(grouped, backend=counter, fullgraph=True, dynamic=False)
    for R in (5, 40):
        x, ends = rows_of(R, 192, FP32), torch.tensor([2, 2, R], dtype=torch.int32)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(graph(x, ends), grouped(x, ends))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_gradients_are_those_of_the_loop(kind):
    """The operator has none, and says so."""
    experts, exact = experts_of(kind, 3, FP32)
    grouped, ends = TritonExperts(experts), torch.tensor([2, 2, 5], dtype=torch.int32)
    x = rows_of(5, exact.shape[2], FP32).requires_grad_()
    with pytest.raises(NotImplementedError, match="no gradients"):
        torch.ops.bifurcated.widened_linear(x, *[*grouped.buffers(), None, None, None][:3], None, ends)
    found, expected = (torch.autograd.grad(each(x, ends).square().sum(), x)[0] for each in (grouped, experts))
    torch.testing.assert_close(found, expected)
    if kind != "plain":
        linear = TritonLinear(experts[0].weight, None, FP32)
        found, expected = (torch.autograd.grad(each(x).square().sum(), x)[0] for each in (linear, experts[0]))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_a_mixture_is_grouped_and_computes_as_its_loops(kind, monkeypatch):
    """Two layers of experts and one without, N = 5, S = 2; nothing is left that keeps a step from being recorded.
    Oracle: the loop, in fp32."""
    monkeypatch.setattr(held, "has_triton", lambda *_: True)
    args = replace(GQA, dim=64, hidden_dim=37, mixture=MoEConfig(5, 2, 32 if kind == "int4" else 37, True, 29, (1,)))
    plain, model = (random_model(args, FP32) for _ in range(2))

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        if kind == "plain" or not args.mixture.has(name):
            return None
        weight = random_weight(kind, *linear.weight.shape)
        scales = weight.scales / (800 if kind == "int8" else 50) * (1 + len(name) % 2)
        zeros = {} if kind == "int8" else {"zeros": weight.zeros / 50}
        return held.QuantisedLinear(replace(weight, scales=scales, **zeros), None, FP32)

    swap_linears(plain, make)
    swap_linears(model, make)
    assert not can_capture_graph(model)
    group_experts(model)
    assert can_capture_graph(model) and kernels(model)["grouped in Triton"] == 6
    assert choose_grouped(plain.layers[0].feed_forward.w1, FP16) is (None if kind == "plain" else TritonExperts)
    tokens, input_pos = random_tokens(args, 5, 2), torch.arange(2).expand(5, 2)
    expected, found = (each(tokens, input_pos, NoCache()) for each in (plain, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_no_rows_are_no_product():
    experts, _ = experts_of("int8", 3, BF16)
    assert TritonExperts(experts)(rows_of(0, 75, BF16), torch.zeros(3, dtype=torch.int32)).shape == (0, 37)
    assert triton_linear.INTERPRETED
