"""Time the decode step of a model of a named shape with random weights, for every context layout.

    python scripts/benchmark.py --preset cpu
    python scripts/benchmark.py --shape stories110M --context 4096 -n 1 8 16 64 --out cells.jsonl --charts charts

Prints Markdown tables to stdout as they finish; --out adds one JSON object per cell, --charts draws them. A step is the
network, the logits and the draw of a token; a cell is the median of --steps steps after a warm-up. The columns of one N
are measured one after another in one process, so their ratios share the machine's state. Next to every time stands its
limit: the bytes that a step must read over the measured bandwidth, or its operations over the measured rate of a matrix
product, whichever takes longer.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bifurcated_attention import ScoreMod
from cache import KVCache, NoCache, Prefill, attend_by_torch
from cli.options import OneLineParser, changed
from cli.ranks import join, leave
from engine.engine import SILENT, Engine
from engine.graphs import Step, StepInput
from engine.layouts import Int8Context, SDPACache, copied
from engine.plan import (
    Plan,
    available_memory,
    choose_device,
    choose_dtype,
    choose_packing,
    human,
    keep_freed_memory,
    plan_run,
    release_freed_memory,
    step_operations,
    weigh,
)
from engine.request import Sampling, Workload
from layers.kernels import attend_chain
from layers.linear import Quantised, StreamedLinear, can_pack, kernels, make_linear, pack_linears, swap_linears
from layers.moe import ExpertLinear, MixtureOfExperts, MoEConfig
from loading.checkpoint import load_model, read_checkpoint, read_safetensors
from model import ModelArgs, Transformer, empty_model
from quantize import quantise_int4, quantise_int8
from tp import WHOLE, Shard

SHAPES = {
    "tiny": ModelArgs(192, 5, 6, 2, 32, 384, 2048, 1 << 20),
    "stories110M": ModelArgs(768, 12, 12, 12, 64, 2048, 32000, 1 << 20),
    "stories110M-gqa": ModelArgs(768, 12, 12, 4, 64, 2048, 32000, 1 << 20),
    "tinyllama-1.1b": ModelArgs(2048, 22, 32, 4, 64, 5632, 32000, 1 << 20),
    "llama-2-7b": ModelArgs(4096, 32, 32, 32, 128, 11008, 32000, 1 << 20),
    "mistral-7b": ModelArgs(4096, 32, 32, 8, 128, 14336, 32000, 1 << 20),
    "llama-3.1-8b": ModelArgs(4096, 32, 32, 8, 128, 14336, 128256, 1 << 20, rope_theta=500000.0),
}


@dataclass(frozen=True)
class Column:
    """A context layout (a constructor of caches), its step compiled or not; layout and kv_dtype as in Request."""

    make: Callable[[KVCache, int, int], KVCache]
    compiled: bool
    layout: str
    kv_dtype: str = "auto"


class OneKernel(SDPACache):
    """Copies of the context, read by one SDPA kernel. All slots count as visible, since not every kernel takes a mask:
    for timing only, since slots that no step has reached are read too."""

    kernel: SDPBackend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        self.write(layer, k, v, input_pos)
        k, v = self.k[layer], self.v[layer]
        with sdpa_kernel(self.kernel):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class FlashKernel(OneKernel):
    kernel = SDPBackend.FLASH_ATTENTION


class EfficientKernel(OneKernel):
    kernel = SDPBackend.EFFICIENT_ATTENTION


class MathKernel(OneKernel):
    kernel = SDPBackend.MATH


def share(context: KVCache, n: int, slots: int) -> KVCache:
    """Fork as the engine does: a single row extends the context's own cache, here a copy of it."""
    return copied(context, 1, slots, kind=KVCache) if n == 1 else KVCache.fork(context, n, slots)


def fork_int8(context: KVCache, n: int, slots: int) -> KVCache:
    return KVCache.fork(Int8Context(copied(context, 1, 0, kind=KVCache)), n, slots)


class TorchCache(KVCache):
    """KVCache without the operator of kernels.py."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        self.write(layer, k, v, input_pos)
        return attend_by_torch(self, layer, q, input_pos, mod)


def by_torch(context: KVCache, n: int, slots: int) -> KVCache:
    """As `share`, by PyTorch alone."""
    return copied(context, 1, slots, kind=TorchCache) if n == 1 else TorchCache.fork(context, n, slots)


COLUMNS = {
    "bifurcated": Column(share, False, "bifurcated"),
    "bifurcated, compiled": Column(share, True, "bifurcated"),
    "bifurcated, int8": Column(fork_int8, False, "bifurcated", "int8"),
    "bifurcated, int8, compiled": Column(fork_int8, True, "bifurcated", "int8"),
    "bifurcated, torch": Column(by_torch, False, "bifurcated"),
    "bifurcated, torch, compiled": Column(by_torch, True, "bifurcated"),
    "contiguous": Column(partial(copied, kind=KVCache), False, "contiguous"),
    "contiguous, compiled": Column(partial(copied, kind=KVCache), True, "contiguous"),
    "contiguous SDPA": Column(copied, False, "contiguous"),
    "contiguous SDPA, compiled": Column(copied, True, "contiguous"),
    "contiguous SDPA, flash": Column(partial(copied, kind=FlashKernel), False, "contiguous"),
    "contiguous SDPA, flash, compiled": Column(partial(copied, kind=FlashKernel), True, "contiguous"),
    "contiguous SDPA, efficient": Column(partial(copied, kind=EfficientKernel), False, "contiguous"),
    "contiguous SDPA, efficient, compiled": Column(partial(copied, kind=EfficientKernel), True, "contiguous"),
    "contiguous SDPA, math": Column(partial(copied, kind=MathKernel), False, "contiguous"),
    "contiguous SDPA, math, compiled": Column(partial(copied, kind=MathKernel), True, "contiguous"),
    "expanded SDPA": Column(SDPACache.fork, False, "expanded"),
    "expanded SDPA, compiled": Column(SDPACache.fork, True, "expanded"),
}
PREFILL_CHUNK = 512
IN_TURNS = 9
MOST_SLOTS = 128  # decoded slots of a timed cache
EVERY_N = [1 << power for power in range(12)]

# What the paper compares, each eager and compiled.
PAPER_COLUMNS = tuple(
    name
    for name in COLUMNS
    if "int8" not in name and "torch" not in name and name not in ("contiguous", "contiguous, compiled")
)


@dataclass(frozen=True)
class Preset:
    """Shapes, sizes and columns that a preset measures unless a flag overrides them."""

    shapes: tuple[str, ...]
    context: tuple[int, ...]
    num_samples: tuple[int, ...]
    columns: tuple[str, ...]
    steps: int = 20


PRESETS = {
    "cpu": Preset(
        ("stories110M", "stories110M-gqa"), (2048,), (1, 8, 64), ("bifurcated, compiled", "contiguous SDPA"), steps=8
    ),
    "paper": Preset(("llama-2-7b", "mistral-7b"), (8192, 16384, 32768), tuple(EVERY_N), PAPER_COLUMNS),
    "quantised": Preset(("stories110M", "tinyllama-1.1b"), (128,), (1, 8, 64), (), steps=12),
    "kernels": Preset(("stories110M",), (2048,), (1, 8, 16, 64), (), steps=9),
    "tp": Preset(("tinyllama-1.1b",), (128,), (1, 8, 64), (), steps=8),
    "moe": Preset(("stories110M",), (256,), (1, 64), ("bifurcated", "bifurcated, compiled")),
    "attention": Preset(("stories110M",), (1024, 2048, 4096), (1, 4, 16, 64), ()),
    "decode": Preset(
        ("stories110M",),
        (4096,),
        (1, 8, 16, 64),
        ("bifurcated", "bifurcated, compiled", "contiguous, compiled", "contiguous SDPA"),
        steps=12,
    ),
}


def random_model(args: ModelArgs, device: torch.device, dtype: torch.dtype) -> Transformer:
    model = empty_model(args).to(dtype).to_empty(device=device).eval().requires_grad_(False)
    model.tie_output()
    for parameter in model.parameters():
        parameter.normal_(std=0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
    return model


def packs(options: argparse.Namespace, args: ModelArgs, rows: int) -> bool:
    """Return whether generate.py would pack the weights for a long run of `rows` rows."""
    return options.pack and choose_packing(options.device, options.dtype, args, 1 << 20, rows)


def model_of(options: argparse.Namespace, args: ModelArgs, rows: int) -> Transformer:
    """Build a random model for timing steps of `rows` rows, packed as generate.py would for a long run."""
    model = random_model(args, options.device, options.dtype)
    if packs(options, args, rows):
        pack_linears(model)
    return model


def random_context(args: ModelArgs, slots: int, like: Tensor) -> KVCache:
    cache = KVCache.empty(args.kv_shape, 1, slots, like)
    for tensor in cache.k + cache.v:
        tensor.normal_()
    return cache


def timed(function: Callable[[], object], times: int, device: torch.device, budget: float = 1e9) -> list[float]:
    """Return the seconds of each of `times` calls; of fewer, at least one, if they exceed `budget` seconds."""
    seconds: list[float] = []
    while len(seconds) < times and sum(seconds) < budget:
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return seconds


@torch.no_grad()
def time_decode(step: Step, cache: KVCache, context: int, repeats: int, budget: float = 1e9) -> float:
    """Return the median seconds of a decode step over positions from `context` on."""
    device, rows = cache.start.device, cache.rows
    token = torch.zeros(rows, dtype=torch.long, device=device)
    input_pos = torch.full((rows, 1), context, device=device)
    samples, seed = torch.arange(rows, device=device), torch.tensor(0, device=device)

    def advance() -> None:
        nonlocal token, input_pos
        token, _ = step(StepInput(token[:, None], input_pos, samples, seed), cache)
        input_pos = input_pos + 1

    timed(advance, 1, device)  # may compile
    timed(advance, 3, device, budget / 4)
    return statistics.median(timed(advance, repeats, device, budget))


@dataclass(frozen=True)
class Rates:
    """Measured rates: bytes per second moved by a large copy (read and written) or read by a sum, whichever is more,
    and operations per second (multiplications and additions) of a large matrix product."""

    bandwidth: float
    operations: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    big = torch.ones(1 << 26, device=device)
    copy = torch.ones_like(big)
    square = torch.ones(2048, 2048, device=device, dtype=dtype)

    def best(function: Callable[[], object]) -> float:
        return min(timed(function, 6, device, 1.0))

    moved, read = 2 * big.nbytes / best(lambda: copy.copy_(big)), big.nbytes / best(lambda: big.sum())
    return Rates(max(moved, read), 2 * 2048**3 / best(lambda: square @ square))


@dataclass(frozen=True)
class Cell:
    """One measurement. ms: of a step; None if it was not run, for the reason in `note`. limit_ms: time of a step's
    bytes or operations at the measured rates; limit: which of them binds."""

    shape: str
    column: str
    num_samples: int
    context: int
    ms: float | None
    limit_ms: float
    limit: str
    memory_bytes: int
    note: str = ""
    tokens_per_s: float | None = field(init=False)
    share_of_limit: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens_per_s", self.ms and 1000 * self.num_samples / self.ms)
        object.__setattr__(self, "share_of_limit", self.ms and self.limit_ms / self.ms)

    def __str__(self) -> str:
        return self.note if self.ms is None else f"{self.ms:.1f} ({self.share_of_limit:.0%})"


def plan_of(
    options: argparse.Namespace, args: ModelArgs, model: Transformer, context: int, rows: int, column: Column
) -> Plan:
    """Plan the bytes that a cell needs."""
    slots = min(MOST_SLOTS, options.steps + 8)
    work = Workload(context, rows, slots, column.layout, column.kv_dtype)
    return plan_run(args, weigh(model), work, options.device, options.dtype, 1 << 62, False)


def measure(options: argparse.Namespace, shape: str, args: ModelArgs, rates: Rates) -> Iterator[Cell]:
    """Measure every cell of a shape, row by row."""
    device, empty = options.device, empty_model(args).to(options.dtype)
    if weigh(empty).total > available_memory(device):
        raise ValueError(f"the weights of {shape} need {human(weigh(empty).total)}: choose a smaller --shape")
    steps = {}
    for packed, rows in {packs(options, args, rows): rows for rows in options.num_samples}.items():
        model = model_of(options, args, rows)
        for is_compiled in (False, True):
            engine = Engine(model)
            plan = plan_of(options, args, empty, 1, 1, COLUMNS["bifurcated"])
            plan = replace(plan, compiled=is_compiled, packed=False)
            engine.prepare(plan)
            steps[packed, is_compiled] = engine.step(Sampling(0.8, top_k=200), plan)
    for context in options.context:
        root = random_context(args, context, model.norm.weight)
        for rows in options.num_samples:
            shared = plan_of(options, args, empty, context, rows, COLUMNS["bifurcated"])
            limits = {
                "bandwidth": 1000 * shared.per_step / rates.bandwidth,
                "operations": 1000 * step_operations(args, context, rows) / rates.operations,
            }
            limit = max(limits, key=limits.__getitem__)
            for name in options.columns:
                column = COLUMNS[name]
                needed = plan_of(options, args, empty, context, rows, column)
                extra = needed.decoded + needed.workspace + (needed.context if column.kv_dtype == "int8" else 0)
                memory = needed.weights.total + shared.context + extra
                ms, note = None, f"needs {human(memory)}"
                release_freed_memory(device)
                if extra <= available_memory(device):
                    step = steps[packs(options, args, rows), column.compiled]
                    ms, note = attempt(column, root, rows, step, options)
                yield Cell(shape, name, rows, context, ms, limits[limit], limit, memory, note)


def attempt(
    column: Column, root: KVCache, rows: int, step: Step, options: argparse.Namespace
) -> tuple[float | None, str]:
    """Time a step. Returns (milliseconds, ""), or (None, reason) if it cannot run."""
    try:
        cache = column.make(root, rows, min(MOST_SLOTS, options.steps + 8))
        return 1000 * time_decode(step, cache, root.slots, options.steps, options.budget), ""
    except RuntimeError as error:
        if "No viable backend" in str(error) or "No available kernel" in str(error):
            return None, "no such kernel"
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        if options.device.type == "cuda":
            torch.cuda.empty_cache()
        return None, "out of memory"


@dataclass(frozen=True)
class Point:
    """One layer's attention in milliseconds. kind: prefill, decode or hybrid; by: the size that varies."""

    kind: str
    by: str
    num_samples: int
    context: int
    ours_ms: float
    sdpa_ms: float
    shape: str

    def __str__(self) -> str:
        sizes = f"{self.kind} by {self.by} | {self.num_samples} | {self.context}"
        return f"| {sizes} | {self.ours_ms:.2f} | {self.sdpa_ms:.2f} |"


@torch.no_grad()
def attention_points(options: argparse.Namespace, shape: str, args: ModelArgs) -> Iterator[Point]:
    """Time one layer's attention against SDPA over N copies of the context: prefill, decoding, and a prefill chunk next
    to decoding rows (hybrid), each by length and by batch. Eager."""
    args = replace(args, n_layer=1)
    like = torch.empty(0, device=options.device, dtype=options.dtype)

    def inputs(rows: int, size: int, begin: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q = torch.randn(rows, args.n_head, size, args.head_dim, device=like.device).to(like.dtype)
        k, v = torch.randn(2, rows, args.n_kv_head, size, args.head_dim, device=like.device).to(like.dtype)
        return q, k, v, (begin + torch.arange(size, device=like.device)).expand(rows, size)

    def ms(function: Callable[[], object]) -> float:
        timed(function, 2, like.device, options.budget)
        return 1000 * statistics.median(timed(function, options.steps, like.device, options.budget))

    def whole(rows: int, size: int) -> tuple[float, float]:
        given = inputs(rows, size, 0)
        both = ms(lambda: NoCache().attend(0, *given, None))  # the same kernel
        return both, both

    def chunk(begin: int, size: int) -> float:
        cache, given = KVCache.empty(args.kv_shape, 1, begin + size, like), inputs(1, size, begin)
        return ms(lambda: Prefill(cache, begin, size).attend(0, *given, None))

    def decoded(rows: int, context: int) -> tuple[float, float]:
        root, given = random_context(args, context, like), inputs(rows, 1, context)
        ours, theirs = share(root, rows, 64), copied(root, rows, 64)
        return ms(lambda: ours.attend(0, *given, None)), ms(lambda: theirs.attend(0, *given, None))

    def hybrid(rows: int, context: int) -> tuple[float, float]:
        part = min(512, context // 2)
        read, (ours, theirs) = chunk(context - part, part), decoded(rows, context)
        return read + ours, read + theirs

    short = min(options.context)
    for kind, time_both, few in (("prefill", whole, 1), ("decode", decoded, 16), ("hybrid", hybrid, 16)):
        for size in options.context:
            yield Point(kind, "length", few, size, *time_both(few, size), shape)
        for rows in (1, 2, 4) if kind == "prefill" else options.num_samples:
            yield Point(kind, "batch", rows, short, *time_both(rows, short), shape)


@torch.no_grad()
def prefill_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time prefill, as generate.py runs it, against the measured rate of a matrix product, as Markdown."""
    model = model_of(options, args, max(EVERY_N))
    engine = Engine(model)
    yield "| tokens | chunk | ms | T operations/s | of the matrix product's rate |\n|---|---|---|---|---|"
    for context in options.context:
        tokens = [token % args.vocab_size for token in range(context)]

        def read(tokens: list[int] = tokens) -> None:
            engine.prefill(
                KVCache.empty(args.kv_shape, 1, len(tokens), model.norm.weight), tokens, PREFILL_CHUNK, SILENT
            )

        timed(read, 1, options.device)
        seconds = statistics.median(timed(read, options.steps, options.device, options.budget))
        # A token attends to half of the prompt on average; only the last one has logits.
        head = 2 * (context - 1) * args.dim * args.vocab_size
        rate = (step_operations(args, context // 2, context) - head) / seconds
        share = rate / rates.operations
        yield f"| {context} | {PREFILL_CHUNK} | {1000 * seconds:.0f} | {rate / 1e12:.2f} | {share:.0%} |"


def load_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time loading a folder of safetensors against mapping it with safetensors alone, in milliseconds, as Markdown: the
    mapping alone, and with every byte read once from the page cache."""
    config = {
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

    def read(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.view(torch.int16).view(-1).max()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(config), "utf-8")
        save_file(random_model(args, torch.device("cpu"), torch.bfloat16).state_dict(), folder / "model.safetensors")
        size = (folder / "model.safetensors").stat().st_size

        def alone() -> list[Tensor]:
            return list(read_safetensors(folder / "model.safetensors").values())

        def ours() -> list[Tensor]:
            return list(load_model(read_checkpoint(folder), "cpu", torch.bfloat16).parameters())

        yield "| bytes | what | safetensors alone | load_model | ratio |\n|---|---|---|---|---|"
        for what, use in (("mapped", len), ("mapped and read", read)):
            times = []
            for load in (alone, ours):
                seconds = timed(partial(lambda load, use: use(load()), load, use), options.steps + 1, options.device)
                times.append(1000 * statistics.median(seconds[1:]))
            yield f"| {human(size)} | {what} | {times[0]:.1f} | {times[1]:.1f} | {times[1] / times[0]:.2f} |"


QUANTISERS: dict[str, Callable[[Tensor], Quantised]] = {
    "int8": quantise_int8,
    "int4, groups of 32": partial(quantise_int4, groupsize=32),
}


def quantised_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time a decode step with quantised weights, in the kernels that generate.py would use at that N, against plain
    weights, as Markdown. Eager."""
    yield "| context | N | weights | held | ms | plain / this | linear layers |\n|---|---|---|---|---|---|---|"
    for context, rows in ((context, rows) for context in options.context for rows in options.num_samples):
        plain = None
        for name in ("plain", *QUANTISERS):
            model = random_model(args, options.device, options.dtype)
            if quantiser := QUANTISERS.get(name):
                hold(model, quantiser, rows)
            weights = weigh(model)
            if packs(options, args, rows):
                pack_linears(model)
            engine = Engine(model, compile=False)
            cache = share(random_context(args, context, model.norm.weight), rows, min(MOST_SLOTS, options.steps + 8))
            work = Workload(context, rows, MOST_SLOTS)
            plan = plan_run(args, weights, work, options.device, options.dtype, 1 << 62, False)
            step = engine.step(Sampling(0.8, top_k=200), plan)
            ms = 1000 * time_decode(step, cache, context, options.steps, options.budget)
            plain = plain or ms
            by = ", ".join(f"{count} {kernel}" for kernel, count in kernels(model).items())
            yield f"| {context} | {rows} | {name} | {human(weights.per_step)} | {ms:.1f} | {plain / ms:.2f} | {by} |"


def hold(model: Transformer, quantiser: Callable[[Tensor], Quantised], rows: int) -> None:
    """Quantise every linear layer, held as from a checkpoint for steps of `rows` rows."""
    swap_linears(
        model,
        lambda name, linear: make_linear(
            quantiser(linear.weight), linear.bias, linear.weight.device, linear.weight.dtype, rows
        ),
    )


def shard_of(options: argparse.Namespace, args: ModelArgs, shard: Shard) -> Transformer:
    """Build a rank's part of a model with random weights."""
    model = random_model(args, options.device, options.dtype)
    for name, module in model.named_modules():
        for kind, whole in module._parameters.items():
            if whole is not None:
                part = shard.part(f"{name}.{kind}", whole.detach(), args)
                module._parameters[kind] = torch.nn.Parameter(part, requires_grad=False)
    shard.attach(model)
    if options.pack:
        pack_linears(model)
    return model


def tp_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time a decode step of one process with as many threads as there are ranks against a step of the ranks, as
    Markdown. The other ranks wait meanwhile. Eager."""
    ranks = join(None, options.device)
    world = ranks.shard.world
    if world == 1:
        raise ValueError("--preset tp takes ranks: torchrun --standalone --nproc_per_node=2 scripts/benchmark.py ...")
    part = shard_of(options, args, ranks.shard)
    whole = model_of(options, args, max(EVERY_N)) if ranks.leads else part

    def ms(model: Transformer, threads: int, shard: Shard, context: int, rows: int) -> float:
        torch.set_num_threads(threads)
        engine = Engine(model, compile=False, shard=shard)
        cache = share(random_context(engine.args, context, model.norm.weight), rows, MOST_SLOTS)
        plan = plan_of(options, engine.args, model, context, rows, COLUMNS["bifurcated"])
        step = engine.step(Sampling(0.8, top_k=200), plan)
        return 1000 * time_decode(step, cache, context, options.steps)  # the same number of steps on every rank

    yield f"| context | N | 1 process, {world} threads | {world} ranks | ratio |\n|---|---|---|---|---|"
    for context, rows in ((context, rows) for context in options.context for rows in options.num_samples):
        one = ranks.share(partial(ms, whole, world, WHOLE, context, rows))
        many = ranks.share(partial(float, ms(part, 1, ranks.shard, context, rows)))
        yield f"| {context} | {rows} | {one:.1f} | {many:.1f} | {many / one:.2f} |"


def in_turns(what: str, rows: int, limit: float, ours: Callable[[], object], theirs: Callable[[], object]) -> str:
    """Return a line of kernel_table. The sides alternate, so other load on the machine reaches both, and the minimum
    over all turns has the least of it. limit: in seconds."""
    cpu = torch.device("cpu")
    timed(ours, 2, cpu), timed(theirs, 2, cpu)
    turns = [timed(ours, 2, cpu)[1:] + timed(theirs, 2, cpu)[1:] for _ in range(IN_TURNS)]
    ms, their_ms = (1000 * min(side) for side in zip(*turns, strict=True))
    return f"| {what} | {rows} | {ms:.2f} | {their_ms:.2f} | {their_ms / ms:.2f} | {1000 * limit / ms:.0%} |"


@torch.no_grad()
def kernel_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time the operators of kernels.py, eagerly, against the same without them, as Markdown. The limit is that of
    reading the context or the weights, or of a matrix product's rate; whole steps have none."""
    yield "| what | N | ms | without, ms | without / with | limit / ms |\n|---|---|---|---|---|---|"
    for context, rows in ((context, rows) for context in options.context for rows in options.num_samples):
        model = model_of(options, args, rows)
        like = model.norm.weight
        plain, int8 = random_context(args, context, like), Int8Context(random_context(args, context, like))
        q = torch.randn(rows, args.n_head, 1, args.head_dim, dtype=like.dtype)
        where = torch.full((rows, 1), context)
        operations = 4 * rows * args.n_layer * args.n_head * args.head_dim * context / rates.operations
        for name, root in (("context", plain), ("context in int8", int8)):
            cache = KVCache.fork(root, rows, 0)
            sides = (partial(all_layers, way, cache, q, where) for way in (attend_chain, attend_by_torch))
            limit = max(operations, sum(tensor.nbytes for tensor in root.tensors) / rates.bandwidth)
            yield in_turns(f"{name}, {context} tokens", rows, limit, *sides)
        if not packs(options, args, rows):
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            sides = (partial(products, each, rows) for each in (list(map(StreamedLinear, linears)), linears))
            limit = sum(linear.weight.nbytes for linear in linears) / rates.bandwidth
            yield in_turns("products with plain weights", rows, limit, *sides)
        steps = [step_over(options, args, model, way(plain, rows, 8), context) for way in (share, by_torch)]
        yield in_turns("step", rows, 0, *steps)
        for name, quantiser in QUANTISERS.items():
            held = random_model(args, options.device, options.dtype)
            hold(held, quantiser, rows)
            other = step_over(options, args, held, share(plain, rows, 8), context)
            yield in_turns(f"step, weights in {name}, against plain ones", rows, 0, other, steps[0])
    for context in options.context:
        q, k, v = torch.randn(3, 1, args.n_head, context, args.head_dim, dtype=like.dtype)
        cache = KVCache(like, 1, tuple(k.shape), torch.zeros(1, dtype=torch.long))
        chunk = Prefill(cache, 0, context)
        ours = partial(chunk.attend, 0, q, k, v, torch.arange(context)[None], None)
        theirs = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, is_causal=True)
        limit = 2 * args.n_head * args.head_dim * context**2 / rates.operations
        yield in_turns(f"prompt of {context}, one layer, against SDPA", 1, limit, ours, theirs)


def products(linears: Iterable[nn.Linear], rows: int) -> None:
    for linear in linears:
        linear(torch.ones(rows, 1, linear.in_features, dtype=linear.weight.dtype))


def all_layers(way: Callable[..., Tensor], cache: KVCache, q: Tensor, input_pos: Tensor) -> None:
    for layer in range(len(cache.k)):
        way(cache, layer, q, input_pos, None)


def step_over(
    options: argparse.Namespace, args: ModelArgs, model: Transformer, cache: KVCache, position: int
) -> Callable[[], object]:
    """Return a callable that repeats the same step, eagerly."""
    rows = cache.rows
    plan = plan_run(args, weigh(model), Workload(position, rows, 8), options.device, options.dtype, 1 << 62, False)
    step = Engine(model, compile=False).step(Sampling(0.8, top_k=200), plan)
    tokens = torch.zeros(rows, 1, dtype=torch.long)
    return partial(step, StepInput(tokens, tokens + position, torch.arange(rows), torch.tensor(0)), cache)


class EveryExpert(nn.Module):
    """A mixture that computes all experts for all tokens and weights them, for timing."""

    def __init__(self, mixture: MixtureOfExperts) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x: Tensor) -> Tensor:
        mixture, tokens = self.mixture, x.flatten(0, 1)  # [M,dim]
        weights, chosen = mixture.router(tokens)
        weights = weights.new_zeros(len(tokens), mixture.mixture.experts).scatter(1, chosen, weights)  # [M,E]
        y = torch.zeros_like(tokens)
        for number, (w1, w3, w2) in enumerate(zip(mixture.w1, mixture.w3, mixture.w2, strict=True)):
            y += weights[:, number, None].to(x.dtype) * w2(mixture.activation(w1(tokens)) * w3(tokens))
        return y.view_as(x)


def experts_read(model: Transformer, nbytes: dict[str, int], run: Callable[[], object]) -> tuple[float, float]:
    """Return (experts read per mixture, bytes of experts read) of an average step of `run`, counted as the experts are
    multiplied, without the first step, whose rows are alike. nbytes: of each parameter, by name, before packing."""
    read: list[str] = []
    ends: list[int] = []  # of `read`, at each step
    hooks = [model.norm.register_forward_pre_hook(lambda norm, inputs: ends.append(len(read)))]
    linears = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    for prefix, experts in linears.items():
        for number, linear in enumerate(experts):
            name = f"{prefix}.{number}.weight"
            hooks.append(linear.register_forward_pre_hook(lambda linear, inputs, name=name: read.append(name)))
    run()
    for hook in hooks:
        hook.remove()
    read, steps = read[ends[0] :], len(ends) - 1
    return len(read) / len(linears) / steps, sum(nbytes[name] for name in read) / steps


MOE_COLUMNS = (
    "context", "N", "chosen experts, compiled", "chosen experts", "all experts", "ratio", "experts read a layer",
    "expected", "bytes of experts read", "of all",
)  # fmt: skip


@torch.no_grad()
def moe_table(options: argparse.Namespace, args: ModelArgs, rates: Rates) -> Iterator[str]:
    """Time a step of a mixture with its chosen experts and with all, eager and alternating, in milliseconds, and their
    ratio; and count what a step reads of the experts, next to the plan's expectation; as Markdown. The shape's
    feed-forward becomes eight experts of its width, of which a token uses two."""
    mixture = MoEConfig(8, 2, args.hidden_dim, True)
    args = replace(args, mixture=mixture)
    torch.manual_seed(0)
    model = random_model(args, options.device, options.dtype)
    weights, nbytes = weigh(model), {name: parameter.nbytes for name, parameter in model.named_parameters()}
    engine, plan = Engine(model), plan_of(options, args, model, 1, 1, COLUMNS["bifurcated"])
    eager = engine.step(Sampling(0.8, top_k=200), plan)
    fused = None
    if "bifurcated, compiled" in options.columns:
        engine.prepare(replace(plan, compiled=True, packed=False))
        fused = engine.step(Sampling(0.8, top_k=200), replace(plan, compiled=True))
    own: list[Any] = [block.feed_forward for block in model.layers]
    yield f"| {' | '.join(MOE_COLUMNS)} |\n" + "|---" * len(MOE_COLUMNS) + "|"

    def install(parts: Iterable[nn.Module]) -> None:
        for block, part in zip(model.layers, parts, strict=True):
            block.feed_forward = part  # type: ignore

    for context, rows in itertools.product(options.context, options.num_samples):
        root = random_context(args, context, model.norm.weight)
        if packs(options, args, rows):  # also for all that follow
            pack_linears(model)

        def ms(step: Step, root: KVCache = root, rows: int = rows) -> float:
            return 1000 * time_decode(step, share(root, rows, MOST_SLOTS), root.slots, options.steps, options.budget)

        compiled, chosen, every = "" if fused is None else f"{ms(fused):.1f}", [], []
        for _ in range(2):
            chosen.append(ms(eager))
            install(map(EveryExpert, own))
            every.append(ms(eager))
            install(own)
        touched, size = experts_read(model, nbytes, partial(ms, eager))
        ours, theirs = statistics.mean(chosen), statistics.mean(every)
        times = f"{compiled} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f}"
        read = f"{touched:.2f} | {mixture.expected(rows):.2f} | {human(size)} | {size / weights.experts:.0%}"
        yield f"| {context} | {rows} | {times} | {read} |"


TABLES = {
    "prefill": prefill_table,
    "load": load_table,
    "kernels": kernel_table,
    "moe": moe_table,
    "quantised": quantised_table,
    "tp": tp_table,
}


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def table(cells: list[Cell], columns: list[str]) -> str:
    """Format cells as Markdown: a row per context and N; ms per step and share of the limit."""
    lines = ["| context | N | " + " | ".join(columns) + " | limit |", "|" + "---|" * (len(columns) + 3)]
    for context, rows in dict.fromkeys((cell.context, cell.num_samples) for cell in cells):
        found = {cell.column: cell for cell in cells if (cell.context, cell.num_samples) == (context, rows)}
        any_cell = next(iter(found.values()))
        texts = [str(found.get(name, "")) for name in columns]
        lines.append(f"| {context} | {rows} | " + " | ".join(texts) + f" | {any_cell.limit_ms:.1f} {any_cell.limit} |")
    return "\n".join(lines)


def header(options: argparse.Namespace, rates: Rates) -> str:
    device = options.device
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    ).stdout.strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
    threads = f", {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}" * (device.type == "cpu")
    return (
        f"`python scripts/benchmark.py {shlex.join(options.command)}`\n\n"
        f"commit {commit or 'unknown'}, torch {torch.__version__}, {name}{threads}, {str(options.dtype)[6:]}"
        f"{', packed weights' * options.pack}; "
        f"measured in this run: {rates.bandwidth / 1e9:.0f} GB/s, {rates.operations / 1e12:.2f} T operations/s in a "
        "matrix product. Milliseconds; of a decode step also the share of the limit that is reached."
    )


def shape_of(name: str, settings: list[str]) -> ModelArgs:
    """Return the named shape with the fields of --set. Raises ValueError if there is no such field."""
    fields: dict[str, Any] = {}
    for setting in settings:
        field_name, _, value = setting.partition("=")
        if type(getattr(SHAPES[name], field_name, None)) is not int or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--set {setting}: write a field of ModelArgs and a number, such as n_kv_head=4")
        fields[field_name] = int(value)
    return replace(SHAPES[name], **fields)


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description="Time the decode step, for every way to hold the context.")
    choices = dict.fromkeys((*PRESETS, *TABLES))
    parser.add_argument("--preset", choices=choices, default="decode", help="what to measure; other flags change it")
    parser.add_argument("--shape", choices=SHAPES, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="change a field of the shapes")
    parser.add_argument("--context", type=int, nargs="+", help="tokens")
    parser.add_argument("-n", "--num_samples", type=int, nargs="+")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, metavar="COLUMN", help=", ".join(map(repr, COLUMNS)))
    parser.add_argument("--steps", type=int, help="timed steps per cell, at most")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of timed steps per cell; default: 2")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto")
    parser.add_argument("--plain_weights", action="store_true", help="do not pack them (linear.py)")
    parser.add_argument("--out", type=Path, help="append one JSON object per cell to this file")
    parser.add_argument("--charts", type=Path, help="draw the cells as PNG files in this folder (needs matplotlib)")
    return parser


OF_PRESET = "context", "num_samples", "columns", "steps"  # unless a flag gives them


def complete(options: argparse.Namespace) -> tuple[argparse.Namespace, dict[str, ModelArgs]]:
    """Fill in the preset where no flag is given; return the shapes. Raises ValueError if they cannot be run."""
    preset = PRESETS.get(options.preset, PRESETS["decode"])
    missing = [name for name in OF_PRESET if getattr(options, name) is None]
    options = changed(options, **{name: getattr(preset, name) for name in missing})
    numbers = [*options.num_samples, *options.context, options.steps]
    if min(numbers) < 1 or options.steps > MOST_SLOTS - 8 or not options.budget > 0:
        raise ValueError(
            f"num_samples, context and steps must be at least 1, steps at most {MOST_SLOTS - 8}, budget above 0"
        )
    if options.preset == "attention" and min(options.context) < 2:
        raise ValueError("--preset attention needs a context of at least 2 tokens: part of it is a chunk")
    for path, taken in ((options.out, Path.is_dir), (options.charts, Path.is_file)):
        if path is not None and (taken(path) or not path.parent.is_dir()):
            raise ValueError(f"{path} cannot be written: --out is a file and --charts a folder, in one that exists")
    if options.preset in TABLES and (options.out or options.charts):
        raise ValueError(f"--out and --charts are not for --preset {options.preset}")
    if options.charts and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--charts needs matplotlib: install requirements-dev.txt")
    device, dtype = choose_device(options.device), options.dtype
    if options.preset == "load":
        if dtype not in ("auto", "bfloat16"):
            raise ValueError(f"--preset load reads bfloat16: leave out --dtype {dtype}")
        dtype = "bfloat16"
    chosen = choose_dtype(dtype, device)
    pack = can_pack(device, chosen) and options.preset not in ("attention", "load") and not options.plain_weights
    options = changed(options, device=device, dtype=chosen, pack=pack, command=sys.argv[1:])
    return options, {name: shape_of(name, options.set) for name in options.shape or preset.shapes}


def append(path: Path | None, cell: Cell | Point) -> None:
    """Append one JSON object per line."""
    if path is not None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell)) + "\n")


def run(options: argparse.Namespace, shapes: dict[str, ModelArgs]) -> list[Cell | Point]:
    """Measure, printing each shape's table when it is done; an interruption prints what it has."""
    # Loading multiplies nothing, and a bfloat16 product takes seconds on a CPU without instructions for it.
    rates = machine_rates(options.device, torch.float32 if options.preset == "load" else options.dtype)
    print(header(options, rates), flush=True)
    cells: list[Cell | Point] = []
    total = len(shapes) * len(options.context) * len(options.num_samples) * len(options.columns)
    begin = time.perf_counter()
    for shape, args in shapes.items():
        print(f"\n{shape}: {args.n_layer} layers, dim {args.dim}, {args.n_head} heads, {args.n_kv_head} for keys\n")
        if options.preset in TABLES:
            for line in TABLES[options.preset](options, args, rates):
                print(line, flush=True)
            continue
        if options.preset == "attention":
            print("| what | N | T | this engine | SDPA |\n|---|---|---|---|---|")
            for point in attention_points(options, shape, args):
                cells.append(point)
                print(point, flush=True)
                append(options.out, point)
            continue
        own: list[Cell] = []
        try:
            for cell in measure(options, shape, args, rates):
                own.append(cell)
                left = (time.perf_counter() - begin) * (total / (len(cells) + len(own)) - 1)
                log(f"{shape}, {cell.column}, N {cell.num_samples}, T {cell.context}: {cell}; about {left:.0f} s left")
                append(options.out, cell)
        finally:
            cells += own
            print(table(own, options.columns), flush=True)
    return cells


def main() -> int:
    options = build_parser().parse_args()
    keep_freed_memory()
    if os.environ.get("RANK", "0") != "0":  # under torchrun, one rank writes
        sys.stdout = open(os.devnull, "w")
    try:
        torch._dynamo.config.recompile_limit = 64  # every column of every shape compiles the same code
        with contextlib.suppress(BrokenPipeError):
            options, shapes = complete(options)
            cells = run(options, shapes)
            if options.charts and cells:
                from plot import draw

                log("\n".join(map(str, draw([asdict(cell) for cell in cells], options.charts))))
    except (ValueError, OSError) as error:
        return print_error(error)
    except KeyboardInterrupt:
        return 130
    leave()
    return 0


if __name__ == "__main__":
    finish(main)
