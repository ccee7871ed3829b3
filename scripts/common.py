"""Shared code of the benchmarks: start, flags, heading, random models, timing, tables and their JSON lines."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from cli.system import finish as finish
from cli.system import print_error, start

# A script imports this file before all others, so that Ctrl-C ends their imports too.
if Path(getattr(sys.modules["__main__"], "__file__", None) or "-").resolve().parent == ROOT / "scripts":
    start()

import argparse
import contextlib
import functools
import itertools
import json
import platform
import re
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from cli.options import OneLineParser
from cli.system import check_writable
from engine.plan import choose_device, choose_dtype, keep_freed_memory
from engine.request import Sampling
from model import ModelArgs, Transformer, empty_model

T = TypeVar("T")

SHAPES = {
    "tiny": ModelArgs(192, 5, 6, 2, 32, 384, 2048, 1 << 20),
    "stories110M": ModelArgs(768, 12, 12, 12, 64, 2048, 32000, 1 << 20),
    "stories110M-gqa": ModelArgs(768, 12, 12, 4, 64, 2048, 32000, 1 << 20),
    "tinyllama-1.1b": ModelArgs(2048, 22, 32, 4, 64, 5632, 32000, 1 << 20),
    "llama-2-7b": ModelArgs(4096, 32, 32, 32, 128, 11008, 32000, 1 << 20),
    "mistral-7b": ModelArgs(4096, 32, 32, 8, 128, 14336, 32000, 1 << 20),
    "llama-3.1-8b": ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 1 << 20, rope_theta=500000.0),
}
SAMPLING = Sampling(0.8, top_k=200)
CPU = torch.device("cpu")


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return an argparse type: int or float, above 0."""

    def parse(text: str) -> float:
        if not (value := kind(text)) > 0:
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"  # argparse puts it into its error
    return parse


count = positive(int)


def writable(text: str) -> Path:
    """Return the path of a file that can be written: better told before measuring than after it."""
    try:
        check_writable(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def build_parser(description: str | None, dtype: str = "auto") -> OneLineParser:
    """Return a parser with the flags of every benchmark. dtype: the default."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default=dtype)
    parser.add_argument("--out", type=writable, help="append one JSON object per measurement to this file")
    return parser


def begin(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """Prepare the process to time what a command would do, and return the device and dtype of the flags. Raises
    ValueError if there are no such."""
    keep_freed_memory()
    place = choose_device(device)
    return place, choose_dtype(dtype, place)


def reporting(main: Callable[[], object]) -> Callable[[], int]:
    """Return main with an exit status: 2 after a ValueError or OSError, which is printed in one line."""

    @functools.wraps(main)
    def run() -> int:
        try:
            with contextlib.suppress(BrokenPipeError):
                main()
        except (ValueError, OSError) as error:
            return print_error(error)
        return 0

    return run


def print_heading(device: torch.device, dtype: torch.dtype, more: str = "") -> None:
    """Print the command, and the commit, versions and machine that it runs on. more: what follows in that line."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}" * (device.type == "cpu")
    print(f"`python scripts/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}`\n")
    print(f"commit {commit}, torch {torch.__version__}, {name}{threads}, {str(dtype)[6:]}{more}", flush=True)


class Table:
    """A Markdown table, printed row by row. columns: "name", or "name:format" of its numbers. out: a file that gets one
    JSON object per row, of the columns and `fields`."""

    def __init__(self, *columns: str, out: Path | None = None, **fields: object) -> None:
        self.names = [column.partition(":")[0] for column in columns]
        self.formats = [column.partition(":")[2] for column in columns]
        self.out, self.fields = out, fields
        print(f"\n| {' | '.join(self.names)} |\n|{'---|' * len(columns)}", flush=True)

    def row(self, *values: object) -> None:
        """Print a row; None is a dash."""
        pairs = zip(values, self.formats, strict=True)
        cells = [format(value, how) if isinstance(value, int | float) else str(value or "-") for value, how in pairs]
        print(f"| {' | '.join(cells)} |", flush=True)
        append(self.out, self.fields | dict(zip(self.names, values, strict=True)))


def append(path: Path | None, record: Mapping[str, object]) -> None:
    """Append a JSON line."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def timed(
    function: Callable[[], object], times: int = 1, device: torch.device = CPU, budget: float = 1e9
) -> list[float]:
    """Return the seconds of each of `times` calls; of fewer, at least one, if they exceed `budget` seconds."""
    if device.type == "cuda":
        first = timed_by_events(function, 1, device)
        more = min(times, int(budget / first[0])) - 1
        return first + timed_by_events(function, more, device) if more > 0 else first
    seconds: list[float] = []
    while len(seconds) < times and sum(seconds) < budget:
        begin = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begin)
    return seconds


def timed_by_events(function: Callable[[], object], times: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `times` calls on a CUDA device, by its own clock: the host waits for the last call
    only, so that no call begins on an idle device."""
    with torch.cuda.device(device):
        events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        events[-1].synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in itertools.pairwise(events)]


def median_ms(function: Callable[[], object], times: int, device: torch.device, budget: float = 1e9) -> float:
    """Return the median milliseconds of a call, after a warm-up, which may compile."""
    timed(function, 1, device)
    timed(function, 3, device, budget / 4)
    return 1000 * statistics.median(timed(function, times, device, budget))


def clocked(function: Callable[[], object], times: int = 1) -> Callable[[], float]:
    """Return a callable that calls the function `times` times, and returns the seconds of the last call."""
    return lambda: timed(function, times)[-1]


def alternate(sides: Iterable[Callable[[], T]], turns: int, warm_up: int = 0) -> list[tuple[T, ...]]:
    """Return the results of each side, without those of the first `warm_up` turns. The sides take turns, so that other
    load on the machine reaches all of them."""
    sides = list(sides)
    return list(zip(*[[side() for side in sides] for _ in range(warm_up + turns)][warm_up:], strict=True))


def medians(sides: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.median(side) for side in sides]


def random_model(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Build a network of random weights, the same at every call."""
    torch.manual_seed(0)
    model = empty_model(args).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.tie_output()
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def llama_config(args: ModelArgs) -> dict[str, Any]:
    """Return the config.json of a Llama of that shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layer,
        "num_attention_heads": args.n_head,
        "num_key_value_heads": args.n_kv_head,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.context_limit,
    }


def random_llama(context_limit: int, layers: int = 12, vocabulary: int = 32000, **fields: Any) -> Any:
    """Build a random Llama of transformers, of stories110M's width. fields: of its config."""
    from transformers import LlamaConfig, LlamaForCausalLM  # seconds, and only two benchmarks need it

    torch.manual_seed(0)
    sizes = replace(SHAPES["stories110M"], n_layer=layers, vocab_size=vocabulary, context_limit=context_limit)
    return LlamaForCausalLM(LlamaConfig(**llama_config(sizes) | fields)).eval()


def resident(field: str = "VmRSS") -> int:
    """Return this process's resident bytes, or with VmHWM their peak (Linux)."""
    return 1024 * int(re.findall(field + r":\s+(\d+)", Path("/proc/self/status").read_text())[0])
