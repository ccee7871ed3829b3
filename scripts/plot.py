"""Draws what scripts/benchmark.py measured: latency against N and against the context, with the limit beside it.

python scripts/plot.py --cells cells.jsonl --out charts
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

AXES = {"num_samples": ("context", "N, samples"), "context": ("num_samples", "context, tokens")}


def draw(cells: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """One PNG per shape and axis, a panel for each value of the other one. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for shape in dict.fromkeys(cell["shape"] for cell in cells):
        own = [cell for cell in cells if cell["shape"] == shape]
        for axis, (fixed, label) in AXES.items():
            if len({cell[axis] for cell in own}) > 1:
                files.append(out / f"{shape}-{axis}.png")
                panels(own, axis, fixed, label, files[-1])
    return files


def panels(cells: Sequence[dict[str, Any]], axis: str, fixed: str, label: str, file: Path) -> None:
    """Milliseconds per step against `axis`, both logarithmic, in one panel for each value of `fixed`."""
    values = sorted({cell[fixed] for cell in cells})
    figure, grid = pyplot.subplots(1, len(values), figsize=(4.5 * len(values), 4), sharey=True, squeeze=False)
    for panel, value in zip(grid[0], values, strict=True):
        shown = [cell for cell in cells if cell[fixed] == value]
        for column in dict.fromkeys(cell["column"] for cell in shown):
            points = sorted((c[axis], c["ms"]) for c in shown if c["column"] == column and c["ms"] is not None)
            panel.plot(*zip(*points, strict=True), marker="o", label=column) if points else None
        limits = sorted({(cell[axis], cell["limit_ms"]) for cell in shown})
        panel.plot(*zip(*limits, strict=True), color="black", linestyle="--", label="limit of the machine")
        panel.set(xscale="log", yscale="log", xlabel=label, title=f"{fixed.replace('_', ' ')} {value}")
        panel.set_xticks(sorted({cell[axis] for cell in shown}), labels=sorted({cell[axis] for cell in shown}))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    grid[0][0].set_ylabel("milliseconds per step")
    grid[0][0].legend(fontsize="small")
    figure.suptitle(cells[0]["shape"])
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description="Draw what scripts/benchmark.py measured.")
    parser.add_argument("--cells", type=Path, required=True, help="what benchmark.py --out wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    options = parser.parse_args()
    try:
        cells = [json.loads(line) for line in options.cells.read_text("utf-8").splitlines()]
        files = draw(cells, options.out)
        if not files:
            raise ValueError("no shape was measured at two values of N or of the context")
        print(*files, sep="\n")
    except (ValueError, TypeError, KeyError, OSError) as error:
        print(f"error: {options.cells} cannot be drawn: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
