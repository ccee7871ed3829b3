"""The network and its caches. Oracles: one full forward pass without a cache in fp64; transformers' Llama in fp32."""

import pytest
import torch
from conftest import ALIBI, GQA, MHA, STORIES, WINDOW, needs_stories, random_model, random_tokens

from checkpoint import check_weights, load_model, read_checkpoint
from families import args_from_config, our_tensors
from model import KVCache, NoCache, Prefill, SDPACache, Transformer
from rotary import RopeScaling, rotary_frequencies

EXACT = {"rtol": 0, "atol": 1e-10}
MODELS = {"GQA": GQA, "MHA": MHA, "window": WINDOW, "ALiBi": ALIBI}


def positions(begin: int, rows: int, length: int) -> torch.Tensor:
    return (begin + torch.arange(length)).expand(rows, length)


def full(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [N,S] -> logits [N,S,V], each row alone, without a cache."""
    return torch.cat([model(row[None], positions(0, 1, len(row)), NoCache()) for row in tokens])


def prefilled(model: Transformer, tokens: torch.Tensor, chunk: int) -> KVCache:
    cache = KVCache.empty(model.args, 1, tokens.shape[1], model.norm.weight)
    for begin in range(0, tokens.shape[1], chunk):
        part = tokens[:, begin : begin + chunk]
        model.hidden(part, positions(begin, 1, part.shape[1]), Prefill(cache, begin, part.shape[1]))
    return cache


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("chunk", [1, 5, 13, 64])
def test_prefill_in_chunks_equals_one_pass(args, chunk):
    model, tokens = random_model(args), random_tokens(args, 1, 13)
    cache = KVCache.empty(args, 1, 13, model.norm.weight)
    logits = []
    for begin in range(0, 13, chunk):
        part = tokens[:, begin : begin + chunk]
        logits.append(model(part, positions(begin, 1, part.shape[1]), Prefill(cache, begin, part.shape[1])))
    torch.testing.assert_close(torch.cat(logits, 1), full(model, tokens), **EXACT)


LAYOUTS = {
    "bifurcated": KVCache.fork,
    "contiguous": KVCache.copy,
    "contiguous SDPA": SDPACache.copy,
    "expanded": SDPACache.fork,
}


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
    leaf = kind.fork(middle, 2, 9, lengths)
    input_pos = leaf.start[:, None] + torch.arange(6)
    parts = [(0, 1), (1, 5), (5, 6)]
    logits = torch.cat([model(answers[:, a:b], input_pos[:, a:b], leaf) for a, b in parts], 1)
    for row in range(6):
        question = questions[row // 2, : lengths[row // 2]]
        whole = torch.cat([system[0], question, answers[row]])[None]
        torch.testing.assert_close(logits[row], full(model, whole)[0, -6:], **EXACT)


def test_a_rewritten_position_leaves_no_trace():
    """What a rejected draft wrote is overwritten; the cache has no cursor to wind back."""
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 3, 4, seed=2)
    cache = KVCache.fork(prefilled(model, context, 9), 3, 6)
    model((decoded + 1) % GQA.vocab_size, positions(9, 3, 4), cache)
    logits = model(decoded, positions(9, 3, 4), cache)
    expected = full(model, torch.cat([context.expand(3, -1), decoded], 1))[:, 9:]
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_caches_decode_on_with_fewer_rows_and_more_slots(layout):
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 5, 4, seed=2)
    cache = LAYOUTS[layout](prefilled(model, context, 9), 5, 2)
    model(decoded[:, :2], positions(9, 5, 2), cache)
    rows = torch.tensor([4, 1, 2])
    cache.keep(rows)
    cache.reserve(cache.slots + 2)
    logits = model(decoded[rows, 2:], positions(11, 3, 2), cache)
    expected = full(model, torch.cat([context.expand(3, -1), decoded[rows]], 1))[:, 11:]
    torch.testing.assert_close(logits, expected, **EXACT)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_context_takes_over_the_tokens_of_a_row(layout):
    model, context, decoded = random_model(GQA), random_tokens(GQA, 1, 9), random_tokens(GQA, 3, 4, seed=2)
    root = prefilled(model, context, 9)
    cache = LAYOUTS[layout](root, 3, 4)
    model(decoded, positions(9, 3, 4), cache)
    root.append(cache.row(2, 9), 3)
    assert root.slots == 12
    logits = model(decoded[2:3, 3:], positions(12, 1, 1), KVCache.fork(root, 1, 1))
    expected = full(model, torch.cat([context, decoded[2:3]], 1))[:, 12:]
    torch.testing.assert_close(logits, expected, **EXACT)


def test_bytes_of_a_cache_are_those_of_its_own_slots():
    root = KVCache.empty(GQA, 1, 100, torch.zeros((), dtype=torch.bfloat16))
    leaf = KVCache.fork(root, 7, 16)
    assert root.nbytes == 100 * GQA.kv_values_per_token * 2
    assert leaf.nbytes == 7 * 16 * GQA.kv_values_per_token * 2


def test_angles_stay_fp32_in_a_bfloat16_model():
    model = random_model(GQA).to(torch.bfloat16)
    assert torch.equal(model.frequencies, rotary_frequencies(GQA.head_dim, GQA.rope_theta))
    assert model.frequencies.dtype == torch.float32


@pytest.mark.parametrize("n_head,n_kv_head,head_dim", [(6, 3, 10), (4, 4, 8)])
def test_impossible_shapes_are_refused(n_head, n_kv_head, head_dim):
    args = {"dim": 8, "n_layer": 1, "hidden_dim": 8, "vocab_size": 8, "context_limit": 8}
    type(GQA)(**args, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim)
    with pytest.raises(ValueError, match="not a multiple"):
        type(GQA)(**args, n_head=n_head + 1, n_kv_head=n_kv_head, head_dim=head_dim)
    with pytest.raises(ValueError, match="odd"):
        type(GQA)(**args, n_head=n_head, n_kv_head=n_kv_head, head_dim=head_dim + 1)


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "MHA tied": {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 42, "tie_word_embeddings": True},
    "GQA": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 60},
    "MQA, head_dim": {"num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 45, "head_dim": 18},
    "Llama 3.1": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64, "rope_scaling": LLAMA3_ROPE},
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=101, num_hidden_layers=3, intermediate_size=70, max_position_embeddings=512, **CONFIGS[name]
    )  # fmt: skip
    torch.manual_seed(0)
    reference = LlamaForCausalLM(config).eval()
    args = args_from_config(config.to_dict() | {"architectures": ["LlamaForCausalLM"]})
    state = our_tensors(reference.state_dict(), {"architectures": ["LlamaForCausalLM"]})
    model = Transformer(args).eval()
    check_weights(model, state)
    model.load_state_dict(state)
    tokens = torch.randint(101, (3, 200))
    with torch.no_grad():
        torch.testing.assert_close(full(model, tokens), reference(tokens).logits, rtol=0, atol=1e-5)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = rotary_frequencies(64, 10000.0)
    scaled = rotary_frequencies(64, 10000.0, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)


@needs_stories
def test_greedy_text_of_stories15m_equals_that_of_transformers():
    from transformers import AutoModelForCausalLM

    from generate import Request, Sampling, generate
    from tokenizer import load_tokenizer

    checkpoint = read_checkpoint(STORIES)
    model, tokenizer = load_model(checkpoint, "cpu", torch.float32), load_tokenizer(STORIES)
    prompt = [tokenizer.bos_id, *tokenizer.encode("Tim had a red kite.")]
    (sample,) = generate(model, prompt, Request(1, 60, Sampling(0), seed=0), tokenizer)
    reference = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    assert sample.tokens[: len(expected)] == expected
    assert tokenizer.decode(expected).strip() in sample.text
