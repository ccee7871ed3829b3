"""Model files on disk -> (ModelArgs, weights). The one place that knows their names and layouts.

A checkpoint is a folder with config.json, in the schema of Hugging Face, and the weights: model.pth (a state dict under
this repository's names) or *.safetensors (under Hugging Face's). What a model is stands in config.json; nothing is
guessed from a path. Weights are mapped, not read: a page comes into memory when it is first used.
"""

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model import ModelArgs, RopeScaling, Transformer


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies and what its metadata says, read without touching a weight."""

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    args: ModelArgs
    eos_ids: frozenset[int]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the metadata of a checkpoint. path: its folder, or the model.pth in it.

    Raises FileNotFoundError where a file is missing and ValueError where one does not say what it must.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give a folder with config.json, or the model.pth in one")
    folder = path if path.is_dir() else path.parent
    if path.is_file():
        weights = (path,)
    elif (folder / "model.pth").exists():
        weights = (folder / "model.pth",)
    else:
        weights = tuple(sorted(folder.glob("*.safetensors")))
    if not weights:
        raise FileNotFoundError(f"no model.pth and no *.safetensors in {folder}")
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"no config.json beside {weights[0]}: it holds the model's shape")
    config = read_json(folder / "config.json")
    try:
        args = args_from_config(config)
        eos_ids = as_ids(config.get("eos_token_id"))
    except (ValueError, TypeError, AttributeError) as error:  # a field of another type than it must be
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    generation = folder / "generation_config.json"
    if generation.exists():
        eos_ids |= as_ids(read_json(generation).get("eos_token_id"))
    return Checkpoint(folder, weights, config, args, eos_ids)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def as_ids(value: int | list[int] | None) -> frozenset[int]:
    """The three forms that eos_token_id takes."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) for id in ids):
        raise ValueError(f"eos_token_id {value!r} is not a token id, nor a list of them")
    return frozenset(ids)


ARCHITECTURES = ("LlamaForCausalLM",)
# Fields that change the result, with the values under which this network computes it.
SUPPORTED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}


def args_from_config(config: Mapping[str, Any]) -> ModelArgs:
    """ModelArgs from a Hugging Face config. Raises ValueError on what is missing or not supported, by name."""
    architecture = (config.get("architectures") or ["none"])[0]
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture} is not supported; supported: {', '.join(ARCHITECTURES)}")
    for field, value in SUPPORTED.items():
        if config.get(field, value) != value:
            raise ValueError(f"{field} {config[field]!r} is not supported, only {value!r}")

    def integer(field: str, default: int | None = None) -> int:
        value = config.get(field) or default
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{field} is {value!r}, not a positive number: the model's shape is not known without it")
        return value

    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads = integer("num_attention_heads")
    return ModelArgs(
        dim=integer("hidden_size"),
        n_layer=integer("num_hidden_layers"),
        n_head=heads,
        n_kv_head=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", integer("hidden_size") // heads),
        hidden_dim=integer("intermediate_size"),
        vocab_size=integer("vocab_size"),
        context_limit=integer("max_position_embeddings"),
        norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
        rope_scaling=rope_scaling(rope),
        tied_output=config.get("tie_word_embeddings", False),
    )


def rope_scaling(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope type {kind!r} is not supported, only default and llama3")
    fields = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if missing := [field for field in fields if field not in rope]:
        raise ValueError(f"rope scaling lacks {', '.join(missing)}")
    return RopeScaling(*(rope[field] for field in fields))


HF_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}
HF_TOP = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}


def our_name(name: str) -> str | None:
    """Hugging Face's name of a tensor -> ours; None for what this network computes itself; others are kept as is."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", name)
    if layer and layer[2] in HF_NAMES:
        return f"layers.{layer[1]}.{HF_NAMES[layer[2]]}.weight"
    return HF_TOP.get(name, name)


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under our names, mapped. Raises ValueError where a file is truncated or of another kind."""
    state: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        state |= read_pth(path) if path.suffix == ".pth" else read_safetensors(path)
    if checkpoint.args.tied_output and "tok_embeddings.weight" in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def read_pth(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: convert or fetch it again") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise ValueError(f"{path} does not hold a plain state dict: convert it with scripts/convert_hf_checkpoint.py")
    return state


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {ours: file.get_tensor(name) for name in file.keys() if (ours := our_name(name))}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error


def check_weights(args: ModelArgs, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first few tensors that are missing, left over or of another shape."""
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in Transformer(args).state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    wrong = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    )
    kinds = sorted(
        f"{name} {state[name].dtype}" for name in expected if name in state and not state[name].is_floating_point()
    )
    found = {"missing": missing, "not in the model": unknown, "of another shape": wrong, "of another type": kinds}
    problems = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in found.items() if names]
    if problems:
        raise ValueError("the weights do not match config.json; " + "; ".join(problems))


def load_model(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The network, its weights on `device` in `dtype`, ready for inference. Raises ValueError as those two."""
    state = read_weights(checkpoint)
    try:
        check_weights(checkpoint.args, state)
    except ValueError as error:
        raise ValueError(f"{checkpoint.weights[0]}: {error}") from error
    with torch.device("meta"):
        model = Transformer(checkpoint.args)
    model.load_state_dict(state, assign=True)
    model.tie_output()
    return model.to(device=device, dtype=dtype).eval().requires_grad_(False)


def save_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes model.pth and config.json, each under a temporary name first, so that a crash leaves no half of one."""
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = folder / "model.pth.unfinished"
    try:
        torch.save(dict(state), unfinished)
        unfinished.replace(folder / "model.pth")
    finally:
        unfinished.unlink(missing_ok=True)
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json.unfinished").write_text(text, "utf-8")
    (folder / "config.json.unfinished").replace(folder / "config.json")
