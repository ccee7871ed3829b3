"""The context in int8. Oracles: the same context without it, exactly where its numbers were rounded before, and on a
real model over real stories."""

import re
from dataclasses import replace

import pytest
import torch
from conftest import ALIBI, GQA, SHARED, STORIES, needs_stories, random_model, random_tokens
from torch import Tensor

from checkpoint import load_model, read_checkpoint
from generate import Request, Sampling, generate, make_steps, prefill
from int8_context import Int8Context, quantized
from model import KVCache
from plan import plan_memory
from tokenizer import load_tokenizer


def filled(args, rows: int, slots: int, dtype: torch.dtype) -> KVCache:
    cache = KVCache.empty(args, rows, slots, torch.empty(0, dtype=dtype))
    generator = torch.Generator().manual_seed(slots)
    for tensor in cache.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_the_nearest_of_255(dtype):
    tensor = torch.randn(2, 3, 17, 59, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 1, 2] = 0
    tensor[0, 2, 2:6] *= torch.tensor([1e-2, 1e-3, 1e-4, 1e-5])[:, None].to(dtype)
    tensor[1, 2, 3] = 1e-7
    number, scale = quantized(tensor)
    assert number.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (2, 3, 17, 1)
    error = (number.float() * scale.float() - tensor.float()).abs()
    # Half a step; where the scale was rounded down, at most what 127 steps then lack, also of a subnormal scale.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    assert (error <= scale.float() * (0.5 + 127 * eps) + 127 * eps * tiny + 1e-12).all()
    assert (number[0, 1, 2] == 0).all()


def test_it_takes_the_place_of_the_context_in_half_the_bytes():
    context = filled(GQA, 1, 50, torch.bfloat16)
    expected = plan_memory(GQA, torch.bfloat16, 50, 3, 8, "bifurcated", 10**9, "int8")
    halved = Int8Context(context)
    assert context.tensors == []
    assert halved.nbytes == expected.context == 50 * GQA.kv_values_per_token * 12 // 10  # 10 numbers and a scale
    assert (halved.rows, halved.slots, halved.dtype) == (1, 50, torch.bfloat16)
    child = KVCache.fork(halved, 3, 8)
    assert child.dtype == torch.bfloat16 and child.k[0].shape == (3, 2, 8, 10)


@pytest.mark.parametrize("args", [GQA, ALIBI], ids=["plain", "ALiBi, window"])
@pytest.mark.parametrize("rows", [None, 2])
def test_samples_are_those_of_the_rounded_context(args, rows, monkeypatch):
    """fp32, N = 5, also in waves. Oracle: an ordinary context that holds the rounded numbers."""
    model, prompt = random_model(args, torch.float32), random_tokens(args, 23).tolist()
    request = Request(5, 12, Sampling(0.9, top_k=30), seed=3, rows_at_once=rows, kv_dtype="int8")
    drawn = [each.tokens for each in generate(model, prompt, request)]

    def rounded(context: KVCache) -> KVCache:
        other = Int8Context(context)
        pairs = [other.read(layer) for layer in range(args.n_layer)]
        return KVCache([k for k, _ in pairs], [v for _, v in pairs], other.start)

    monkeypatch.setattr("generate.Int8Context", rounded)
    assert drawn == [each.tokens for each in generate(model, prompt, request)]


def test_one_compiled_step_reads_it():
    torch.compiler.reset()
    args = replace(GQA, n_layer=1)
    model = random_model(args, torch.float32)
    compiled, eager = make_steps(model, compile_decode=True).decode, make_steps(model).decode

    def difference(n: int, length: int) -> float:
        context = Int8Context(filled(args, 1, length, torch.float32))
        token, input_pos = random_tokens(GQA, n, 1), torch.full((n, 1), length)
        logits, expected = (step(token, input_pos, KVCache.fork(context, n, 4)) for step in (compiled, eager))
        return (logits - expected).abs().max().item()

    assert difference(5, 29) < 1e-4
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3, 77) < 1e-4 and difference(17, 200) < 1e-4


@needs_stories
@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.02), (torch.float32, 0.004)])
def test_log_probabilities_on_real_stories_hardly_move(dtype, bound):
    """stories15M: the mean over stories of |log-probability with int8 - without| of each next token, in the second half
    of a story that follows the first half. In bfloat16 most of it is bfloat16's own rounding."""
    checkpoint = read_checkpoint(STORIES)
    model = load_model(checkpoint, "cpu", dtype)
    tokenizer, steps = load_tokenizer(STORIES), make_steps(model)
    text = (SHARED / "text" / "tinystories_sample.txt").read_text("utf-8")
    stories = re.split(r"\n+(?=Once upon a time|One day,)", text)[:20]
    assert len(stories) == 20

    def scored(tokens: list[int], kind: str) -> Tensor:
        half = len(tokens) // 2
        context = KVCache.empty(checkpoint.args, 1, half, model.norm.weight)
        prefill(steps, model, context, tokens[:half], 512)
        context = Int8Context(context) if kind == "int8" else context
        rest = torch.tensor([tokens[half:]])
        positions = half + torch.arange(rest.shape[1])[None]
        logits = model(rest, positions, KVCache.fork(context, 1, rest.shape[1]))
        return logits[:, :-1].float().log_softmax(-1).gather(-1, rest[:, 1:, None]).flatten()

    differences = []
    for story in stories:
        tokens = tokenizer.encode(story)[: checkpoint.args.context_limit]
        differences.append((scored(tokens, "int8") - scored(tokens, "auto")).abs())
    mean = torch.cat(differences).mean().item()
    assert 0 < mean < bound
