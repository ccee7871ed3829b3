"""The operator that attends over a chain. Oracles: the merge contract's fp64 softmax over all keys, and twice the error
of SDPA (test_bifurcated_attention.py), the plain torch path, and g++'s memory checkers."""

import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ALIBI, GQA, MQA, ROOT, WINDOW, positions, prefilled, random_model, random_tokens, slow
from test_bifurcated_attention import SHAPES, assert_error_at_most_twice, draw, oracle, side_by_side
from torch import Tensor

import cache as caches
from bifurcated_attention import ScoreMod
from cache import KVCache, NoCache, Prefill, attend_by_kernel, attend_by_torch
from engine.engine import Engine
from engine.layouts import Int8Context
from engine.request import Request, Sampling
from layers import kernels
from layers import linear as packed
from layers.kernels import Part, attend
from layers.linear import Int4Weight, Int8Weight, Quantised, dequantise, hold_linears
from layers.moe import ExpertLinear
from layers.notices import Notice
from layers.rope import alibi_slopes

pytestmark = pytest.mark.skipif(kernels.library().note == "no C++ compiler", reason="no C++ compiler")


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.long)


def bifurcated(
    q: Tensor,
    k_context: Tensor,
    v_context: Tensor,
    k: Tensor,
    v: Tensor,
    input_pos: Tensor,
    mod: ScoreMod | None = None,
) -> tuple[Tensor, Tensor]:
    """A context of one row, and each row's own slots behind it."""
    N, T = len(q), k_context.shape[2]
    own = Part(k, v, None, None, torch.full((N,), T))
    return attend(q, [own, Part(k_context, v_context, None, None, zeros(1), zeros(N))], input_pos, mod)


@pytest.mark.parametrize(
    "dtype,scale", [(torch.float32, 1), pytest.param(torch.bfloat16, 1, marks=slow), (torch.bfloat16, 16)]
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_sdpa(shape, dtype, scale):
    N, P, D, T, L = shape
    if D % 2 and dtype == torch.bfloat16:
        pytest.skip("pairs")
    q, *rest = draw(*shape, S=1, dtype=dtype)
    q = q * scale
    k, v = side_by_side(rest[0], rest[2]), side_by_side(rest[1], rest[3])
    expected, expected_lse = oracle(q, k, v)
    out, lse = bifurcated(q, *rest, torch.full((N, 1), T + L - 1))
    assert_error_at_most_twice(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
    torch.testing.assert_close(lse[..., None].double(), expected_lse, rtol=1e-6, atol=2e-5)


def test_the_code_for_avx512_with_bfloat16_emulated(tmp_path, monkeypatch):
    """Vectors of 16 and pairs of bfloat16, on whatever CPU there is: all but the instructions themselves. Attention by
    the contract's bound; products by the error of a rounded weight."""
    target = tmp_path / "emulated.so"
    kernels.build("g++", target, "-O0", "-DEMULATE_AVX512", "-w")
    emulated = kernels.load(target)
    monkeypatch.setattr(kernels, "library", lambda: emulated)
    for shape in ((1, 2, 64, 129, 15), (3, 4, 96, 127, 33), (5, 6, 80, 61, 2), (40, 1, 48, 59, 1), (9, 1, 58, 120, 3)):
        N, _, _, T, L = shape
        q, *rest = draw(*shape, S=1, dtype=torch.bfloat16)
        k, v = side_by_side(rest[0], rest[2]), side_by_side(rest[1], rest[3])
        out, lse = bifurcated(q, *rest, torch.full((N, 1), T + L - 1))
        expected, expected_lse = oracle(q, k, v)
        assert_error_at_most_twice(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), expected)
        torch.testing.assert_close(lse[..., None].double(), expected_lse, rtol=1e-6, atol=2e-5)
    for weight in (random_weight("int8", 61, 544), random_weight("int4", 50, 320)):
        zeros = getattr(weight, "zeros", None)
        for rows in (1, 3, 9, 17, 40):
            x = torch.randn(rows, weight.shape[1]).bfloat16()
            product = torch.ops.bifurcated.quantised_linear(x, weight.values, weight.scales, zeros, None)
            expected = x.double() @ dequantise(weight, torch.float64).T
            assert (product.double() - expected).norm() <= 5e-3 * expected.norm(), rows


@slow
def test_clang_builds_it_too(tmp_path):
    """A process of its own, as its OpenMP is not g++'s. Oracles: PyTorch's attention and product, in fp32."""
    if shutil.which("clang++") is None:
        pytest.skip("no clang++")
    target = tmp_path / "clang.so"
    try:
        kernels.build("clang++", target, "-O0")
    except subprocess.CalledProcessError as error:
        if "omp" not in error.stderr:
            raise
        pytest.skip("clang++ without OpenMP")
    code = f"""if True:
        import torch
        from layers import kernels, linear as packed
        from pathlib import Path
        library = kernels.load(Path({str(target)!r}))
        kernels.library = lambda: library
        zeros, close = torch.zeros(3, dtype=torch.long), torch.testing.assert_close
        for n, D in ((1, 64), (3, 10), (40, 64)):
            q, (k, v) = torch.randn(n, 6, 1, D), torch.randn(2, n, 2, 130, D)
            part = kernels.Part(k, v, None, None, torch.zeros(n, dtype=torch.long))
            out, _ = kernels.attend(q, [part], torch.full((n, 1), 129), None)
            close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=0, atol=1e-5)
        for rows in (1, 2, 5, 33):
            x, weight = torch.randn(rows, 96), torch.randn(61, 96)
            int8 = packed.Int8Weight(torch.randint(-127, 128, (61, 96)).char(), torch.rand(61).bfloat16())
            exact = x @ packed.dequantise(int8, torch.float32).T
            close(kernels.run_linear(x, int8.values, int8.scales, None, None), exact, rtol=1e-5, atol=1e-3)
            close(kernels.run_streamed(x, weight, None), x @ weight.T, rtol=1e-5, atol=1e-4)
        print("alike")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "alike\n", done.stderr[-3000:]


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


MODS = {
    "plain": None,
    "window": ScoreMod(window=5),
    "ALiBi": ScoreMod(slopes=alibi_slopes(6)),
    "all": ScoreMod(window=70, slopes=alibi_slopes(6), softcap=2.0),
}


def plainly(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, distance: Tensor, mod: ScoreMod | None
) -> tuple[Tensor, ...]:
    """fp64: q [N,H,S,D], k and v [N,G,L,D], seen bool and distance to a key [N,S,L] -> out, lse [N,H,S]."""
    q, k, v = q.double(), *(side.double().repeat_interleave(q.shape[1] // side.shape[1], 1) for side in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if mod is not None and mod.softcap is not None:
        scores = mod.softcap * (scores / mod.softcap).tanh()
    if mod is not None and mod.slopes is not None:
        scores = scores - mod.slopes.double()[:, None, None] * distance[:, None]
    if mod is not None and mod.window is not None:
        seen = seen & (distance < mod.window)
    scores = scores.masked_fill(~seen[:, None], -math.inf)
    return scores.softmax(-1).nan_to_num(0) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
@pytest.mark.parametrize("G,S", [(1, 1), (2, 3), (6, 1)])
def test_a_tree_of_ragged_rows(mod, G, S, threads):
    """Seven rows behind three of their own lengths, in any order and shares, behind one; one of the three is empty."""
    torch.manual_seed(G)
    N, R, T, L, D = 7, 3, 517, 9, 16
    rows, length = torch.tensor([2, 0, 2, 1, 0, 2, 2]), torch.tensor([130, 0, 61])
    q = torch.randn(N, 6, S, D)
    pairs = [torch.randn(2, n, G, slots, D) for n, slots in ((N, L), (R, 130), (1, T))]
    start = T + length[rows]
    input_pos = start[:, None] + torch.arange(N)[:, None] % 4 + torch.arange(S)
    parts = [
        Part(*pairs[0], None, None, start),
        Part(*pairs[1], None, None, torch.full((R,), T), rows, length),
        Part(*pairs[2], None, None, zeros(1), zeros(N)),
    ]
    own = start[:, None] + torch.arange(L)
    middle = (T + torch.arange(130)).expand(N, -1)
    key_pos = torch.cat([torch.arange(T).expand(N, -1), middle, own], 1)
    written = torch.cat([torch.ones(N, T), torch.arange(130) < length[rows, None], torch.ones(N, L)], 1).bool()
    k, v = (torch.cat([c.expand(N, -1, -1, -1), m[rows], o], 2) for o, m, c in zip(*pairs, strict=True))
    distance = input_pos[..., None] - key_pos[:, None]  # [N,S,L]
    seen = written[:, None] & (distance >= 0)
    expected, expected_lse = plainly(q, k, v, seen, distance, mod)
    out, lse = attend(q, parts, input_pos, mod)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=5e-6)


def test_a_query_that_sees_nothing_gives_zero_and_minus_infinity():
    q, k, v = torch.randn(3, 4, 2, 16), *torch.randn(2, 3, 2, 9, 16)
    input_pos = torch.tensor([[0, 1], [-1, 0], [7, 8]])
    out, lse = attend(q, [Part(k, v, None, None, zeros(3))], input_pos, None)
    assert (out[1, :, 0] == 0).all() and (lse[1, :, 0] == -math.inf).all()
    assert (
        out.isfinite().all() and lse[0].isfinite().all() and (out[1, :, 1] == v[1, :, 0].repeat_interleave(2, 0)).all()
    )


@pytest.mark.parametrize("n", [1, 3, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_so(n, bad):
    """A key, a query or a value, in narrow and wide tasks: as the torch path has it."""
    for side in range(3):
        q, k, v = torch.randn(n, 2, 1, 16), *torch.randn(2, n, 2, 70, 16)
        (q, k, v)[side][0, 1, 0, 3] = bad
        out, _ = attend(q, [Part(k, v, None, None, zeros(n))], torch.full((n, 1), 69), None)
        expected, _ = plainly(q, k, v, torch.ones(n, 1, 70, dtype=torch.bool), torch.zeros(n, 1, 70), None)
        if side or bad != bad:  # an infinite query may be of one sign with one key
            assert torch.equal(out[0, 1].isfinite(), expected[0, 1].isfinite()) or not out[0, 1].isfinite().all()
        assert out[0, 0].isfinite().all() and out[1:].isfinite().all()
    out, lse = attend(torch.full((n, 2, 1, 16), math.nan), [Part(k, v, None, None, zeros(n))], zeros(n)[:, None], None)
    assert out.isnan().all() and lse.isnan().all()


@pytest.fixture
def prebuilt() -> str:
    """The library of this process, for a stand-in to hand out in the place of a compiler."""
    return built()


def test_what_others_could_have_written_is_not_loaded(prebuilt, anew, monkeypatch):
    monkeypatch.setenv("CXX", compiler(anew, f'cp {prebuilt} "$target"'))
    functions = kernels.library().functions
    assert functions is not None
    folder = Path(functions._name).parent
    assert folder.parent == anew and folder.stat().st_mode & 0o077 == 0
    Path(functions._name).unlink()  # it is mapped
    Path(functions._name).write_bytes(b"cut short")
    kernels.library.cache_clear()
    assert kernels.library().functions is not None, "built anew"
    folder.chmod(0o777)
    kernels.library.cache_clear()
    with pytest.warns(Notice, match="another user owns or can write .*; using PyTorch's slower operators"):
        assert kernels.library() == kernels.Library(None, f"not built: another user owns or can write {folder}")


def test_slots_beyond_the_position_are_not_read():
    q, k, v = torch.randn(3, 4, 1, 16), *torch.randn(2, 3, 4, 300, 16)
    expected, _ = attend(q, [Part(k[:, :, :66], v[:, :, :66], None, None, zeros(3))], torch.full((3, 1), 65), None)
    k[:, :, 66:] = v[:, :, 66:] = math.nan
    out, _ = attend(q, [Part(k, v, None, None, zeros(3))], torch.full((3, 1), 65), None)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("begin", [0, 61, 500])
@pytest.mark.parametrize("mod", MODS.values(), ids=MODS)
def test_a_chunk_of_a_prompt(begin, mod):
    q, (k, v) = torch.randn(1, 6, 203, 20), torch.randn(2, 1, 2, 203 + begin, 20)
    input_pos = begin + torch.arange(203)[None]
    distance = input_pos[..., None] - torch.arange(203 + begin)
    expected, _ = plainly(q, k, v, distance >= 0, distance, mod)
    out, _ = attend(q, [Part(k, v, None, None, zeros(1))], input_pos, mod)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n,D", [(1, 64), (3, 64), (20, 64), (3, 10), (20, 80)])
def test_a_context_in_int8_is_that_of_its_rounded_numbers(dtype, n, D):
    context = KVCache(torch.empty(0, dtype=dtype), 1, (1, 2, 150, D), zeros(1))
    for side in context.tensors:
        side.normal_()
    context.k[0][..., 3] *= 8
    held = Int8Context.of(context)
    q = torch.randn(n, 4, 1, D).to(dtype)
    k, v = (
        side.float() * scale.float() for side, scale in ((held.k[0], held.k_scale[0]), (held.v[0], held.v_scale[0]))
    )
    k *= held.k_channel[0].float()
    own = torch.randn(2, n, 2, 5, D).to(dtype)
    parts = [Part(*own, None, None, torch.full((n,), 150)), kernels.part(held, 0, zeros(n))]
    out, _ = attend(q, parts, torch.full((n, 1), 154), None)
    expected, _ = oracle(q, side_by_side(k.double(), own[0].double()), side_by_side(v.double(), own[1].double()))
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=5e-6 if dtype == torch.float32 else 3e-2)


def random_weight(kind: str, outputs: int, inputs: int, groupsize: int = 32) -> Quantised:
    torch.manual_seed(outputs)
    scales, zeros = torch.rand(2, outputs, inputs // groupsize).bfloat16()
    if kind == "int8":
        return Int8Weight(torch.randint(-127, 128, (outputs, inputs)).char(), scales[:, 0].contiguous())
    return Int4Weight.from_codes(torch.randint(16, (outputs, inputs)).byte(), scales, zeros)


@pytest.mark.parametrize("dtype,most", [(torch.float32, 1e-6), (torch.bfloat16, 3e-3)])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_products_with_quantised_weights(kind, dtype, most, threads):
    """Numbers of rows and outputs on all sides of every block. Oracle: fp64 with the dequantised weight."""
    for weight in (random_weight(kind, *size) for size in ((49, 96), (61, 544), (7, 1088, 64))):
        exact, zeros = dequantise(weight, torch.float64), getattr(weight, "zeros", None)
        for rows in (1, 2, 3, 4, 5, 9, 16, 17, 130, 257):
            x = torch.randn(rows, weight.shape[1]).to(dtype)
            product = torch.ops.bifurcated.quantised_linear(x, weight.values, weight.scales, zeros, None)
            expected = x.double() @ exact.T
            assert product.dtype == dtype and (product.double() - expected).norm() <= most * expected.norm(), rows


def test_a_layer_holds_a_weight_that_lies_transposed():
    plain = random_weight("int4", 64, 96)
    weight = Int4Weight(plain.values.t().contiguous().t(), plain.scales.t().contiguous().t(), plain.zeros)
    linear, x = packed.make_linear(weight, None, torch.device("cpu"), torch.float32, 3), torch.randn(3, 1, 96)
    assert isinstance(linear, packed.WidenedLinear) or packed.multiplies_bfloat16()
    torch.testing.assert_close(linear(x), F.linear(x, dequantise(plain, torch.float32)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype,most", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_one_or_two_rows_stream_a_plain_weight(dtype, most, threads):
    """Oracle: fp64, with two roundings; PyTorch's own product from three rows on."""
    torch.manual_seed(0)
    for outputs, inputs in ((61, 544), (7, 32), (300, 96)):
        weight, bias = torch.randn(outputs, inputs).to(dtype), torch.randn(outputs).to(dtype)
        for shape in ((1, 1), (2, 1), (1, 2), (1, 3)):
            x = torch.randn(*shape, inputs).to(dtype)
            for own in (None, bias):
                product, plain = torch.ops.bifurcated.streamed_linear(x, weight, own), F.linear(x, weight, own)
                expected = F.linear(x.double(), weight.double(), None if own is None else own.double())
                assert product.dtype == dtype and product.shape == plain.shape
                assert (product.double() - expected).norm() <= most * expected.norm()
                assert shape != (1, 3) or torch.equal(product, plain)


def test_a_model_streams_its_weights_and_may_pack_them_later(monkeypatch):
    """Tied ones and experts too; hooks and numbers stay, and parameters are the same."""
    monkeypatch.setattr("layers.linear.MIN_PACK_ELEMENTS", 1)
    args = replace(GQA, dim=32, hidden_dim=64, tied_output=True)
    model, plain = (random_model(args, torch.float32) for _ in range(2))
    names, told = dict(model.named_parameters()), []
    model.output.register_forward_hook(lambda *_: told.append(1))
    hold_linears(model)
    assert packed.kernels(model) == {"plain, streamed": 3 * 6 + 1, "plain": 3}, "wo has 60 inputs"
    assert all(parameter is names[name] for name, parameter in model.named_parameters())
    for n in (1, 2, 3):
        tokens, at = random_tokens(args, n, 1), positions(0, n, 1)
        torch.testing.assert_close(model(tokens, at, NoCache()), plain(tokens, at, NoCache()), rtol=0, atol=2e-4)
    assert len(told) == 3
    if packed.can_pack(torch.device("cpu"), torch.float32):
        packed.hold_linears(model, pack=True, tied_output=True)
        assert packed.kernels(model) == {"plain, packed": 3 * 4 + 1}
        model(tokens, at, NoCache())
        assert len(told) == 4


@pytest.mark.parametrize("args", [GQA, MQA, WINDOW, ALIBI], ids=["GQA", "MQA", "window", "ALiBi"])
def test_a_model_gives_the_logits_of_the_torch_path(args, monkeypatch):
    """Prefill in chunks into a context and a fork of it, then steps of one and of three tokens."""
    model, both = random_model(args, torch.float32), []
    for kind in (attend_by_kernel, attend_by_torch):
        monkeypatch.setattr(kernels, "takes", lambda *_, kind=kind: kind is attend_by_kernel)
        context = prefilled(model, random_tokens(args, 1, 70), 33)
        question = KVCache.fork(context, 1, 9)
        part = random_tokens(args, 1, 9, seed=4)
        logits = [model(part, positions(70, 1, 9), caches.Prefill(question, 0, 9))]
        cache = KVCache.fork(question, 5, 7)
        assert cache.over_chain is kind
        for begin, size in ((0, 1), (1, 3)):
            logits.append(model(random_tokens(args, 5, size, seed=begin), positions(79 + begin, 5, size), cache))
        both.append(torch.cat([each.flatten() for each in logits]))
    torch.testing.assert_close(*both, rtol=0, atol=2e-4)


@pytest.mark.parametrize("trained", ["q", "own keys", "own values", "context's keys", "context's values"])
@pytest.mark.parametrize("mod", [None, MODS["all"]], ids=["plain", "all"])
def test_gradients_flow_through_a_chain(trained, mod):
    """fp32, of one input at a time. Oracle: autograd through the fp64 softmax over all keys."""
    torch.manual_seed(0)
    N, G, T, S, D = 3, 2, 70, 2, 10
    q, k, v = torch.randn(N, 6, S, D), *torch.randn(2, N, G, S, D)
    context = KVCache(torch.empty(0), 1, (1, G, T, D), zeros(1))
    context.k[0], context.v[0] = torch.randn(2, 1, G, T, D)
    leaf = dict(zip(("q", "own keys", "own values", "context's keys", "context's values"),
                    (q, k, v, context.k[0], context.v[0]), strict=True))[trained].requires_grad_()  # fmt: skip
    cache, input_pos = KVCache.fork(context, N, S), positions(T, N, S)
    assert cache.over_chain is attend_by_kernel
    out = cache.attend(0, q, k, v, input_pos, mod)
    distance = input_pos[..., None] - torch.arange(T + S)
    sides = (torch.cat([mine[0].expand(N, -1, -1, -1), own], 2) for mine, own in ((context.k, k), (context.v, v)))
    expected, _ = plainly(q, *sides, distance >= 0, distance, mod)
    weight = torch.randn(out.shape)
    found, right = (torch.autograd.grad((each * weight).sum(), leaf)[0] for each in (out, expected))
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("args", [GQA, ALIBI], ids=["GQA", "ALiBi, window"])
def test_a_model_is_trained_through_its_caches(args, monkeypatch):
    """All weights, in fp32, by N = 3 rows behind a context of 70 tokens. Oracle: one full pass of each row, in fp64."""
    monkeypatch.setattr("layers.linear.MIN_PACK_ELEMENTS", 1)
    model = random_model(replace(args, n_layer=2, windows=args.windows[:2]), torch.float32)
    exact = deepcopy(model).double()
    hold_linears(model)
    prompt, own = random_tokens(args, 1, 70), random_tokens(args, 3, 4, seed=2)
    context = KVCache.empty(model.args.kv_shape, 1, 70, model.norm.weight)
    for each in (model, exact):
        each.requires_grad_(True)
    model.hidden(prompt, positions(0, 1, 70), Prefill(context, 0, 70))
    logits = model(own, positions(70, 3, 4), KVCache.fork(context, 3, 4))
    expected = exact(torch.cat([prompt.expand(3, -1), own], 1), positions(0, 3, 74), NoCache())[:, 70:]
    for each in (logits, expected):
        each.log_softmax(-1)[..., 5].sum().backward()
    for (name, found), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert found.grad is not None and right.grad is not None, name
        assert (found.grad - right.grad).norm() <= 1e-4 * right.grad.norm(), name


def held_linears() -> Iterator[nn.Module]:
    """Every layer [48,96] whose weight an operator multiplies, in fp32 or bfloat16."""
    plain = nn.Linear(96, 48).requires_grad_(False)
    yield packed.StreamedLinear(plain)
    if packed.can_pack(torch.device("cpu"), torch.float32):
        yield packed.PackedLinear(plain)
    for kind in ("int8", "int4"):
        for dtype in (torch.float32, torch.bfloat16):
            yield packed.WidenedLinear(random_weight(kind, 48, 96), torch.randn(48).to(dtype), dtype)


def test_gradients_flow_through_layers_whose_weight_is_held():
    """To the input, and to the bias. Oracle: what the layer itself makes of the identity is its weight."""
    for linear in held_linears():
        bias = linear.bias
        assert isinstance(bias, Tensor)
        x, upstream = torch.randn(2, 96, dtype=bias.dtype), torch.randn(2, 48, dtype=bias.dtype)
        weight = (linear(torch.eye(96, dtype=bias.dtype)) - bias.detach()).double()  # [in,out]
        for leaf, right in ((x, upstream.double() @ weight.T), (bias, upstream.double().sum(0))):
            leaf.requires_grad_(True)
            (found,) = torch.autograd.grad(linear(x), leaf, upstream)
            most = 1e-5 if bias.dtype == torch.float32 else 2e-2
            assert (found.double() - right).norm() <= most * right.norm(), linear
            leaf.requires_grad_(False)


def test_gradients_flow_through_experts():
    """Oracle: each row by its own expert."""
    experts, x = ExpertLinear(nn.Linear(6, 5) for _ in range(3)), torch.randn(7, 6, requires_grad=True)
    ends, upstream = torch.tensor([2, 2, 7], dtype=torch.int32), torch.randn(7, 5)
    leaves = x, experts[0].weight, experts[2].bias
    found = torch.autograd.grad(experts(x, ends), leaves, upstream)
    rows = torch.stack([experts[0 if row < 2 else 2](x[row]) for row in range(7)])
    for mine, right in zip(found, torch.autograd.grad(rows, leaves, upstream), strict=True):
        torch.testing.assert_close(mine, right)


def test_an_operator_refuses_what_asks_for_gradients():
    ops, x, pos = torch.ops.bifurcated, torch.randn(1, 1, 32, requires_grad=True), zeros(1)[:, None]
    int8, int4 = random_weight("int8", 16, 32), random_weight("int4", 16, 32)
    held = packed.PackedLinear(nn.Linear(32, 16)) if packed.can_pack(torch.device("cpu"), torch.float32) else None
    calls: list[Callable[[Tensor], object]] = [
        lambda x: ops.streamed_linear(x, torch.randn(16, 32), None),
        lambda x: ops.quantised_linear(x, int8.values, int8.scales, None, None),
        lambda x: ops.quantised_linear(x, int4.values, int4.scales, int4.zeros, None),
        lambda x: attend(x[None], [Part(x[None].detach(), x[None].detach(), None, None, zeros(1))], pos, None),
        lambda x: attend(x[None].detach(), [Part(x[None], x[None], None, None, zeros(1))], pos, None),
    ]
    for call in calls + [lambda x: ops.packed_linear(x, None, held.number, 16)] * (held is not None):
        with pytest.raises(NotImplementedError, match="has no gradients: call it under torch.no_grad"):
            call(x)
        with torch.no_grad():
            call(x)


def wrong_attention() -> dict[str, tuple[dict, str]]:
    """What kernels.cpp would misread: replaced arguments of a sound call, and the error."""
    k, long = torch.randn(3, 2, 9, 16), zeros(3)
    odd = torch.randn(3, 2, 9, 17).bfloat16()[..., :16]
    return {
        "q in int8": ({"q": torch.zeros(3, 6, 1, 16, dtype=torch.int8)}, "queries are torch.int8"),
        "q in float16": ({"q": torch.zeros(3, 6, 1, 16).half()}, "queries are torch.float16"),
        "a head of an odd size": (
            dict(q=torch.zeros(3, 6, 1, 15).bfloat16(), k=k[..., :15].bfloat16(), v=k[..., :15].bfloat16()),
            "queries .* 15",
        ),
        "a head too large": (dict(q=torch.zeros(3, 6, 1, 258), k=k, v=k), "queries .* 258"),
        "H is no multiple of G": ({"q": torch.zeros(3, 5, 1, 16)}, "does not fit"),
        "another head size": ({"q": torch.zeros(3, 6, 1, 32)}, "does not fit"),
        "fewer values": ({"v": k[:, :, :8]}, "does not fit"),
        "fewer rows of keys": ({"k": k[:2], "v": k[:2], "start": zeros(2)}, "does not fit"),
        "keys in another dtype": ({"k": k.bfloat16(), "v": k.bfloat16()}, "keys are torch.bfloat16"),
        "values in another dtype": ({"v": k.double()}, "values torch.float64"),
        "tokens in odd steps": (dict(q=torch.zeros(3, 6, 1, 16).bfloat16(), k=odd, v=odd), "strides .*17"),
        "heads that lie last": ({"k": k.transpose(2, 3).contiguous().transpose(2, 3)}, "strides"),
        "int8 without scales": ({"k": k.char(), "v": k.char()}, "int8 needs scales"),
        "int8 with other scales": (
            {"k": k.char(), "v": k.char(), "k_scale": k[..., :1].double(), "v_scale": k[..., :1]}, "int8 needs scales"
        ),
        "int32 positions": ({"input_pos": torch.full((3, 1), 8, dtype=torch.int32)}, "input_pos is torch.int32"),
        "fewer positions": ({"input_pos": torch.full((2, 1), 8)}, r"input_pos .* expected torch.int64 \[3, 1\]"),
        "slopes in fp64": ({"slopes": torch.ones(6).double()}, "slopes is torch.float64"),
        "fewer slopes": ({"slopes": torch.ones(5)}, "slopes"),
        "slopes with gaps": ({"slopes": torch.ones(12)[::2]}, "slopes .* not contiguous"),
        "int32 start": ({"start": long.int()}, "start is torch.int32"),
        "int32 rows": ({"rows": long.int()}, "rows is torch.int32"),
        "int32 length": ({"length": long.int()}, "length is torch.int32"),
        "channels of other heads": (
            {"k": k.char(), "v": k.char(), "k_scale": k[..., :1], "v_scale": k[..., :1], "k_channel": k[:, :, :1, :9]},
            "k_channel",
        ),
        "fewer rows": ({"rows": zeros(2)}, "rows"),
        "length with gaps": ({"length": zeros(6)[::2]}, "length"),
    }  # fmt: skip


@pytest.mark.parametrize("wrong", wrong_attention())
def test_attention_refuses_what_it_would_misread(wrong):
    replaced, error = wrong_attention()[wrong]
    k = torch.randn(3, 2, 9, 16)
    fields = {"k": k, "v": k, "k_scale": None, "v_scale": None, "start": zeros(3), "rows": None, "length": None}
    fields["k_channel"] = None
    sound = {"q": torch.randn(3, 6, 1, 16), "input_pos": torch.full((3, 1), 8), "slopes": None, **fields}
    given = sound | replaced
    part = Part(*(given[name] for name in fields))
    with pytest.raises(ValueError, match=error):
        attend(given["q"], [part], given["input_pos"], ScoreMod(slopes=given["slopes"]))


@pytest.mark.parametrize("row", [-1, 2, 2**40])
def test_a_row_that_is_not_there_is_an_error(row):
    k = torch.randn(2, 2, 9, 16)
    part = Part(k, k, None, None, zeros(2), torch.tensor([0, 1, row]))
    with pytest.raises(IndexError, match="row index out of range: .* in a cache of 2 rows"):
        attend(torch.randn(3, 6, 1, 16), [part], torch.full((3, 1), 8), None)


def test_a_length_past_the_slots_is_that_of_the_slots():
    q, k = torch.randn(3, 6, 1, 16), torch.randn(1, 2, 9, 16)
    parts = [Part(k, k, None, None, zeros(1), zeros(3), length) for length in (None, torch.tensor([10**6]))]
    assert torch.equal(*(attend(q, [part], torch.full((3, 1), 8), None)[0] for part in parts))


def test_products_refuse_what_they_would_misread():
    """In int4 and int8; a plain weight that the operator does not take is PyTorch's."""
    product, int8, int4 = torch.ops.bifurcated.quantised_linear, *(random_weight(k, 16, 96) for k in ("int8", "int4"))
    for x in (torch.randn(1, 64), torch.randn(1, 90), torch.randn(1, 96).double(), torch.randn(1, 96).char()):
        for weight in (int8, int4):
            with pytest.raises(ValueError, match="expected"):
                product(x, weight.values, weight.scales, getattr(weight, "zeros", None), None)
    x = torch.randn(1, 96)
    for values, scales, zeros_ in (
        (int8.values, int8.scales.float(), None), (int8.values, int8.scales[:9], None),
        (int8.values.byte(), int8.scales, None),
        (int8.values.T.contiguous().T, int8.scales, None), (int4.values, int4.scales, int4.zeros[:, :2].contiguous()),
        (int4.values, int4.scales.T.contiguous().T, int4.zeros), (int4.values.char(), int4.scales, int4.zeros),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected"):
            product(x, values, scales, zeros_, None)
    for x in (torch.randn(1, 30), torch.randn(1, 96).double(), torch.randn(1, 96).half()):
        weight = torch.randn(16, x.shape[-1]).to(x.dtype)
        assert torch.equal(torch.ops.bifurcated.streamed_linear(x, weight, None), F.linear(x, weight))


def test_the_tokens_are_those_of_the_torch_path(published, monkeypatch):
    engine = Engine.open(published, "cpu", "float32", compile=False)
    prompt, request = engine.encode("Once upon a time"), Request(5, 40, Sampling(0.8, top_k=50), seed=3)
    drawn = [sample.tokens for sample in engine.generate(prompt, request)]
    monkeypatch.setattr(kernels, "takes", lambda *_: False)
    assert drawn == [sample.tokens for sample in engine.generate(prompt, request)]


def test_the_compiled_step_holds_it_as_one_graph(monkeypatch):
    """Without Inductor: what is asked is whether other sizes compile again."""
    model, args = random_model(GQA, torch.float32), GQA
    step = torch.compile(
        lambda tokens, input_pos, cache: model(tokens, input_pos, cache), backend="eager", fullgraph=True, dynamic=False
    )
    for number, (n, length, slots) in enumerate(((3, 13, 64), (5, 40, 7), (2, 70, 65))):
        cache = KVCache.fork(prefilled(model, random_tokens(args, 1, length), 64), n, slots)
        tokens, input_pos = random_tokens(args, n, 1), positions(length, n, 1).clone()
        graphs_marked(tokens, input_pos, cache)
        with torch.compiler.set_stance("fail_on_recompile" if number else "default"):
            actual = step(tokens, input_pos, cache)
        torch.testing.assert_close(actual, model(tokens, input_pos, cache), rtol=0, atol=1e-5)


def graphs_marked(tokens: Tensor, input_pos: Tensor, cache: KVCache) -> None:
    from engine.graphs import StepInput, mark_dynamic

    mark_dynamic(StepInput(tokens, input_pos, torch.arange(len(tokens)), torch.tensor(0)), cache)


def test_threads_are_torchs_own(threads):
    """A product of torch's and then the operator: no thread more."""
    a = torch.randn(512, 512)
    q, (k, v) = torch.randn(64, 8, 1, 16), torch.randn(2, 64, 8, 99, 16)
    count = []
    for _ in range(2):
        (a @ a).exp_().sum()
        torch.randn(1 << 20).exp_()
        count.append(len(os.listdir("/proc/self/task")))
        attend(q, [Part(k, v, None, None, zeros(64))], torch.full((64, 1), 98), None)
        count.append(len(os.listdir("/proc/self/task")))
    assert count[-1] == count[0], count


@pytest.fixture
def anew(monkeypatch, tmp_path) -> Iterator[Path]:
    """The library is looked for again, in an empty cache folder; yields it."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    kernels.library.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    kernels.library.cache_clear()


def compiler(folder: Path, script: str) -> str:
    """A stand-in for a compiler: a shell script, in which $target is the file to write."""
    made = folder / "compiler"
    made.write_text(f"#!/bin/sh\nfor target; do :; done\necho called >> {folder}/calls\n{script}\n")
    made.chmod(0o755)
    return str(made)


def built() -> str:
    """The library of this process, for a stand-in to hand out."""
    functions = kernels.library().functions
    assert functions is not None
    return functions._name


@pytest.mark.parametrize("umask", [0o002, 0o000, 0o077], ids="{:03o}".format)
def test_the_umask_does_not_matter(monkeypatch, tmp_path, umask):
    """A library that the compiler makes writable by all is loaded, and by the next process without the compiler."""
    monkeypatch.setenv("CXX", compiler(tmp_path, f'cat {built()} > "$target"\nchmod a+rw "$target"'))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        for _ in range(2):
            kernels.library.cache_clear()
            assert kernels.library().note == "kernels.cpp"
    finally:
        os.umask(before)
        monkeypatch.undo()
        kernels.library.cache_clear()
    assert (tmp_path / "calls").read_text().split() == ["called"]


@pytest.mark.parametrize(
    "script,why",
    [
        ("echo 'In file: x' >&2; echo 'k.cpp:3: error: no such thing' >&2; exit 1", "k.cpp:3: error: no such thing"),
        ("exit 4", "exited with status 4"),
        ("sleep 9", "took more than 0.5 s"),
        ('echo none > "$target"', "file too short|invalid ELF header"),
    ],
)
def test_a_failure_to_build_is_told_once_and_remembered(anew, monkeypatch, script, why):
    monkeypatch.setenv("CXX", compiler(anew, script))
    monkeypatch.setattr(kernels, "BUILD_SECONDS", 0.5 if "sleep" in script else 60)
    with pytest.warns(Notice, match=why) as told:
        for _ in range(3):
            assert not kernels.multiplies(torch.float32, 32, 32)
    assert len(told) == 1 and (anew / "calls").read_text().split() == ["called"]
    cpu = torch.device("cpu")
    assert re.search(rf"^torch \(not built: .*({why})", kernels.attention_kernel(cpu, torch.float32, 64))


def test_a_cache_folder_may_be_shared(anew, monkeypatch):
    """Users have folders of their own in it."""
    mine = kernels.cache_folder()
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert mine.parent == anew == kernels.cache_folder().parent and kernels.cache_folder() != mine
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    assert "54321" in kernels.cache_folder().name and kernels.cache_folder() != mine


@pytest.mark.filterwarnings("ignore::layers.notices.Notice")
@pytest.mark.parametrize(
    "name,value,note",
    [("PATH", "", "no C++ compiler"), ("CXX", "/bin/false", "not built: /bin/false exited with status 1")],
)
def test_without_a_compiler_torch_runs(anew, monkeypatch, capfd, name, value, note):
    monkeypatch.setenv(name, value)
    cpu = torch.device("cpu")
    assert not kernels.takes(cpu, torch.float32, 64)
    assert kernels.attention_kernel(cpu, torch.float32, 64) == f"torch ({note})"
    cache = KVCache(torch.empty(0), 1, (2, 2, 5, 16), zeros(2))
    k, v = torch.randn(2, 2, 2, 1, 16)
    assert cache.over_chain is attend_by_torch and capfd.readouterr() == ("", "")
    assert torch.equal(cache.attend(0, torch.randn(2, 4, 1, 16), k, v, zeros(2)[:, None], None)[:, ::2], v)


def test_what_it_does_not_take():
    cpu = torch.device("cpu")
    taken = [(torch.float32, 64), (torch.bfloat16, 256), (torch.float64, 64), (torch.float16, 64), (torch.float32, 258)]
    assert [kernels.takes(cpu, *each) for each in taken] == [True, True, False, False, False]
    assert not kernels.takes(torch.device("cuda"), torch.float32, 64)
    assert kernels.attention_kernel(cpu, torch.float64, 64) == "torch"


@slow
def test_processes_that_build_at_once_find_one_library(tmp_path):
    """By a compiler that takes its time and hands out the library of this process; a third process does not call it."""
    slow = compiler(tmp_path, f'sleep 1\ncp {built()} "$target"')
    code = "from layers import kernels; print(kernels.library().note)"
    environment = os.environ | {"CXX": slow, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    assert [each.communicate()[0] for each in running] == ["kernels.cpp\n"] * 2
    assert 1 <= len((tmp_path / "calls").read_text().split()) <= 2
    assert len(list((tmp_path / "cache" / kernels.cache_folder().name).iterdir())) == 1
    (tmp_path / "calls").unlink()
    assert subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout == "kernels.cpp\n"
    assert not (tmp_path / "calls").exists()


@slow
def test_a_memory_checker_finds_nothing(tmp_path):
    flags = ["-O0", "-march=native", "-std=c++17", "-fopenmp", "-fsanitize=address,undefined"]
    made = tmp_path / "driver"
    build = ["g++", *flags, "-fno-sanitize-recover=all", str(ROOT / "tests" / "kernels_driver.cpp"), "-o", str(made)]
    if shutil.which("g++") is None or subprocess.run(build, capture_output=True).returncode:
        pytest.skip("no g++ with its memory checkers")
    done = subprocess.run([made], capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=0"})
    assert done.returncode == 0, done.stderr[-3000:]


@slow
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_instruction_sets_compile(compiler):
    """What this machine cannot run is at least compiled: AVX-512 with and without bfloat16."""
    if os.uname().machine != "x86_64" or shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} for x86")
    every = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma".split()
    for flags in (every, [*every, "-mavx512bf16"]):
        command = [compiler, "-std=c++17", "-fsyntax-only", *flags, str(kernels.SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
