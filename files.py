"""The files of a model in a folder: its config, its tokenizer, its weights. PyTorch is not needed."""

import json
from pathlib import Path
from typing import Any

from system import check_plain, read_text

COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
)
WEIGHTS = ("*.pth", "*.safetensors", "*.bin", "*.index.json")


def companions(folder: Path) -> list[Path]:
    """What belongs to a model beside its weights: its config, and all of the tokenizer."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def files_of(model: Path) -> list[Path]:
    """What belongs to a model, which is a folder or its weights: no output may take the place of one."""
    folder = model if model.is_dir() else model.parent
    return [*companions(folder), *(each for pattern in WEIGHTS for each in folder.glob(pattern))]


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
    check_plain(path)
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): put the file there") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object")
    return value
