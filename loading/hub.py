"""Hugging Face Hub models: download the files that the engine needs once, then read them from disk.

    folder = locate("OWNER/NAME")  # or a path, which is returned unchanged

huggingface_hub is imported inside the functions that use it, so that a run from disk does not wait for it.
"""

import errno
import json
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from loading.files import ADAPTER, ADAPTS, COMPANIONS, FORMS, counted, snapshot, weight_files, weights_among

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"
UNFINISHED = "download.unfinished"  # marks a folder whose download is not complete
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def choose(names: Collection[str], files: Sequence[str] = ()) -> list[str]:
    """Choose the files to download from a repository's `names`; `files` override the weights found by name.

    Raises ValueError if the repository is not a model that the engine can load.
    """
    if missing := [name for name in files if name not in names]:
        raise ValueError(f"no file {', '.join(missing)}; {found(names)}: pass an existing file as --file")
    if ADAPTER in names and not files:
        raise ValueError(ADAPTS)
    weights = list(files) or next(filter(None, (with_index(names, *form) for form in FORMS)), [])
    if not weights:
        raise ValueError(
            f"no *.safetensors or pytorch_model*.bin in its top folder; {found(names)}: choose another repository, or "
            "download single files with scripts/download.py --file"
        )
    if not files and "config.json" not in names:
        raise ValueError("no config.json, which defines the model: choose a repository that has one")
    return list(dict.fromkeys([*(name for name in COMPANIONS if name in names), *weights]))


def with_index(names: Collection[str], stem: str, suffix: str) -> list[str]:
    """Find the weights of one form, with the index of their shards if there is one."""
    try:
        found = weights_among(names, stem, suffix)
    except LookupError as error:
        raise ValueError(f"{error.args[0]}: choose another repository") from error
    index = f"{stem}{suffix}.index.json"
    return [index, *found] if found and index in names and stem + suffix not in names else found


def found(names: Collection[str]) -> str:
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return f"it has {', '.join(weights[:3])}{more}" if weights else "it has no weight files"


def readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def check_space(out: Path, needed: int) -> None:
    """Raise ValueError if the disk of `out`, which need not exist yet, has less than `needed` bytes free."""
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if needed > free:
        raise ValueError(
            f"the download needs {readable(needed)}, but the disk of {out} has {readable(free)} free: "
            "free up space, or use scripts/download.py with --out on another disk"
        )


def download(repo: str, revision: str | None, out: Path, files: Sequence[str]) -> Path:
    """Download into `out` and return it. Raises ValueError, or what huggingface_hub and the file system raise."""
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    if repo.count("/") != 1:  # the library rejects other bad names, but not one without an owner
        raise HFValidationError(repo)
    info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    try:
        names = choose(sizes, files)
    except ValueError as error:
        raise ValueError(f"{repo} has {error}") from error
    total = sum(sizes[name] or 0 for name in names)
    there = sum(sizes[name] or 0 for name in names if size_of(out / name) == sizes[name])
    check_space(out, total - there)
    here = f", {readable(there)} already in {out}" if there else ""
    print(f"downloading {counted(len(names), 'file')} of {repo}, {readable(total)}{here}", file=sys.stderr, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / UNFINISHED
    unfinished.touch()
    # One at a time in this thread, unlike snapshot_download: its threads finish their downloads after Ctrl-C, and it
    # accepts a partial folder if the hub fails. All files are from the commit that was listed.
    for name in names:
        hf_hub_download(repo, name, revision=info.sha or revision, local_dir=out)
        if sizes[name] not in (None, size_of(out / name)):
            raise ValueError(
                f"{out / name} does not have its {sizes[name]} bytes: delete it and run the same command again"
            )
    unfinished.unlink(missing_ok=True)  # another process may have downloaded the same model
    return out


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


LOGIN = "set HF_TOKEN or run `hf auth login`"
GATED = "{repo} needs a token: accept the licence on {page}, then " + LOGIN
# What went wrong and how to fix it, by the class of huggingface_hub's error, or by the status of its answer.
EXPLANATIONS = {
    "HFValidationError": "{repo!r} is not a repository name: use OWNER/NAME",
    "GatedRepoError": GATED,
    "403": GATED,
    # The hub answers alike for a missing and a private one.
    "RepositoryNotFoundError": "{page} not found: check the name; if it is private, " + LOGIN,
    "RevisionNotFoundError": (
        "{repo} has no revision {revision!r}: pass one of its branches, tags or commits ({page}/commits)"
    ),
    "401": "the hub rejected the token for {repo}: set HF_TOKEN to a valid one, or run `hf auth login`",
    "OfflineModeIsEnabled": "{repo} cannot be downloaded while HF_HUB_OFFLINE is set: unset it",
}


def explain(error: Exception, repo: str, revision: str | None, out: Path) -> str:
    """Say in one line what went wrong and how to fix it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: of the HTTP library that it uses

    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    page, text = f"{constants.ENDPOINT}/{repo}", " ".join(str(error).split())
    names = [kind.__name__ for kind in type(error).__mro__]  # the error's own class first
    names.append(str(getattr(getattr(error, "response", None), "status_code", None)))
    if known := next((EXPLANATIONS[name] for name in names if name in EXPLANATIONS), None):
        return known.format(repo=repo, revision=revision, page=page)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "os error 28" in text:  # hf_xet's message: it raises no OSError
        return f"the disk of {out} is full: free up space and run the same command again; completed files are kept"
    if isinstance(error, OSError) and error.filename is not None:
        remedy = "choose another folder by scripts/download.py --out, or by HF_HOME"
        return f"{error.filename} cannot be used ({error.strerror}): {remedy}"
    if isinstance(error, OSError | HTTPError | RuntimeError | json.JSONDecodeError):
        return f"{page} cannot be downloaded ({text}): check the network and run the same command again"
    return text


def fetch(repo: str, revision: str | None, out: Path, files: Sequence[str] = ()) -> Path:
    """Download as download(), but raise every failure as a one-line ValueError."""
    from huggingface_hub.errors import HTTPError

    try:
        return download(repo, revision, out, files)
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        raise ValueError(explain(error, repo, revision, out)) from error


def is_complete(folder: Path) -> bool:
    """Return whether a folder has a model with every file that it names, and no download into it was interrupted."""
    # Without an index, only this marker distinguishes some shards from all of them.
    if (folder / UNFINISHED).exists() or not (folder / "config.json").is_file():
        return False
    try:
        return bool(weight_files(folder))
    except FileNotFoundError:
        return False


def locate(path: Path | str, store: Path = CHECKPOINTS) -> Path:
    """Find the checkpoint a user means: an existing path, or `store`/OWNER/NAME for the hub's OWNER/NAME.

    Missing files of the latter are downloaded; a complete folder is used without contacting the hub.
    Raises FileNotFoundError if `path` is neither, and ValueError if the hub or the disk fails.
    """
    name = str(path)
    if Path(path).exists():
        return snapshot(Path(path))
    if not HUB_NAME.fullmatch(name) or name.endswith((".pt", ".pth")):
        raise FileNotFoundError(
            f"checkpoint {path} not found: pass a folder with config.json, the model.pth in one, or OWNER/NAME of the "
            "Hugging Face Hub"
        )
    folder = store / name
    if is_complete(folder):
        return folder
    try:
        return fetch(name, None, folder)
    except ValueError as error:  # a mistyped folder looks like a hub name
        raise ValueError(f"{name} is not a local folder, and {error}") from error
