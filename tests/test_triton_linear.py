"""Products in Triton, compiled for GPUs that are not there, and in Triton's interpreter; how they are chosen, and all
else without them. Oracles: ptxas's own account of a compiled kernel; those of interpreted_triton_linear.py."""

import re
import sys
from dataclasses import replace

import pytest
import torch
from conftest import GQA, TINY, slow
from test_cuda import Recorder
from test_linear import CUDA, random_weight
from torch import Tensor

from cache import NoCache
from layers import linear as held
from layers.linear import TritonExperts, TritonLinear, choose_grouped, group_experts, has_triton
from layers.moe import ExpertLinear, MoEConfig, can_capture_graph
from model import empty_model

pytest.importorskip("triton", reason="Triton is not installed")
from triton_kernels import (  # noqa: E402
    SHARED,
    Launches,
    as_gpu,
    assert_passes_interpreted,
    compile_launch,
    run_without,
)

from layers import triton_linear  # noqa: E402
from layers.triton_linear import tile  # noqa: E402


def test_in_the_interpreter():
    assert_passes_interpreted("interpreted_triton_linear.py")


@pytest.fixture
def launches(monkeypatch) -> Launches:
    made = Launches(triton_linear.multiply_rows)
    monkeypatch.setattr(triton_linear, "multiply_rows", made)
    return made


def multiply(kind: str, dtype: torch.dtype, R: int, E: int = 0, groupsize: int = 32, inputs: int = 4096) -> Tensor:
    """Multiply R rows by a weight of 96 outputs, or if E is not 0 by E of them, the first of which has all rows."""
    dtypes, shapes = {"int8": torch.int8, "int4": torch.uint8}, (96, inputs // (1 + (kind == "int4")))
    lead, scales, zeros = (E,) * bool(E), None, None
    if kind != "plain":
        scales = torch.zeros(*lead, 96, *[inputs // groupsize] * (kind == "int4")).bfloat16()
        zeros = scales if kind == "int4" else None
    values, x = torch.zeros(*lead, *shapes, dtype=dtypes.get(kind, dtype)), torch.zeros(R, inputs, dtype=dtype)
    ends = torch.full((E,), R, dtype=torch.int32) if E else None
    return triton_linear.widened_linear(x, values, scales, zeros, None if E else x[0, :96], ends)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS: dict[str, tuple[tuple, int]] = {  # arguments of `multiply`, and the most registers a thread may have
    "int8, few rows": (("int8", BF16, 7), 64),
    "int8, 64 rows": (("int8", BF16, 64), 128),
    "int4, few rows": (("int4", BF16, 7), 96),
    "int4, few rows, wide groups": (("int4", FP16, 7, 0, 128), 128),
    "int4, 32 rows": (("int4", BF16, 32, 0, 128), 200),
    "int4 experts": (("int4", BF16, 512, 8, 128), 255),
    "int4 experts, narrow groups": (("int4", BF16, 512, 8), 255),
    "int8 experts": (("int8", BF16, 16, 8), 64),
    "plain experts": (("plain", BF16, 256, 8), 128),
    "plain experts, many rows": (("plain", BF16, 512, 8), 128),
    "plain experts, fp32": (("plain", FP32, 256, 8), 128),
    "int4, fp32": (("int4", FP32, 17), 168),
    "int8, fp32": (("int8", FP32, 17), 200),
}  # fmt: skip
OFTEN = "int8, few rows", "int4 experts"  # to compile all takes 80 s


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    "given,most",
    [pytest.param(*each, id=name, marks=[slow] * (name not in OFTEN)) for name, each in PRODUCTS.items()],
)
def test_no_register_spills(given, most, arch, launches, tmp_path):
    """And loads in flight: cp.async of codes, and of inputs, on every one of these GPUs."""
    multiply(*given)
    (launch,) = launches.made
    registers, spilled, shared, ptx = compile_launch(launch, launches.kernel, arch, tmp_path / "cubin")
    print(f"sm_{arch}: {registers} registers, {shared} bytes shared, {launch['options']}")
    assert spilled == 0 and registers <= most and shared <= SHARED[arch]
    assert "cp.async.c" in ptx and (given[1] == FP32 or re.search(r"mma\.sync|wgmma\.mma_async", ptx))


def test_a_launch_does_not_depend_on_the_routing(launches):
    """Only a tensor that changes in place does: a recorded graph stays valid. The grid holds any routing."""
    for _ in range(2):
        multiply("int8", BF16, 70, 3)
        launches.made[-1]["ends"].copy_(torch.tensor([1, 2, 70]))
    first, second = launches.made
    for name in first.keys() - {"x", "values", "scales", "ends", "y"}:  # allocated by the call
        assert first[name] is second[name] or first[name] == second[name], name
    assert first["grid"] == (2, (70 + 3 * 31) // 32) and first["BM"] == 32  # 5 blocks; at most 1 + 1 + 3 are needed


def test_blocks_hold_every_routing():
    """Oracle: all ways to share R rows among E experts, by hand for small numbers."""

    def needed(R: int, E: int, BM: int) -> int:
        if E == 1:
            return -(-R // BM)
        return max(-(-own // BM) + needed(R - own, E - 1, BM) for own in range(R + 1))

    for R in (1, 2, 5, 9):
        for E in (1, 2, 3, 12):
            assert (R + min(E, R) * 3) // 4 >= max(needed(R, each, 4) for each in range(1, min(E, R) + 1))


@pytest.mark.parametrize("groupsize", [0, 32, 64, 96, 128, 256, 1024])
def test_tiles_hold_what_they_should(groupsize):
    """A run of inputs lies in one group, of 16 in each half of its bytes; loads in flight fit 99 KB."""
    for rows in (1, 16, 17, 33, 64, 1000):
        for itemsize in (2, 4):
            for size in {1} if groupsize else {1, itemsize}:
                found = tile(rows, itemsize, size, groupsize)
                assert all(16 <= each == 1 << each.bit_length() - 1 for each in found[:3])
                assert found.BK >= 32 and (not groupsize or groupsize % found.BK == 0)
                halves = 2 if groupsize else 1
                loaded = found.unroll * found.BK * (found.BM * itemsize + found.BN * size // halves)
                assert 2 <= found.stages and found.stages * loaded <= 72 << 10
                assert found.BM >= min(rows, 64 if itemsize == 2 else 32)


def test_what_does_not_fit_is_refused(launches):
    x, ends = torch.zeros(3, 64), torch.zeros(2, dtype=torch.int32)
    scales = torch.zeros(5, 4).bfloat16()
    for values, given in (
        (torch.zeros(5, 63), (None, None, None, None)),
        (torch.zeros(5, 64), (None, None, None, ends)),
        (torch.zeros(5, 32).byte(), (scales, scales, None, None)),  # groups of 16
    ):
        with pytest.raises(
            ValueError, match=r"values \[5, \d+\] in groups of \d+ do not fit [12] experts and \[3, 64\]"
        ):
            triton_linear.widened_linear(x, values, *given)
    assert not launches.made


def test_where_it_is_chosen(monkeypatch):
    """On CUDA from compute capability 8.0, for three dtypes; without Triton not at all."""
    as_gpu(monkeypatch, 8)
    assert [has_triton(CUDA, dtype) for dtype in (BF16, FP16, FP32, torch.float64)] == [True] * 3 + [False]
    assert not has_triton(torch.device("cpu"), BF16)
    as_gpu(monkeypatch, 7)
    assert not has_triton(CUDA, BF16)
    as_gpu(monkeypatch, 9)
    monkeypatch.delattr("layers.triton_linear")
    monkeypatch.setitem(sys.modules, "layers.triton_linear", None)
    assert not has_triton(CUDA, BF16)


def test_experts_that_differ_or_do_not_fit_are_left_to_the_loop(monkeypatch):
    """Of one form, dtype and shape, and in int4 with groups of a multiple of 32, all are grouped."""
    w1 = ExpertLinear(torch.nn.Linear(96, 48, bias=False, dtype=BF16) for _ in range(3))
    assert choose_grouped(w1, BF16) is None  # a CPU
    monkeypatch.setattr(held, "has_triton", lambda *_: True)
    assert choose_grouped(w1, BF16) is TritonExperts and choose_grouped(w1, FP32) is None
    for kind, groupsize, expected in (("int8", 0, TritonExperts), ("int4", 32, TritonExperts), ("int4", 24, None)):
        for number in range(3):
            assert number == 0 or choose_grouped(w1, BF16) is None  # one of them differs
            weight = random_weight(kind, 48, 96, groupsize)
            w1[number] = (TritonLinear if number else held.QuantisedLinear)(weight, None, BF16)
        assert choose_grouped(w1, BF16) is expected
    for number in range(3):
        w1[number] = TritonLinear(random_weight("int8", 48, 96), torch.zeros(48), BF16)
    assert choose_grouped(w1, BF16) is None  # biases


@pytest.mark.parametrize("kind", ["plain", "int8", "int4"])
def test_a_step_never_waits_for_the_host(kind, monkeypatch):
    """Traced on the meta device, which has no numbers to wait for: experts in one operator a matrix, and other weights
    of two rows and of many."""
    monkeypatch.setattr(held, "has_triton", lambda *_: True)
    args = replace(GQA, dim=32, head_dim=16, hidden_dim=64, mixture=MoEConfig(5, 2, 64, True, shared=32))
    model = empty_model(args).to(BF16).requires_grad_(False)

    def make(name: str, linear: torch.nn.Linear) -> torch.nn.Module | None:
        if kind == "plain" or linear.in_features % 32:
            return None
        return TritonLinear(held.KINDS[kind].empty(*linear.weight.shape, 32), None, BF16)

    held.swap_linears(model, make)
    others = sum(isinstance(module, TritonLinear) for module in model.modules()) - 3 * 3 * 5 * (kind != "plain")
    group_experts(model)
    for N, few in ((3, True), (65, False)):
        tokens = torch.zeros(N, 1, dtype=torch.long, device="meta")
        with Recorder() as recorder:
            logits = model(tokens, tokens, NoCache())
        assert logits.shape == (N, 1, 97) and recorder.devices == {"meta"} and can_capture_graph(model)
        assert recorder.count("widened_linear") == 3 * 3 + others * few and bool(others) == (kind != "plain")


def test_all_else_works_without_the_file(tmp_path):
    """A copy of the sources without it: a GPU dequantises at each product, experts loop, and the command runs."""
    code = f"""if True:
        import torch
        from engine import Engine, Request
        from layers.linear import Int8Weight, choose_way
        way = choose_way(Int8Weight.empty(64, 64), torch.device("cuda"), torch.bfloat16, 8)
        made = Engine.open({str(TINY)!r}, "cpu", compile=False).generate("Once", Request(3, 4, seed=1))
        print(way, len(made))
    """
    assert run_without("triton_linear.py", code, tmp_path) == "dequantised at each product 3\n"
