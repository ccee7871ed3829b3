"""Every model family. Oracles: transformers' own implementation of each on a small random model, saved as it saves and
loaded as any checkpoint; for Baichuan, which it lacks, plain loops over positions and heads in fp64.

In fp32 every logit is within 1e-4; in bfloat16 they are as near to fp32 as those of transformers in bfloat16.
"""

import json
import math

import pytest
import torch
import transformers
from conftest import full, positions, prefilled, random_tokens, slow
from safetensors.torch import load_file, save_file
from test_cache import LAYOUTS

from cache import NoCache
from convert_hf_checkpoint import convert
from engine.engine import Engine
from engine.request import Request, Sampling
from layers.rope import all_frequencies
from loading import checkpoint
from loading.checkpoint import load_model, read_checkpoint, read_weights, save_model, weight_sizes
from loading.families import args_from_config
from model import Transformer
from quantize import main as quantise
from tp import Shard

# Odd on purpose. The context of 64 is what rope scaling starts from; windows are shorter than any test's context.
SHAPE = {
    "hidden_size": 48, "intermediate_size": 88, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 101, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
QWEN_MOE = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
PHI3 = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.5], "long_factor": [1.0, 2.0, 4.0, 7.5],
}  # fmt: skip
LONGROPE_SHARED = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.0, 2.0, 7.5]}
GEMMA3 = {"head_dim": 12, "sliding_window": 17, "sliding_window_pattern": 3, "num_hidden_layers": 4}
FAMILIES = {
    "Llama": ("Llama", {}),
    "Llama, tied, MHA": ("Llama", {"num_key_value_heads": 6, "tie_word_embeddings": True}),
    "Llama 3.1": ("Llama", {"max_position_embeddings": 1 << 17, "rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "dynamic": ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    "YaRN": ("Llama", {"rope_scaling": YARN}),
    "YaRN of Qwen": ("Qwen2", {"rope_scaling": YARN | {"beta_fast": 16, "attention_factor": 1.3}}),
    "Mistral": ("Mistral", {"head_dim": 10, "sliding_window": None}),
    "Mistral, window": ("Mistral", {"head_dim": 10, "sliding_window": 17}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2}),
    "Qwen3": ("Qwen3", {"head_dim": 12, "tie_word_embeddings": True}),
    "Gemma": ("Gemma", {"head_dim": 12}),
    "Mixtral": ("Mixtral", {"head_dim": 10, "num_local_experts": 5, "num_experts_per_tok": 2}),
    "Mixtral, window": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 17}),
    "Qwen2 MoE": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 28, "decoder_sparse_step": 2}),
    "Qwen3 MoE": ("Qwen3Moe", QWEN_MOE | {"head_dim": 12, "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "OLMoE": ("Olmoe", {"num_experts": 7, "num_experts_per_tok": 3, "eos_token_id": 2}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "OLMo 2": ("Olmo2", {"eos_token_id": 2, "bos_token_id": 1}),
    "SmolLM3": ("SmolLM3", {"no_rope_layer_interval": 3, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}),
    "SmolLM3, window": (
        "SmolLM3",
        {
            "no_rope_layers": [1, 0, 1, 0],
            "use_sliding_window": True,
            "sliding_window": 17,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attention_bias": True,
            "rope_scaling": YARN,
        },
    ),
    "Granite 3": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "logits_scaling": 6.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.2,
            "attention_bias": True,
        },
    ),
    "Phi-3": ("Phi3", PHI3),
    "Phi-3, window": ("Phi3", PHI3 | {"sliding_window": 17, "num_key_value_heads": 6}),
    "Phi-3, long": ("Phi3", PHI3 | {"max_position_embeddings": 256, "rope_scaling": LONGROPE}),
    "Phi-4-mini": (
        "Phi3",
        PHI3 | {"max_position_embeddings": 256, "rope_scaling": LONGROPE_SHARED, "partial_rotary_factor": 0.75},
    ),
    "Gemma 3": ("Gemma3", GEMMA3 | {"query_pre_attn_scalar": 9}),
    "Gemma 3, linear": (
        "Gemma3",
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 20.0},
    ),
    "Gemma 2, 27B": ("Gemma2", {"head_dim": 12, "query_pre_attn_scalar": 8, "sliding_window": 17}),
    "Gemma 2": ("Gemma2", {"head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 17}),
}


def save_random(folder, family: str, **change):
    """A random model as transformers saves it into `folder`; returns transformers' model."""
    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SHAPE | fields | change)
    reference = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter in reference.parameters():
        if parameter.dim() == 1:  # norms and biases, which start as ones and zeros
            parameter.add_(torch.randn_like(parameter) * 0.3)
        # What bfloat16 can hold, as in real checkpoints: then what is compared is arithmetic.
        parameter.copy_(parameter.to(torch.bfloat16))
    reference.save_pretrained(folder)
    return reference


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """(folder as transformers saves it, transformers' model)."""
    folder = tmp_path_factory.mktemp("family")
    return folder, save_random(folder, request.param)


def read(folder, dtype: torch.dtype = torch.float32) -> Transformer:
    return load_model(read_checkpoint(folder), "cpu", dtype)


def test_logits_equal_those_of_transformers_at_every_position(saved):
    folder, reference = saved
    tokens = random_tokens(read(folder).args, 3, 90)
    expected = reference(tokens).logits
    assert expected.std() > 0.1
    actual = read(folder)(tokens, positions(0, 3, 90), NoCache())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


def bfloat16_errors(folder, reference) -> tuple[float, float]:
    """Root mean square over all logits against fp32, relative to theirs: (ours, transformers'). Of a mixture, of the
    median token: where experts nearly tie, rounding sends a token to another, which counts as an error of all of it."""
    tokens = random_tokens(read(folder).args, 3, 60)
    expected = reference(tokens).logits
    theirs = type(reference).from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits.float()
    ours = read(folder, torch.bfloat16)(tokens, positions(0, 3, 60), NoCache()).float()
    scale = expected.square().mean().sqrt()
    squares = [(logits - expected).square().mean(-1) for logits in (ours, theirs)]
    middle = torch.median if read(folder).args.mixture else torch.mean
    return tuple((middle(each).sqrt() / scale).item() for each in squares)


@slow
def test_bfloat16_is_as_near_to_fp32_as_transformers_is(saved):
    """Four layers of large random weights amplify rounding: transformers' own bfloat16 is 1 to 6 % off."""
    ours, theirs = bfloat16_errors(*saved)
    assert ours < 1.1 * theirs


@slow
@pytest.mark.parametrize("family", FAMILIES)
def test_two_layers_in_bfloat16_are_within_half_a_percent(family, tmp_path):
    """Weights of the usual size. Where transformers itself is further off (Gemma 2), that counts."""
    ours, theirs = bfloat16_errors(tmp_path, save_random(tmp_path, family, num_hidden_layers=2, initializer_range=0.02))
    assert ours < max(5e-3, 1.1 * theirs)


def fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The experts of a Mixtral in one tensor a layer, as transformers 5 holds them and others write them."""
    found = {name.replace("block_sparse_moe.gate", "mlp.gate"): t for name, t in state.items() if "experts" not in name}
    for layer in range(SHAPE["num_hidden_layers"]):
        base, one = f"model.layers.{layer}.mlp.experts.", f"model.layers.{layer}.block_sparse_moe.experts."
        of = [[state[f"{one}{expert}.w{matrix}.weight"] for matrix in (1, 3, 2)] for expert in range(5)]
        found[base + "gate_up_proj"] = torch.stack([torch.cat(each[:2]) for each in of])
        found[base + "down_proj"] = torch.stack([each[2] for each in of])
    return found


@pytest.mark.parametrize("form", ["sharded", "fused", "fused, sharded"])
def test_experts_are_read_mapped_from_every_form(tmp_path, form, monkeypatch):
    """Shards of a few matrices each, which experts of one layer straddle. No number of theirs is copied: every weight
    of the network lies where the file is mapped. Converted, they come back the same, mapped again."""
    reference = save_random(tmp_path, "Mixtral")
    if "fused" in form:
        save_file(fused(load_file(tmp_path / "model.safetensors")), tmp_path / "model.safetensors")
    if "sharded" in form:
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        where = {name: f"part-{number % 3}.safetensors" for number, name in enumerate(state)}
        for part in set(where.values()):
            save_file({name: state[name] for name in state if where[name] == part}, tmp_path / part)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    kept: list[dict] = []
    monkeypatch.setattr(checkpoint, "read_weights", lambda each: kept.append(read_weights(each)) or kept[-1])
    for folder in (tmp_path, convert(tmp_path, tmp_path / "out")):
        model = read(folder)
        tokens = random_tokens(model.args, 3, 40)
        torch.testing.assert_close(full(model, tokens), reference(tokens).logits, rtol=0, atol=1e-4)
        experts = {name: each for name, each in model.named_parameters() if "feed_forward.w" in name}
        assert len(experts) == 4 * 3 * 5
        assert all(each.data_ptr() == kept[-1][name].data_ptr() for name, each in experts.items())


REFUSED_MOE = {
    "window": ({"use_sliding_window": True}, "use_sliding_window True is not supported"),
    "too few experts": ({"num_experts_per_tok": 8}, "8 experts per token: expected at most 7"),
    "no number of experts": ({"num_experts": None, "num_local_experts": None}, "num_experts is None"),
}


@pytest.mark.parametrize("change,match", REFUSED_MOE.values(), ids=REFUSED_MOE)
def test_mixtures_that_are_not_supported_are_refused_by_name(change, match):
    config = transformers.Qwen2MoeConfig(**SHAPE | QWEN_MOE).to_dict() | {"architectures": ["Qwen2MoeForCausalLM"]}
    args_from_config(config)
    with pytest.raises(ValueError, match=match):
        args_from_config(config | change)


@pytest.mark.parametrize(
    "layout", ["bifurcated", *(pytest.param(each, marks=slow) for each in LAYOUTS if each != "bifurcated")]
)
def test_three_rows_decode_step_by_step_as_transformers_scores_them(saved, layout):
    """From a context of 50, past every window, over the position 64 that rope scaling starts from."""
    folder, reference = saved
    model = read(folder)
    if model.args.rope_scaling and model.args.rope_scaling.by_length:
        pytest.skip("it rotates by the longest position so far: a step is not a part of a longer pass")
    context, decoded = random_tokens(model.args, 1, 50), random_tokens(model.args, 3, 20, seed=2)
    cache = LAYOUTS[layout](prefilled(model, context, 23), 3, 20)
    steps = [model(decoded[:, i : i + 1], positions(50 + i, 3, 1), cache) for i in range(20)]
    expected = reference(torch.cat([context.expand(3, -1), decoded], 1)).logits[:, 50:]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family,length", [("dynamic", 80), ("Phi-3, long", 80), ("Phi-3, long", 60), ("Phi-4-mini", 40)]
)
def test_scaling_by_length_decodes_as_transformers_does(family, length, tmp_path):
    """Each of its steps rotates by the length so far, and so does each of ours: also across the original context."""
    reference = save_random(tmp_path, family)
    model = read(tmp_path)
    context, decoded = random_tokens(model.args, 1, length), random_tokens(model.args, 3, 9, seed=2)
    cache = LAYOUTS["bifurcated"](prefilled(model, context, length), 3, 9)
    steps = [model(decoded[:, i : i + 1], positions(length + i, 3, 1), cache) for i in range(9)]
    past, expected = reference(context.expand(3, -1), use_cache=True).past_key_values, []
    for i in range(9):
        expected.append(reference(decoded[:, i : i + 1], past_key_values=past).logits)
    torch.testing.assert_close(torch.cat(steps, 1), torch.cat(expected, 1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("length,n", [(50, 1), (50, 3), (64, 3), (65, 3), (20, 3)])
def test_a_text_that_outgrows_the_original_context_is_read_anew_as_by_transformers(length, n, tmp_path):
    """Phi-3's longrope, whose keys are turned by the short factors up to 64 positions. Oracle: transformers' own
    generate, which reads all anew there."""
    reference = save_random(tmp_path, "Phi-3, long")
    model = read(tmp_path)
    prompt = random_tokens(model.args, 1, length)
    request = Request(n, 66, Sampling(0), eos_ids=frozenset())
    samples = Engine(model, compile=False).generate(prompt[0].tolist(), request)
    theirs = reference.generate(
        prompt, max_new_tokens=66, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    expected = theirs.sequences[0, length:]
    logprobs = torch.cat(theirs.logits).log_softmax(-1)[torch.arange(66), expected]
    for sample in samples:
        assert sample.tokens == expected.tolist()
        assert sample.logprobs == pytest.approx(logprobs.tolist(), abs=1e-4)


ROPES = {
    "nothing": {},
    "theta": {"rope_theta": 7e5},
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "new and theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rope_theta": 7e5},
    "old": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "both": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 5e5}},
    "all": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 5e5},
        "rope_theta": 7e5,
    },
    "two originals": {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
        "original_max_position_embeddings": 24,
    },
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "SmolLM3", "Granite", "Gemma3"])
def test_theta_and_scaling_are_those_that_transformers_reads_from_the_same_file(name, rope, tmp_path):
    """Oracle: the frequencies of transformers' own network."""
    architecture = f"{name}ForCausalLM"
    if name == "Gemma3" and rope not in ("nothing", "theta", "old"):
        pytest.skip("transformers' Gemma 3 has rope_parameters by kind of layer alone")
    config = (
        SHAPE | ROPES[rope] | (MOE if name == "Mixtral" else {}) | {"architectures": [architecture], "head_dim": 12}
    )
    config |= {"model_type": {"Gemma3": "gemma3_text"}.get(name, name.lower()), "pad_token_id": 0}
    config["num_hidden_layers"] = 7 if name == "Gemma3" else 2  # of which the sixth sees all
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    rotary = transformers.AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    args = args_from_config(config)
    ours = all_frequencies(args.head_dim, args.rope_theta, args.rope_scaling, args.rope)
    if name == "Gemma3":
        expected = torch.cat([rotary.full_attention_inv_freq, rotary.sliding_attention_inv_freq])
    else:
        expected = rotary.inv_freq
        assert rotary.attention_scaling == (args.rope_scaling.attention_factor if args.rope_scaling else 1.0)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", ["Llama 3.1", "YaRN", "linear"])
def test_positions_far_beyond_the_original_context(family, tmp_path):
    """Forty tokens up to position 9,040, which llama3 scaling stretches to. Turns are so many there that fp32 angles
    differ in their last bits."""
    reference = save_random(tmp_path, family)
    model, where = read(tmp_path), positions(9000, 2, 40)
    tokens = random_tokens(model.args, 2, 40)
    actual, expected = model(tokens, where, NoCache()), reference(tokens, position_ids=where).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["Llama, biases", "OLMo 2", "SmolLM3", "Granite 3", "Phi-4-mini", "Gemma 3"])
def test_families_are_planned_quantised_and_divided_as_the_others_are(family, tmp_path):
    """int8 is within 3 % of fp32; the plan knows what the network holds; parts of two ranks are of equal size."""
    save_random(tmp_path, family, num_hidden_layers=3, initializer_range=0.05)
    whole, found = read(tmp_path), read_checkpoint(tmp_path)
    sizes = weight_sizes(found, "cpu", torch.float32)
    assert sum(sizes.values()) == sum(each.nbytes for each in whole.parameters())
    if whole.args.qk_norm_whole:
        with pytest.raises(ValueError, match="pass --tp 1"):
            Shard(0, 2).local(whole.args)
    else:
        parts = [load_model(found, "cpu", torch.float32, shard=Shard(rank, 2)).state_dict() for rank in range(2)]
        own = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
        assert own[0] == own[1] < sum(sizes.values()) * 0.8
    assert quantise(["--checkpoint_path", str(tmp_path), "--mode", "int8"]) == 0
    tokens = random_tokens(whole.args, 2, 40)
    expected, actual = full(whole, tokens), full(read(tmp_path / "model_int8.pth"), tokens)
    assert (actual - expected).square().mean() < 0.03**2 * expected.square().mean()


def baichuan_config(heads: int, vocab: int, **fields) -> dict:
    return {
        "architectures": ["BaichuanForCausalLM"], "hidden_size": 8 * heads, "intermediate_size": 44,
        "num_hidden_layers": 2, "num_attention_heads": heads, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "model_max_length": 128, "hidden_act": "silu", "tie_word_embeddings": False,
    } | fields  # fmt: skip


def baichuan_weights(config: dict) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (vocab, dim), "lm_head.weight": (vocab, dim), "model.norm.weight": (dim,)}
    for layer in range(config["num_hidden_layers"]):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.W_pack": (3 * dim, dim), "self_attn.o_proj": (dim, dim), "mlp.gate_proj": (hidden, dim),
                "mlp.up_proj": (hidden, dim), "mlp.down_proj": (dim, hidden), "input_layernorm": (dim,),
                "post_attention_layernorm": (dim,),
            }.items()
        }  # fmt: skip
    scale = {1: 1.0, 2: 1.5 / dim**0.5}
    return {name: torch.randn(shape) * scale[len(shape)] for name, shape in shapes.items()}


def published_slopes(heads: int) -> list[float]:
    """Press et al. 2022: a geometric sequence from 2^(-8/n); the authors' rule for n that are no power of two."""
    if math.log2(heads).is_integer():
        return [(2 ** (-8 / heads)) ** (i + 1) for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return published_slopes(closest) + published_slopes(2 * closest)[0::2][: heads - closest]


def baichuan_logits(config: dict, state: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """Plain loops over heads and positions in fp64: ALiBi attention, [S,V]."""
    state = {name: tensor.double() for name, tensor in state.items()}
    heads, dim = config["num_attention_heads"], config["hidden_size"]
    slopes, size = published_slopes(heads), dim // heads

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * state[name]

    x = state["model.embed_tokens.weight"][tokens]
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}."
        packed = norm(x, base + "input_layernorm.weight") @ state[base + "self_attn.W_pack.weight"].T
        q, k, v = (part.view(-1, heads, size) for part in packed.split(dim, 1))
        mixed = torch.zeros_like(q)
        for head in range(heads):
            for here in range(len(tokens)):
                scores = torch.stack([
                    q[here, head] @ k[there, head] / math.sqrt(size) - slopes[head] * (here - there)
                    for there in range(here + 1)
                ])  # fmt: skip
                mixed[here, head] = scores.softmax(0) @ v[: here + 1, head]
        x = x + mixed.flatten(1) @ state[base + "self_attn.o_proj.weight"].T
        inner = norm(x, base + "post_attention_layernorm.weight")
        gate = torch.nn.functional.silu(inner @ state[base + "mlp.gate_proj.weight"].T)
        x = x + (gate * (inner @ state[base + "mlp.up_proj.weight"].T)) @ state[base + "mlp.down_proj.weight"].T
    head = state["lm_head.weight"]
    if config["vocab_size"] == 125696:
        head = head / head.norm(dim=1, keepdim=True)
    return norm(x, "model.norm.weight") @ head.T


@pytest.mark.parametrize("heads,vocab", [(5, 125696), (4, 61), (6, 61)])
def test_baichuan_with_alibi_equals_plain_loops(tmp_path, heads, vocab):
    config = baichuan_config(heads, vocab)
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = baichuan_weights(config)
    save_file(state, tmp_path / "model.safetensors")
    model = read(tmp_path)
    context, decoded = random_tokens(model.args, 1, 13), random_tokens(model.args, 3, 6, seed=2)
    rows = torch.cat([context.expand(3, -1), decoded], 1)
    expected = torch.stack([baichuan_logits(config, state, row.tolist()) for row in rows]).float()
    torch.testing.assert_close(full(model, rows), expected, rtol=0, atol=1e-4)
    cache = LAYOUTS["bifurcated"](prefilled(model, context, 5), 3, 6)
    steps = [model(decoded[:, i : i + 1], positions(13 + i, 3, 1), cache) for i in range(6)]
    torch.testing.assert_close(torch.cat(steps, 1), expected[:, 13:], rtol=0, atol=1e-4)


def test_baichuan_7b_turns_queries_and_keys(tmp_path):
    """Oracle: transformers' Llama with the same weights, unpacked."""
    config = baichuan_config(4, 61, max_position_embeddings=128)
    state = baichuan_weights(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state, tmp_path / "model.safetensors")
    fields = {field: value for field, value in config.items() if field not in ("architectures", "model_max_length")}
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields)).eval().requires_grad_(False)
    for layer in range(2):
        base = f"model.layers.{layer}.self_attn."
        for name, part in zip("qkv", state.pop(base + "W_pack.weight").split(32), strict=True):
            state[base + name + "_proj.weight"] = part.clone()
    reference.load_state_dict(state)
    tokens = random_tokens(read(tmp_path).args, 2, 40)
    torch.testing.assert_close(full(read(tmp_path), tokens), reference(tokens).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("form", ["sharded", "bin", "sharded bin"])
def test_every_form_in_which_weights_are_stored_is_read(tmp_path, form):
    torch.manual_seed(0)
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    reference.save_pretrained(tmp_path, max_shard_size="40KB" if form == "sharded" else "5GB")
    if "bin" in form:
        state = load_file(tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").unlink()
        names = sorted(state)
        parts = [names[:7], names[7:]] if "sharded" in form else [names]
        files = [f"pytorch_model-{i}.bin" for i in range(2)] if "sharded" in form else ["pytorch_model.bin"]
        for file, part in zip(files, parts, strict=True):
            torch.save({name: state[name] for name in part}, tmp_path / file)
        if len(parts) > 1:
            where = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        assert len(list(tmp_path.glob("*.safetensors"))) > 3
    tokens = random_tokens(read(tmp_path).args, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(full(read(tmp_path), tokens), reference(tokens).logits, rtol=0, atol=1e-4)
    converted = convert(tmp_path, tmp_path / "out")
    assert torch.equal(full(read(converted), tokens), full(read(tmp_path), tokens))


def llama(folder, **change) -> dict[str, torch.Tensor]:
    """A random Llama as transformers saves it; returns its tensors."""
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE | change)).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("heads", ["none", "equal", "other", "only"])
def test_a_head_beside_tied_embeddings_is_used_as_transformers_uses_it(tmp_path, heads, suffix):
    """Oracle: transformers, which ties no head of other values. Nor is one lost by converting or quantising."""
    state = llama(tmp_path, tie_word_embeddings=True)
    embedding = state["model.embed_tokens.weight"]
    if heads != "none":
        state["lm_head.weight"] = torch.randn_like(embedding) if heads == "other" else embedding.clone()
    if heads == "only":
        del state["model.embed_tokens.weight"]
    (tmp_path / "model.safetensors").unlink()
    if suffix == ".bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).requires_grad_(False)
    tokens = random_tokens(read_checkpoint(tmp_path).args, 3, 40)
    expected = reference(tokens).logits
    assert read_checkpoint(tmp_path).args.tied_output == (heads != "other")
    torch.testing.assert_close(full(read(tmp_path), tokens), expected, rtol=0, atol=1e-4)
    (tmp_path / "out").mkdir()
    other = {"tok_embeddings.weight": embedding}  # of an earlier conversion, which is not asked
    save_model(tmp_path, read_checkpoint(tmp_path).config, other)
    for folder in (tmp_path / "out", tmp_path):
        converted = convert(tmp_path, folder)
        torch.testing.assert_close(full(read(converted), tokens), expected, rtol=0, atol=1e-4)
    (tmp_path / "model.pth").unlink()
    assert quantise(["--checkpoint_path", str(tmp_path / "out"), "--mode", "int8"]) == 0
    rounded = full(read(tmp_path / "out" / "model_int8.pth"), tokens)
    assert (rounded - expected).square().mean() < 0.1**2 * expected.square().mean()
    sizes = weight_sizes(read_checkpoint(tmp_path), "cpu", torch.float32)
    assert sum(sizes.values()) == sum(each.nbytes for each in read(tmp_path).parameters())


def test_a_tensor_in_two_files_is_refused_with_both_names(tmp_path):
    state = llama(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    save_file(state, tmp_path / "first.safetensors")
    save_file({"module.model.norm.weight": torch.ones(48)}, tmp_path / "second.safetensors")
    match = "model.norm.weight of .*first.safetensors and module.model.norm.weight of .*second.safetensors are the same"
    with pytest.raises(ValueError, match=match):
        read(tmp_path)


PREFIXES = {
    "none": lambda name: name.removeprefix("model."),
    "compiled": lambda name: "_orig_mod." + name,
    "compiled inside": lambda name: name.replace("self_attn", "_orig_mod.self_attn"),
    "parallel": lambda name: "module." + name,
    "both": lambda name: "module._orig_mod." + name,
    "peft": lambda name: "base_model.model." + name,
    "images": lambda name: "language_model." + name,
    "images, newer": lambda name: name.replace("model.", "model.language_model."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_names_in_a_wrapper_are_read_and_buffers_passed_over(tmp_path, prefix):
    """Oracle: the tensors under their own names."""
    state = llama(tmp_path)
    tokens = random_tokens(read(tmp_path).args, 2, 9)
    expected, one = full(read(tmp_path), tokens), torch.ones(1)
    buffers = ["self_attn.rotary_emb.inv_freq", "self_attn.rotary_emb.cos_cached", "self_attn.masked_bias",
               "self_attn.bias", "self_attn.k_scale", "self_attn.attn.v_scale", "self_attn.k_proj.k_scale"]  # fmt: skip
    state |= {f"model.layers.1.{name}": one.clone() for name in buffers} | {"model.rotary_emb.inv_freq": one.clone()}
    save_file({PREFIXES[prefix](name): each for name, each in state.items()}, tmp_path / "model.safetensors")
    assert torch.equal(full(read(tmp_path), tokens), expected)


def test_a_missing_shard_is_named(tmp_path):
    llama(tmp_path / "whole")
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    shards[1].rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"lists {shards[1].name}, which was not found: download it"):
        read_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    match = f"only {len(shards) - 1} of {len(shards)} weight shards .{shards[1].name} is missing.: download all"
    with pytest.raises(FileNotFoundError, match=match):
        read_checkpoint(tmp_path)
    (tmp_path / "elsewhere").rename(shards[1])
    (tmp_path / "optimizer.safetensors").write_text("stray")  # as what is not numbered
    assert read_checkpoint(tmp_path).weights == tuple(shards)
    (tmp_path / "other-00001-of-00001.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"shards of 2 models \(model-00001-of-.*, other-00001-of-00001"):
        read_checkpoint(tmp_path)


def test_shards_in_a_subfolder_that_an_index_names_are_read(tmp_path):
    reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).requires_grad_(False)
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    index = tmp_path / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    (tmp_path / "sub").mkdir()
    for name in set(where.values()):
        (tmp_path / name).rename(tmp_path / "sub" / name)
    index.write_text(json.dumps({"weight_map": {name: f"sub/{file}" for name, file in where.items()}}))
    tokens = random_tokens(read(tmp_path).args, 2, 9)
    torch.testing.assert_close(full(read(tmp_path), tokens), reference(tokens).logits, rtol=0, atol=1e-4)


MISSING = {
    "Llama": ("layers.1.self_attn.q_proj.weight", "q_proj"), "Phi-3": ("layers.1.self_attn.qkv_proj.weight", "qkv"),
    "Phi-4-mini": ("layers.0.mlp.gate_up_proj.weight", "gate_up"), "Gemma 2": (
        "layers.1.pre_feedforward_layernorm.weight", "pre_feed"
    ), "Mixtral": ("layers.0.block_sparse_moe.experts.2.w3.weight", "gate_up_proj"),
    "Qwen3 MoE": ("layers.2.mlp.experts.0.down_proj.weight", "experts.0.down_proj"),
    "Qwen2 MoE": ("layers.1.mlp.gate.weight", "mlp.gate.weight"), "OLMo 2": ("norm.weight", "model.norm"),
}  # fmt: skip


@pytest.mark.parametrize("family", MISSING)
def test_what_is_missing_or_wrong_is_named_as_in_its_file(family, tmp_path):
    """The first name is taken out of the file, and another is left over; both, and the file, are told."""
    save_random(tmp_path, family)
    state, name = load_file(tmp_path / "model.safetensors"), f"model.{MISSING[family][0]}"
    state["model.layers.0.self_attn.o_proj.bias"] = torch.ones(3)
    state["model.layers.1.self_attn.o_proj.weight"] = torch.ones(5, 3)
    (tmp_path / "model.safetensors").unlink()
    assert state.pop(name) is not None
    save_file({each: state.pop(each) for each in sorted(state) if "o_proj" in each}, tmp_path / "a.safetensors")
    save_file(state, tmp_path / "b.safetensors")
    with pytest.raises(ValueError) as refused:
        read(tmp_path)
    told = str(refused.value)
    assert f"missing: {name}" in told
    assert "1 unexpected: model.layers.0.self_attn.o_proj.bias of a.safetensors" in told
    assert "model.layers.1.self_attn.o_proj.weight of a.safetensors (5, 3) instead of (48, " in told


def test_tensors_that_the_config_does_not_know_are_listed(tmp_path):
    """A Qwen2 folder whose config says Llama: its biases are left over."""
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPE)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    for field in ("layer_types", "max_window_layers"):
        config.pop(field, None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ", ".join(f"model.layers.0.self_attn.{part}_proj.bias" for part in "kqv")
    with pytest.raises(ValueError, match=f"12 unexpected: {names}"):
        read(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_of_tinyllamas_equals_the_model_it_was_made_from(tmp_path, tied):
    """Their heads turn pairs of neighbours. Oracle: transformers' Llama, its rows of queries and keys reordered."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SHAPE | {"tie_word_embeddings": tied, "rms_norm_eps": 1e-5})
    reference = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    back = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
    }  # fmt: skip
    state = {}
    for name, tensor in reference.state_dict().items():
        for theirs, ours in back.items():
            name = name.replace(theirs, ours)
        if name.endswith(("wq.weight", "wk.weight")):  # rows (i, i + 4) of a head of 8 become neighbours
            tensor = torch.cat([head[[0, 4, 1, 5, 2, 6, 3, 7]] for head in tensor.split(8)])
        state["_orig_mod." + name] = tensor
    state["_orig_mod.freqs_cos"] = torch.ones(64, 4)
    args = {
        "dim": 48, "n_layers": 4, "n_heads": 6, "n_kv_heads": 2, "vocab_size": 101, "multiple_of": 4, "max_seq_len": 64,
        "dropout": 0.0,
    }  # fmt: skip
    torch.save({"model": state, "model_args": args, "optimizer": {}, "iter_num": 3}, tmp_path / "stories.pt")
    checkpoint = read_checkpoint(tmp_path / "stories.pt")
    assert checkpoint.args.tied_output == tied and "output.weight" in read_weights(checkpoint)
    tokens = random_tokens(checkpoint.args, 2, 40)
    expected = reference(tokens).logits
    torch.testing.assert_close(full(read(tmp_path / "stories.pt"), tokens), expected, rtol=0, atol=1e-4)
    converted = convert(tmp_path / "stories.pt", tmp_path / "out")
    torch.testing.assert_close(full(read(converted), tokens), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted({name for name, _ in FAMILIES.values()}))
def test_where_a_config_leaves_out_the_epsilon_it_is_that_of_transformers(tmp_path, name):
    fields = next(fields for each, fields in FAMILIES.values() if each == name)
    kind = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    config = getattr(transformers, kind)(**SHAPE | fields, architectures=[f"{name}ForCausalLM"])
    written = {key: value for key, value in config.to_dict().items() if key != "rms_norm_eps"}
    residual = getattr(config, "residual_multiplier", 1)  # Granite's stream is held divided by it
    assert args_from_config(written).norm_eps == pytest.approx(type(config)().rms_norm_eps / residual**2)


def test_windows_of_qwen_begin_at_a_layer_where_no_types_are_given():
    """The first max_window_layers layers see all."""
    fields = {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 2}
    config = SHAPE | fields | {"architectures": ["Qwen2ForCausalLM"]}
    del config["initializer_range"]
    assert args_from_config(config).windows == (None, None, 17, 17)
