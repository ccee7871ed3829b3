"""Model files in a folder: config, tokenizer, weights. PyTorch is not needed."""

import codecs
import json
import os
import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

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
# Hugging Face's names of weights, as (stem, suffix) in order of preference.
FORMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
# Prefixes of duplicate weights under Mistral's names, and of weights that are not a model's.
NOT_OURS = ("consolidated", "adapter", "optimizer")
ADAPTER = "adapter_config.json"
ADAPTS = (
    "a LoRA adapter (adapter_config.json), which is not supported: merge it into its base model and pass the result"
)


def companions(folder: Path) -> list[Path]:
    """List a model's files other than weights: config and tokenizer."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def files_of(model: Path) -> list[Path]:
    """List all files of a model, given its folder or its weights; no output may overwrite one."""
    folder = model if model.is_dir() else model.parent
    return [*companions(folder), *(each for pattern in WEIGHTS for each in folder.glob(pattern))]


def snapshot(path: Path) -> Path:
    """Resolve a repository folder in the hub's cache (models--OWNER--NAME) to its model; any other path is returned."""
    if not (path / "snapshots").is_dir() or (path / "config.json").exists():
        return path
    main = path / "refs" / "main"
    named = path / "snapshots" / main.read_text("utf-8").strip() if main.is_file() else path
    found = [named] if named != path and named.is_dir() else sorted((path / "snapshots").iterdir())
    if len(found) != 1:
        raise FileNotFoundError(
            f"{path} is a Hugging Face cache folder with {len(found)} snapshots: pass one of the folders in snapshots/"
        )
    return found[0]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Find model.pth, else Hugging Face's weight files. Raises FileNotFoundError if there is neither."""
    return (folder / "model.pth",) if (folder / "model.pth").exists() else hugging_face_files(folder)


def hugging_face_files(folder: Path) -> tuple[Path, ...]:
    """Find the shards that an index names, or the weight files present; *.safetensors before pytorch_model*.bin."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    try:
        for stem, suffix in FORMS:
            if (index := f"{stem}{suffix}.index.json") in names and stem + suffix not in names:
                return shards_of(folder / index)
            if found := weights_among(names, stem, suffix):
                return tuple(folder / name for name in found)
    except LookupError as error:
        raise FileNotFoundError(f"{folder} has {error.args[0]}: download all shards of one model") from error
    missing = f"no *.safetensors or pytorch_model*.bin found in {folder}"
    if ADAPTER in names:
        raise FileNotFoundError(f"{missing}, only {ADAPTS}")
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        raise FileNotFoundError(
            f"{missing}, only GGUF files ({gguf}), which are not supported: pass the original model"
        )
    raise FileNotFoundError(f"{missing}: pass a folder with weights, or a model.pth")


def weights_among(names: Collection[str], stem: str, suffix: str) -> list[str]:
    """Select a model's weights of one form by name: the single file, numbered shards, or all with the suffix.
    Raises LookupError if a shard is missing or there are shards of several models."""
    if stem + suffix in names:
        return [stem + suffix]
    own = [name for name in names if name.endswith(suffix) and "/" not in name and not name.startswith(NOT_OURS)]
    own = sorted(name for name in own if suffix == ".safetensors" or name.startswith(stem))
    sets: dict[tuple[str, str], list[re.Match]] = {}
    for shard in filter(None, map(SHARD.fullmatch, own)):
        sets.setdefault((shard[1], shard[3]), []).append(shard)
    if not sets:
        return own
    if len(sets) > 1:
        raise LookupError(f"shards of {len(sets)} models ({', '.join(each[0][0] for each in sets.values())})")
    ((stem, total), found) = sets.popitem()
    there = {int(shard[2]) for shard in found}
    if missing := next((number for number in range(1, int(total) + 1) if number not in there), None):
        name = f"{stem}-{missing:0{len(found[0][2])}}-of-{total}{suffix}"
        raise LookupError(f"only {len(found)} of {int(total)} weight shards ({name} is missing)")
    return [shard[0] for shard in found]


def shards_of(index: Path) -> tuple[Path, ...]:
    """Find the files that an index names, in its folder or below; all of them must exist."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(is_below, where.values())):
        raise ValueError(f"{index} has no weight_map of file names: download it again")
    names = sorted(set(where.values()))
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise FileNotFoundError(f"{index} lists {missing[0]}, which was not found: download it")
    return tuple(index.parent / name for name in names)


def is_below(name: object) -> bool:
    """Return whether a relative path stays within its base folder."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def kind_of(path: Path) -> str | None:
    """Describe a known file type without PyTorch weights, and what to give instead. Returns None if it is unknown."""
    with path.open("rb") as file:
        head = file.read(256)
    if head.startswith(b"GGUF"):
        return "a GGUF file, which is not supported: pass the original model"
    if head.lstrip().startswith(b"{"):
        return "a JSON file, not weights: pass the model's folder"
    if head.startswith(b"\n") and b"<unk>" in head:
        return "a SentencePiece tokenizer, not weights: pass the model's folder"
    return None


def read_json(path: Path) -> dict[str, Any]:
    check_plain(path)
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): check that it exists and is readable") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a {type(value).__name__}: expected a JSON object")
    return value


def counted(count: int, noun: str) -> str:
    """Format a count with its noun: 1 sample, 2 samples, 3 processes."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def identity(path: Path) -> tuple[int, int] | None:
    """Device and inode, the same for all names of a file: symlinks, hard links, other spellings. None if missing."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def check_stays(read: Iterable[Path], output: Path) -> None:
    """Raise ValueError if the output would overwrite a file that is read, under any of its names."""
    if (found := identity(output)) is not None and found in map(identity, read):
        raise ValueError(f"{output} is an input and would be overwritten: choose another output file")


def check_plain(path: Path) -> None:
    """Raise ValueError if an existing path is not a regular file: a folder, or a pipe, which would block."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} must be a regular file, not a folder or a pipe")


def decode_text(data: bytes) -> str:
    """Decode UTF-8, without the byte order mark that some editors add. Raises ValueError, which says what the bytes are
    instead."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("UTF-16, not UTF-8: convert it to UTF-8")
    if (at := data.find(0)) >= 0:  # in UTF-16 without a mark, every other byte
        raise ValueError(f"not UTF-8 (NUL at byte {at}, as in UTF-16): convert it to UTF-8")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (invalid at byte {error.start}): convert it to UTF-8") from error


def read_text(path: Path) -> str:
    """Read a text file. Raises ValueError if it is not UTF-8."""
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically and durably: `write` writes a temporary file beside `path`, which replaces it; after a
    power cut either the old or the new one is there, complete. Raises OSError."""
    from tempfile import TemporaryDirectory  # slower to import than the rest of this file

    target = Path(os.path.realpath(path))  # keep a symlink
    try:
        with TemporaryDirectory(".unfinished", ".", target.parent) as folder:
            unfinished = Path(folder, target.name)
            write(unfinished)
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(target)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path} cannot be written ({why}): free up disk space, or choose another file") from error
    with suppress(OSError):  # not every system can open a folder
        handle = os.open(target.parent, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
