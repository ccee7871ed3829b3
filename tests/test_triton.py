"""The Triton kernel of a decode step, compiled for GPUs that are not there, and in Triton's interpreter; how it is
chosen, and all else without it. Oracles: ptxas's own account of a compiled kernel; those of interpreted_triton.py."""

import re
import sys

import pytest
import torch
from conftest import GQA, TINY, random_model, slow
from torch import Tensor

from bifurcated_attention import ScoreMod
from cache import KVCache, Link, Prefill, attend_by_kernel, attend_by_torch, chain_operator
from cli.console import decode_kernel
from engine.layouts import Int8Context
from layers.rope import alibi_slopes

pytest.importorskip("triton", reason="Triton is not installed")
from test_linear import CUDA  # noqa: E402
from triton_kernels import (  # noqa: E402
    SHARED,
    Launches,
    as_gpu,
    assert_passes_interpreted,
    compile_launch,
    run_without,
)

from layers import triton_attention  # noqa: E402
from layers.triton_attention import split_count, tile  # noqa: E402


def test_in_the_interpreter():
    assert_passes_interpreted("interpreted_triton.py")


@pytest.fixture
def launches(monkeypatch) -> Launches:
    made = Launches(triton_attention.attend_part)
    monkeypatch.setattr(triton_attention, "attend_part", made)
    monkeypatch.setattr(torch.ops.bifurcated, "attend_split", triton_attention.attend_split)
    return made


def decode(
    dtype: torch.dtype,
    N: int,
    S: int,
    shape: tuple[int, int, int],
    int8: bool = False,
    pool: bool = False,
    mod: ScoreMod | None = None,
) -> tuple[KVCache, Tensor, Tensor]:
    """Run a decode step over a context of 4096 slots: one row, or a pool of rows in unequal shares. shape: P, G, D."""
    P, G, D = shape
    context = KVCache.empty((1, G, D), 1 + pool, 4096, torch.empty(0, dtype=dtype))
    for tensor in context.tensors:
        tensor.zero_()
    kept, length = Int8Context.of(context) if int8 else context, torch.tensor([4096, 7]) if pool else None
    cache = KVCache.branch(kept, [pool * (row > 0) for row in range(N)], 130, length=length)
    q, input_pos = torch.zeros(N, P * G, S, D, dtype=dtype), cache.start[:, None] + torch.arange(S)
    triton_attention.attend_chain(cache, 0, q, input_pos, mod)
    return cache, q, input_pos


ALL = ScoreMod(4096, alibi_slopes(64), 50.0)
LAUNCHES: dict[str, tuple[tuple, int]] = {  # arguments of `decode`, and the most registers a thread may have
    "one row": ((torch.bfloat16, 1, 1, (1, 32, 128)), 168),
    "int8, all at once": ((torch.bfloat16, 9, 9, (8, 8, 128), True, True, ALL), 255),
    "heads of 256": ((torch.bfloat16, 9, 4, (4, 2, 256), False, True, ALL), 255),
    "fp16, many rows": ((torch.float16, 129, 1, (4, 2, 80)), 255),
    "fp32": ((torch.float32, 65, 1, (2, 2, 128)), 168),
}


SELDOM = "heads of 256", "fp16, many rows", "fp32"  # to compile all takes 40 s


@pytest.mark.parametrize("arch", SHARED)
@pytest.mark.parametrize(
    "given,most",
    [pytest.param(*each, id=name, marks=[slow] * (name in SELDOM)) for name, each in LAUNCHES.items()],
)
def test_no_register_spills(given, most, arch, launches, tmp_path):
    """Of each launch of a step. Two programs of 128 threads and 168 registers, or of 256 and 128, share a
    multiprocessor's 65,536."""
    decode(*given)
    assert len(launches.made) == 2 and [each["MERGE"] for each in launches.made] == [False, True]
    for launch in launches.made:
        registers, spilled, shared, ptx = compile_launch(launch, launches.kernel, arch, tmp_path / "cubin")
        print(f"sm_{arch} {'merge' if launch['MERGE'] else 'split'}: {registers} registers, {shared} bytes shared")
        assert spilled == 0 and registers <= most and shared <= SHARED[arch]
        assert given[0] == torch.float32 or re.search(r"mma\.sync|wgmma\.mma_async", ptx)


@pytest.mark.parametrize("changed", ["length", "positions", "start"])
def test_a_launch_does_not_depend_on_lengths(changed, launches):
    """Only tensors that change in place do: a recorded graph stays valid."""
    cache, q, input_pos = decode(torch.float32, 3, 1, (2, 2, 16), pool=True)
    before = launches.made[:]
    changes = {"length": cache.links[0].length, "positions": input_pos, "start": cache.start}
    changes[changed].sub_(3)
    triton_attention.attend_chain(cache, 0, q, input_pos, None)
    assert len(before) == 2
    for first, second in zip(before, launches.made[2:], strict=True):
        for name in first.keys() - {"outs", "lses", "y"}:  # allocated by the call
            alike = first[name] is second[name] if isinstance(first[name], Tensor) else first[name] == second[name]
            assert alike or name in ("k", "v") and first[name].data_ptr() == second[name].data_ptr(), name


def test_own_slots_are_split_where_rows_are_few(launches):
    """A chain of one, as one row that decodes behind its own prompt: 16 multiprocessors, 4096 slots, one head."""
    cache = KVCache.empty((1, 1, 64), 1, 4096, torch.empty(0, dtype=torch.bfloat16))
    triton_attention.attend_chain(cache, 0, torch.zeros(1, 1, 1, 64).bfloat16(), torch.zeros(1, 1).long(), None)
    assert [(each["grid"], each["slots"], each["MERGE"]) for each in launches.made] == [
        ((1, 32), 4096, False), ((1, 1), 0, True),
    ]  # fmt: skip


def test_keys_that_do_not_fit_are_refused(launches):
    cache, q, input_pos = decode(torch.float32, 3, 1, (2, 2, 16))
    with pytest.raises(ValueError, match=r"keys \[1, 2, 4096, 16\] .* queries \[3, 4, 1, 8\]"):
        triton_attention.attend_chain(cache, 0, q[..., :8], input_pos, None)


@pytest.mark.parametrize(
    "slots,programs,cores,expected",
    [
        (8192, 32, 132, 8), (8192, 8, 132, 33), (1 << 20, 1, 132, 64), (129, 8, 132, 1), (0, 1, 132, 1),
        (8192, 265, 132, 1),
    ],
)  # fmt: skip
def test_splits(slots, programs, cores, expected):
    """By hand: two programs on a multiprocessor, at least 128 slots and at most 64 splits."""
    assert split_count(slots, programs, cores) == expected


def test_tiles_hold_what_they_should():
    """Powers of two of at least 16, no wider than they must be; three stages of keys and values in 99 KB."""
    for queries in (1, 16, 17, 33, 1024):
        for D in (10, 64, 80, 96, 128, 256):
            for itemsize in (2, 4):
                BM, BD, BN, warps = tile(queries, D, itemsize)
                assert all(16 <= each == 1 << each.bit_length() - 1 for each in (BM, BD, BN))
                assert D <= BD < max(17, 2 * D)
                assert BM < max(17, 2 * queries) and 2 * 2 * BN * BD * itemsize + BM * BD * itemsize < 99 << 10
                assert warps in (4, 8)


def test_where_it_is_chosen(monkeypatch):
    """On CUDA from compute capability 8.0, for dtypes and sizes that it takes; without Triton not at all."""
    as_gpu(monkeypatch, 8)
    kinds = [(torch.bfloat16, 128), (torch.float16, 80), (torch.float32, 10), (torch.float64, 64), (torch.float32, 257)]
    chosen = [chain_operator(CUDA, *kind) for kind in kinds]
    assert chosen == [triton_attention.attend_chain] * 3 + [None] * 2
    assert [decode_kernel(CUDA, *kind) for kind in kinds] == ["Triton"] * 3 + ["torch"] * 2
    as_gpu(monkeypatch, 7)
    assert chain_operator(CUDA, torch.bfloat16, 128) is None
    as_gpu(monkeypatch, 9)
    monkeypatch.delattr("layers.triton_attention")
    monkeypatch.setitem(sys.modules, "layers.triton_attention", None)
    assert chain_operator(CUDA, torch.bfloat16, 128) is None


@pytest.mark.parametrize("links", [0, 1])
def test_prefill_is_not_its_business(monkeypatch, links):
    """A chunk goes to PyTorch, whatever attends in a decode step."""
    monkeypatch.setattr("cache.chain_operator", lambda *_: pytest.fail)
    cache = KVCache.empty(GQA.kv_shape, 1, 9, torch.empty(0))
    cache.extend_from(*[Link(KVCache.empty(GQA.kv_shape, 1, 5, torch.empty(0)), [0], None)] * links)
    assert cache.over_chain is attend_by_kernel
    model = random_model(GQA, torch.float32)
    for begin in (0, 4):
        reading = Prefill(cache, begin, 4)
        assert reading.over_chain is attend_by_torch
        model.hidden(torch.zeros(1, 4, dtype=torch.long), begin + torch.arange(4)[None], reading)


def test_all_else_works_without_the_file(tmp_path):
    """A copy of the sources without it: a GPU decodes by PyTorch, and the command runs."""
    code = f"""if True:
        import torch
        from cache import KVCache, chain_operator
        from engine import Engine, Request
        assert chain_operator(torch.device("cuda"), torch.bfloat16, 128) is None
        print(len(Engine.open({str(TINY)!r}, "cpu", compile=False).generate("Once", Request(3, 4, seed=1))))
    """
    assert run_without("triton_attention.py", code, tmp_path) == "3\n"
