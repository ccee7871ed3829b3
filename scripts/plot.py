"""Plot what scripts/benchmark.py measured: a step against N and against the context, with its limit, and one layer's
attention by length and by batch.

python scripts/plot.py --cells cells.jsonl --out charts
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import json
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

LABELS = {"num_samples": "N", "context": "context"}
AXES = {"num_samples": ("context", "N, samples"), "context": ("num_samples", "context, tokens")}


def draw(cells: Sequence[dict[str, Any]], out: Path) -> list[Path]:
    """Plot decode steps, one PNG per shape and axis with a panel for each value of the other axis, and attention, one
    PNG per shape. Returns the files."""
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for shape in dict.fromkeys(cell["shape"] for cell in cells):
        points = [cell for cell in cells if cell["shape"] == shape and "kind" in cell]
        if len(points) > 1:
            files.append(out / f"{shape}-attention.png")
            attention_panels(points, files[-1])
        own = [cell for cell in cells if cell["shape"] == shape and "kind" not in cell]
        for axis, (fixed, label) in AXES.items():
            if len({cell[axis] for cell in own}) > 1:
                files.append(out / f"{shape}-{axis}.png")
                panels(own, axis, fixed, label, files[-1])
    return files


def panels(cells: Sequence[dict[str, Any]], axis: str, fixed: str, label: str, file: Path) -> None:
    """Plot milliseconds per step against `axis`, both logarithmic, in one panel for each value of `fixed`."""
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


def attention_panels(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot one layer's milliseconds: prefill, decoding and both at once, by length above and by batch below."""
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    figure, grid = pyplot.subplots(2, len(kinds), figsize=(4.5 * len(kinds), 7), squeeze=False)
    for line, (by, axis) in zip(grid, (("length", "context"), ("batch", "num_samples")), strict=True):
        for panel, kind in zip(line, kinds, strict=True):
            shown = sorted((p for p in points if (p["kind"], p["by"]) == (kind, by)), key=lambda point: point[axis])
            sizes = [point[axis] for point in shown]
            for name, label in (("ours_ms", "this engine"), ("sdpa_ms", "SDPA, a copy for each sample")):
                panel.plot(sizes, [point[name] for point in shown], marker="o", label=label)
            fixed = "context" if axis == "num_samples" else "num_samples"
            others = ", ".join(str(other) for other in dict.fromkeys(point[fixed] for point in shown))
            panel.set(xscale="log", yscale="log", xlabel=AXES[axis][1], title=f"{kind}, {LABELS[fixed]} {others}")
            panel.set_xticks(sizes, labels=sizes)
            panel.minorticks_off()
            panel.grid(alpha=0.3)
        line[0].set_ylabel("milliseconds of one layer")
    grid[0][0].legend(fontsize="small")
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
        return print_error(f"{options.cells} cannot be drawn: {error}")
    return 0


if __name__ == "__main__":
    finish(main)
