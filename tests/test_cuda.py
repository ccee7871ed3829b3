"""The path of a CUDA device. Where there is none, its code runs on the meta device, with the CUDA operator's own shapes
and dtypes and no numbers, and with numbers through PyTorch's fused CPU kernel, whose interface is the same.

Oracles: an fp64 softmax and, for the recorded step, the plain one. The last tests need a GPU and are skipped without.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import GQA, random_model, random_tokens
from test_bifurcated_attention import SHAPES, assert_error_at_most_twice, draw, oracle, side_by_side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bifurcated_attention as ours
import model as network
from cuda_graph import RecordedStep, Recording
from generate import Request, Sampling, generate, make_steps
from int8_context import Int8Context
from model import LAYOUTS, KVCache, ModelArgs, Prefill, SDPACache, Transformer, empty_model

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
SHAPE = ModelArgs(
    dim=48, n_layer=2, n_head=6, n_kv_head=2, head_dim=16, hidden_dim=40, vocab_size=97, context_limit=4096
)  # fmt: skip


@pytest.fixture
def fused(monkeypatch):
    """The fused kernel on every device, and on the meta device CUDA's."""
    for module in (ours, network):
        monkeypatch.setattr(module, "has_flash", lambda device, dtype, head_dim: dtype != torch.float64)
    monkeypatch.setitem(ours.FLASH, "meta", ours.FLASH["cuda"])


class Recorder(TorchDispatchMode):
    """Every operator that runs, with the shapes of the tensors that it makes."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, list[tuple[int, ...]]]] = []
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        made = result if isinstance(result, tuple | list) else [result]
        self.devices |= {each.device.type for each in made if isinstance(each, Tensor)}
        self.seen.append((function.name(), [tuple(each.shape) for each in made if isinstance(each, Tensor)]))
        return result

    def count(self, name: str) -> int:
        return sum(name in seen for seen, _ in self.seen)


@pytest.mark.parametrize("dtype,scale", [(torch.float32, 1), (torch.bfloat16, 4)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_merge_contract_of_the_fused_kernel(fused, shape, dtype, scale):
    q, k_context, v_context, k_decoded, v_decoded = draw(*shape, S=1, dtype=dtype)
    q = q * scale
    k, v = side_by_side(k_context, k_decoded), side_by_side(v_context, v_decoded)
    expected, _ = oracle(q, k, v)
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    mask = torch.ones(1, 1, 1, k_decoded.shape[2], dtype=torch.bool)  # as a cache has: the fused kernel takes none
    found = ours.bifurcated_attention(q, k_context, v_context, k_decoded, v_decoded, mask)
    assert_error_at_most_twice(found, plain, expected)


def test_the_fused_kernel_gives_the_log_sum_exp(fused):
    q, k, v, _, _ = draw(5, 4, 64, 129, 1, S=3, dtype=torch.float32)
    expected_out, expected_lse = oracle(q, k, v)
    out, lse = ours.shared_attention(q, k, v)
    torch.testing.assert_close(out.double(), expected_out, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=0, atol=1e-6)
    assert ours.partial_attention(q, k[:, :, :0], v[:, :, :0])[1].max() == -float("inf")


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_prefill_in_parts_is_prefill_with_a_mask(request, chunk):
    """Chunks after the first: their past and themselves, merged, against one causal pass in fp32."""
    model, tokens = random_model(SHAPE, torch.float32), random_tokens(SHAPE, 1, 64)
    positions = torch.arange(64)[None]

    def hidden() -> Tensor:
        cache = KVCache.empty(SHAPE, 1, 64, model.norm.weight)
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


def meta_model(dtype: torch.dtype) -> Transformer:
    return empty_model(SHAPE).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("n,size", [(1, 1), (3, 1), (17, 2)])
def test_no_scores_over_the_context_are_held(fused, n, size):
    """A decode step over a context of 777: one fused kernel a layer, and nothing made that has a dimension of 777."""
    model = meta_model(torch.bfloat16)
    cache = KVCache.fork(KVCache.empty(SHAPE, 1, 777, model.norm.weight), n, 33)
    tokens = torch.zeros(n, size, dtype=torch.long, device="meta")
    with Recorder() as recorder:
        logits = model(tokens, tokens + 777, cache)
    assert logits.shape == (n, size, 97) and logits.dtype == torch.bfloat16
    assert recorder.count("_scaled_dot_product_flash_attention") == SHAPE.n_layer
    assert not [seen for seen in recorder.seen if any(777 in shape for shape in seen[1])]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_layout_traces_on_one_device(fused, layout, dtype):
    """Prefill in two chunks, fork, two steps, rows dropped, slots grown, another step: no tensor strays to the CPU."""
    model = meta_model(dtype)
    context = KVCache.empty(SHAPE, 1, 20, model.norm.weight)
    for first, size in ((0, 13), (13, 7)):
        tokens = torch.zeros(1, size, dtype=torch.long, device="meta")
        model.hidden(tokens, first + torch.arange(size, device="meta")[None], Prefill(context, first, size))
    tokens, kept = torch.zeros(5, 1, dtype=torch.long, device="meta"), torch.tensor([0, 2, 4], device="meta")
    with Recorder() as recorder:
        cache = LAYOUTS[layout](context, 5, 4)
        for step in range(2):
            assert model(tokens, tokens + 20 + step, cache).shape == (5, 1, 97)
        cache.keep(kept)
        cache.reserve(cache.slots + 4)
        assert model(tokens[:3], tokens[:3] + 22, cache).dtype == dtype
    assert recorder.devices == {"meta"}


def test_a_recorded_step_is_recorded_when_the_cache_changes(monkeypatch):
    """The same tokens as the plain step's, through compaction and growth, from a recording that is made only then."""
    monkeypatch.setattr("generate.DECODE_SLOTS", 8)
    model, prompt = random_model(GQA, torch.float32), random_tokens(GQA, 13).tolist()
    plain, recordings = make_steps(model), []

    def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
        output = step()
        recordings.append(output.shape)

        def replay() -> None:
            output.copy_(step())

        return replay, output

    request = Request(17, 40, Sampling(0.9, top_k=30), seed=1, eos_ids=frozenset(range(3, 97, 9)))
    steps = replace(plain, decode=RecordedStep(plain.decode, record))
    drawn = [each.tokens for each in generate(model, prompt, request, steps=steps)]
    assert drawn == [each.tokens for each in generate(model, prompt, request)]
    counted = len(recordings)
    assert 4 <= counted <= 12 < max(map(len, drawn))  # five growths, and at most five compactions
    generate(model, prompt, request, steps=steps)
    assert len(recordings) > counted  # another cache


def test_memory_that_is_handed_out_again_is_recorded_anew():
    """Caches of other lengths, and of another kind, in the same memory: each call gives the plain step's logits."""
    model = random_model(GQA, torch.float32)
    plain = make_steps(model).decode
    memory = torch.randn(4 * GQA.n_layer, 10000, generator=torch.Generator().manual_seed(0))
    starts = torch.zeros(1, dtype=torch.long), torch.zeros(3, dtype=torch.long)

    def record(step: Callable[[], Tensor], device: torch.device) -> Recording:
        """Keeps to the shapes that it has seen, as a graph does, and not to the objects."""
        kind, length, output = current[0], current[1], step()

        def replay() -> None:
            output.copy_(plain(recorded.tokens, recorded.input_pos, cache_of(kind, length)))

        return replay, output

    def cache_of(kind: type[KVCache], length: int) -> KVCache:
        parts = [part[: rows * 2 * slots * 10].view(rows, 2, slots, 10) for part, (rows, slots) in zip(memory, (
            [(1, length)] * 2 * GQA.n_layer + [(3, 4)] * 2 * GQA.n_layer), strict=True)]  # fmt: skip
        layers = [parts[first : first + GQA.n_layer] for first in range(0, len(parts), GQA.n_layer)]
        starts[1].fill_(length)
        return kind(layers[2], layers[3], starts[1], KVCache(layers[0], layers[1], starts[0]))

    recorded, tokens = RecordedStep(plain, record), random_tokens(GQA, 3, 1)
    for current in ((KVCache, 13), (KVCache, 14), (SDPACache, 14), (SDPACache, 14)):
        input_pos = torch.full((3, 1), current[1])
        found = recorded(tokens, input_pos, cache_of(*current)).clone()
        assert torch.equal(found, plain(tokens, input_pos, cache_of(*current))), current


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
@pytest.mark.parametrize("compiled", [False, True])
def test_layouts_agree_on_a_gpu(compiled):
    """fp32, N = 1, 3, 17: the same tokens from every layout as on the CPU, recorded and compiled."""
    on_cpu = random_model(SHAPE, torch.float32)
    on_gpu = random_model(SHAPE, torch.float32).cuda()
    prompt, steps = random_tokens(SHAPE, 40).tolist(), make_steps(on_gpu, compile_decode=compiled)
    for n in (1, 3, 17):
        request = Request(n, 30, Sampling(0.9, top_k=30), seed=n, eos_ids=frozenset(range(3, 97, 9)), prefill_chunk=13)
        expected = [each.tokens for each in generate(on_cpu, prompt, request)]
        for layout in LAYOUTS:
            drawn = generate(on_gpu, prompt, replace(request, attention=layout), steps=steps)
            assert [each.tokens for each in drawn] == expected, (n, layout)


@needs_gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_recorded_steps_are_the_plain_steps_on_a_gpu(compiled):
    """bfloat16 through the fused kernel, prompts of several lengths with one recorded step, and the context in int8."""
    model = random_model(SHAPE, torch.float32).to(device="cuda", dtype=torch.bfloat16)
    recorded, plain = make_steps(model, compile_decode=compiled).decode, make_steps(model).decode.step
    for length in (40, 41, 300, 40):
        for kind in (lambda cache: cache, Int8Context):
            context = KVCache.empty(SHAPE, 1, length, model.norm.weight)
            for tensor in context.tensors:
                tensor.normal_(generator=torch.Generator("cuda").manual_seed(length))
            context = kind(context)
            tokens, input_pos = random_tokens(SHAPE, 17, 1).cuda(), torch.full((17, 1), length, device="cuda")
            found, expected = (step(tokens, input_pos, KVCache.fork(context, 17, 8)) for step in (recorded, plain))
            assert ((found - expected).float().norm() / expected.float().norm()).item() < 0.02
