"""Model files on disk -> (ModelArgs, weights). The one place that knows where they lie and how they are stored.

A checkpoint is a folder with config.json, in the schema of Hugging Face, and the weights: model.pth (a state dict under
this repository's names), or *.safetensors or pytorch_model*.bin (under Hugging Face's; families.py), or it is one file
of karpathy/tinyllamas. What a model is stands in its metadata; nothing is guessed from a path. Weights are mapped, not
read: a page comes into memory when it is first used.
"""

import json
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter

from families import (
    args_from_config,
    from_tinyllamas,
    is_tinyllamas,
    our_tensors,
    tinyllamas_config,
)
from model import ModelArgs, Transformer, empty_model


@dataclass(frozen=True)
class Checkpoint:
    """Where a model lies and what its metadata says, read without touching a weight."""

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    args: ModelArgs
    eos_ids: frozenset[int]


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads the metadata of a checkpoint. path: its folder, or the model.pth in it, or a file of karpathy/tinyllamas.

    Raises FileNotFoundError where a file is missing and ValueError where one does not say what it must.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}: give a folder with config.json, or the model.pth in one")
    folder = path if path.is_dir() else path.parent
    weights = weight_files(folder) if path.is_dir() else (path,)
    if path.is_file() and is_tinyllamas(found := unpickle(path)):
        try:
            config, source = tinyllamas_config(found), path
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    elif not (folder / "config.json").exists():
        raise FileNotFoundError(f"no config.json beside {weights[0]}: it holds the model's shape")
    else:
        source = folder / "config.json"
        config = read_json(source)
    try:
        args = args_from_config(config)
        eos_ids = as_ids(config.get("eos_token_id"))
    except (ValueError, TypeError, AttributeError) as error:  # a field of another type than it must be
        raise ValueError(f"{source}: {error}") from error
    generation = folder / "generation_config.json"
    if generation.exists():
        try:
            eos_ids |= as_ids(read_json(generation).get("eos_token_id"))
        except ValueError as error:
            raise ValueError(f"{generation}: {error}") from error
    return Checkpoint(folder, weights, config, args, eos_ids)


def weight_files(folder: Path) -> tuple[Path, ...]:
    """model.pth, else what Hugging Face stores. Raises FileNotFoundError where there is neither."""
    return (folder / "model.pth",) if (folder / "model.pth").exists() else hugging_face_files(folder)


def hugging_face_files(folder: Path) -> tuple[Path, ...]:
    """The shards that an index names, or the files that are there; *.safetensors before pytorch_model*.bin."""
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        if (whole := folder / f"{stem}{suffix}").is_file():
            return (whole,)
        if (index := folder / f"{stem}{suffix}.index.json").exists():
            return shards_of(index)
        if found := sorted(folder.glob("*.safetensors" if stem == "model" else "pytorch_model*.bin")):
            return tuple(found)
    raise FileNotFoundError(f"no *.safetensors or pytorch_model*.bin in {folder}: give one that has, or a model.pth")


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names, all of which must be beside it."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(v, str) and "/" not in v for v in where.values()):
        raise ValueError(f"{index} has no weight_map of file names: fetch it again")
    names = sorted(set(where.values()))
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not in the folder: fetch it")
    return tuple(index.parent / name for name in names)


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


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tensors under our names, mapped. Raises ValueError where a file is truncated or of another kind."""
    state: dict[str, Tensor] = {}
    for path in checkpoint.weights:
        if path.suffix == ".safetensors":
            state |= our_tensors(read_safetensors(path), checkpoint.config)
            continue
        found = unpickle(path)
        if is_tinyllamas(found):
            try:
                state |= from_tinyllamas(found["model"], checkpoint.args.head_dim)
            except (RuntimeError, IndexError, AttributeError) as error:
                raise ValueError(f"{path}: a tensor is not of the shape that model_args tell: {error}") from error
        elif not isinstance(found, dict) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.items()
        ):
            raise ValueError(
                f"{path} does not hold a plain state dict: convert it with scripts/convert_hf_checkpoint.py"
            )
        else:
            state |= our_tensors(found, checkpoint.config) if path.suffix == ".bin" else found
    if checkpoint.args.tied_output and "tok_embeddings.weight" in state:
        state["output.weight"] = state["tok_embeddings.weight"]
    return state


def unpickle(path: Path) -> Any:
    """What torch.save wrote, its tensors mapped. No code in the file is run."""
    mapped = zipfile.is_zipfile(path)  # older files are not, and can only be read
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # damaged bytes raise whatever the unpickler happens to run into
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: convert or fetch it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): fetch it again") from error


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weights(model: Transformer, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError that names the first few tensors that are missing, left over or of another shape."""
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    wrong = sorted(
        f"{name} {tuple(state[name].shape)} instead of {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    )
    kinds = sorted(
        f"{name} {state[name].dtype}" for name in expected if name in state and state[name].dtype not in DTYPES
    )
    found = {"missing": missing, "not in the model": unknown, "of another shape": wrong, "of another type": kinds}
    problems = [f"{len(names)} {kind}: {', '.join(names[:3])}" for kind, names in found.items() if names]
    if problems:
        raise ValueError("the weights do not match config.json; " + "; ".join(problems))


def load_model(checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype) -> Transformer:
    """The network, its weights on `device` in `dtype`, ready for inference. Raises ValueError as those two."""
    state, model = read_weights(checkpoint), empty_model(checkpoint.args)
    try:
        check_weights(model, state)
    except ValueError as error:
        raise ValueError(f"{checkpoint.weights[0]}: {error}") from error
    # Module.load_state_dict, Module.to and the like would walk the modules five times: a third of what loading takes.
    for prefix, module in model.named_modules():
        module.training = False
        if module is model.output and checkpoint.args.tied_output:
            continue
        for name, empty in module._parameters.items():
            if empty is not None:
                tensor = state[f"{prefix}.{name}" if prefix else name].to(device, dtype)
                module._parameters[name] = Parameter(tensor, requires_grad=False)
    model.tie_output()
    model.place_constants()
    return model


def save_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Writes config.json and model.pth, each under a temporary name first, so that a crash leaves no half of one.

    Raises OSError where they cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = [folder / "config.json.unfinished", folder / "model.pth.unfinished"]
    try:
        unfinished[0].write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        torch.save(dict(state), unfinished[1])
        for path in unfinished:
            path.replace(path.with_suffix(""))
    except RuntimeError as error:  # torch.save's for every failure of the disk
        free, why = shutil.disk_usage(folder).free / 1e9, str(error).splitlines()[0]
        raise OSError(f"{folder / 'model.pth'} cannot be written ({free:.1f} GB are free there): {why}") from error
    finally:
        for path in unfinished:
            path.unlink(missing_ok=True)
