"""Weights held otherwise than plainly. Oracles: the plain model, whose sums in bfloat16 are the same, eager and
compiled; fp64 products with dequantised weights; plain loops."""

import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GQA, random_model, random_tokens, slow
from torch._dynamo.testing import CompileCounter

from cache import KVCache, NoCache
from engine.graphs import StepInput, compiled
from engine.plan import weigh
from engine.runner import decode
from layers import linear as packed
from layers.kernels import multiplies
from layers.linear import (
    DequantisedLinear,
    Int4Weight,
    Int8Weight,
    PackedLinear,
    QuantisedLinear,
    TinygemmLinear,
    WidenedLinear,
    bytes_read,
    can_pack,
    choose_way,
    dequantise,
    hold_linears,
    kernels,
    make_linear,
    swap_linears,
)
from sampling import uniform

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="needs an x86 CPU")
DTYPES = [torch.float32]
DTYPES += [torch.bfloat16] if can_pack(CPU, torch.bfloat16) else []
# Of logits: what rounding may make of them.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.01}


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(packed, "MIN_PACK_ELEMENTS", 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_products_are_those_of_the_plain_weights(dtype):
    """Odd sizes, with a bias and without, at one row and many, S = 1 and more: in bfloat16 equal to the last bit; in
    fp32 as near to the fp64 product."""
    for bias, inputs, outputs in ((False, 30, 52), (True, 97, 259)):
        linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
        product, exact = PackedLinear(linear), deepcopy(linear).double()
        for n, size in ((1, 1), (3, 17), (17, 1), (64, 5)):
            x = torch.randn(n, size, inputs, generator=torch.Generator().manual_seed(n)).to(dtype)
            if dtype == torch.bfloat16:
                assert torch.equal(product(x), linear(x)), (bias, n, size)
            else:
                torch.testing.assert_close(product(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_is_the_plain_model(small_ones_too, dtype):
    """All of its layers are packed, and no plain weight outlives its packing."""
    args = replace(GQA, qkv_bias=True)
    plain, model = (random_model(args, dtype) for _ in range(2))
    weights = [weakref.ref(module) for module in model.modules() if isinstance(module, torch.nn.Linear)]
    alive = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    with pytest.MonkeyPatch.context() as patch:
        count = lambda weight: alive.append(sum(ref() is not None for ref in weights)) or reorder(weight)  # noqa: E731
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", count)
        hold_linears(model, pack=True)
    # wq, wk, wv, w1 and w3 are joined before; then one plain weight after another is packed.
    assert alive[0] == len(weights) - 5 * args.n_layer and alive == sorted(alive, reverse=True) and alive[-1] <= 1
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 4 * args.n_layer + 1
    tokens, input_pos = random_tokens(args, 3, 17), torch.arange(17).expand(3, 17)
    expected, found = (each(tokens, input_pos, NoCache()) for each in (plain, model))
    assert ((found - expected).float().norm() / expected.float().norm()).item() < NEAR[dtype]


def test_what_is_shared_or_small_stays(monkeypatch):
    monkeypatch.setattr(packed, "MIN_PACK_ELEMENTS", 30 * 101)
    model = random_model(replace(GQA, tied_output=True), torch.float32)
    hold_linears(model, pack=True)
    assert model.output.weight is model.tok_embeddings.weight
    hold_linears(model, pack=True, tied_output=True)
    assert isinstance(model.output, PackedLinear) and isinstance(model.tok_embeddings.weight, torch.nn.Parameter)
    assert not isinstance(model.layers[0].attention.products.whole, PackedLinear)  # 30 x 100
    assert isinstance(model.layers[0].feed_forward.products.whole, PackedLinear)  # 30 x 104


@slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_step_takes_packed_weights(small_ones_too, dtype):
    """One compiled step for N = 3 and 17; its logits are those of the plain eager step within the dtype's rounding."""
    torch.compiler.reset()
    args = replace(GQA, n_layer=1)
    plain, model = (random_model(args, dtype) for _ in range(2))
    hold_linears(model, pack=True)
    steps = compiled(partial(decode, model, uniform)), partial(decode, plain, uniform)
    root = KVCache.empty(args.kv_shape, 1, 29, model.norm.weight)
    root.k[0].normal_(), root.v[0].normal_()

    def difference(n: int) -> float:
        rows = StepInput(random_tokens(args, n, 1), torch.full((n, 1), 29), torch.arange(n), torch.tensor(0))
        logits, expected = (step(rows, KVCache.fork(root, n, 4))[0] for step in steps)
        return ((logits - expected).float().norm() / expected.float().norm()).item()

    assert difference(5) < NEAR[dtype]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3) < NEAR[dtype] and difference(17) < NEAR[dtype]


def test_weights_leave_with_their_model(small_ones_too):
    model = random_model(GQA, torch.float32)
    held = len(packed.WEIGHTS)
    hold_linears(model, pack=True)
    assert len(packed.WEIGHTS) == held + 13
    del model
    assert len(packed.WEIGHTS) == held


def test_swapping_names_every_layer_and_leaves_what_is_shared():
    args = replace(GQA, tied_output=True)
    model, seen = random_model(args), []
    swap_linears(model, lambda name, linear: seen.append((name, linear.weight.shape)))
    named = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert seen == [(name, module.weight.shape) for name, module in named.items() if name != "output"]
    swap_linears(model, lambda name, linear: torch.nn.Identity() if name == "layers.1.attention.wo" else None)
    assert isinstance(model.layers[1].attention.wo, torch.nn.Identity)
    assert model.layers[0].attention.wo is named["layers.0.attention.wo"]
    assert kernels(model) == {"plain": 7 * 3 - 1 + 1}


def random_weight(kind: str, outputs: int, inputs: int, groupsize: int = 32) -> Int8Weight | Int4Weight:
    generator = torch.Generator().manual_seed(outputs)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator).bfloat16()

    if kind == "int8":
        return Int8Weight(torch.randint(-127, 128, (outputs, inputs), generator=generator).char(), uniform(outputs))
    codes = torch.randint(16, (outputs, inputs), generator=generator).byte()
    return Int4Weight.from_codes(codes, *(uniform(outputs, inputs // groupsize) for _ in range(2)))


@pytest.mark.parametrize("groupsize", [10, 32, 64])
def test_dequantising_is_what_the_format_says(groupsize, monkeypatch):
    """Number by number, in Python; also where a weight is dequantised in several blocks."""
    monkeypatch.setattr(packed, "BLOCK", 3 * 128)
    int8, int4 = random_weight("int8", 7, 6 * groupsize), random_weight("int4", 7, 6 * groupsize, groupsize)
    codes = torch.arange(16).repeat(7, 6 * groupsize // 2)[:, : 6 * groupsize].byte()
    assert torch.equal(Int4Weight.from_codes(codes, int4.scales, int4.zeros).codes(), codes)
    found8, found4 = dequantise(int8, torch.float32), dequantise(int4, torch.float32)
    for out in range(7):
        for i in range(6 * groupsize):
            assert found8[out, i] == int8.values[out, i].item() * int8.scales[out].item()
            byte, group = int4.values[out, i // 2].item(), i // groupsize
            code = byte & 15 if i % 2 else byte >> 4
            assert code == int4.codes()[out, i]
            expected = (code - 8) * int4.scales[out, group].item() + int4.zeros[out, group].item()
            assert found4[out, i].item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


EVERYWHERE = [DequantisedLinear, QuantisedLinear] + [WidenedLinear] * multiplies(torch.float32, 32, 32)
ANY = [(kind, linear) for kind in ("int8", "int4") for linear in EVERYWHERE]
CASES = [(*case, dtype) for dtype in (torch.bfloat16, torch.float32) for case in ANY]


@pytest.mark.parametrize("kind,linear,dtype", CASES)
@pytest.mark.parametrize("instructions", [True, False], ids=["bf16 CPU", "older CPU"])
def test_a_quantised_product_is_the_dequantised_one(kind, linear, dtype, instructions, monkeypatch):
    """With a bias and without, on few rows and on as many as a prompt has, contiguous or not. At most twice the error
    of the plain product in the same dtype."""
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: instructions)
    monkeypatch.setattr(packed, "BLOCK", 1000)
    for bias, outputs, inputs in ((False, 48, 96), (True, 112, 32)):
        weight = random_weight(kind, outputs, inputs)
        bias = torch.randn(outputs, dtype=dtype) if bias else None
        product, exact = linear(weight, bias, dtype), dequantise(weight, torch.float64)
        for n, size in ((1, 1), (3, 2), (8, 1), (2, 59), (1, 200)):
            x = torch.randn(size, n, inputs, generator=torch.Generator().manual_seed(n)).to(dtype).transpose(0, 1)
            expected = torch.nn.functional.linear(x.double(), exact, None if bias is None else bias.double())
            plain = torch.nn.functional.linear(x, exact.to(dtype), bias)
            found = product(x)
            assert found.shape == (n, size, outputs) and found.dtype == dtype
            error, bound = ((each.double() - expected).norm() for each in (found, plain))
            assert error <= 2 * bound + 1e-6 * expected.norm(), (n, size)


def test_kernels_are_chosen_by_rows_dtype_and_shape(monkeypatch):
    """Oracle: the measurements in docs/benchmarks.md, as a table; first of a CPU without bfloat16 instructions."""
    monkeypatch.setattr(packed, "has_triton", lambda *_: False)
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: False)

    def chosen(kind, outputs, inputs, dtype, rows, groupsize=32):
        return choose_way(random_weight(kind, outputs, inputs, groupsize), CPU, dtype, rows)

    monkeypatch.setattr(packed, "multiplies", lambda *_: False)
    for kind in ("int8", "int4"):
        assert {chosen(kind, 48, 96, dtype, rows) for dtype in (torch.float32, torch.bfloat16) for rows in (1, 64)} == {
            "dequantised"
        }
        assert choose_way(random_weight(kind, 48, 96), torch.device("cuda"), torch.float32, 1) == (
            "dequantised at each product"
        )
    monkeypatch.setattr(packed, "multiplies", lambda *_: True)
    assert chosen("int4", 48, 96, torch.float32, 1) == chosen("int8", 48, 96, torch.bfloat16, 64) == "widened"
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: True)
    assert chosen("int8", 48, 96, torch.bfloat16, 16) == "widened" != chosen("int8", 48, 96, torch.bfloat16, 17)


CUDA = torch.device("cuda")


def test_on_a_gpu_weights_are_chosen_by_rows(monkeypatch):
    """As tables. Without Triton: tinygemm up to 32 rows where it fits; beyond, each product dequantises, and the weight
    stays small. With it: tinygemm for one row, Triton for more and for experts; one row of int8 is the compiler's."""
    monkeypatch.setattr(packed, "has_tinygemm", lambda device, dtype: dtype == torch.bfloat16)
    monkeypatch.setattr(packed, "has_triton", lambda *_: False)

    def chosen(kind, outputs, inputs, rows, groupsize=32, dtype=torch.bfloat16, expert=False):
        return choose_way(random_weight(kind, outputs, inputs, groupsize), CUDA, dtype, rows, expert)

    each = "dequantised at each product"
    assert [chosen("int4", 48, 96, rows) for rows in (1, 32, 33, 1024)] == ["tinygemm"] * 2 + [each] * 2
    assert [chosen("int8", 48, 96, rows) for rows in (1, 32, 33)] == [each] * 3
    assert chosen("int4", 44, 96, 1) == chosen("int4", 48, 96, 1, dtype=torch.float16) == each  # tinygemm does not fit
    assert chosen("int4", 48, 96, 1, 24) == each
    monkeypatch.setattr(packed, "has_triton", lambda *_: True)
    triton, many = "widened in Triton", (2, 33, 64, 1024)
    assert [chosen("int4", 48, 96, rows) for rows in (1, *many)] == ["tinygemm"] + [triton] * 4
    assert [chosen("int8", 47, 95, rows) for rows in (1, *many)] == [each] + [triton] * 4
    assert chosen("int4", 44, 96, 1) == chosen("int4", 48, 96, 1, dtype=torch.float16) == triton
    assert [chosen(kind, 48, 96, 1, expert=True) for kind in ("int8", "int4")] == [triton] * 2
    assert chosen("int4", 48, 96, 8, 24) == each


@pytest.fixture
def tinygemm(monkeypatch) -> list[int]:
    """A stand-in for the CUDA operators, whose packed form is the weight's bytes. Returns the rows of each product."""
    rows: list[int] = []

    def multiply(x, values, groupsize, grid):
        if not torch.compiler.is_compiling():
            rows.append(len(x))
        weight = Int4Weight(values.byte(), *(each.T for each in grid.unbind(-1)))
        assert torch.compiler.is_compiling() or weight.groupsize == groupsize
        return torch.nn.functional.linear(x, weight.expand(x.dtype))

    monkeypatch.setattr(torch.ops.aten, "_convert_weight_to_int4pack", lambda values, tiles: values.int())
    monkeypatch.setattr(torch.ops.aten, "_weight_int4pack_mm", multiply)
    return rows


def test_tinygemm_multiplies_few_rows_and_leaves_a_prompt_to_the_dequantised_weight(tinygemm):
    """Up to 32 rows and positions together; both are the dequantised product. No tensor of it is looked at to choose,
    so that the host need not wait: on the meta device."""
    weight, bias = random_weight("int4", 48, 96), torch.randn(48).bfloat16()
    linear, meta = TinygemmLinear(weight, bias, torch.bfloat16), deepcopy(TinygemmLinear(weight, bias, torch.bfloat16))
    exact = dequantise(weight, torch.bfloat16)
    for n, size in ((1, 1), (32, 1), (3, 10), (33, 1), (1, 200), (11, 3)):
        x = torch.randn(n, size, 96, generator=torch.Generator().manual_seed(n)).bfloat16()
        torch.testing.assert_close(linear(x), torch.nn.functional.linear(x, exact, bias), rtol=0.02, atol=0.05)
    assert tinygemm == [1, 32, 30]
    meta.to("meta")
    for n, size in ((32, 1), (3, 11)):
        assert meta(torch.empty(n, size, 96, device="meta", dtype=torch.bfloat16)).shape == (n, size, 48)


def test_a_compiled_product_by_tinygemm_takes_any_rows(tinygemm):
    """A graph for few rows and one for many, and none besides. Oracle: the dequantised product."""
    torch.compiler.reset()
    weight = random_weight("int4", 48, 96)
    linear, exact = TinygemmLinear(weight, None, torch.bfloat16), dequantise(weight, torch.bfloat16)
    counter = CompileCounter()
    graph = torch.compile(linear.multiply, backend=counter, fullgraph=True, dynamic=False)
    for n in (2, 31, 5, 32, 33, 100, 7):
        x = torch.randn(n, 1, 96).bfloat16()
        torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(graph(x), torch.nn.functional.linear(x, exact), rtol=0.02, atol=0.05)
    assert counter.frame_count == 2


def test_a_copy_in_tinygemms_layout_is_held_and_not_read_besides(tinygemm, monkeypatch):
    """Oracle: the buffers of a model with one such layer."""
    model = random_model(replace(GQA, dim=64), torch.bfloat16)
    plain, made = weigh(model), random_weight("int4", 64, 64)

    def make(name: str, _: torch.nn.Linear) -> TinygemmLinear | None:
        return TinygemmLinear(made, None, torch.bfloat16) if name.endswith("0.attention.wo") else None

    swap_linears(model, make)
    linear = model.layers[0].attention.wo
    held, old = sum(each.nbytes for each in linear.buffers()), 64 * 60 * 2
    copies = linear.packed.nbytes + linear.packed_scales.nbytes
    assert weigh(model).total == plain.total - old + held
    assert weigh(model).per_step == plain.per_step - old + held - copies


def test_a_weight_in_the_networks_dtype_is_streamed_packed_or_left(monkeypatch):
    """By its size, its device, whether packing pays and whether it is trained; and so is one that was dequantised."""
    monkeypatch.setattr(packed, "streams", lambda device, *_: device.type == "cpu")
    linear = torch.nn.Linear(512, 256).requires_grad_(False)

    def chosen(linear: torch.nn.Linear, device: str = "cpu", **pack: bool) -> str:
        return choose_way(linear, torch.device(device), torch.float32, **pack)

    assert (chosen(linear), chosen(linear, pack=True)) == ("plain, streamed", "plain, packed")
    assert (chosen(linear, "cuda"), chosen(torch.nn.Linear(512, 255))) == ("plain", "plain")
    assert chosen(packed.StreamedLinear(linear), pack=True) == "plain, packed"
    assert chosen(deepcopy(linear).requires_grad_(True)) == "plain"
    monkeypatch.setattr(packed, "multiplies", lambda *_: False)
    made = make_linear(random_weight("int8", 256, 512), None, CPU, torch.float32, 1)
    assert packed.kernel_of(made) == chosen(made) == "dequantised, streamed"


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("held", ["widened", "dequantised"])
def test_planned_bytes_are_those_that_a_step_reads(kind, held, monkeypatch):
    if held == "widened" and not multiplies(torch.float32, 96, 32):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(packed, "choose_way", lambda *_: held)
    weight = random_weight(kind, 48, 96)
    linear = make_linear(weight, None, CPU, torch.bfloat16, 3)
    read = [linear.weight] if held == "dequantised" else list(linear.buffers())
    assert bytes_read(weight, CPU, torch.bfloat16, 3) == sum(tensor.nbytes for tensor in read)
    empty = type(weight).empty(48, 96, 32)
    assert bytes_read(empty, CPU, torch.bfloat16, 3) == bytes_read(weight, CPU, torch.bfloat16, 3)


def test_dequantised_layers_are_packed_as_plain_ones(small_ones_too):
    model = random_model(GQA, torch.float32)
    weight = random_weight("int8", 60, 30)
    make = lambda name, linear: make_linear(weight, None, CPU, torch.float32, 4) if "wq" in name else None  # noqa: E731
    swap_linears(model, make)
    hold_linears(model, pack=True)
    assert kernels(model) == {"dequantised, packed": 3, "plain, packed": 5 * 3 + 1}, "q apart"


def test_a_compiled_step_takes_quantised_weights(monkeypatch):
    """One graph for N = 3, 17 and 130 rows, whose kernels differ; its logits are those of the eager step in bfloat16,
    within its rounding."""
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: False)
    has_kernel = multiplies(torch.float32, 32, 32)
    choose = {"int8": "widened" if has_kernel else "dequantised", "int4": "dequantised at each product"}
    monkeypatch.setattr(packed, "choose_way", lambda weight, *_: choose[weight.kind])
    torch.compiler.reset()
    args = replace(GQA, dim=64, hidden_dim=96, n_layer=1)
    models = [random_model(args, torch.bfloat16) for _ in range(2)]

    def make(name: str, linear: torch.nn.Linear) -> torch.nn.Module | None:
        weight = random_weight("int8" if "w1" in name or "wq" in name else "int4", *linear.weight.shape)
        return make_linear(weight, None, CPU, torch.bfloat16, 3) if linear.in_features % 32 == 0 else None

    for model in models:
        swap_linears(model, make)
    assert kernels(models[0]) == {choose["int8"]: 2, choose["int4"]: 5, "plain": 1}
    steps = compiled(partial(decode, models[0], uniform)), partial(decode, models[1], uniform)
    root = KVCache.empty(args.kv_shape, 1, 29, models[0].norm.weight)
    root.k[0].normal_(), root.v[0].normal_()

    def difference(n: int) -> float:
        rows = StepInput(random_tokens(args, n, 1), torch.full((n, 1), 29), torch.arange(n), torch.tensor(0))
        logits, expected = (step(rows, KVCache.fork(root, n, 4))[0] for step in steps)
        return ((logits - expected).float().norm() / expected.float().norm()).item()

    assert difference(5) < 0.03
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3) < 0.03 and difference(17) < 0.03 and difference(130) < 0.03
