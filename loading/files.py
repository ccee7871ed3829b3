"""The files of a model in a folder: its config, its tokenizer, its weights. PyTorch is not needed."""

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
# How Hugging Face names weights: a stem and a suffix, in this order of preference.
FORMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))
SHARD = re.compile(r"(.+)-(\d+)-of-(\d+)(\.\w+)")
# The same weights once more under Mistral's names, and weights that are not a model's.
NOT_OURS = ("consolidated", "adapter", "optimizer")
ADAPTER = "adapter_config.json"
ADAPTS = (
    "a LoRA adapter (adapter_config.json), which is not applied here: give the model that it is merged into, without it"
)


def companions(folder: Path) -> list[Path]:
    """What belongs to a model beside its weights: its config, and all of the tokenizer."""
    return [folder / name for name in COMPANIONS if (folder / name).is_file()]


def files_of(model: Path) -> list[Path]:
    """What belongs to a model, which is a folder or its weights: no output may take the place of one."""
    folder = model if model.is_dir() else model.parent
    return [*companions(folder), *(each for pattern in WEIGHTS for each in folder.glob(pattern))]


def snapshot(path: Path) -> Path:
    """The model's folder in a repository's folder of the hub's cache (models--OWNER--NAME); any other path as it is."""
    if not (path / "snapshots").is_dir() or (path / "config.json").exists():
        return path
    main = path / "refs" / "main"
    named = path / "snapshots" / main.read_text("utf-8").strip() if main.is_file() else path
    found = [named] if named != path and named.is_dir() else sorted((path / "snapshots").iterdir())
    if len(found) != 1:
        raise FileNotFoundError(f"{path} is a folder of the hub's cache: give one of the {len(found)} in its snapshots")
    return found[0]


def weight_files(folder: Path) -> tuple[Path, ...]:
    """model.pth, else what Hugging Face stores. Raises FileNotFoundError where there is neither."""
    return (folder / "model.pth",) if (folder / "model.pth").exists() else hugging_face_files(folder)


def hugging_face_files(folder: Path) -> tuple[Path, ...]:
    """The shards that an index names, or the files that are there; *.safetensors before pytorch_model*.bin."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    try:
        for stem, suffix in FORMS:
            if (index := f"{stem}{suffix}.index.json") in names and stem + suffix not in names:
                return shards_of(folder / index)
            if found := weights_among(names, stem, suffix):
                return tuple(folder / name for name in found)
    except LookupError as error:
        raise FileNotFoundError(f"{folder} has {error.args[0]}: fetch it") from error
    missing = f"no *.safetensors or pytorch_model*.bin in {folder}"
    if ADAPTER in names:
        raise FileNotFoundError(f"{missing} but {ADAPTS}")
    if gguf := next((name for name in names if name.endswith(".gguf")), None):
        raise FileNotFoundError(f"{missing}, only GGUF files ({gguf}): give the model that they were made from")
    raise FileNotFoundError(f"{missing}: give one that has, or a model.pth")


def weights_among(names: Collection[str], stem: str, suffix: str) -> list[str]:
    """Which of the names are a model's weights of one form: the whole file, numbered shards, or all of the suffix.
    Raises LookupError where a shard is missing, or they are of two models."""
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
        raise LookupError(f"shards of {len(sets)} models, {', '.join(each[0][0] for each in sets.values())}")
    ((stem, total), found) = sets.popitem()
    there = {int(shard[2]) for shard in found}
    if missing := next((number for number in range(1, int(total) + 1) if number not in there), None):
        name = f"{stem}-{missing:0{len(found[0][2])}}-of-{total}{suffix}"
        raise LookupError(f"{len(found)} of the {int(total)} shards of its weights, but not {name}")
    return [shard[0] for shard in found]


def shards_of(index: Path) -> tuple[Path, ...]:
    """The files that an index names, in its folder or below it, all of which must be there."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(map(is_below, where.values())):
        raise ValueError(f"{index} has no weight_map of file names: fetch it again")
    names = sorted(set(where.values()))
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise FileNotFoundError(f"{index} names {missing[0]}, which is not in the folder: fetch it")
    return tuple(index.parent / name for name in names)


def is_below(name: object) -> bool:
    """Whether a path stays in the folder that it is relative to."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def kind_of(path: Path) -> str | None:
    """Name a known file that holds no PyTorch weights, and what to give instead. Returns None for an unknown one."""
    with path.open("rb") as file:
        head = file.read(256)
    if head.startswith(b"GGUF"):
        return "a GGUF file: give the model that it was made from"
    if head.lstrip().startswith(b"{"):
        return "a JSON file: give the folder of the model"
    if head.startswith(b"\n") and b"<unk>" in head:
        return "the tokenizer of a model (SentencePiece): give its folder"
    return None


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


def counted(count: int, noun: str) -> str:
    """The count and its noun: 1 sample, 2 samples, 3 processes."""
    return f"{count} {noun}{'' if count == 1 else 'es' if noun.endswith('s') else 's'}"


def identity(path: Path) -> tuple[int, int] | None:
    """The same for all names of a file: links to it, hard links, other spellings. None: there is no such file."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def check_stays(read: Iterable[Path], output: Path) -> None:
    """Raises ValueError where the output would replace a file that is read, under whatever name."""
    if (found := identity(output)) is not None and found in map(identity, read):
        raise ValueError(f"{output} is read, and would be replaced: give another file")


def check_plain(path: Path) -> None:
    """Raises ValueError where what is to be read is no plain file: a folder, or a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a plain file: put one there")


def decode_text(data: bytes) -> str:
    """The text of UTF-8 bytes, without the byte order mark that some editors put before it. Raises ValueError, which
    says what they are instead."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("UTF-16, not UTF-8: convert it")
    if (at := data.find(0)) >= 0:  # of UTF-16 without a mark every other byte
        raise ValueError(f"not UTF-8 (a NUL at byte {at}, as in UTF-16): convert it")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start}): convert it") from error


def read_text(path: Path) -> str:
    """The text of a file. Raises ValueError where it is not UTF-8."""
    try:
        return decode_text(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is {error}") from error


def replace_file(written: Path, target: Path) -> None:
    """Replace a file atomically and durably: after a power cut either the old or the new one is there, whole."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    written.replace(target)
    with suppress(OSError):  # not every system opens a folder
        folder = os.open(target.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Has `write` write a file beside `path`, which then takes its place: whole, or not at all. Raises OSError."""
    from tempfile import TemporaryDirectory  # which takes longer to import than all else here

    target = Path(os.path.realpath(path))  # a link stays one
    try:
        with TemporaryDirectory(prefix=".unfinished-", dir=target.parent) as folder:
            unfinished = Path(folder, target.name)
            write(unfinished)
            replace_file(unfinished, target)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{path} cannot be written ({why}): make room, or give another file") from error
