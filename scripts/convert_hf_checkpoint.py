"""Converts a Hugging Face folder (config.json + *.safetensors) into model.pth, config.json and the tokenizer.

python scripts/convert_hf_checkpoint.py --checkpoint_dir FOLDER [--out FOLDER]
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoint import check_weights, read_checkpoint, read_weights, save_model

COMPANIONS = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


def convert(source: Path, out: Path) -> Path:
    """Writes `out`/model.pth and what belongs to it; returns its path. Raises ValueError or OSError."""
    checkpoint = read_checkpoint(source)
    state = read_weights(checkpoint)
    check_weights(checkpoint.args, state)
    if checkpoint.args.tied_output:
        del state["output.weight"]
    save_model(out, checkpoint.config, state)
    for name in COMPANIONS:
        if (source / name).exists() and source != out:
            shutil.copyfile(source / name, out / name)
    return out / "model.pth"


def main() -> int:
    parser = argparse.ArgumentParser(description="Convert a Hugging Face folder into model.pth.")
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="folder with config.json and *.safetensors")
    parser.add_argument("--out", type=Path, help="folder to write; default: the same folder")
    options = parser.parse_args()
    try:
        print(convert(options.checkpoint_dir, options.out or options.checkpoint_dir))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
