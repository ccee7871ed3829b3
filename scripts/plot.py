"""Plot what scripts/benchmark.py measured: a step against N and against the context, with its limit, and one layer's
attention by length and by batch.

python scripts/plot.py --cells cells.jsonl --out charts
"""

import common  # isort: split

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
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
        own = [cell for cell in cells if cell["shape"] == shape and "column" in cell]
        for axis, (fixed, label) in AXES.items():
            if len({cell[axis] for cell in own}) > 1:
                files.append(out / f"{shape}-{axis}.png")
                panels(own, axis, fixed, label, files[-1])
    return files


def panels(cells: Sequence[dict[str, Any]], axis: str, fixed: str, label: str, file: Path) -> None:
    """Plot milliseconds per step against `axis` in one panel for each value of `fixed`."""
    values = sorted({cell[fixed] for cell in cells})
    figure, grid = pyplot.subplots(1, len(values), figsize=(4.5 * len(values), 4), sharey=True, squeeze=False)
    for panel, value in zip(grid[0], values, strict=True):
        shown = [cell for cell in cells if cell[fixed] == value]
        curves = {
            column: [(c[axis], c["ms"]) for c in shown if c["column"] == column and c["ms"] is not None]
            for column in dict.fromkeys(cell["column"] for cell in shown)
        }
        plot(panel, curves, label, f"{fixed.replace('_', ' ')} {value}")
        limits = sorted({(cell[axis], cell["limit_ms"]) for cell in shown})
        panel.plot(*zip(*limits, strict=True), color="black", linestyle="--", label="limit of the machine")
    figure.suptitle(cells[0]["shape"])
    save(figure, grid, "milliseconds per step", file)


def attention_panels(points: Sequence[dict[str, Any]], file: Path) -> None:
    """Plot one layer's milliseconds: prefill, decoding and both at once, by length above and by batch below."""
    kinds = list(dict.fromkeys(point["kind"] for point in points))
    figure, grid = pyplot.subplots(2, len(kinds), figsize=(4.5 * len(kinds), 7), squeeze=False)
    for line, (by, axis) in zip(grid, (("length", "context"), ("batch", "num_samples")), strict=True):
        fixed, label = AXES[axis]
        for panel, kind in zip(line, kinds, strict=True):
            shown = [point for point in points if (point["kind"], point["by"]) == (kind, by)]
            sides = (("ours_ms", "this engine"), ("sdpa_ms", "SDPA, a copy for each sample"))
            curves = {name: [(point[axis], point[side]) for point in shown] for side, name in sides}
            others = ", ".join(str(other) for other in dict.fromkeys(point[fixed] for point in shown))
            plot(panel, curves, label, f"{kind}, {LABELS[fixed]} {others}")
    save(figure, grid, "milliseconds of one layer", file)


def plot(panel: Any, curves: Mapping[str, Sequence[tuple[int, float]]], label: str, title: str) -> None:
    """Plot points by name, both axes logarithmic."""
    for name, points in curves.items():
        panel.plot(*zip(*sorted(points), strict=True), marker="o", label=name) if points else None
    sizes = sorted({size for points in curves.values() for size, _ in points})
    panel.set(xscale="log", yscale="log", xlabel=label, title=title)
    panel.set_xticks(sizes, labels=sizes)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def save(figure: Any, grid: Any, label: str, file: Path) -> None:
    """Label each line of panels, and write the figure."""
    for line in grid:
        line[0].set_ylabel(label)
    grid[0][0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


@common.reporting
def main() -> None:
    parser = argparse.ArgumentParser(description="Draw what scripts/benchmark.py measured.")
    parser.add_argument("--cells", type=Path, required=True, help="what benchmark.py --out wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the PNG files")
    options = parser.parse_args()
    try:
        files = draw([json.loads(line) for line in options.cells.read_text("utf-8").splitlines()], options.out)
        if not files:
            raise ValueError("no shape was measured at two values of N or of the context")
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"{options.cells} cannot be drawn: {error}") from error
    print(*files, sep="\n")


if __name__ == "__main__":
    common.finish(main)
