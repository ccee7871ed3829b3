"""Convert a Hugging Face folder, or a .pt file of karpathy/tinyllamas, into model.pth, config.json and the tokenizer.

python scripts/convert_hf_checkpoint.py --checkpoint_dir FOLDER [--out FOLDER]

Tensors are memory-mapped and written one after another: only the pages that the system keeps are in memory.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()


from cli.options import OneLineParser
from loading.checkpoint import (
    Checkpoint,
    copy_new,
    read_checkpoint,
    read_weights,
    save_model,
)
from loading.files import COMPANIONS, check_stays, companions, hugging_face_files, read_json, snapshot

KEPT = [name for name in COMPANIONS if name != "config.json"]  # which is rewritten


def convert(source: Path, out: Path) -> Path:
    """Write `out`/model.pth and its companion files; return its path. Raises ValueError, before anything is written, if
    another model is there or an input would be overwritten, or OSError."""
    checkpoint = read_checkpoint(source, hugging_face_files)  # not a model.pth of an earlier conversion
    check_folder(checkpoint, out)
    check_stays([*checkpoint.weights, *companions(checkpoint.folder)], out / "model.pth")
    state = read_weights(checkpoint)
    if checkpoint.args.tied_output:
        del state["output.weight"]
    save_model(out, checkpoint.config, state)
    for name in KEPT:
        if (checkpoint.folder / name).exists():
            copy_new(checkpoint.folder / name, out / name)
    return out / "model.pth"


def check_folder(checkpoint: Checkpoint, out: Path) -> None:
    """Raise ValueError, naming the file, if `out` has a file of another model that would be overwritten or taken for
    this model's."""
    config, remedy = out / "config.json", "pass another folder as --out, or delete the file"
    if config.exists() and read_json(config) != checkpoint.config:
        raise ValueError(f"{config} belongs to another model: {remedy}")
    for name in KEPT:
        mine, theirs = checkpoint.folder / name, out / name
        if theirs.exists() and not (mine.exists() and mine.read_bytes() == theirs.read_bytes()):
            raise ValueError(f"{theirs} belongs to another model: {remedy}")


def main() -> int:
    parser = OneLineParser(description="Convert a Hugging Face model to model.pth.")
    parser.add_argument(
        "--checkpoint_dir", type=Path, required=True, help="Hugging Face folder, or .pt file of karpathy/tinyllamas"
    )
    parser.add_argument("--out", type=Path, help="folder to write to; default: the same folder")
    options = parser.parse_args()
    try:
        source = snapshot(options.checkpoint_dir)
        folder = source if source.is_dir() else source.parent
        out = options.out or folder
        print(convert(source, out))
        if not any((folder / name).exists() for name in ("tokenizer.model", "tokenizer.json")):
            print(f"no tokenizer found in {folder}: copy the model's tokenizer to {out}", file=sys.stderr)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
