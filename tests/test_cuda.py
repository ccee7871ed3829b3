"""The path of a CUDA device. Where there is none, its code runs on the meta device, with the CUDA operator's own shapes
and dtypes and no numbers, and with numbers through PyTorch's fused CPU kernel, whose interface is the same.

Oracles: an fp64 softmax; for a recorded step, the plain one. The last tests need a GPU and are skipped without.
"""

from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from conftest import draws, random_model, random_tokens, slow
from test_bifurcated_attention import SHAPES, assert_error_at_most_twice, draw, oracle, side_by_side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bifurcated_attention as ours
import cache as caches
from cache import KVCache, Link, Prefill
from engine import scoring
from engine.contexts import Contexts
from engine.engine import Engine
from engine.graphs import RecordedStep, StepInput, compiled
from engine.layouts import LAYOUTS, Int8Context
from engine.request import Request, Sampling
from engine.runner import ModelRunner, decode
from engine.scheduler import Prompt
from engine.scoring import Rows
from layers.rope import RopeScaling
from model import ModelArgs, Transformer, empty_model
from sampling import uniform
from tp import Shard

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = ModelArgs(
    dim=48, n_layer=2, n_head=6, n_kv_head=2, head_dim=16, hidden_dim=40, vocab_size=97, context_limit=4096
)  # fmt: skip
GROWING = replace(SHAPE, rope_scaling=RopeScaling("longrope", 4.0, 65, short=(1.0,) * 8, long=(2.0,) * 8))


@pytest.fixture
def fused(monkeypatch):
    """The fused kernel on every device, and on the meta device CUDA's."""
    for module in (ours, caches, scoring):
        monkeypatch.setattr(module, "has_fused", lambda device, dtype, head_dim: dtype != torch.float64)
    for kernels in (ours.FLASH, ours.MASKED):
        monkeypatch.setitem(kernels, "meta", kernels["cuda"])


class Recorder(TorchDispatchMode):
    """Every operator that runs, with the shapes and the dtypes of the tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []
        self.made: list[tuple[tuple[int, ...], torch.dtype]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = result if isinstance(result, tuple | list) else [result]
        self.devices |= {each.device.type for each in made if isinstance(each, Tensor)}
        self.made += [(tuple(each.shape), each.dtype) for each in made if isinstance(each, Tensor)]
        self.seen.append((function.name(), [tuple(each.shape) for each in made if isinstance(each, Tensor)]))
        return result

    def count(self, name: str) -> int:
        return sum(name in seen for seen, _ in self.seen)


@pytest.mark.parametrize("dtype,scale", [pytest.param(torch.float32, 1, marks=slow), (torch.bfloat16, 4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_merge_contract_of_the_fused_kernel(fused, shape, dtype, scale):
    q, k_context, v_context, k_decoded, v_decoded = draw(*shape, S=1, dtype=dtype)
    q = q * scale
    k, v = side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded)
    expected, _ = oracle(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mask = torch.ones(1, 1, 1, k_decoded.shape[2], dtype=torch.bool)  # as a cache has
    found = ours.bifurcated_attention(q, k_context, v_context, k_decoded, v_decoded, mask)
    assert_error_at_most_twice(found, plain, expected)


def test_the_fused_kernel_gives_the_log_sum_exp(fused):
    q, k, v, _, _ = draw(5, 4, 64, 129, 1, S=3, dtype=torch.float32)
    expected_out, expected_lse = oracle(q, k, v)
    out, lse = ours.shared_attention(q, k, v)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)
    assert ours.partial_attention(q, k[:, :, :0], v[:, :, :0])[1].max() == -float("inf")


def as_on_cuda(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The CPU's kernel with what CUDA's does besides: nan where a query sees nothing, and a log-sum-exp with room to
    spare behind it."""
    out, lse = ours.FLASH["cpu"](q, k, v, attn_mask=bias)[:2]
    blind = bias.isinf().all(-1)
    lse = torch.nn.functional.pad(lse.masked_fill(blind, float("nan")), (0, 29), value=7.0)
    return out.masked_fill(blind[..., None], float("nan")), lse


@pytest.mark.parametrize("kernel", [ours.MASKED["cpu"], as_on_cuda], ids=["CPU", "as on CUDA"])
@pytest.mark.parametrize("masked", [(5, 1, 1), (1, 1, 3), (5, 4, 3), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("L", [1, 7, 129])
def test_the_fused_kernel_takes_a_mask(monkeypatch, masked, L, kernel):
    """Of rows, heads, queries or all alike, at lengths that no kernel likes; where a query sees nothing, 0 and -inf.
    Oracle: fp64."""
    monkeypatch.setitem(ours.MASKED, "cpu", kernel)
    generator = torch.Generator().manual_seed(L)
    q, k, v = (torch.randn(5, 4, size, 24, generator=generator) for size in (3, L, L))
    mask = torch.rand(*masked, L, generator=generator) < 0.5
    mask.view(-1, L)[0] = False
    out, lse = ours.fused_partial(q, k, v, mask)
    expected_out, expected_lse = oracle(q, k, v, mask)
    blind = ~mask.any(-1, keepdim=True).expand(5, 4, 3, 1)
    assert blind.any() and out.dtype == lse.dtype == torch.float32
    assert (lse[blind] == -float("inf")).all() and (out.masked_select(blind) == 0).all()
    torch.testing.assert_close(out.double(), expected_out.masked_fill(blind, 0), rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", ["rows that share keys", "rows at their own positions"])
def test_masked_keys_go_through_the_fused_kernel(fused, form):
    """shared_attention as a cache calls it: of an ancestor's rows of several lengths, and of own keys. Oracle: fp64."""
    generator, R = torch.Generator().manual_seed(0), 2 if form == "rows that share keys" else 6
    q, k, v = (torch.randn(*shape, 24, generator=generator) for shape in ((6, 4, 1), (R, 2, 9), (R, 2, 9)))
    mask = torch.arange(9) < torch.arange(1, R + 1)[:, None, None, None] * 9 // R  # [R,1,1,9]
    with Recorder() as recorder:
        out, lse = ours.shared_attention(q, k, v, mask)
    assert recorder.count("flash_attention_for_cpu") == 1
    expected = oracle(q, *(each.repeat_interleave(6 // R, 0) for each in (k, v, mask)))
    for found, wanted in zip((out, lse), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (17, 1, 1, 33), (1, 1, 4, 33)], ids=str)
def test_the_kernels_of_cuda_give_these_shapes(causal, mask, fused):
    """On the meta device, so of PyTorch's own word for them: out [B,H,Q,D] and lse [B,H,Q,1], fp32."""
    if causal and mask:
        pytest.skip("a mask says itself what is causal")
    q, k = (torch.empty(17, 6, size, 16, device="meta", dtype=torch.bfloat16) for size in (4, 33))
    visible = mask and torch.ones(mask, device="meta", dtype=torch.bool)
    with Recorder() as recorder:
        out, lse = ours.fused_partial(q, k, k, visible, causal)
    assert (out.shape, lse.shape) == ((17, 6, 4, 16), (17, 6, 4, 1)) and out.dtype == lse.dtype == torch.float32
    assert recorder.count("efficient_attention" if mask else "flash_attention") == 1 and recorder.devices == {"meta"}


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_parts_is_prefill_with_a_mask(request, monkeypatch, chunk):
    """Chunks after the first: their past and themselves, merged, against one causal pass in fp32."""
    monkeypatch.setattr("layers.kernels.takes", lambda *_: False)  # which would have it all
    model, tokens = random_model(SHAPE, torch.float32), random_tokens(SHAPE, 1, 64)
    positions = torch.arange(64)[None]

    def hidden() -> Tensor:
        cache = KVCache.empty(SHAPE.kv_shape, 1, 64, model.norm.weight)
        parts = []
        for first in range(0, 64, chunk):
            part = slice(first, first + chunk)
            size = tokens[:, part].shape[1]
            parts.append(model.hidden(tokens[:, part], positions[:, part], Prefill(cache, first, size)))
        return torch.cat(parts, 1)

    expected = hidden()
    request.getfixturevalue("fused")
    with Recorder() as recorder:
        found = hidden()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    later = -(-64 // chunk) - 1
    assert recorder.count("flash_attention_for_cpu") == SHAPE.n_layer * (1 + 2 * later)  # SDPA's own, then two each


@pytest.mark.parametrize("preamble", [0, 21])
@pytest.mark.parametrize("args", [SHAPE, GROWING], ids=["plain", "longrope"])
def test_many_prompts_are_read_without_masks(request, monkeypatch, args, preamble):
    """Short prompts packed together, alone or behind what all or some share, and contexts that are read anew: no mask
    is made of them or of an ancestor's slots. Oracle: the same without the fused kernels, in fp32."""
    monkeypatch.setattr("layers.kernels.takes", lambda *_: False)
    begin, group = random_tokens(args, preamble).tolist(), random_tokens(args, 70, seed=2).tolist()
    rests = [random_tokens(args, length, seed=length).tolist() for length in (3, 17, 40, 90, 60)]
    prompts = [Prompt(number, begin + (group if number % 2 else []) + rest) for number, rest in enumerate(rests)]
    asked = Request(2, 12, Sampling(0.9, top_k=30), seed=1)

    def drawn() -> list:
        engine = Engine(random_model(args, torch.float32), compile=False)
        return [(each.prompt.id, draws(each.samples)) for each in engine.generate_many(prompts, asked)]

    expected = drawn()
    request.getfixturevalue("fused")
    reading, seen = [], []

    def read(self, *given, method, **flags):
        reading.append(True)
        found = method(self, *given, **flags)
        reading.pop()
        return found

    for owner, name in ((Contexts, "read"), (ModelRunner, "prefill")):
        monkeypatch.setattr(owner, name, partialmethod(read, method=getattr(owner, name)))
    slots = Link.visible
    monkeypatch.setattr(
        Link, "visible", lambda link: seen.append(bool(reading) and link.length is not None) or slots(link)
    )
    monkeypatch.setattr(Rows, "visible", property(lambda rows: pytest.fail("a mask of packed prompts")))
    with Recorder() as recorder:
        assert drawn() == expected
    assert len(seen) > 10 and not any(seen) and recorder.count("flash_attention_for_cpu") > 10


def meta_model(dtype: torch.dtype) -> Transformer:
    return empty_model(SHAPE).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("n,size", [(1, 1), (3, 1), (17, 2)])
def test_no_scores_over_the_context_are_held(fused, n, size):
    """A decode step over a context of 777: a fused kernel a layer for it, and nothing made that has a dimension of 777;
    another for the rows' own keys, of which no copy is made, in fp32 or otherwise."""
    model = meta_model(torch.bfloat16)
    cache = KVCache.fork(KVCache.empty(SHAPE.kv_shape, 1, 777, model.norm.weight), n, 33)
    tokens = torch.zeros(n, size, dtype=torch.long, device="meta")
    with Recorder() as recorder:
        logits = model(tokens, tokens + 777, cache)
    assert logits.shape == (n, size, 97) and logits.dtype == torch.bfloat16
    assert recorder.count("_scaled_dot_product_flash_attention") == SHAPE.n_layer
    assert recorder.count("_scaled_dot_product_efficient_attention") == SHAPE.n_layer  # the rows' own keys
    assert not [seen for seen in recorder.seen if any(777 in shape for shape in seen[1])]
    copies = ("aten::_to_copy", "aten::clone", "aten::cat", "aten::copy_", "aten::bmm", "aten::mul.Tensor")
    assert not [seen for seen in recorder.seen if seen[0] in copies and any(33 in shape for shape in seen[1])]
    assert not [shape for shape, dtype in recorder.made if dtype == torch.float32 and 33 in shape]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layout_traces_on_one_device(fused, layout, dtype):
    """Prefill in two chunks, fork, two steps, rows dropped, slots grown, another step: no tensor strays to the CPU."""
    model = meta_model(dtype)
    context = KVCache.empty(SHAPE.kv_shape, 1, 20, model.norm.weight)
    for first, size in ((0, 13), (13, 7)):
        tokens = torch.zeros(1, size, dtype=torch.long, device="meta")
        model.hidden(tokens, first + torch.arange(size, device="meta")[None], Prefill(context, first, size))
    tokens, kept = torch.zeros(5, 1, dtype=torch.long, device="meta"), [0, 2, 4]
    with Recorder() as recorder:
        cache = LAYOUTS[layout](context, 5, 4, 0)
        for step in range(2):
            assert model(tokens, tokens + 20 + step, cache).shape == (5, 1, 97)
        cache.keep(kept)
        cache.resize(cache.slots + 4)
        assert model(tokens[:3], tokens[:3] + 22, cache).dtype == dtype
    assert recorder.devices == {"meta"}


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[2] % 8 == 0], ids=str)
def test_the_merge_contract_on_a_gpu(shape, dtype):
    inputs = [tensor.cuda() for tensor in draw(*shape, S=1, dtype=dtype)]
    q, k_context, v_context, k_decoded, v_decoded = inputs
    k, v = side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded)
    expected, _ = oracle(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert_error_at_most_twice(ours.bifurcated_attention(*inputs), plain, expected)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("L", [1, 7, 129])
def test_the_fused_kernel_takes_a_mask_on_a_gpu(dtype, L):
    """With queries that see nothing. Oracle: fp64; the bound is twice the error of the CPU's kernel."""
    generator = torch.Generator().manual_seed(L)
    q, k, v = (torch.randn(5, 4, size, 24, generator=generator).to(dtype) for size in (3, L, L))
    mask = torch.rand(5, 1, 3, L, generator=generator) < 0.5
    mask[0] = False
    blind = ~mask.any(-1, keepdim=True)
    expected, expected_lse = oracle(q, k, v, mask)
    plain, _ = ours.fused_partial(q, k, v, mask)
    out, lse = (each.cpu() for each in ours.fused_partial(*(each.cuda() for each in (q, k, v, mask))))
    assert_error_at_most_twice(out, plain, expected.masked_fill(blind, 0))
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=2e-2)


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_layouts_agree_on_a_gpu(compile):
    """fp32, N = 1, 3, 17: the same tokens from every layout as on the CPU, recorded and compiled."""
    on_cpu = Engine(random_model(SHAPE, torch.float32), compile=False)
    on_gpu = Engine(random_model(SHAPE, torch.float32).cuda(), compile=compile)
    prompt, eos = random_tokens(SHAPE, 40).tolist(), frozenset(range(3, 97, 30))
    for n in (1, 3, 17):
        request = Request(n, 90, Sampling(0.9, top_k=30), seed=n, eos_ids=eos, prefill_chunk=13)
        expected = draws(on_cpu.generate(prompt, request))
        for layout in LAYOUTS:
            drawn = on_gpu.generate(prompt, replace(request, attention=layout))
            assert draws(drawn) == expected, (n, layout)


@needs_gpu
def test_numbers_are_those_of_the_cpu():
    words = torch.tensor([0, 1, 0xFFFF, 0xFFFFFFFF, 2**32 + 5, 2**63 - 1])
    for seed in words:
        assert torch.equal(uniform(*(each.cuda() for each in (seed, words[:, None], words))).cpu(),
            uniform(seed, words[:, None], words))  # fmt: skip


@needs_gpu
@pytest.mark.parametrize("compile", [False, True])
def test_recorded_steps_are_the_plain_steps_on_a_gpu(compile):
    """bfloat16 through the fused kernels, prompts of several lengths with one recorded step, the context in int8, and
    steps of three positions between those of one."""
    model = random_model(SHAPE, torch.float32).to(device="cuda", dtype=torch.bfloat16)
    plain = partial(decode, model, uniform)
    recorded = RecordedStep(compiled(plain) if compile else plain)
    for length in (40, 41, 300, 40):
        for kind in (lambda cache: cache, Int8Context.of):
            context = KVCache.empty(SHAPE.kv_shape, 1, length, model.norm.weight)
            for tensor in context.tensors:
                tensor.normal_(generator=torch.Generator("cuda").manual_seed(length))
            context = kind(context)
            for size in (1, 1) if compile else (1, 3, 1):
                where = (length + torch.arange(size, device="cuda")).expand(17, size)
                tokens, samples = random_tokens(SHAPE, 17, size).cuda(), torch.arange(17, device="cuda")
                inputs = StepInput(tokens, where.clone(), samples, torch.tensor(7, device="cuda"))
                found, expected = (step(inputs, KVCache.fork(context, 17, 8)) for step in (recorded, plain))
                assert ((found[0] - expected[0]).float().norm() / expected[0].float().norm()).item() < 0.02
                assert torch.equal(found[1], expected[1])


@needs_gpu
def test_a_group_of_one_over_nccl_draws_the_same():
    model = random_model(SHAPE, torch.float32).cuda()
    engine = Engine(model, compile=False)
    wanted = draws(engine.generate([1, 2, 3], Request(3, 9, seed=1)))
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    try:
        shard = Shard(0, 1, torch.distributed.group.WORLD.group_name)
        shard.attach(model)
        assert draws(Engine(model, compile=False, shard=shard).generate([1, 2, 3], Request(3, 9, seed=1))) == wanted
    finally:
        torch.distributed.destroy_process_group()
