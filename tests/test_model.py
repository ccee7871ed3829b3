"""The network. Oracles: transformers' Llama in fp32; each row alone."""

from dataclasses import replace

import pytest
import torch
from conftest import GQA, full, positions, prefilled, random_model, random_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from cache import KVCache, NoCache
from engine.engine import Engine
from engine.request import Request, Sampling
from layers.rope import RopeScaling, rotary_frequencies
from loading.checkpoint import load_model, read_checkpoint
from loading.families import args_from_config, our_tensors
from loading.tokenizer import load_tokenizer
from model import Transformer


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
    with pytest.raises(ValueError, match="expected an even number"):
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
    state = {}
    for theirs, tensor in reference.state_dict().items():
        state |= our_tensors(theirs, tensor, {"architectures": ["LlamaForCausalLM"]})
    model = Transformer(args).eval()
    model.load_state_dict(state)
    tokens = torch.randint(101, (3, 200))
    with torch.no_grad():
        torch.testing.assert_close(full(model, tokens), reference(tokens).logits, rtol=0, atol=1e-5)


def test_llama3_scaling_keeps_short_wavelengths_and_stretches_long_ones():
    plain = rotary_frequencies(64, 10000.0)
    scaled = rotary_frequencies(64, 10000.0, RopeScaling("llama3", 8.0, 8192, 1.0, 4.0))
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[-1], plain[-1] / 8)


DYNAMIC = RopeScaling("dynamic", 4.0, 20)


def test_dynamic_scaling_goes_by_each_rows_own_position():
    """Rows at positions from 3 to 400, where 20 is the length first trained on: angles, logits without a cache, and a
    step in a cache, each equal to the row alone. Oracle for the angles: theta as published, in Python's floats."""
    model = random_model(replace(GQA, rope_scaling=DYNAMIC))
    begin = torch.tensor([[3], [18], [50], [397]])
    where = begin + torch.arange(4)
    cos, sin = model.rotation(where)
    for row, last in enumerate(where[:, -1].tolist()):
        stretch = 4.0 * max(last + 1, 20) / 20 - 3.0
        theta = 10000.0 * stretch ** (10 / 8)
        angles = torch.tensor([[at / theta ** (2 * pair / 10) for pair in range(5)] for at in where[row].tolist()])
        torch.testing.assert_close(cos[row, 0], angles.cos(), rtol=0, atol=1e-4)
        torch.testing.assert_close(sin[row, 0], angles.sin(), rtol=0, atol=1e-4)
    tokens = random_tokens(GQA, 4, 4)
    together = model(tokens, where, NoCache())
    for row in range(4):
        alone = model(tokens[row : row + 1], where[row : row + 1], NoCache())
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-10)
    root, lengths = prefilled(model, random_tokens(GQA, 1, 9), 9), torch.tensor([1, 4, 30])
    middle, one = KVCache.fork(root, 3, 30), random_tokens(GQA, 3, 1, seed=4)
    model(random_tokens(GQA, 3, 30, seed=3), positions(9, 3, 30), middle)
    leaf = KVCache.fork(middle, 1, 2, length=lengths)
    stepped = model(one, leaf.start[:, None], leaf)
    for row in range(3):
        own = KVCache.branch(middle, [row], 2, length=lengths)
        alone = model(one[row : row + 1], own.start[:, None], own)
        torch.testing.assert_close(stepped[row : row + 1], alone, rtol=0, atol=1e-10)


class Made(TorchDispatchMode):
    """The names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["none", "linear", "dynamic", "longrope"])
def test_a_step_makes_no_constants_of_rope(kind):
    """They would be copied to the device in every step. Oracle: the operators that run, none of which makes a tensor
    from numbers of the host."""
    scaling = None if kind == "none" else RopeScaling(kind, 4.0, 20, short=(1.0,) * 5, long=(2.0,) * 5)
    model = random_model(replace(GQA, rope_scaling=scaling), torch.float32)
    where = positions(17, 3, 5)
    with Made() as made:
        model.rotation(where)
    assert "aten::cos" in made.names
    makers = ("arange", "lift", "copy", "full", "empty", "scalar_tensor")
    assert not {name for name in made.names if any(part in name for part in makers)}


def test_greedy_text_of_a_trained_model_equals_that_of_transformers(published):
    from transformers import AutoModelForCausalLM

    checkpoint = read_checkpoint(published)
    model, tokenizer = load_model(checkpoint, "cpu", torch.float32), load_tokenizer(published)
    prompt = [tokenizer.bos_id, *tokenizer.encode("Tim had a red kite.")]
    (sample,) = Engine(model, tokenizer).generate(prompt, Request(1, 60, Sampling(0), eos_ids=frozenset()))
    reference = AutoModelForCausalLM.from_pretrained(published, dtype=torch.float32)
    expected = reference.generate(torch.tensor([prompt]), max_new_tokens=60, do_sample=False)[0, len(prompt) :].tolist()
    assert sample.tokens[: len(expected)] == expected
    assert tokenizer.decode(expected).strip() in sample.text


def test_the_scale_of_embeddings_is_rounded_to_the_dtype():
    """Oracle: as transformers' Gemma has it, a tensor in the dtype of the embeddings, by hand. 48 ** 0.5 is 6.9282, and
    6.9375 in bfloat16."""
    for dtype, scale in ((torch.bfloat16, 6.9375), (torch.float64, 48**0.5)):
        model = random_model(replace(GQA, embedding_scale=48**0.5), dtype)
        tokens = random_tokens(GQA, 3, 5)
        hidden = model.hidden(tokens, positions(0, 3, 5), NoCache(), layers=0)
        assert torch.equal(hidden, model.tok_embeddings.weight[tokens] * torch.tensor(scale, dtype=dtype))


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.0])
def test_logits_are_scaled(scale):
    """Oracle: those of the same weights without a scale, times it."""
    plain, scaled = (random_model(replace(GQA, logit_scale=each)) for each in (1.0, scale))
    hidden = torch.randn(3, 2, GQA.dim, dtype=torch.float64)
    torch.testing.assert_close(scaled.logits(hidden), scale * plain.logits(hidden))
