"""The caches: chains, trees, the baselines, prefill, a context in int8. Oracles: one full forward pass per row without
a cache, in fp64; for int8 an ordinary context that holds the rounded numbers, and real stories."""

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import (
    ALIBI,
    GQA,
    MHA,
    SHARED,
    STORIES,
    WINDOW,
    full,
    needs_stories,
    positions,
    prefilled,
    random_model,
    random_tokens,
    slow,
)
from torch import Tensor

from cache import KVCache, Prefill, sdpa
from engine.contexts import Contexts
from engine.engine import Engine
from engine.layouts import Int8Context, SDPACache, channel_sizes, copied, quantized
from engine.plan import WeightSizes, plan_run
from engine.request import Request, Sampling, Workload
from loading.checkpoint import load_model, read_checkpoint
from loading.tokenizer import load_tokenizer
from model import ModelArgs, Transformer

EXACT = {"rtol": 0, "atol": 1e-10}
MODELS = {"GQA": GQA, "MHA": MHA, "window": WINDOW, "ALiBi": ALIBI}
LAYOUTS = {
    "bifurcated": KVCache.fork,
    "contiguous": partial(copied, kind=KVCache),
    "contiguous SDPA": copied,
    "expanded": SDPACache.fork,
}
Texts = list[list[int]]  # what each row of a cache sees


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_prefill_in_chunks_equals_one_pass(args, chunk):
    model, tokens = random_model(args), random_tokens(args, 1, 13)
    cache = KVCache.empty(args.kv_shape, 1, 13, model.norm.weight)
    logits = []
    for begin in range(0, 13, chunk):
        part = tokens[:, begin : begin + chunk]
        logits.append(model(part, positions(begin, 1, part.shape[1]), Prefill(cache, begin, part.shape[1])))
    torch.testing.assert_close(torch.cat(logits, 1), full(model, tokens), **EXACT)


@pytest.mark.parametrize("begin", [0, 5])
def test_sdpa_reads_a_prompt_that_shares_nothing(monkeypatch, begin):
    """Where no kernel of ours does: once in every layer, without a mask for the first chunk."""
    masks: list[Tensor | None] = []
    monkeypatch.setattr("cache.sdpa", lambda q, k, v, mask: masks.append(mask) or v[:, :, begin:].repeat(1, 3, 1, 1))
    model, cache = random_model(GQA), KVCache.empty(GQA.kv_shape, 1, 9, torch.empty(0, dtype=torch.float64))
    model(random_tokens(GQA, 1, 4), positions(begin, 1, 4), Prefill(cache, begin, 4))
    assert len(masks) == GQA.n_layer
    assert all(mask is None if begin == 0 else mask.shape == (4, 9) for mask in masks)


@pytest.mark.parametrize("form,softcap", [("bool", 2.0), ("bias", None), ("bias", 2.0)])
def test_what_sdpa_does_not_know_is_not_given_to_it(form, softcap):
    """Soft caps, and biases, which it would round to bfloat16. Oracle: the scores by hand, in fp64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, size, 16, generator=generator).bfloat16() for size in (4, 9, 9))
    bias = 30 + torch.rand(2, 1, 4, 9, generator=generator)  # bfloat16 would round it to multiples of 1/8
    mask = bias > 30.5 if form == "bool" else bias
    scores = q.double() @ k.double().mT / 4
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -float("inf")) if form == "bool" else scores + bias
    found = sdpa(q, k, v, mask, softcap)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), scores.softmax(-1) @ v.double(), rtol=0, atol=0.01)


def test_a_network_of_one_layer_has_every_kind_of_cache():
    args = replace(GQA, n_layer=1)
    model, tokens = random_model(args), random_tokens(args, 3, 9)
    prompt, own = tokens[:1, :5].expand(3, -1), tokens[:, 5:]
    expected = full(model, torch.cat([prompt, own], 1))[:, 5:]
    for layout in LAYOUTS.values():
        cache = layout(prefilled(model, prompt[:1], 2), 3, 2)
        cache.resize(cache.slots + 2)
        torch.testing.assert_close(model(own, positions(5, 3, 4), cache), expected, **EXACT)
    context = prefilled(model, prompt[:1], 5)
    forked = KVCache.fork(context, 3, 4)
    model(own, positions(5, 3, 4), forked)
    context.append(forked.row(1, 5, 3), 3)
    step = model(own[1:2, 3:], positions(8, 1, 1), KVCache.fork(context, 1, 1))
    torch.testing.assert_close(step, expected[1:2, 3:], **EXACT)


def test_one_slot_is_never_in_view():
    """A view of a whole buffer is contiguous, which torch.compile would tell from the others."""
    for reserve in (0, 4):
        cache = KVCache.empty(GQA.kv_shape, 2, 1, torch.empty(0), reserve)
        for slots in (2, 3, 4, 5, 5, 6, 9):
            cache.resize(slots)
            assert cache.slots == slots and not any(tensor.is_contiguous() for tensor in cache.tensors)
        assert {buffer.shape[2] for side in cache.buffers for buffer in side} == {10}


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_equals_one_pass(args, n, layout):
    """One token at a time, then three at once, then one: every layout, against each row's own full forward pass."""
    model, context, decoded = random_model(args), random_tokens(args, 1, 13), random_tokens(args, n, 7, seed=2)
    cache = LAYOUTS[layout](prefilled(model, context, 5), n, 7)
    logits, begin = [], 0
    for size in (1, 1, 3, 1, 1):
        part = decoded[:, begin : begin + size]
        logits.append(model(part, positions(13 + begin, n, size), cache))
        begin += size
    expected = full(model, torch.cat([context.expand(n, -1), decoded], 1))[:, 13:]
    torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", [KVCache, SDPACache])
def test_a_tree_of_three_caches_with_ragged_rows_equals_one_pass(args, kind):
    """A system prompt, questions of 4, 2 and 5 tokens, two samples of each, which decode at their own positions."""
    model, system = random_model(args), random_tokens(args, 1, 13)
    lengths = torch.tensor([4, 2, 5])
    questions, answers = random_tokens(args, 3, 5, seed=2), random_tokens(args, 6, 6, seed=3)
    middle = kind.fork(prefilled(model, system, 13), 3, 5)
    model(questions, positions(13, 3, 5), middle)
    leaf = kind.fork(middle, 2, 9, length=lengths)
    input_pos = leaf.start[:, None] + torch.arange(6)
    parts = [(0, 1), (1, 5), (5, 6)]
    logits = torch.cat([model(answers[:, a:b], input_pos[:, a:b], leaf) for a, b in parts], 1)
    for row in range(6):
        question = questions[row // 2, : lengths[row // 2]]
        whole = torch.cat([system[0], question, answers[row]])[None]
        torch.testing.assert_close(logits[row], full(model, whole)[0, -6:], **EXACT)


def say(model: Transformer, cache: KVCache, texts: Texts, size: int, seed: int) -> Texts:
    """Runs `size` random tokens per row behind what the row sees, and holds their logits against one pass each. Returns
    what the rows then see."""
    tokens = random_tokens(model.args, len(texts), size, seed=seed)
    begin = torch.tensor([[len(text)] for text in texts])
    logits = model(tokens, begin + torch.arange(size), cache)
    texts = [[*text, *said] for text, said in zip(texts, tokens.tolist(), strict=True)]
    for row, text in zip(logits, texts, strict=True):
        torch.testing.assert_close(row, full(model, torch.tensor([text]))[0, -size:], **EXACT)
    return texts


def branch(
    kind: type[KVCache], parent: KVCache, texts: Texts, rows: Sequence[int], written: Sequence[int] | None = None
) -> tuple[KVCache, Texts]:
    """Children of these rows of the parent, which sees only the first `written` slots of its own in each."""
    length = None if written is None else torch.tensor(written)
    if written is not None:
        begin = parent.start.tolist()
        texts = [text[: first + own] for text, first, own in zip(texts, begin, written, strict=True)]
    return kind.branch(parent, rows, 7, length=length), [texts[row] for row in rows]


def system(model: Transformer) -> tuple[KVCache, Texts]:
    tokens = random_tokens(model.args, 1, 13)
    return prefilled(model, tokens, 13), tokens.tolist()


def grown(model: Transformer, kind: type[KVCache], rows: Sequence[int]) -> tuple[KVCache, Texts]:
    """A system prompt, three questions of 4, 2 and 5 tokens, and for each of `rows` an answer of 3 tokens."""
    middle, texts = branch(kind, *system(model), [0, 0, 0])
    texts = say(model, middle, texts, 5, seed=2)
    leaf, texts = branch(kind, middle, texts, rows, [4, 2, 5])
    return leaf, say(model, leaf, texts, 3, seed=3)


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", [KVCache, SDPACache])
@pytest.mark.parametrize("rows", [[2, 0, 0, 1, 2, 2, 0], [1, 1, 1], [0, 1, 2], [2, 1, 0], [0, 0, 1, 1, 2, 2]], ids=str)
def test_rows_continue_the_rows_that_they_name(args, kind, rows):
    """Unequal, equal, crossed and missing shares; then a fourth cache on top, of some rows at their own lengths."""
    model = random_model(args)
    leaf, texts = grown(model, kind, rows)
    texts = say(model, leaf, texts, 1, seed=4)
    last = len(rows) - 1
    top, texts = branch(kind, leaf, texts, [last, 0, 0, 1, last], [1 + row % 4 for row in range(len(rows))])
    texts = say(model, top, texts, 2, seed=5)
    say(model, top, texts, 1, seed=6)


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", [KVCache, SDPACache])
@pytest.mark.parametrize("rows", [[2, 0, 0, 1, 2, 2, 0], [0, 0, 1, 1, 2, 2]], ids=["unequal", "equal"])
def test_rows_of_a_tree_can_be_dropped(args, kind, rows):
    """Some, in another order, one of them twice; then all of one ancestor; then all but one."""
    model = random_model(args)
    leaf, texts = grown(model, kind, rows)
    for kept in ([5, 1, 2, 3, 0, 3], [0, 2, 1], [1]):
        leaf.keep(kept)
        texts = say(model, leaf, [texts[row] for row in kept], 1, seed=len(kept))


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("kind", [KVCache, SDPACache])
def test_a_copy_of_a_chain_holds_all_that_the_chain_sees(args, kind):
    """Two copies of each of seven rows, which see 16 to 21 tokens through three caches. They need the chain no more."""
    model = random_model(args)
    leaf, texts = grown(model, KVCache, [2, 0, 0, 1, 2, 2, 0])
    written = [3, 1, 2, 3, 1, 0, 2]
    texts = [
        text[: begin + own] for text, begin, own in zip(texts, leaf.start.tolist(), written, strict=True) for _ in "ab"
    ]
    copy = copied(leaf, 2, 4, length=torch.tensor(written), kind=kind)
    assert not copy.links and copy.rows == 14 and copy.slots == max(map(len, texts)) + 4
    for cache in (leaf, *(link.cache for link in leaf.links)):
        for tensor in cache.tensors:
            tensor.fill_(float("nan"))
    texts = say(model, copy, texts, 2, seed=5)
    say(model, copy, texts, 1, seed=6)


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("chunk", [1, 4, 5, 9, 64])
def test_prefill_reads_into_a_fork(args, chunk):
    """Nine tokens in chunks behind a context of 13, and behind one row of three at its own length: `start` counts, and
    so do the ancestors. Oracle: one pass over all of it."""
    model = random_model(args)
    alone, texts = system(model)
    middle, heard = branch(KVCache, alone, texts, [0, 0, 0])
    heard = say(model, middle, heard, 5, seed=2)
    forks = [(KVCache.fork(alone, 1, 9), texts[0])]
    for row, own in ((1, 2), (2, 5)):
        fork = KVCache.branch(middle, [row], 9, length=torch.tensor([4, 2, 5]))
        forks.append((fork, heard[row][: 13 + own]))
    for fork, text in forks:
        tokens = random_tokens(args, 1, 9, seed=7)
        logits = []
        for begin in range(0, 9, chunk):
            part = tokens[:, begin : begin + chunk]
            where = len(text) + begin + torch.arange(part.shape[1])[None]
            logits.append(model(part, where, Prefill(fork, begin, part.shape[1])))
        expected = full(model, torch.tensor([[*text, *tokens[0].tolist()]]))[:, len(text) :]
        torch.testing.assert_close(torch.cat(logits, 1), expected, **EXACT)
        fork.resize(11)
        say(model, fork, [[*text, *tokens[0].tolist()]], 2, seed=8)


def test_a_rewritten_position_leaves_no_trace():
    """What a rejected draft wrote is overwritten; the cache has no cursor to wind back."""
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 3, 4, seed=2)
    cache = KVCache.fork(prefilled(model, context, 9), 3, 6)
    model((decoded + 1) % GQA.vocab_size, positions(9, 3, 4), cache)
    logits = model(decoded, positions(9, 3, 4), cache)
    expected = full(model, torch.cat([context.expand(3, -1), decoded], 1))[:, 9:]
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reserve", [0, 20])
def test_caches_decode_on_with_fewer_rows_and_more_slots(layout, reserve):
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 5, 4, seed=2)
    cache = LAYOUTS[layout](prefilled(model, context, 9), 5, 2, reserve)
    model(decoded[:, :2], positions(9, 5, 2), cache)
    rows = [4, 1, 2]
    cache.keep(rows)
    cache.resize(cache.slots + 2)
    logits = model(decoded[rows, 2:], positions(11, 3, 2), cache)
    expected = full(model, torch.cat([context.expand(3, -1), decoded[rows]], 1))[:, 11:]
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_context_takes_over_the_tokens_of_a_row(layout):
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 3, 4, seed=2)
    root = prefilled(model, context, 9)
    cache = LAYOUTS[layout](root, 3, 4)
    model(decoded, positions(9, 3, 4), cache)
    root.append(cache.row(2, 9, 3), 3)
    assert root.slots == 12
    logits = model(decoded[2:3, 3:], positions(12, 1, 1), KVCache.fork(root, 1, 1))
    expected = full(model, torch.cat([context, decoded[2:3]], 1))[:, 12:]
    torch.testing.assert_close(logits, expected, **EXACT)


def nbytes(cache: KVCache) -> int:
    """Of what is in view of a cache's own keys and values."""
    return sum(tensor.nbytes for tensor in cache.tensors)


def test_bytes_of_a_cache_are_those_of_its_own_slots():
    root = KVCache.empty(GQA.kv_shape, 1, 100, torch.zeros((), dtype=torch.bfloat16))
    leaf = KVCache.fork(root, 7, 16)
    assert nbytes(root) == 100 * GQA.kv_values_per_token * 2
    assert nbytes(leaf) == 7 * 16 * GQA.kv_values_per_token * 2


def filled(args: ModelArgs, rows: int, slots: int, dtype: torch.dtype, reserve: int = 0) -> KVCache:
    cache = KVCache.empty(args.kv_shape, rows, slots, torch.empty(0, dtype=dtype), reserve)
    generator = torch.Generator().manual_seed(slots)
    for tensor in cache.tensors:
        tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return cache


def test_values_stay_where_they_are_through_resize_keep_row_and_append():
    """Oracle: clones of what was there. More slots begin as zeros, also where others were once; no memory moves while
    there is room."""
    cache = filled(GQA, 5, 6, torch.float32, reserve=20)
    before, where = [tensor.clone() for tensor in cache.tensors], [tensor.data_ptr() for tensor in cache.tensors]
    for slots in (20, 4, 9, 6):
        cache.resize(slots)
        assert [tensor.data_ptr() for tensor in cache.tensors] == where
        for tensor, old in zip(cache.tensors, before, strict=True):
            held = min(4 if slots != 20 else 6, slots)
            assert tensor.shape == (5, 2, slots, 10) and torch.equal(tensor[:, :, :held], old[:, :, :held])
            assert not tensor[:, :, held:].any()
    cache.resize(4)
    cache.keep([3, 0, 3])
    assert [tensor.data_ptr() for tensor in cache.tensors] == where and cache.start.tolist() == [0] * 3
    for tensor, old in zip(cache.tensors, before, strict=True):
        assert torch.equal(tensor, old[[3, 0, 3], :, :4])
    row = cache.row(1, 1, 2)  # of the three slots from there on
    assert (row.rows, row.slots, row.start.tolist()) == (1, 2, [1]) and not row.links
    for tensor, old in zip(row.tensors, before, strict=True):
        assert torch.equal(tensor, old[0:1, :, 1:3])
    cache.resize(200)  # beyond what was reserved
    cache.k[0].zero_()
    for tensor, old in zip(cache.tensors[1:], before[1:], strict=True):
        assert torch.equal(tensor[:, :, :4], old[[3, 0, 3], :, :4]) and not tensor[:, :, 4:].any()
    assert torch.equal(row.k[0], before[0][0:1, :, 1:3])  # a copy
    target = filled(GQA, 1, 3, torch.float32)
    first = [tensor.clone() for tensor in target.tensors]
    target.append(row, 1)
    for tensor, old, new in zip(target.tensors, first, row.tensors, strict=True):
        assert torch.equal(tensor, torch.cat([old, new[:, :, :1]], 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_rounded_to_the_nearest_of_255(dtype):
    tensor = torch.randn(2, 3, 17, 59, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensor[0, 1, 2] = 0
    tensor[0, 2, 2:6] *= torch.tensor([1e-2, 1e-3, 1e-4, 1e-5])[:, None].to(dtype)
    tensor[1, 2, 3] = 1e-7
    number, scale = quantized(tensor, tensor.new_ones(()))
    assert number.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (2, 3, 17, 1)
    error = (number.float() * scale.float() - tensor.float()).abs()
    # Half a step; where the scale was rounded down, at most what 127 steps then lack, also of a subnormal scale.
    eps, tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
    assert (error <= scale.float() * (0.5 + 127 * eps) + 127 * eps * tiny + 1e-12).all()
    assert (number[0, 1, 2] == 0).all()


@pytest.mark.parametrize("large", ["channels", "a token"])
def test_few_large_channels_or_tokens_do_not_drown_the_others(large):
    """Keys of 300 in 3 channels of 59, or in one token of 130, among others of about 1: the error of the others, in
    fp32. Oracle: what plain rounding by token, and by channel, makes of it."""
    keys = torch.randn(1, 2, 130, 59, generator=torch.Generator().manual_seed(0))
    others = torch.ones(130, 59, dtype=torch.bool)
    where = (slice(None), [3, 20, 31]) if large == "channels" else (0, slice(None))
    keys[:, :, where[0], where[1]] *= 300
    others[where] = False
    channel = channel_sizes(keys)
    number, scale = quantized(keys, channel)
    error = (number.float() * scale * channel - keys)[:, :, others].abs().mean()
    worst = 300 / 127 / 2  # half a step of the large ones, which drown what is below
    assert error < worst / 8
    assert error < 0.15


def test_int8_takes_the_place_of_the_context_in_half_the_bytes():
    context = filled(GQA, 1, 50, torch.bfloat16)
    work = Workload(50, 3, 8, "bifurcated", "int8")
    expected = plan_run(GQA, WeightSizes(0, 0), work, torch.device("cpu"), torch.bfloat16, 10**9)
    halved = Int8Context.of(context)
    assert context.tensors == []
    scaled, channels = 50 * GQA.kv_values_per_token * 12 // 10, GQA.kv_values_per_token // 2 * 2  # 10 numbers, a scale
    assert nbytes(halved) == expected.context == scaled + channels
    assert (halved.rows, halved.slots, halved.like.dtype) == (1, 50, torch.bfloat16)
    child = KVCache.fork(halved, 3, 8)
    assert child.like.dtype == torch.bfloat16 and child.k[0].shape == (3, 2, 8, 10)


def test_int8_refuses_what_would_lose_its_scales():
    context, other = Int8Context.of(filled(GQA, 1, 50, torch.float32)), filled(GQA, 1, 4, torch.float32)
    before = [tensor.clone() for tensor in context.tensors]
    k = torch.zeros(1, 2, 1, 10)
    for call in (
        lambda: context.resize(60), lambda: context.keep([0]), lambda: context.append(other, 2),
        lambda: context.row(0, 3, 1), lambda: context.write(0, k, k, torch.tensor([[3]])),
        lambda: context.attend(0, torch.zeros(1, 6, 1, 10), k, k, torch.tensor([[3]]), None),
    ):  # fmt: skip
        with pytest.raises(TypeError, match="a context in int8 is only read: fork it"):
            call()
    assert all(map(torch.equal, context.tensors, before))


def rounded(context: KVCache) -> KVCache:
    """An ordinary cache that holds the numbers that int8 rounds to."""
    other = Int8Context.of(context)
    plain = KVCache(
        other.k_scale[0], len(other.k), (other.rows, other.k[0].shape[1], other.slots, other.k[0].shape[3]), other.start
    )
    for layer in range(len(other.k)):
        for mine, theirs in zip(plain.read(layer), other.read(layer), strict=True):
            mine.copy_(theirs)
    plain.links = other.links
    return plain


def read_rounded(self: Contexts, row: int, links, tokens, monitor) -> Tensor:
    """Prefill into a cache, and store the numbers that int8 rounds to in an ordinary row."""
    context = self.runner.empty_cache(len(tokens))
    hidden = self.runner.prefill(context, tokens, self.chunk)
    self.store(row, rounded(context))
    return hidden


@pytest.mark.parametrize("args", [GQA, ALIBI], ids=["plain", "ALiBi, window"])
@pytest.mark.parametrize("rows", [None, 2])
def test_samples_are_those_of_the_rounded_context(args, rows, monkeypatch):
    """fp32, N = 5, also with fewer rows, and N = 1. Oracle: an ordinary context of the rounded numbers."""
    engine, prompt = Engine(random_model(args, torch.float32)), random_tokens(args, 23).tolist()
    for n in (5, 1):
        request = Request(n, 12, Sampling(0.9, top_k=30), seed=3, rows_at_once=rows, kv_dtype="int8")
        drawn = [each.tokens for each in engine.generate(prompt, request)]
        with monkeypatch.context() as patch:
            patch.setattr(Contexts, "read_one", read_rounded)
            plain = replace(request, kv_dtype="auto")
            assert drawn == [each.tokens for each in engine.generate(prompt, plain)]


@pytest.mark.parametrize("kind", [KVCache, SDPACache])
def test_a_tree_may_stand_on_a_context_in_int8(kind):
    """Forked twice, and copied. Oracle: the same tree on the rounded numbers."""
    model = random_model(GQA)

    def logits(form) -> Tensor:
        root = form(prefilled(model, random_tokens(GQA, 1, 13), 13))
        middle = kind.fork(root, 2, 3)
        parts = [model(random_tokens(GQA, 2, 3), positions(13, 2, 3), middle)]
        leaf = kind.branch(middle, [1, 0, 1], 4)
        parts += [model(random_tokens(GQA, 3, 2), positions(16, 3, 2), leaf)]
        parts += [model(random_tokens(GQA, 6, 2), positions(13, 6, 2), copied(root, 6, 2, kind=kind))]
        return torch.cat([part.flatten() for part in parts])

    torch.testing.assert_close(logits(Int8Context.of), logits(rounded), **EXACT)


@pytest.mark.parametrize("bias", [0.0, 300.0])
def test_int8_moves_log_probabilities_no_more_than_bfloat16(bias):
    """Of a model whose key biases are large in a few channels, as those of Qwen2: in fp32, 40 tokens of N = 3 behind
    150. Oracle: the same model in bfloat16."""
    args = replace(GQA, dim=64, n_layer=2, n_head=4, head_dim=32, hidden_dim=96, qkv_bias=True)
    model, few = random_model(args, torch.float32), [3, 11, 20, 29]
    for block in model.layers:
        block.attention.wq.weight.view(4, 32, -1)[:, few] *= 0.02  # a trained model has small queries there
        block.attention.wk.bias.zero_().view(2, 32)[:, few] = torch.tensor([1.0, -1.0, 1.0, -1.0]) * bias
    prompt, own = random_tokens(args, 1, 150), random_tokens(args, 3, 40, seed=2)

    def scored(model: Transformer, kind: type[Int8Context] | None) -> Tensor:
        context = prefilled(model, prompt, 64)
        cache = KVCache.fork(context if kind is None else kind.of(context), 3, 40)
        logits = model(own, positions(150, 3, 40), cache)
        return logits[:, :-1].float().log_softmax(-1).gather(-1, own[:, 1:, None])

    exact = scored(model, None)
    int8, half = scored(model, Int8Context), scored(deepcopy(model).bfloat16(), None)
    assert 0 < (int8 - exact).abs().mean() < (half - exact).abs().mean()


@slow
@needs_stories
@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.02), (torch.float32, 0.004)])
def test_log_probabilities_on_real_stories_hardly_move(dtype, bound):
    """stories15M: the mean over stories of |log-probability with int8 - without| of each next token, in the second half
    of a story that follows the first half. In bfloat16 most of it is bfloat16's own rounding."""
    checkpoint = read_checkpoint(STORIES)
    model = load_model(checkpoint, "cpu", dtype)
    tokenizer, engine = load_tokenizer(STORIES), Engine(model)
    text = (SHARED / "text" / "tinystories_sample.txt").read_text("utf-8")
    stories = re.split(r"\n+(?=Once upon a time|One day,)", text)[:10]
    assert len(stories) == 10

    def scored(tokens: list[int], kind: str) -> Tensor:
        half = len(tokens) // 2
        context = KVCache.empty(checkpoint.args.kv_shape, 1, half, model.norm.weight)
        engine.prefill(context, tokens[:half], 512)
        context = Int8Context.of(context) if kind == "int8" else context
        rest = torch.tensor([tokens[half:]])
        where = half + torch.arange(rest.shape[1])[None]
        logits = model(rest, where, KVCache.fork(context, 1, rest.shape[1]))
        return logits[:, :-1].float().log_softmax(-1).gather(-1, rest[:, 1:, None]).flatten()

    differences = []
    for story in stories:
        tokens = tokenizer.encode(story)[: checkpoint.args.context_limit]
        differences.append((scored(tokens, "int8") - scored(tokens, "auto")).abs())
    mean = torch.cat(differences).mean().item()
    assert 0 < mean < bound
