"""Parts of gpu_check.sh: the rates of the device, runs that count what they compile and record, the kernels of one
layer, and the time of all layers by that of few.

    python scripts/gpu_check.py layer --device cuda --context 8192
"""

import common
from common import SHAPES, Table, count, random_model  # isort: split

import argparse
import json
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from benchmark import QUANTISERS, hold, machine_rates, step_of, stepping
from cache import KVCache
from engine.engine import Engine
from engine.request import Request
from engine.runner import bucket
from layers.rope import RopeScaling
from model import ModelArgs, Transformer

STEPS, KERNELS = 8, 12  # steps profiled, and kernels printed of each number of rows


def rates(options: argparse.Namespace) -> None:
    """Print versions and the measured rates of the device."""
    device, dtype = common.begin(options.device, "auto")
    common.print_heading(device, dtype, f", Python {platform.python_version()}, CUDA {torch.version.cuda}")
    found = machine_rates(device, dtype)
    print(f"{found.bandwidth / 1e9:.0f} GB/s, {found.operations / 1e12:.2f} T operations/s in a matrix product")


def with_int8(model: Transformer) -> Transformer:
    """Hold the linear layers in int8."""
    hold(model, QUANTISERS["int8"], 4)
    return model


def runs(options: argparse.Namespace) -> None:
    """Generate with int8 weights, with longrope across its original context and 100 tokens, compiled, and count the
    graphs that are compiled and recorded. The second run of each should add none of the former."""
    device, dtype = common.begin(options.device, "auto")
    args, ramp = SHAPES["tiny"], tuple(1 + pair / 8 for pair in range(SHAPES["tiny"].head_dim // 2))
    growing = replace(args, rope_scaling=RopeScaling("longrope", 4.0, 80, short=(1.0,) * len(ramp), long=ramp))
    kinds: dict[str, tuple[ModelArgs, Callable[[Transformer], Transformer], int]] = {
        "int8": (args, with_int8, 40), "longrope": (growing, lambda model: model, 40),
        "100 new tokens": (args, lambda model: model, 100),
    }  # fmt: skip
    table = Table("what", "N", "run", "tokens", "graphs compiled", "graphs recorded")
    for name, (shape, make, length) in kinds.items():
        engine = Engine(make(random_model(shape, device, dtype)), compile=True)
        for rows in (1, 4):
            for run in (1, 2):
                before = counters["stats"]["unique_graphs"]
                with mock.patch.object(torch.cuda, "CUDAGraph", wraps=torch.cuda.CUDAGraph) as recorded:
                    drawn = engine.generate(list(range(64)), Request(rows, length, seed=1))
                tokens = sum(len(sample.tokens) for sample in drawn)
                compiled = counters["stats"]["unique_graphs"] - before
                table.row(name, rows, run, tokens, str(compiled), str(recorded.call_count))


def layer(options: argparse.Namespace) -> None:
    """Profile the kernels of a step of one layer, compiled and recorded as the engine's, in microseconds a step."""
    device, dtype = common.begin(options.device, "auto")
    args = replace(SHAPES[options.shape], n_layer=1)
    model = random_model(args, device, dtype)
    root = KVCache.empty(args.kv_shape, 1, options.context, model.norm.weight)
    for tensor in root.tensors:
        tensor.normal_()
    step, heads = step_of(model, compile=True), args.n_head // args.n_kv_head
    table = Table("N*P", "kernel", "calls a step:.1f", "us a step:.1f")
    for rows in options.num_samples:
        cache = KVCache.fork(root, rows, bucket(2 * STEPS))
        advance = stepping(step, cache, options.context)
        common.timed(advance, 3, device)
        kind = ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU
        with profile(activities=[kind]) as found:
            common.timed(advance, STEPS - 1, device)
        calls, took = Counter[str](), Counter[str]()
        for each in found.key_averages():
            calls[each.key] += each.count
            took[each.key] += each.self_device_time_total if device.type == "cuda" else each.self_cpu_time_total
        for name, microseconds in took.most_common(KERNELS):
            table.row(rows * heads, f"`{name[:70]}`", calls[name] / (STEPS - 1), microseconds / (STEPS - 1))
        table.row(rows * heads, "all", calls.total() / (STEPS - 1), took.total() / (STEPS - 1))


def extrapolate(options: argparse.Namespace) -> None:
    """Print the time of a step of all layers, by those of two smaller numbers of layers: it is linear in them."""
    few, many = options.layers
    cells = [[json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in options.cells]
    table, total = (
        Table("context", "N", f"{few} layers:.2f", f"{many} layers:.2f", "all:.2f"),
        SHAPES[options.shape].n_layer,
    )
    for one, other in zip(*cells, strict=True):
        if one["ms"] is None or other["ms"] is None:
            table.row(one["context"], one["num_samples"], one["note"] or one["ms"], other["note"] or other["ms"], None)
            continue
        slope = (other["ms"] - one["ms"]) / (many - few)
        table.row(one["context"], one["num_samples"], one["ms"], other["ms"], one["ms"] + (total - few) * slope)


def read_options() -> argparse.Namespace:
    parser = common.OneLineParser(description="Parts of gpu_check.sh.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        each: commands.add_parser(each.__name__, help=each.__doc__) for each in (rates, runs, layer, extrapolate)
    }
    for command, each in parsers.items():
        each.set_defaults(run=command)
        if command is not extrapolate:
            each.add_argument("--device", default="auto")
        if command in (layer, extrapolate):
            each.add_argument("--shape", choices=SHAPES, default="llama-2-7b")
    parsers[layer].add_argument("--context", type=count, default=8192)
    parsers[layer].add_argument("-n", "--num_samples", type=count, nargs="+", default=[1, 4, 16, 64, 128, 256, 1024])
    parsers[extrapolate].add_argument("cells", type=Path, nargs=2, help="JSON lines of benchmark.py")
    parsers[extrapolate].add_argument("--layers", type=count, nargs=2, required=True)
    return parser.parse_args()


@common.reporting
@torch.no_grad()
def main() -> None:
    options = read_options()
    options.run(options)


if __name__ == "__main__":
    common.finish(main)
