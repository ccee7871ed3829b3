"""Times the decode step of a model of a named shape with random weights, for every way to hold the context.

    python scripts/benchmark.py --shape stories110M --context 4096 -n 1 8 16 64

Prints a Markdown table to stdout and, with --out, one JSON object per cell. A step is the network, the logits and the
drawing of a token; each cell is the median of --steps steps after a warm-up. The columns of one N are measured one
after another in one process, so that their ratios share the machine's state.
"""

import argparse
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from generate import DECODE_SLOTS, Sampling, Steps, make_steps, sample
from model import KVCache, ModelArgs, SDPACache, Transformer
from plan import available_memory, choose_device, choose_dtype, human, keep_freed_memory, plan_memory

SHAPES = {
    "tiny": ModelArgs(192, 5, 6, 2, 32, 384, 2048, 1 << 20),
    "stories110M": ModelArgs(768, 12, 12, 12, 64, 2048, 32000, 1 << 20),
    "llama-2-7b": ModelArgs(4096, 32, 32, 32, 128, 11008, 32000, 1 << 20),
    "mistral-7b": ModelArgs(4096, 32, 32, 8, 128, 14336, 32000, 1 << 20),
    "llama-3.1-8b": ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 1 << 20, rope_theta=500000.0),
}


@dataclass(frozen=True)
class Column:
    """A way to hold the context (a constructor of caches), its step compiled or not; layout as in plan_memory."""

    make: Callable[[KVCache, int, int], KVCache]
    compiled: bool
    layout: str


COLUMNS = {
    "bifurcated": Column(KVCache.fork, False, "bifurcated"),
    "bifurcated, compiled": Column(KVCache.fork, True, "bifurcated"),
    "contiguous": Column(KVCache.copy, False, "contiguous"),
    "contiguous, compiled": Column(KVCache.copy, True, "contiguous"),
    "contiguous SDPA": Column(SDPACache.copy, False, "contiguous"),
    "contiguous SDPA, compiled": Column(SDPACache.copy, True, "contiguous"),
    "expanded SDPA": Column(SDPACache.fork, False, "expanded"),
    "expanded SDPA, compiled": Column(SDPACache.fork, True, "expanded"),
}


def random_model(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    with torch.device("meta"):
        model = Transformer(args)
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.tie_output()
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def random_context(args: ModelArgs, slots: int, like: torch.Tensor) -> KVCache:
    cache = KVCache.empty(args, 1, slots, like)
    for tensor in cache.k + cache.v:
        tensor.normal_()
    return cache


def timed(function: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Seconds of each of `times` calls."""
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def time_decode(steps: Steps, cache: KVCache, context: int, repeats: int, warm_up: int = 4) -> float:
    """Median seconds of a decode step over positions from `context` on."""
    device, rows = cache.start.device, cache.rows
    generator = torch.Generator().manual_seed(0)
    token = torch.zeros(rows, dtype=torch.long, device=device)
    input_pos = torch.full((rows, 1), context, device=device)

    def step() -> None:
        nonlocal token, input_pos
        logits = steps.decode(token[:, None], input_pos, cache)
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64).to(device)
        token, _ = sample(logits, uniform, Sampling(0.8, top_k=200))
        input_pos = input_pos + 1

    timed(step, warm_up, device)
    return statistics.median(timed(step, repeats, device))


def machine_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second that a large sum reads, multiply-adds as operations per second of a large matrix product)."""
    big = torch.ones(1 << 26, device=device)
    square = torch.ones(2048, 2048, device=device, dtype=dtype)
    read = min(timed(lambda: big.sum(), 5, device)[1:])
    product = min(timed(lambda: square @ square, 5, device)[1:])
    return big.nbytes / read, 2 * 2048**3 / product


@dataclass(frozen=True)
class Cell:
    """One measurement. ms: of a step, None where it was not run, for the reason in `note`."""

    column: str
    num_samples: int
    context: int
    ms: float | None
    note: str
    bytes_per_step: int


def measure(options: argparse.Namespace, args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Iterable[Cell]:
    """Every cell that fits, row by row."""
    model = random_model(args, device, dtype)
    steps = {compiled: make_steps(model, compile_decode=compiled) for compiled in (False, True)}
    slots = min(DECODE_SLOTS, options.steps + 8)
    for context in options.context:
        root = random_context(args, context, model.norm.weight)
        for rows in options.num_samples:
            for name in options.columns:
                column = COLUMNS[name]
                needed = plan_memory(args, dtype, context, rows, slots, column.layout, 1 << 62)
                shared = plan_memory(args, dtype, context, rows, slots, "bifurcated", 1 << 62)
                extra = needed.decoded + needed.workspace
                if extra > available_memory(device):
                    yield Cell(name, rows, context, None, f"needs {human(extra)}", shared.per_step)
                    continue
                cache = column.make(root, rows, slots)
                seconds = time_decode(steps[column.compiled], cache, context, options.steps)
                del cache
                log(f"{name}, N {rows}, T {context}: {1000 * seconds:.2f} ms")
                yield Cell(name, rows, context, 1000 * seconds, "", shared.per_step)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(cells: list[Cell], columns: list[str], bandwidth: float) -> str:
    """Markdown: a row per context and N; ms per step, and the share of the bandwidth that the first column reaches."""
    lines = [
        "| context | N | " + " | ".join(columns) + " | bandwidth limit |",
        "|" + "---|" * (len(columns) + 3),
    ]
    for context, rows in dict.fromkeys((cell.context, cell.num_samples) for cell in cells):
        found = {cell.column: cell for cell in cells if (cell.context, cell.num_samples) == (context, rows)}
        texts = [f"{found[name].ms:.1f}" if found[name].ms else found[name].note for name in columns]
        limit = 1000 * found[columns[0]].bytes_per_step / bandwidth
        lines.append(f"| {context} | {rows} | " + " | ".join(texts) + f" | {limit:.1f} |")
    return "\n".join(lines)


def header(options: argparse.Namespace, device: torch.device, dtype: torch.dtype, rates: tuple[float, float]) -> str:
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}" * (device.type == "cpu")
    return (
        f"`python scripts/benchmark.py {shlex.join(options.command)}`\n\n"
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {name}{threads}, {str(dtype)[6:]}; "
        f"measured in this run: {rates[0] / 1e9:.0f} GB/s read, {rates[1] / 1e12:.2f} T operations/s in a matrix "
        "product. Milliseconds per decode step; the limit is the bytes that a step must read over that bandwidth."
    )


def shape_of(options: argparse.Namespace) -> ModelArgs:
    """The named shape with --set's fields. Raises ValueError on a field that there is not."""
    args = SHAPES[options.shape]
    for setting in options.set:
        field, _, value = setting.partition("=")
        if not isinstance(getattr(args, field, None), int) or not value.isdecimal():
            raise ValueError(f"--set {setting}: write a field of ModelArgs and a number, such as n_kv_head=4")
        args = replace(args, **{field: int(value)})
    return args


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Time the decode step, for every way to hold the context.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="stories110M")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="change a field of the shape")
    parser.add_argument("--context", type=int, nargs="+", default=[4096], help="tokens")
    parser.add_argument("-n", "--num_samples", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS), metavar="COLUMN")
    parser.add_argument("--steps", type=int, default=20, help="timed steps per cell")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--out", type=Path, help="append one JSON object per cell to this file")
    options = parser.parse_args()
    options.command = sys.argv[1:]
    try:
        args, device = shape_of(options), choose_device(options.device)
        if min(options.num_samples + options.context + [options.steps]) < 1 or options.steps > DECODE_SLOTS - 8:
            raise ValueError(f"num_samples, context and steps must be at least 1, and steps at most {DECODE_SLOTS - 8}")
    except ValueError as error:
        log(f"error: {error}")
        return 2
    dtype = choose_dtype(options.dtype, device)
    keep_freed_memory()
    rates = machine_rates(device, dtype)
    cells = list(measure(options, args, device, dtype))
    print(header(options, device, dtype, rates), end="\n\n")
    print(table(cells, options.columns, rates[0]))
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(vars(cell)) + "\n" for cell in cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
