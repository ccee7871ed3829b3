"""Files on disk. Oracle: the tensors that were written; errors name the file and the remedy."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import GQA, ROOT, TINY, random_model
from safetensors.torch import save_file

from convert_hf_checkpoint import convert
from layers.gptq import quantise_int4, quantise_int8
from layers.linear import tensors_of
from loading.checkpoint import (
    Recipe,
    load_model,
    read_checkpoint,
    read_weights,
    save_model,
    save_quantised,
    weight_sizes,
)
from loading.families import args_from_config
from loading.hub import locate
from model import Transformer

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": GQA.dim,
    "intermediate_size": GQA.hidden_dim,
    "num_hidden_layers": GQA.n_layer,
    "num_attention_heads": GQA.n_head,
    "num_key_value_heads": GQA.n_kv_head,
    "head_dim": GQA.head_dim,
    "vocab_size": GQA.vocab_size,
    "max_position_embeddings": GQA.context_limit,
    "rms_norm_eps": 1e-5,
    "eos_token_id": [7, 8],
}


@pytest.fixture
def folder(tmp_path):
    save_model(tmp_path, CONFIG, random_model(GQA, torch.float32).state_dict())
    return tmp_path


@pytest.mark.parametrize("name", ["", "model.pth"])
def test_a_saved_model_comes_back(folder, name):
    checkpoint = read_checkpoint(folder / name)
    assert checkpoint.args == GQA and checkpoint.eos_ids == {7, 8}
    model = load_model(checkpoint, "cpu", torch.float32)
    expected = random_model(GQA, torch.float32).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert load_model(checkpoint, "cpu", torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert not list(folder.glob("*.unfinished"))


def test_eos_ids_of_both_files_count(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert read_checkpoint(folder).eos_ids == {7, 8, 9}


def test_a_converted_model_equals_its_source(published, tmp_path):
    source, converted = read_checkpoint(published), read_checkpoint(convert(published, tmp_path))
    assert converted.args == source.args
    before, after = read_weights(source), read_weights(converted)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "tokenizer.model").read_bytes() == (published / "tokenizer.model").read_bytes()


def test_a_tied_model_holds_one_table():
    model = load_model(read_checkpoint(TINY), "cpu", torch.float32)
    assert model.args.tied_output and model.output.weight is model.tok_embeddings.weight


def refused(path, match):
    with pytest.raises((ValueError, OSError), match=match):
        load_model(read_checkpoint(path), "cpu", torch.float32)


def test_missing_files_are_named(folder, tmp_path):
    refused(tmp_path / "nothing", "checkpoint .*nothing not found")
    (folder / "config.json").unlink()
    refused(folder, "no config.json found beside")
    (folder / "model.pth").unlink()
    refused(
        folder, "no \\*.safetensors or pytorch_model\\*.bin found in .*: pass a folder with weights, or a model.pth"
    )


KINDS_OF_FILE = {
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(64), "x is a GGUF file, which is not supported: pass the original model"),
    "config": (b'{\n  "hidden_size": 8}', "x is a JSON file, not weights: pass the model's folder"),
    "SentencePiece": (b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02\n", "x is a SentencePiece tokenizer"),
}


@pytest.mark.parametrize("content,match", KINDS_OF_FILE.values(), ids=KINDS_OF_FILE)
def test_a_file_that_is_no_model_is_named_for_what_it_is(folder, content, match):
    (folder / "x").write_bytes(content)
    refused(folder / "x", match)


def test_one_shard_given_alone_is_not_taken_for_all(folder):
    save_file({"model.norm.weight": torch.zeros(GQA.dim)}, folder / "x.safetensors")
    refused(
        folder / "x.safetensors",
        "x.safetensors: the weights do not match config.json; 29 missing: model.layers.0.self_attn.k_proj",
    )


@pytest.mark.parametrize("beside", [(), ("config.json",), ("config.json", "model.pth")])
def test_a_lora_adapter_is_named_and_not_passed_over(folder, beside):
    (folder / "adapter_config.json").write_text("{}")
    save_file(
        {"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)},
        folder / "adapter_model.safetensors",
    )
    for name in {"config.json", "model.pth"} - {*beside}:
        (folder / name).unlink()
    refused(folder, "a LoRA adapter .adapter_config.json., which is not supported")


def test_parts_of_an_adapter_among_the_weights_are_named(folder):
    (folder / "model.pth").unlink()
    save_file({"base_model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2)}, folder / "model.safetensors")
    refused(folder, "q_proj.lora_A.weight is part of a LoRA adapter")


def test_a_folder_of_gguf_files_is_named(folder):
    (folder / "model.pth").rename(folder / "x.Q4_K_M.gguf")
    refused(folder, "no .* in .*, only GGUF files .x.Q4_K_M.gguf., which are not supported: pass the original model")


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_of_the_hubs_cache_is_read(folder, tmp_path_factory, named):
    """Its snapshots are links to blobs. Where there are several, refs/main names one."""
    cache = tmp_path_factory.mktemp("hub") / "models--own--name"
    for commit in ("01ab", "02cd"):
        (cache / "snapshots" / commit).mkdir(parents=True)
    for name in ("config.json", "model.pth"):
        (cache / "snapshots" / "02cd" / name).symlink_to(folder / name)
    if not named:
        refused(cache, "is a Hugging Face cache folder with 2 snapshots: pass one of the folders in snapshots/")
        (cache / "snapshots" / "01ab").rmdir()
    else:
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("02cd\n")
    assert read_checkpoint(cache).folder == locate(cache) == cache / "snapshots" / "02cd"
    assert load_model(read_checkpoint(cache), "cpu", torch.float32).args == GQA


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_truncated_checkpoint_is_named(folder, size):
    data = (folder / "model.pth").read_bytes()
    (folder / "model.pth").write_bytes(data[:size])
    refused(folder, "model.pth is truncated or not a PyTorch checkpoint")


@pytest.mark.parametrize("content", [{"model": {}}, [1, 2], 3, {7: torch.ones(2)}])
def test_a_foreign_checkpoint_is_named(folder, content):
    torch.save(content, folder / "model.pth")
    refused(folder, "is not a plain state dict")


def test_a_truncated_safetensors_file_is_named(folder):
    (folder / "model.pth").unlink()
    save_file({"model.norm.weight": torch.ones(GQA.dim)}, folder / "model.safetensors")
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-10])
    refused(folder, "model.safetensors is truncated or not a safetensors file")


def test_keys_that_do_not_match_the_config_are_listed(folder):
    state = random_model(GQA, torch.float32).state_dict()
    state["layers.0.attention.wq.bias"] = state.pop("norm.weight")
    state["output.weight"] = state["output.weight"][:-1].clone()
    torch.save(state, folder / "model.pth")
    refused(
        folder,
        r"1 missing: norm.weight; 1 unexpected: layers.0.attention.wq.bias; "
        r"1 of the wrong shape: output.weight \(96, 30\) instead of \(97, 30\)",
    )


LONGROPE = {"rope_type": "longrope", "long_factor": [1.0, 2.0], "short_factor": [1.0, 1.0]}


@pytest.mark.parametrize(
    "change,match",
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"attention_bias": 1}, "attention_bias is 1: expected true or false"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 4.0}},
            "long_factor is None: expected a list of numbers above 0",
        ),
        (
            {"rope_scaling": LONGROPE | {"long_factor": [1.0, 0.0]}},
            "long_factor is .*: expected a list of numbers above 0",
        ),
        ({"rope_scaling": LONGROPE}, "rope scaling has 2 factors: expected one for each of the 5 pairs of a head"),
        ({"rope_scaling": LONGROPE | {"short_mscale": 1.2}}, "short_mscale 1.2 is unknown and may change"),
        ({"architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1]}, "no_rope_layers is .*: expected 0 or 1"),
        (
            {"architectures": ["Phi3ForCausalLM"], "partial_rotary_factor": 1.5},
            "partial_rotary_factor is 1.5: expected a number",
        ),
        (
            {
                "architectures": ["Gemma3ForCausalLM"],
                "rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "of sliding_attention: only rope_theta is supported",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "heat": 2}}, "heat 2 is unknown and may change"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope scaling of type linear needs factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: weights quantised by other tools are not"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantization: weights quantised by other tools are not"),
        (
            {"a": 2, "hidden_act": "gelu", "b": True, "rope_scaling": {"rope_type": "linear", "factor": 2.0, "c": [3]}},
            "hidden_act 'gelu' is not supported, only 'silu' or 'swish'; a 2, b True, c .3. is unknown and may change",
        ),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types other than full_attention are not"),
        ({"rope_type": "linear"}, "rope_type 'linear' is not supported, only 'default'"),
        (
            {
                "architectures": ["MixtralForCausalLM"],
                "norm_topk_prob": False,
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
            },
            "norm_topk_prob False is not supported, only True",
        ),
        ({"residual_multiplier": 0.22}, "residual_multiplier 0.22 is unknown and may change"),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "layer_types": ["linear_attention"] * 3,
                "use_sliding_window": True,
            },
            "layer_types is .*: expected full_attention or",
        ),
        ({"hidden_size": None}, "hidden_size"),
        ({"rope_scaling": {"factor": 4.0}}, "factor 4.0 is not supported, only 1.0"),
        ({"rope_scaling": [4]}, "rope_scaling is .*: expected an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention .* is unknown and may change"),
        ({"rope_theta": 0}, "rope_theta is 0: expected a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "4"}}, "factor is '4': expected a number above 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false': expected true or false"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": -1}, "sliding_window is -1"),
        ({"vocab_size": ...}, "vocab_size is None: expected a positive integer"),
        ({"num_hidden_layers": "four"}, "num_hidden_layers is 'four': expected a positive integer"),
        ({"hidden_size": -192}, "hidden_size is -192: expected a positive integer"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
            "scaling of type llama3 needs low_freq_factor, high",
        ),
    ],
)
def test_a_config_that_this_network_does_not_compute_is_refused(change, match):
    config = {field: value for field, value in (CONFIG | change).items() if value is not ...}
    with pytest.raises(ValueError, match=match):
        args_from_config(config)


@pytest.mark.parametrize(
    "change",
    [{"rms_norm_eps": "small"}, {"rope_scaling": "linear"}, {"eos_token_id": {"a": 1}}, {"rope_theta": []}],
    ids=str,
)
def test_fields_of_another_type_are_refused(folder, change):
    (folder / "config.json").write_text(json.dumps(CONFIG | change))
    with pytest.raises(ValueError, match="config.json: "):
        read_checkpoint(folder)


def test_weights_of_another_type_are_named(folder):
    state = random_model(GQA, torch.float32).state_dict()
    state["norm.weight"] = state["norm.weight"].to(torch.int8)
    torch.save(state, folder / "model.pth")
    refused(folder, "1 of the wrong dtype: norm.weight torch.int8")


NEUTRAL = {
    "num_beams": 1, "num_return_sequences": 1, "length_penalty": 1.0, "typical_p": 1.0, "_commit_hash": "abc",
    "is_decoder": False, "prefix": None, "min_length": 0, "diversity_penalty": 0.0, "pruned_heads": {},
    "suppress_tokens": [], "num_labels": 2, "use_return_dict": True, "an_unknown_scale": 1.0, "hidden_act": "swish",
    "layer_types": ["full_attention"] * GQA.n_layer, "max_window_layers": 2, "use_sliding_window": False,
    "rope_type": "default", "rope_scaling": {"rope_type": "default", "finetuned": True, "beta_fast": 32},
}  # fmt: skip


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_field_that_changes_nothing_is_passed_over(field):
    assert args_from_config(CONFIG | {field: NEUTRAL[field]}) == args_from_config(CONFIG) == GQA


def test_fields_of_another_kind_of_rope_scaling_are_passed_over():
    """As transformers does; and a name of the kind beside the scaling, of both spellings."""
    linear = {"rope_type": "linear", "type": "linear", "factor": 2.0}
    other = {"beta_fast": 32, "low_freq_factor": 1.0, "attention_factor": 1.3, "finetuned": True}
    plain = args_from_config(CONFIG | {"rope_scaling": linear})
    assert plain == args_from_config(CONFIG | {"rope_scaling": linear | other, "rope_type": "linear"})
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    assert args_from_config(CONFIG | mixtral) == args_from_config(CONFIG | mixtral | {"norm_topk_prob": True})


def test_limits_and_defaults_are_those_that_transformers_takes():
    llama3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = 8192
    limit = {"max_position_embeddings": 131072}
    assert args_from_config(CONFIG | limit | {"rope_scaling": llama3}).context_limit == 131072
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    both = {"rope_scaling": yarn, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    args = args_from_config(CONFIG | limit | both)  # the older field alone
    assert args.rope_scaling.kind == "yarn" and args.rope_theta == 1e4 and args.context_limit == 131072
    mistral = args_from_config(CONFIG | limit | {"architectures": ["MistralForCausalLM"]})
    assert mistral.windows == (4096,) * 3
    gemma = {"architectures": ["Gemma2ForCausalLM"], "head_dim": 256, "sliding_window_size": 4096}
    assert args_from_config(CONFIG | limit | gemma).score_softcap == 50.0


@pytest.mark.parametrize("text,match", [("{", "is not valid JSON"), ("[]", "contains a list: expected a JSON object")])
def test_a_broken_config_is_named(folder, text, match):
    (folder / "config.json").write_text(text)
    refused(folder, f"config.json {match}")


def test_nothing_is_overwritten_where_saving_fails(folder):
    before = (folder / "model.pth").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        save_model(folder, CONFIG, {"norm.weight": lambda: None})
    assert (folder / "model.pth").read_bytes() == before
    assert not list(folder.glob("*.unfinished"))


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(folder, tmp_path):
    """Oracle: the command line under a limit on the size of files, which is how a full disk looks to a program."""
    config = json.dumps({**CONFIG, "hidden_size": 512, "head_dim": 64, "num_attention_heads": 8})
    (folder / "config.json").write_text(config)
    with torch.device("meta"):
        shapes = Transformer(read_checkpoint(folder).args).state_dict()
    torch.save({name: torch.ones(tensor.shape) for name, tensor in shapes.items()}, folder / "pytorch_model.bin")
    script = "convert_hf_checkpoint.py"
    command = (
        f"ulimit -f 100; {sys.executable} {ROOT / 'scripts' / script} --checkpoint_dir {folder} --out {tmp_path}/out"
    )
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert "model.pth cannot be written" in result.stderr
    assert not list((tmp_path / "out").iterdir())


def test_converting_replaces_nothing_of_another_model(folder, tmp_path):
    """Nor is its tokenizer or EOS id believed. Converted again, the same model is written again."""
    out = tmp_path / "out"
    out.mkdir()
    (folder / "model.pth").unlink()
    save_file(random_model(GQA, torch.float32).state_dict(), folder / "model.safetensors")
    (folder / "tokenizer.model").write_text("its own")
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model", "config.json"):
        (out / name).write_text('{"another": "model"}')
        with pytest.raises(ValueError, match=f"{name} belongs to another model: pass another folder as --out"):
            convert(folder, out)
        assert [path.name for path in out.iterdir()] == [name]
        (out / name).unlink()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("its own")
    for _ in range(2):
        convert(folder, out)
        names = ["additional_chat_templates", "config.json", "model.pth", "tokenizer.model"]
        assert sorted(path.name for path in out.iterdir()) == names
        for name in ("tokenizer.model", "additional_chat_templates/tool_use.jinja"):
            assert (out / name).read_text() == "its own"


def test_converting_replaces_nothing_that_is_read(folder, tmp_path):
    """Whatever the name of it. Its own config and tokenizer stay as they are where it is converted in its folder, or in
    one that has links to them."""
    out, read = tmp_path / "out" / "model.pth", folder / "pytorch_model.bin"
    out.parent.mkdir()
    (folder / "model.pth").rename(read)
    (folder / "tokenizer.model").write_text("its own")
    for link in (os.symlink, os.link):
        link(read, out)
        with pytest.raises(
            ValueError, match="model.pth is an input and would be overwritten: choose another output file"
        ):
            convert(folder, out.parent)
        assert list(out.parent.iterdir()) == [out]
        out.unlink()
    for name in ("config.json", "tokenizer.model"):
        os.symlink(folder / name, out.parent / name)
    before = (folder / "config.json").read_bytes()
    for place in (out.parent, folder):
        convert(folder, place)
        assert (folder / "config.json").read_bytes() == before
    assert (out.parent / "config.json").is_symlink() and (out.parent / "tokenizer.model").is_symlink()
    with pytest.raises(ValueError, match="model.pth is an input"):
        convert(out, out.parent)


def test_a_file_of_the_older_format_is_read(folder):
    state = random_model(GQA, torch.float32).state_dict()
    torch.save(state, folder / "model.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(load_model(read_checkpoint(folder), "cpu", torch.float32).output.weight, state["output.weight"])


@pytest.mark.parametrize("where", [{}, ["a"], {"a": 5}, {"a": ["x"]}, {"a": "/etc/hostname"}, {"a": "x/../../b"}])
def test_a_damaged_index_is_named(folder, where):
    (folder / "model.pth").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    refused(folder, "model.safetensors.index.json has no weight_map of file names")


def test_config_files_are_read_as_written():
    checkpoint = read_checkpoint(TINY)
    assert checkpoint.config == json.loads((TINY / "config.json").read_text())
    assert checkpoint.weights == (TINY / "model.pth",)


@pytest.fixture
def quantised(folder):
    """model.pth with one int8 layer and one int4 layer, whose groups are of 10 inputs."""
    state = random_model(GQA, torch.float32).state_dict()
    recipe = Recipe("by hand", {"output": "int8", "layers.1.attention.wk": "int4"}, groupsize=10)
    for name, kind in recipe.layers.items():
        weight = state.pop(f"{name}.weight")
        weight = quantise_int8(weight) if kind == "int8" else quantise_int4(weight, 10)
        state |= {f"{name}.{part}": tensor for part, tensor in tensors_of(weight).items()}
    save_quantised(read_checkpoint(folder), folder / "model.pth", state, recipe)
    return folder


def change(folder, **changes):
    saved = torch.load(folder / "model.pth")
    torch.save({key: saved[key] | changes.get(key, {}) for key in saved}, folder / "model.pth")


def test_a_quantised_file_comes_back(quantised):
    """From the folder and by its name, its numbers as they were stored, mapped."""
    for path in (quantised, quantised / "model.pth"):
        checkpoint = read_checkpoint(path)
        assert checkpoint.recipe.layers == {"output": "int8", "layers.1.attention.wk": "int4"}
        assert checkpoint.args == GQA
    state = read_weights(checkpoint)
    assert state["output.values"].dtype == torch.int8 and state["layers.1.attention.wk.values"].dtype == torch.uint8
    assert not load_model(checkpoint, "cpu", torch.float32).output.training


@pytest.mark.parametrize(
    "changes,match",
    [
        ({"recipe": {"version": 2}}, "model.pth has a recipe of unsupported version 2: quantise the model again"),
        ({"recipe": {"layers": {"output": "int3"}}}, "has an invalid recipe .*'layers'"),
        ({"recipe": {"layers": 3}}, "has an invalid recipe .*'layers'"),
        ({"recipe": {"layers": {"output": ["int8"]}}}, "has an invalid recipe .*'layers'"),
        ({"recipe": {"mode": ["int8"]}}, "has an invalid recipe .*'mode'"),
        ({"recipe": {"groupsize": 0}}, "has an invalid recipe .*'groupsize'"),
        ({"recipe": {"colour": 3}}, "has an invalid recipe .*'colour'"),
        ({"recipe": {"layers": {"layers.9.attention.wk": "int8"}}}, "layers that config.json lacks: layers.9.att"),
        ({"state": {"output.values": torch.zeros(96, 30, dtype=torch.int8)}}, r"output.values \(96, 30\) instead of"),
        ({"state": {"output.values": torch.zeros(97, 30)}}, "1 of the wrong dtype: output.values torch.float32"),
        ({"state": {"output.weight": torch.zeros(97, 30)}}, "1 unexpected: output.weight"),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit_is_named(quantised, changes, match):
    change(quantised, **changes)
    refused(quantised, match)


def test_planned_bytes_of_a_checkpoint_are_those_of_its_tensors(quantised, monkeypatch):
    """Oracle: the parameters of the loaded network. Quantised layers of these sizes are dequantised; those that are
    not, in test_packed.py."""
    for folder in (quantised, TINY):
        checkpoint = read_checkpoint(folder)
        for dtype in (torch.float32, torch.bfloat16):
            loaded = {name: p.nbytes for name, p in load_model(checkpoint, "cpu", dtype).named_parameters()}
            assert weight_sizes(checkpoint, "cpu", dtype) == loaded
    monkeypatch.setattr("layers.linear.has_triton", lambda *_: True)  # asks a GPU
    meta = weight_sizes(read_checkpoint(quantised), "cuda", torch.float32)
    assert meta["output.weight"] == 97 * 30 + 2 * 97
    assert meta["layers.1.attention.wk.weight"] == 20 * 15 + 2 * 2 * 20 * 3
