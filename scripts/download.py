"""Fetches from the Hugging Face Hub what the engine needs of a model: its config, its tokenizer, one set of weights.

python scripts/download.py OWNER/NAME [--revision R] [--out FOLDER] [--file NAME]

The folder goes to stdout, everything else to stderr. The same command again fetches what is still missing.
"""

import argparse
import errno
import json
import re
import shutil
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,  # of whichever HTTP library huggingface_hub is built on
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

ROOT = Path(__file__).resolve().parents[1]
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# The same weights once more under Mistral's names, and weights that are not a model's.
NOT_OURS = ("consolidated", "adapter")
WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def choose(names: Collection[str], files: Sequence[str] = ()) -> list[str]:
    """What to fetch of a repository that holds `names`; `files` stand in for the weights found by name.

    Raises ValueError where that is not a model for the engine.
    """
    if missing := [name for name in files if name not in names]:
        raise ValueError(f"no file {', '.join(missing)}; {found(names)}: give one of those as --file")
    weights = list(files) or sharded(names, "model", ".safetensors")
    if not weights:
        top = (name for name in names if "/" not in name and not name.startswith(NOT_OURS))
        weights = sorted(name for name in top if name.endswith(".safetensors"))
    weights = weights or sharded(names, "pytorch_model", ".bin")
    if not weights:
        raise ValueError(
            "no *.safetensors and no pytorch_model*.bin of a model at its top, which is what the engine reads; "
            f"{found(names)}: name another repository, or single files by --file"
        )
    if not files and "config.json" not in names:
        raise ValueError("no config.json, which holds the model's shape: name a repository that has one")
    return list(dict.fromkeys([*(name for name in COMPANIONS if name in names), *weights]))


def sharded(names: Collection[str], stem: str, suffix: str) -> list[str]:
    """The weights in one file, or else in numbered ones with their index."""
    if stem + suffix in names:
        return [stem + suffix]
    shards = sorted(name for name in names if re.fullmatch(rf"{stem}-\d+-of-\d+{re.escape(suffix)}", name))
    index = f"{stem}{suffix}.index.json"
    return [index, *shards] if shards and index in names else shards


def found(names: Collection[str]) -> str:
    weights = sorted(name for name in names if name.endswith(WEIGHTS))
    more = f" and {len(weights) - 3} more" if len(weights) > 3 else ""
    return f"it has {', '.join(weights[:3])}{more}" if weights else "it has no weights at all"


def readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def check_space(out: Path, needed: int) -> None:
    """Raises ValueError where the disk that `out` lies or will lie on has less than `needed` bytes free."""
    free = shutil.disk_usage(next(folder for folder in (out, *out.absolute().parents) if folder.exists())).free
    if needed > free:
        raise ValueError(
            f"{readable(needed)} are to be fetched and the disk of {out} has {readable(free)} free: "
            "free some, or give a folder on another disk as --out"
        )


def download(repo: str, revision: str | None, out: Path, files: Sequence[str]) -> Path:
    """Fetches into `out` and returns it. Raises ValueError, or what huggingface_hub and the disk raise."""
    if repo.count("/") != 1:  # the library refuses other bad names by itself, but not one without an owner
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
    here = f", {readable(there)} of it already in {out}" if there else ""
    print(f"fetching {len(names)} files of {repo}, {readable(total)}{here}", file=sys.stderr, flush=True)
    # One after another in this thread, unlike snapshot_download: its threads run on to the end after Ctrl-C, and it
    # takes a folder as it is where the hub fails. All files are of the one commit that was listed.
    for name in names:
        hf_hub_download(repo, name, revision=info.sha or revision, local_dir=out)
        if sizes[name] not in (None, size_of(out / name)):
            raise ValueError(f"{out / name} is not of {sizes[name]} bytes: remove it and run the same command again")
    return out


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def explain(error: Exception, repo: str, revision: str | None, out: Path) -> str:
    """One line: what went wrong, and what to do about it."""
    page = f"{constants.ENDPOINT}/{repo}"
    while isinstance(error, LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    text = " ".join(str(error).split())
    if isinstance(error, HFValidationError):
        return f"{repo!r} is not the name of a repository: give OWNER/NAME"
    if isinstance(error, GatedRepoError) or status == 403:
        return f"{repo} needs a token: accept the licence on {page}, then set HF_TOKEN or run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):  # the hub does not tell one from the other
        return f"{page} is not there, or private: check the name; if private, set HF_TOKEN or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}: give one of its branches, tags or commits ({page}/commits)"
    if status == 401:
        return f"the hub does not accept the token: set HF_TOKEN to a valid one, or run `hf auth login` ({repo})"
    if isinstance(error, OfflineModeIsEnabled):
        return f"{repo} cannot be fetched while HF_HUB_OFFLINE is set: unset it"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "os error 28" in text:  # the second in the words of hf_xet, which raises no OSError
        return f"the disk of {out} is full: free some of it and run the same command again; whole files are kept"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be used ({error.strerror}): give one that can as --out, or as HF_HOME"
    if isinstance(error, OSError | HTTPError | RuntimeError | json.JSONDecodeError):
        return f"{page} cannot be fetched ({text}): check the network and run the same command again"
    return text


def main() -> int:
    class OneLineParser(argparse.ArgumentParser):
        def error(self, message: str) -> None:
            self.exit(2, f"error: {message}; see --help\n")

    parser = OneLineParser(description="Fetch a model from the Hugging Face Hub. Prints its folder.")
    parser.add_argument("repo", metavar="REPO", help="OWNER/NAME on the hub")
    parser.add_argument("--revision", help="branch, tag or commit; default: the main branch")
    parser.add_argument("--out", type=Path, help="folder to write; default: checkpoints/REPO in this repository")
    parser.add_argument(
        "--file", action="append", default=[], help="fetch this file, not the weights found by name (repeatable)"
    )
    options = parser.parse_args()
    out = options.out or ROOT / "checkpoints" / options.repo
    try:
        print(download(options.repo, options.revision, out, options.file))
    except KeyboardInterrupt:
        print("\ninterrupted: whole files are kept; the same command fetches the others", file=sys.stderr)
        return 130
    except (OSError, HTTPError, ValueError, RuntimeError) as error:
        print(f"error: {explain(error, options.repo, options.revision, out)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
