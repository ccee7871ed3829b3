"""Read and write checkpoints: model files on disk -> (ModelArgs, weights). Only this module knows their layout.

A checkpoint is a folder with a Hugging Face config.json and the weights: model.pth (a state dict with our names), or
*.safetensors or pytorch_model*.bin (with Hugging Face's names; families.py); or it is a single karpathy/tinyllamas
file. A quantised model.pth stores its recipe beside its state dict. The metadata defines the model; nothing is guessed
from a path. Weights are memory-mapped: a page is read on first use.
"""

import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from types import GenericAlias
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.nn import Parameter

from layers.linear import (
    KINDS,
    MappedFiles,
    Quantised,
    TinygemmLinear,
    bytes_read,
    choose_way,
    group_experts,
    join_linears,
    make_linear,
    replace_module,
    tensors_of,
)
from loading.families import (
    args_from_config,
    from_tinyllamas,
    is_tinyllamas,
    our_tensors,
    their_name,
    tinyllamas_config,
)
from loading.files import (
    ADAPTER,
    ADAPTS,
    check_plain,
    check_stays,
    companions,
    kind_of,
    read_json,
    snapshot,
    weight_files,
    write_file,
)
from model import ModelArgs, Transformer, empty_model
from tp import WHOLE, Shard

RECIPE_VERSION = 1
ENDS = ("tok_embeddings.weight", "output.weight")  # one tensor if they are tied


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint's weights were quantised; stored in its file.

    layers: "int8" or "int4" for each quantised linear layer. groupsize: of int4, 0 if no layer is int4. kept: layers
    that groupsize does not divide, kept in 16 bits. rounded: experts rounded to nearest, as the calibration text gave
    them too few tokens. calibration_*: None without a calibration text.
    """

    mode: str
    layers: dict[str, str]
    kept: tuple[str, ...] = ()
    groupsize: int = 0
    calibration_file: str | None = None
    calibration_sha256: str | None = None
    calibration_sequences: int | None = None
    calibration_seq_length: int | None = None
    act_order: bool = False
    rounded: tuple[str, ...] = ()
    torch_version: str = str(torch.__version__)
    version: int = RECIPE_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """Location and metadata of a model. No weight is read, except an output stored beside a tied embedding."""

    folder: Path
    weights: tuple[Path, ...]
    config: dict[str, Any]
    args: ModelArgs
    eos_ids: frozenset[int]
    recipe: Recipe | None = None


def read_checkpoint(path: Path, choose: Callable[[Path], tuple[Path, ...]] = weight_files) -> Checkpoint:
    """Read a checkpoint's metadata. path: its folder, the model.pth in it, a karpathy/tinyllamas file, or a
    repository's folder in the hub's cache. choose: returns the weight files of a folder.

    Raises FileNotFoundError if a file is missing and ValueError if one is invalid.
    """
    path = snapshot(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} not found: pass a folder with config.json, or the model.pth in one")
    folder = path if path.is_dir() else path.parent
    weights = choose(folder) if path.is_dir() else (path,)
    if (folder / ADAPTER).exists():
        raise ValueError(f"{folder} has {ADAPTS}")
    pickled = weights[0].name == "model.pth" or path.is_file() and path.suffix != ".safetensors"
    found: Any = unpickle(weights[0]) if pickled else None
    if is_tinyllamas(found):
        with naming(path):
            config, source = tinyllamas_config(found), path
    elif not (folder / "config.json").exists():
        raise FileNotFoundError(f"no config.json found beside {weights[0]}: put the model's config.json there")
    else:
        source = folder / "config.json"
        config = read_json(source)
    with naming(source):
        args = args_from_config(config)
        eos_ids = as_ids(config.get("eos_token_id"))
    generation = folder / "generation_config.json"
    if generation.exists():
        with naming(generation):
            eos_ids |= as_ids(read_json(generation).get("eos_token_id"))
    recipe = read_recipe(found["recipe"], weights[0]) if is_quantised(found) else None
    checkpoint = Checkpoint(folder, weights, config, args, eos_ids, recipe)
    return replace(checkpoint, args=replace(args, tied_output=args.tied_output and is_tied(checkpoint)))


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Re-raise errors about a value in a file as a ValueError that begins with its path."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, OverflowError) as error:  # a field has the wrong type or size
        raise ValueError(f"{path}: {error}") from error


def is_tied(checkpoint: Checkpoint) -> bool:
    """Return whether a tied model stores no differing output: that would be used, as in transformers."""
    if checkpoint.recipe is not None and "output" in checkpoint.recipe.layers:
        return False
    stored = read_stored(checkpoint)
    ends = [stored[name].tensor for name in ENDS if name in stored]
    return len(ends) < 2 or (ends[0].shape, ends[0].dtype) == (ends[1].shape, ends[1].dtype) and torch.equal(*ends)


def is_quantised(found: object) -> bool:
    """Return whether an unpickled file has save_quantised's layout."""
    return isinstance(found, dict) and found.keys() == {"recipe", "state"}


def read_recipe(values: Any, path: Path) -> Recipe:
    """Parse a recipe. Raises ValueError if it is invalid or of another version."""
    values = values if isinstance(values, dict) else {}
    version, kinds = values.get("version"), get_type_hints(Recipe)
    if isinstance(version, int) and version != RECIPE_VERSION:
        raise ValueError(f"{path} has a recipe of unsupported version {version}: quantise the model again")
    wrong = [name for name in ("mode", "layers", "version") if name not in values]
    wrong += [name for name, value in values.items() if name not in kinds or not has_type(value, kinds[name])]
    if not wrong and not KINDS.keys() >= set(values["layers"].values()):
        wrong = ["layers"]
    if not wrong and "int4" in values["layers"].values() and values.get("groupsize", 0) < 1:
        wrong = ["groupsize"]
    if wrong:
        raise ValueError(f"{path} has an invalid recipe ({wrong[0]!r}): quantise the model again")
    return Recipe(**values)


def has_type(value: object, kind: Any) -> bool:
    """Return whether a value has the type of a Recipe field: a plain type, or a dict or tuple of strings."""
    if not isinstance(kind, GenericAlias):
        return isinstance(value, kind)
    parts: Any = [*value, *value.values()] if isinstance(value, dict) else value
    return type(value) is kind.__origin__ and all(isinstance(part, str) for part in parts)


def as_ids(value: int | list[int] | None) -> frozenset[int]:
    """Parse eos_token_id: an id, a list of ids, or null. Raises ValueError."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) for id in ids):
        raise ValueError(f"eos_token_id is {value!r}: expected a token id or a list of them")
    return frozenset(ids)


class StoredTensor(NamedTuple):
    """A stored tensor, or a part of one, with its file and its name in the file."""

    tensor: Tensor
    path: Path
    name: str


def read_stored(checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """Map the tensors into memory, by our names. Raises ValueError if a file is truncated or of another kind, or if a
    tensor is stored twice."""
    state: dict[str, StoredTensor] = {}
    for path in checkpoint.weights:
        found: Any = read_safetensors(path) if path.suffix == ".safetensors" else unpickle(path)
        found = found["state"] if is_quantised(found) else found
        check_state(found["model"] if is_tinyllamas(found) else found, path)
        if is_tinyllamas(found):
            try:
                found = from_tinyllamas(found["model"], checkpoint.args.head_dim)
            except (RuntimeError, IndexError, AttributeError) as error:
                raise ValueError(f"{path}: a tensor does not have the shape that model_args give: {error}") from error
        for name, tensor in found.items():
            parts = our_tensors(name, tensor, checkpoint.config) if has_their_names(path) else {name: tensor}
            for ours, part in parts.items():
                if (other := state.get(ours)) is not None:
                    both = f"{other.name} of {other.path} and {name} of {path}"
                    raise ValueError(f"{both} are the same tensor of the model: keep only one of them")
                state[ours] = StoredTensor(part, path, name)
    return state


def has_their_names(path: Path) -> bool:
    """Return whether a file's tensors have Hugging Face's names."""
    return path.suffix in (".safetensors", ".bin")


def read_weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Map the tensors into memory, by our names; a tied output is the embedding. Raises ValueError as read_stored, and
    if they do not match config.json."""
    state = read_stored(checkpoint)
    ends = [state[name] for name in ENDS if name in state]
    if checkpoint.args.tied_output and ends:
        state |= dict.fromkeys(ENDS, ends[0])
    check_weights(checkpoint, state)
    return {name: stored.tensor for name, stored in state.items()}


def check_state(found: Any, path: Path) -> None:
    """Raise ValueError if an unpickled value is not a dict of dense CPU tensors."""
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a plain state dict: convert it with scripts/convert_hf_checkpoint.py")
    for name, each in found.items():
        whole = isinstance(each, Tensor) and each.layout is torch.strided and each.device.type == "cpu"
        if not isinstance(name, str) or not whole or each.is_nested or each.is_quantized:
            kind = f"a {each.layout} tensor on {each.device}" if isinstance(each, Tensor) else type(each).__name__
            raise ValueError(f"{path} is not a plain state dict ({name!r} is {kind}): save dense CPU tensors")


def unpickle(path: Path) -> Any:
    """Load a torch.save file with its tensors mapped, without running code in it. Raises ValueError."""
    check_plain(path)
    try:
        mapped = zipfile.is_zipfile(path)  # the older format is not, and cannot be mapped
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # on damaged bytes the unpickler may raise anything
        if isinstance(error, UnpicklingError) and (code := re.search(r"GLOBAL ([\w.]+)", str(error))):
            raise ValueError(f"{path} would run code when loaded ({code[1]}): save plain tensors instead") from error
        if kind := kind_of(path):
            raise ValueError(f"{path} is {kind}") from error
        raise ValueError(f"{path} is truncated or not a PyTorch checkpoint: convert or download it again") from error


def read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open  # not needed to run a network of other weights

    check_plain(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error}): download it again") from error


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def quantised_weights(model: Transformer, recipe: Recipe | None) -> dict[str, Quantised]:
    """Build the recipe's layers by name, on "meta". Raises ValueError if the network lacks one."""
    layers, groupsize = (recipe.layers, recipe.groupsize) if recipe else ({}, 0)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if unknown := sorted(layers.keys() - linears.keys()):
        raise ValueError(f"the recipe has layers that config.json lacks: {', '.join(unknown[:3])}")
    return {
        name: KINDS[kind].empty(linears[name].out_features, linears[name].in_features, groupsize)
        for name, kind in layers.items()
    }


def check_weights(checkpoint: Checkpoint, state: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if tensors are missing, unexpected or of the wrong shape or dtype; it gives the first few by
    their names in the files."""
    model, paths = empty_model(checkpoint.args), checkpoint.weights
    expected, exact = dict(model.state_dict()), dict[str, Tensor]()  # exact: dtypes matter too
    for layer, weight in quantised_weights(model, checkpoint.recipe).items():
        del expected[f"{layer}.weight"]
        exact |= {f"{layer}.{name}": tensor for name, tensor in tensors_of(weight).items()}
    expected |= exact

    def named(name: str) -> str:
        """The tensor's name in its file, with the file if there are several."""
        return state[name].name + f" of {state[name].path.name}" * (len(paths) > 1)

    missing = sorted(expected.keys() - state.keys())
    if has_their_names(paths[0]):
        missing = [their_name(name, checkpoint.config) for name in missing]
    unknown = [named(name) for name in sorted(state.keys() - expected.keys())]
    wrong, kinds = list[str](), list[str]()
    for name in sorted(expected.keys() & state.keys()):
        tensor, wanted = state[name].tensor, expected[name]
        if tensor.shape != wanted.shape:
            wrong.append(f"{named(name)} {tuple(tensor.shape)} instead of {tuple(wanted.shape)}")
        if tensor.dtype not in ((wanted.dtype,) if name in exact else DTYPES):
            kinds.append(f"{named(name)} {tensor.dtype}")
    found = {"missing": missing, "unexpected": unknown, "of the wrong shape": wrong, "of the wrong dtype": kinds}
    problems = [f"{len(names)} {kind}: {', '.join(dict.fromkeys(names[:3]))}" for kind, names in found.items() if names]
    where = paths[0] if len(paths) == 1 else checkpoint.folder
    if adapter := next((name for name in unknown if ".lora_" in name), None):
        raise ValueError(f"{where}: {adapter} is part of {ADAPTS}")
    if problems:
        raise ValueError(f"{where}: the weights do not match config.json; " + "; ".join(problems))


def load_model(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, rows: int = 1, shard: Shard = WHOLE
) -> Transformer:
    """Load the network, or this rank's shard, onto `device` for inference: in `dtype`, or quantised with the kernels
    that are fastest in decode steps of `rows` rows. Raises ValueError as read_weights."""
    args = checkpoint.args
    state, model = read_weights(checkpoint), empty_model(args)
    quantised, files = quantised_weights(model, checkpoint.recipe), MappedFiles()
    # Module.load_state_dict, Module.to etc. would walk the modules five times: a third of the loading time.
    for prefix, module in model.named_modules():
        module.training = False
        if prefix in quantised or (module is model.output and checkpoint.args.tied_output):
            continue
        for name, empty in module._parameters.items():
            if empty is not None:
                key = f"{prefix}.{name}" if prefix else name
                part = shard.part(key, state[key], args)
                if part is not state[key]:
                    files.release(state[key])
                module._parameters[name] = Parameter(files.convert(part, device, dtype), requires_grad=False)

    model.tie_output()
    for name, empty in quantised.items():
        key, (parent, _, child) = f"{name}.bias", name.rpartition(".")
        bias = shard.part(key, state[key], args).to(device, dtype) if key in state else None
        whole = type(empty)(*(state[f"{name}.{part}"] for part in tensors_of(empty)))
        weight, seen, expert = held_part(whole, name, args, rows, shard)
        weight = type(weight)(*(tensor.to(device) for tensor in tensors_of(weight).values()))
        made = make_linear(weight, bias, torch.device(device), dtype, seen, expert).eval()
        replace_module(model.get_submodule(parent), child, made)
    group_experts(model)
    model.place_constants()
    shard.attach(model)
    return model


def load_joined(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, rows: int = 1, shard: Shard = WHOLE
) -> Transformer:
    """As load_model, with layers of the same input joined where that copies no mapped file: for a network that is only
    run."""
    model = load_model(checkpoint, device, dtype, rows, shard)
    join_linears(model)
    return model


def held_part(weight: Quantised, name: str, args: ModelArgs, rows: int, shard: Shard) -> tuple[Quantised, int, bool]:
    """Return this rank's part of a layer's weight, the rows that it multiplies in a step of `rows` rows, and whether it
    is an expert's."""
    cut = shard.cut(name, args)
    part = weight if cut is None else weight.narrow(*cut)
    if args.mixture is None:
        return part, rows, False
    return part, args.mixture.rows_of(name, rows), args.mixture.has(name)


def weight_sizes(
    checkpoint: Checkpoint, device: torch.device | str, dtype: torch.dtype, rows: int = 1, shard: Shard = WHOLE
) -> dict[str, int]:
    """Bytes of each tensor that load_model would hold, by name, from metadata alone; a tied one counts once.

    A quantised weight counts in the form that its kernel reads (linear.bytes_read); a packed copy by itself.
    """
    model, args = empty_model(checkpoint.args), checkpoint.args
    sizes = {name: shard.part(name, t, args).numel() * dtype.itemsize for name, t in model.named_parameters()}
    for layer, weight in quantised_weights(model, checkpoint.recipe).items():
        part, seen, expert = held_part(weight, layer, args, rows, shard)
        held = part, torch.device(device), dtype, seen, expert
        sizes[f"{layer}.weight"] = bytes_read(*held)
        if choose_way(*held) == TinygemmLinear.kernel:
            sizes[f"{layer}.packed"] = bytes_read(*held)
    return sizes


def save_atomically(value: Any, path: Path) -> None:
    """torch.save to a temporary name, then rename, so that a crash leaves no partial file. Raises OSError."""
    try:
        write_file(path, partial(torch.save, value))
    except RuntimeError as error:  # torch.save raises it for any disk error
        free, why = shutil.disk_usage(path.parent).free / 1e9, str(error).splitlines()[0]
        raise OSError(f"{path} cannot be written ({free:.1f} GB free): {why}") from error


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    text = json.dumps(config, indent=2) + "\n"
    write_file(folder / "config.json", lambda path: path.write_text(text, "utf-8"))


def save_model(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write model.pth, and config.json unless it is up to date, each to a temporary name first. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    save_atomically(dict(state), folder / "model.pth")
    path = folder / "config.json"
    if not path.exists() or read_json(path) != config:
        write_config(folder, config)


def check_output(output: Path, checkpoint: Checkpoint, text: Path | None) -> None:
    """Raise ValueError if the output would overwrite the model or text being read, cannot be written, or would be in
    the folder of another model."""
    if output.suffix != ".pth":
        raise ValueError(f"--output {output} must end in .pth")
    check_stays([*checkpoint.weights, *companions(checkpoint.folder), *([text] if text else [])], output)
    folder, config = output.parent, output.parent / "config.json"
    place = next(each for each in (folder, *folder.resolve().parents) if each.exists())  # missing folders are created
    if not (place.is_dir() and os.access(place, os.W_OK)) or output.is_dir():
        raise ValueError(f"--output {output} cannot be written: choose a file in a writable folder")
    if config.exists() and read_json(config) != checkpoint.config:
        raise ValueError(f"{config} belongs to another model: choose --output in another folder")
    for mine in [] if config.exists() else companions(checkpoint.folder):
        theirs = folder / mine.relative_to(checkpoint.folder)
        if theirs.exists() and not (theirs.is_file() and theirs.read_bytes() == mine.read_bytes()):
            raise ValueError(f"{theirs} belongs to another model: choose --output in another folder")


def save_quantised(source: Checkpoint, output: Path, state: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Write a quantised model and, unless it has a config.json beside it, its source's config and tokenizer files.
    Raises OSError."""
    folder = output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "config.json").exists():
        for path in companions(source.folder):
            copy_new(path, folder / path.relative_to(source.folder))
        write_config(folder, source.config)
    save_atomically({"recipe": asdict(recipe), "state": dict(state)}, output)


def copy_new(source: Path, target: Path) -> None:
    """Copy a file unless the target exists."""
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
