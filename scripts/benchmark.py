"""Time the decode step of a model of a named shape with random weights, for every context layout.

    python scripts/benchmark.py --preset cpu
    python scripts/benchmark.py --shape stories110M --context 4096 -n 1 8 16 64 --out cells.jsonl --charts charts

Prints Markdown tables to stdout row by row; --out adds one JSON object per cell, --charts draws them. A step is the
network, the logits and the draw of a token; a cell is the median of --steps steps after a warm-up. The columns of one N
are measured one after another in one process, so their ratios share the machine's state. Next to every time stands its
limit: the bytes that a step must read over the measured bandwidth, or its operations over the measured rate of a matrix
product, whichever takes longer.
"""

import common
from common import (  # isort: split
    CPU,
    SAMPLING,
    SHAPES,
    Table,
    alternate,
    clocked,
    count,
    median_ms,
    medians,
    random_model,
    timed,
)

import argparse
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bifurcated_attention import ScoreMod
from cache import KVCache, NoCache, Prefill, attend_by_torch
from cli.options import changed
from cli.ranks import join
from engine.engine import SILENT, Engine
from engine.graphs import Step, StepInput
from engine.layouts import Int8Context, SDPACache, copied
from engine.plan import (
    Plan,
    available_memory,
    choose_packing,
    human,
    plan_run,
    release_freed_memory,
    step_operations,
    weigh,
)
from engine.request import Request, Workload
from engine.runner import bucket
from layers.kernels import attend_chain
from layers.linear import Quantised, StreamedLinear, can_pack, hold_linears, kernels, make_linear, swap_linears
from layers.moe import ExpertLinear, MixtureOfExperts, MoEConfig
from loading.checkpoint import load_model, read_checkpoint, read_safetensors
from model import ModelArgs, Transformer, empty_model
from quantize import quantise_int4, quantise_int8
from tp import WHOLE, Shard


class Column(NamedTuple):
    """A context layout (a constructor of caches), its step compiled or not; layout and kv_dtype as in Request."""

    make: Callable[[KVCache, int, int], KVCache]
    layout: str
    kv_dtype: str = "auto"
    compiled: bool = False


class OneKernel(SDPACache):
    """Copies of the context, read by one SDPA kernel. All slots count as visible, since not every kernel takes a mask:
    for timing only, since slots that no step has reached are read too."""

    kernel: SDPBackend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        self.write(layer, k, v, input_pos)
        k, v = self.k[layer], self.v[layer]
        with sdpa_kernel(self.kernel):
            return scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


class TorchCache(KVCache):
    """KVCache without the operator of kernels.py."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        self.write(layer, k, v, input_pos)
        return attend_by_torch(self, layer, q, input_pos, mod)


def fork_int8(context: KVCache, n: int, slots: int) -> KVCache:
    return KVCache.fork(Int8Context.of(copied(context, 1, 0, kind=KVCache)), n, slots)


def copied_for(kernel: SDPBackend) -> Callable[[KVCache, int, int], KVCache]:
    """Return the contiguous layout, read by that kernel."""
    return partial(copied, kind=type(kernel.name, (OneKernel,), {"kernel": kernel}))


EAGER = {
    "bifurcated": Column(KVCache.fork, "bifurcated"),
    "bifurcated, int8": Column(fork_int8, "bifurcated", "int8"),
    "bifurcated, torch": Column(TorchCache.fork, "bifurcated"),
    "contiguous": Column(partial(copied, kind=KVCache), "contiguous"),
    "contiguous SDPA": Column(copied, "contiguous"),
    "contiguous SDPA, flash": Column(copied_for(SDPBackend.FLASH_ATTENTION), "contiguous"),
    "contiguous SDPA, efficient": Column(copied_for(SDPBackend.EFFICIENT_ATTENTION), "contiguous"),
    "contiguous SDPA, math": Column(copied_for(SDPBackend.MATH), "contiguous"),
    "expanded SDPA": Column(SDPACache.fork, "expanded"),
}
COLUMNS = {
    f"{name}, compiled" if compiled else name: column._replace(compiled=compiled)
    for name, column in EAGER.items()
    for compiled in (False, True)
}
IN_TURNS = 9
EVERY_N = tuple(1 << power for power in range(12))
# What the paper compares, each eager and compiled.
PAPER_COLUMNS = tuple(
    name
    for name in COLUMNS
    if "int8" not in name and "torch" not in name and name not in ("contiguous", "contiguous, compiled")
)
QUANTISERS: dict[str, Callable[[Tensor], Quantised]] = {
    "int8": quantise_int8,
    "int4, groups of 32": partial(quantise_int4, groupsize=32),
}


class Rates(NamedTuple):
    """Measured rates: bytes per second moved by a large copy (read and written) or read by a sum, whichever is more,
    and operations per second (multiplications and additions) of a large matrix product: on CUDA of 1 GB and a side of
    8,192, on a CPU of 256 MB and 2,048."""

    bandwidth: float
    operations: float


def machine_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    elements, side = (1 << 28, 8192) if device.type == "cuda" else (1 << 26, 2048)
    big = torch.ones(elements, device=device)
    copy = torch.ones_like(big)
    square = torch.ones(side, side, device=device, dtype=dtype)

    def best(function: Callable[[], object]) -> float:
        return min(timed(function, 6, device, 1.0))

    moved, read = 2 * big.nbytes / best(lambda: copy.copy_(big)), big.nbytes / best(lambda: big.sum())
    return Rates(max(moved, read), 2 * side**3 / best(lambda: square @ square))


@dataclass(frozen=True)
class Bench:
    """Run one table for one shape. records: the cells of all shapes so far, as --out writes them.
    started: by time.perf_counter."""

    options: argparse.Namespace
    shape: str
    args: ModelArgs
    rates: Rates
    records: list[dict[str, Any]]
    started: float

    @property
    def slots(self) -> int:
        """Slots of a row for its timed steps: on CUDA as the engine makes visible, whose fused kernels read them all;
        on a CPU, whose kernel reads the written ones, as few as suffice."""
        needed = self.options.steps + 8
        return bucket(needed) if self.options.device.type == "cuda" else needed

    @property
    def like(self) -> Tensor:
        return torch.empty(0, device=self.options.device, dtype=self.options.dtype)

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield each context with each N."""
        return itertools.product(self.options.context, self.options.num_samples)

    def table(self, *columns: str) -> Table:
        return Table(*columns, out=self.options.out, shape=self.shape)

    def record(self, **fields: Any) -> None:
        """Record a cell."""
        self.records.append({"shape": self.shape, **fields})
        common.append(self.options.out, self.records[-1])

    def log(self, cell: str) -> None:
        """Log a cell of all, and how long the rest should take."""
        options, seconds = self.options, time.perf_counter() - self.started
        total = len(options.shape) * len(options.columns) * len(list(self.sizes()))
        left = seconds * (total / len(self.records) - 1)
        print(f"{self.shape}, {cell}; about {left:.0f} s left", file=sys.stderr, flush=True)

    def packs(self, rows: int) -> bool:
        """Return whether generate.py would pack the weights for a long run of `rows` rows."""
        options = self.options
        return options.pack and choose_packing(options.device, options.dtype, self.args, 1 << 20, rows)

    def random(self) -> Transformer:
        return random_model(self.args, self.options.device, self.options.dtype)

    def model(self, rows: int) -> Transformer:
        """Build a random model for steps of `rows` rows, packed as generate.py would for a long run."""
        model = self.random()
        if self.packs(rows):
            hold_linears(model, pack=True)
        return model

    def context(self, slots: int) -> KVCache:
        """Build a context of random keys and values."""
        cache = KVCache.empty(self.args.kv_shape, 1, slots, self.like)
        for tensor in cache.k + cache.v:
            tensor.normal_()
        return cache

    def plan(self, weights: Transformer, context: int, rows: int, column: Column) -> Plan:
        """Plan the bytes of a cell, those of `weights` included."""
        options = self.options
        work = Workload(context, rows, self.slots, column.layout, column.kv_dtype)
        return plan_run(self.args, weigh(weights), work, options.device, options.dtype, 1 << 62, False)

    def ms(self, step: Step, cache: KVCache, position: int) -> float:
        """Return the median milliseconds of a decode step over positions from `position` on."""
        options = self.options
        return median_ms(stepping(step, cache, position), options.steps, options.device, options.budget)


def step_of(model: Transformer, compile: bool = False, shard: Shard = WHOLE) -> Step:
    """Return a decode step, the draw of a token included."""
    engine = Engine(model, compile=compile, shard=shard)
    plan = replace(engine.plan(1, Request(sampling=SAMPLING)), compiled=compile, packed=False)
    engine.prepare(plan)
    return engine.step(plan, lambda: SAMPLING)


def stepping(step: Step, cache: KVCache, position: int, stride: int = 1) -> Callable[[], None]:
    """Return a callable that runs a step at `position`, and at its next call `stride` later."""
    device, rows = cache.start.device, cache.rows
    token, input_pos = torch.zeros(rows, 1, dtype=torch.long, device=device), torch.tensor(position, device=device)
    samples, seed = torch.arange(rows, device=device), torch.tensor(0, device=device)

    def advance() -> None:
        nonlocal token, input_pos
        drawn, _ = step(StepInput(token, input_pos.repeat(rows, 1), samples, seed), cache)
        token, input_pos = drawn[:, None] if stride else token, input_pos + stride

    return advance


def decode_table(bench: Bench) -> None:
    """Time a step of every column in milliseconds, next to the share of its limit that it reaches."""
    options, empty = bench.options, empty_model(bench.args).to(bench.options.dtype)
    if weigh(empty).total > available_memory(options.device):
        raise ValueError(f"the weights of {bench.shape} need {human(weigh(empty).total)}: choose a smaller --shape")
    steps: dict[tuple[bool, bool], Step] = {}
    for packed, rows in {bench.packs(rows): rows for rows in options.num_samples}.items():
        model = bench.model(rows)
        steps |= {(packed, compiled): step_of(model, compiled) for compiled in (False, True)}
    table = Table("context", "N", *options.columns, "limit")
    for context in options.context:
        root = bench.context(context)
        for rows in options.num_samples:
            shared = bench.plan(empty, context, rows, COLUMNS["bifurcated"])
            operations = step_operations(bench.args, context, rows) / bench.rates.operations
            limits = {"bandwidth": 1000 * shared.per_step / bench.rates.bandwidth, "operations": 1000 * operations}
            limit = max(limits, key=limits.__getitem__)
            texts = dict.fromkeys(options.columns, "-")
            try:
                for name in options.columns:
                    column = COLUMNS[name]
                    plan = bench.plan(empty, context, rows, column)
                    step = steps[bench.packs(rows), column.compiled]
                    cell = measure(bench, column, root, plan, step)
                    cell |= {"column": name, "context": context, "limit_ms": limits[limit], "limit": limit}
                    cell["share_of_limit"] = cell["ms"] and limits[limit] / cell["ms"]
                    bench.record(**cell)
                    texts[name] = cell["note"] or f"{cell['ms']:.1f} ({cell['share_of_limit']:.0%})"
                    bench.log(f"{name}, N {rows}, T {context}: {texts[name]}")
            finally:  # an interruption prints what it has
                table.row(context, rows, *texts.values(), f"{limits[limit]:.1f} {limit}")


def measure(bench: Bench, column: Column, root: KVCache, plan: Plan, step: Step) -> dict[str, Any]:
    """Time a step, unless it cannot run, for the reason that is its "note"."""
    rows, converted = plan.workload.num_samples, plan.context if column.kv_dtype == "int8" else 0
    extra = plan.decoded + plan.workspace + converted
    memory = plan.weights.total + sum(tensor.nbytes for tensor in root.tensors) + extra
    ms, note = None, f"needs {human(memory)}"
    release_freed_memory(bench.options.device)
    if extra <= available_memory(bench.options.device):
        ms, note = attempt(bench, column, root, rows, step)
    per_second = ms and 1000 * rows / ms
    return {"num_samples": rows, "ms": ms, "note": note, "memory_bytes": memory, "tokens_per_s": per_second}


def attempt(bench: Bench, column: Column, root: KVCache, rows: int, step: Step) -> tuple[float | None, str]:
    """Time a step. Returns (milliseconds, ""), or (None, reason) if it cannot run."""
    try:
        return bench.ms(step, column.make(root, rows, bench.slots), root.slots), ""
    except RuntimeError as error:
        if "No viable backend" in str(error) or "No available kernel" in str(error):
            return None, "no such kernel"
        if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
            raise
        release_freed_memory(bench.options.device)
        return None, "out of memory"


def attention_table(bench: Bench) -> None:
    """Time one layer's attention against SDPA over N copies of the context: prefill, decoding, and a prefill chunk next
    to decoding rows (hybrid), each by length and by batch. Eager."""
    options, args, like = bench.options, replace(bench.args, n_layer=1), bench.like
    bench = replace(bench, args=args)
    table = Table("what", "N", "T", "this engine:.2f", "SDPA:.2f")

    def inputs(rows: int, size: int, begin: int) -> tuple[int, Tensor, Tensor, Tensor, Tensor, None]:
        """Return the arguments of `attend`."""
        q = torch.randn(rows, args.n_head, size, args.head_dim, device=like.device).to(like.dtype)
        k, v = torch.randn(2, rows, args.n_kv_head, size, args.head_dim, device=like.device).to(like.dtype)
        return 0, q, k, v, (begin + torch.arange(size, device=like.device)).expand(rows, size), None

    def ms(attend: Callable[..., Tensor], given: tuple) -> float:
        return median_ms(partial(attend, *given), options.steps, options.device, options.budget)

    def prefill(rows: int, size: int) -> tuple[float, float]:
        both = ms(NoCache().attend, inputs(rows, size, 0))  # the same kernel
        return both, both

    def decode(rows: int, context: int) -> tuple[float, float]:
        root, given = bench.context(context), inputs(rows, 1, context)
        return ms(KVCache.fork(root, rows, 64).attend, given), ms(copied(root, rows, 64).attend, given)

    def hybrid(rows: int, context: int) -> tuple[float, float]:
        size = min(512, -(-context // 2))
        cache, begin = KVCache.empty(args.kv_shape, 1, context, like), context - size
        read = ms(Prefill(cache, begin, size).attend, inputs(1, size, begin))
        ours, theirs = decode(rows, context)
        return read + ours, read + theirs

    short = min(options.context)
    for measure, few in ((prefill, 1), (decode, 16), (hybrid, 16)):
        kind, numbers = measure.__name__, (1, 2, 4) if measure is prefill else options.num_samples
        points = [("length", few, size) for size in options.context] + [("batch", rows, short) for rows in numbers]
        for by, rows, size in points:
            ours, theirs = measure(rows, size)
            table.row(f"{kind} by {by}", rows, size, ours, theirs)
            bench.record(kind=kind, by=by, num_samples=rows, context=size, ours_ms=ours, sdpa_ms=theirs)


def prefill_table(bench: Bench) -> None:
    """Time prefill, as generate.py runs it, against the measured rate of a matrix product."""
    options, args = bench.options, bench.args
    engine = Engine(bench.model(max(EVERY_N)))
    chunk = engine.chunk(None)
    table = bench.table("tokens", "chunk", "ms:.0f", "T operations/s:.2f", "of the matrix product's rate:.0%")
    for context in options.context:
        tokens = [token % args.vocab_size for token in range(context)]

        def read(tokens: list[int] = tokens) -> None:
            cache = KVCache.empty(args.kv_shape, 1, len(tokens), bench.like)
            engine.prefill(cache, tokens, chunk, SILENT)

        ms = median_ms(read, options.steps, options.device, options.budget)
        # A token attends to half of the prompt on average; only the last one has logits.
        head = 2 * (context - 1) * args.dim * args.vocab_size
        rate = (step_operations(args, context // 2, context) - head) / ms * 1000
        table.row(context, chunk, ms, rate / 1e12, rate / bench.rates.operations)


def load_table(bench: Bench) -> None:
    """Time loading a folder of safetensors against mapping it with safetensors alone, in milliseconds: the mapping
    alone, and with every byte read once from the page cache."""
    from safetensors.torch import save_file  # only this table needs it

    def read(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor.view(torch.int16).view(-1).max()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = folder / "model.safetensors"
        (folder / "config.json").write_text(json.dumps(common.llama_config(bench.args)), "utf-8")
        save_file(random_model(bench.args, CPU, torch.bfloat16).state_dict(), weights)

        def alone() -> list[Tensor]:
            return list(read_safetensors(weights).values())

        def ours() -> list[Tensor]:
            return list(load_model(read_checkpoint(folder), "cpu", torch.bfloat16).parameters())

        table = bench.table("bytes", "what", "safetensors alone:.1f", "load_model:.1f", "ratio:.2f")
        for what, use in (("mapped", len), ("mapped and read", read)):
            sides = [clocked(partial(lambda load, use: use(load()), load, use)) for load in (alone, ours)]
            least, took = (1000 * median for median in medians(alternate(sides, bench.options.steps, warm_up=1)))
            table.row(human(weights.stat().st_size), what, least, took, took / least)


def quantised_table(bench: Bench) -> None:
    """Time a decode step with quantised weights, in the kernels that generate.py would use at that N, against plain
    weights: eager, on CUDA compiled."""
    table = bench.table("context", "N", "weights", "held", "ms:.1f", "plain / this:.2f", "linear layers")
    for context, rows in bench.sizes():
        plain = None
        for name in ("plain", *QUANTISERS):
            model = bench.random()
            if name in QUANTISERS:
                hold(model, QUANTISERS[name], rows)
            held = weigh(model).per_step
            if bench.packs(rows):
                hold_linears(model, pack=True)
            step = step_of(model, compile=bench.options.device.type == "cuda")
            ms = bench.ms(step, KVCache.fork(bench.context(context), rows, bench.slots), context)
            plain = plain or ms
            by = ", ".join(f"{number} {kernel}" for kernel, number in kernels(model).items())
            table.row(context, rows, name, human(held), ms, plain / ms, by)


def hold(model: Transformer, quantiser: Callable[[Tensor], Quantised], rows: int) -> None:
    """Quantise every linear layer, held as from a checkpoint for steps of `rows` rows."""

    def make(name: str, linear: nn.Linear) -> nn.Module:
        weight = linear.weight
        return make_linear(quantiser(weight), linear.bias, weight.device, weight.dtype, rows)

    swap_linears(model, make)


def part_of(bench: Bench, shard: Shard) -> Transformer:
    """Build a rank's part of a model with random weights."""
    model = bench.random()
    for name, module in model.named_modules():
        for kind, whole in module._parameters.items():
            if whole is not None:
                part = shard.part(f"{name}.{kind}", whole.detach(), bench.args)
                module._parameters[kind] = nn.Parameter(part, requires_grad=False)
    shard.attach(model)
    if bench.options.pack:
        hold_linears(model, pack=True)
    return model


def tp_table(bench: Bench) -> None:
    """Time an eager decode step of one process with as many threads as there are ranks against a step of the ranks.
    The other ranks wait meanwhile."""
    ranks = join(None, bench.options.device)
    world = ranks.shard.world
    if world == 1:
        raise ValueError("--preset tp takes ranks: torchrun --standalone --nproc_per_node=2 scripts/benchmark.py ...")
    part = part_of(bench, ranks.shard)
    whole = bench.model(max(EVERY_N)) if ranks.leads else part
    # The same number of steps on every rank, however long they take.
    bench = replace(bench, options=changed(bench.options, budget=float("inf")))

    def ms(model: Transformer, threads: int, shard: Shard, context: int, rows: int) -> float:
        torch.set_num_threads(threads)
        root = replace(bench, args=shard.local(bench.args)).context(context)
        return bench.ms(step_of(model, shard=shard), KVCache.fork(root, rows, bench.slots), context)

    table = bench.table("context", "N", f"1 process, {world} threads:.1f", f"{world} ranks:.1f", "ratio:.2f")
    for context, rows in bench.sizes():
        one = ranks.share(partial(ms, whole, world, WHOLE, context, rows))
        many = ranks.share(partial(float, ms(part, 1, ranks.shard, context, rows)))
        table.row(context, rows, one, many, many / one)


def kernel_table(bench: Bench) -> None:
    """Time the operators of kernels.py, eagerly, against the same without them. The limit is that of reading the
    context or the weights, or of a matrix product's rate; whole steps have none."""
    args, rates, like = bench.args, bench.rates, bench.like
    table = bench.table("what", "N", "ms:.2f", "without, ms:.2f", "without / with:.2f", "limit / ms:.0%")

    def compare(what: str, rows: int, limit: float, *sides: Callable[[], object]) -> None:
        """Print a row. The minimum over all turns has the least of other load on the machine. limit: in seconds."""
        seconds = alternate([clocked(side, 2) for side in sides], IN_TURNS, warm_up=1)
        ms, their_ms = (1000 * min(side) for side in seconds)
        table.row(what, rows, ms, their_ms, their_ms / ms, 1000 * limit / ms)

    for context, rows in bench.sizes():
        model, plain = bench.model(rows), bench.context(context)
        q = torch.randn(rows, args.n_head, 1, args.head_dim, dtype=like.dtype)
        where = torch.full((rows, 1), context)
        operations = 4 * rows * args.n_layer * args.n_head * args.head_dim * context / rates.operations
        for name, root in (("context", plain), ("context in int8", Int8Context.of(bench.context(context)))):
            cache = KVCache.fork(root, rows, 0)
            sides = (partial(all_layers, way, cache, q, where) for way in (attend_chain, attend_by_torch))
            limit = max(operations, sum(tensor.nbytes for tensor in root.tensors) / rates.bandwidth)
            compare(f"{name}, {context} tokens", rows, limit, *sides)
        if not bench.packs(rows):
            linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
            sides = (partial(products, each, rows) for each in (list(map(StreamedLinear, linears)), linears))
            limit = sum(linear.weight.nbytes for linear in linears) / rates.bandwidth
            compare("products with plain weights", rows, limit, *sides)
        caches = [kind.fork(plain, rows, 8) for kind in (KVCache, TorchCache)]
        steps = [stepping(step_of(model), cache, context, stride=0) for cache in caches]
        compare("step", rows, 0, *steps)
        for name, quantiser in QUANTISERS.items():
            held = bench.random()
            hold(held, quantiser, rows)
            other = stepping(step_of(held), KVCache.fork(plain, rows, 8), context, stride=0)
            compare(f"step, weights in {name}, against plain ones", rows, 0, other, steps[0])
    for context in bench.options.context:
        q, k, v = torch.randn(3, 1, args.n_head, context, args.head_dim, dtype=like.dtype)
        chunk = Prefill(KVCache.empty((1, args.n_head, args.head_dim), 1, context, like), 0, context)
        ours = partial(chunk.attend, 0, q, k, v, torch.arange(context)[None], None)
        theirs = partial(scaled_dot_product_attention, q, k, v, is_causal=True)
        limit = 2 * args.n_head * args.head_dim * context**2 / rates.operations
        compare(f"prompt of {context}, one layer, against SDPA", 1, limit, ours, theirs)


def products(linears: Sequence[nn.Linear], rows: int) -> None:
    for linear in linears:
        linear(torch.ones(rows, 1, linear.in_features, dtype=linear.weight.dtype))


def all_layers(way: Callable[..., Tensor], cache: KVCache, q: Tensor, input_pos: Tensor) -> None:
    for layer in range(len(cache.k)):
        way(cache, layer, q, input_pos, None)


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


def moe_table(bench: Bench) -> None:
    """Time a step of a mixture with its chosen experts and with all, eager and alternating, in milliseconds; and count
    what a step reads of the experts, next to the plan's expectation. The shape's feed-forward becomes eight experts of
    its width, of which a token uses two."""
    mixture = MoEConfig(8, 2, bench.args.hidden_dim, True)
    bench = replace(bench, args=replace(bench.args, mixture=mixture))
    model = bench.random()
    every_byte, nbytes = weigh(model).experts, {name: each.nbytes for name, each in model.named_parameters()}
    eager, fused = step_of(model), step_of(model, compile=True)
    own: list[Any] = [block.feed_forward for block in model.layers]
    table = bench.table(
        "context", "N", "chosen experts, compiled:.1f", "chosen experts:.1f", "all experts:.1f", "ratio:.2f",
        "experts read a layer:.2f", "expected:.2f", "bytes of experts read", "of all:.0%",
    )  # fmt: skip

    def install(parts: Iterable[nn.Module]) -> None:
        for block, part in zip(model.layers, parts, strict=True):
            block.feed_forward = part  # type: ignore

    for context, rows in bench.sizes():
        root = bench.context(context)
        if bench.packs(rows):  # also for all that follow
            hold_linears(model, pack=True)

        def ms(step: Step, root: KVCache = root, rows: int = rows) -> float:
            return bench.ms(step, KVCache.fork(root, rows, bench.slots), root.slots)

        def with_all() -> float:
            install(map(EveryExpert, own))
            found = ms(eager)
            install(own)
            return found

        compiled = ms(fused) if "bifurcated, compiled" in bench.options.columns else None
        chosen, every = medians(alternate((partial(ms, eager), with_all), 2))
        touched, size = experts_read(model, nbytes, partial(ms, eager))
        read = (touched, mixture.expected(rows), human(size), size / every_byte)
        table.row(context, rows, compiled, chosen, every, chosen / every, *read)


class Preset(NamedTuple):
    """Default measurements of a table; flags override them."""

    table: Callable[[Bench], None]
    shape: Sequence[str] = ("stories110M",)
    context: Sequence[int] = (4096,)
    num_samples: Sequence[int] = (1, 8, 16, 64)
    columns: Sequence[str] = ("bifurcated", "bifurcated, compiled", "contiguous, compiled", "contiguous SDPA")
    steps: int = 12


BOTH_HEADS, LARGE = ("stories110M", "stories110M-gqa"), ("llama-2-7b", "mistral-7b")
FEW = (1, 8, 64)
PRESETS = {
    "decode": Preset(decode_table),
    "cpu": Preset(decode_table, BOTH_HEADS, (2048,), FEW, ("bifurcated, compiled", "contiguous SDPA"), 8),
    "paper": Preset(decode_table, LARGE, (8192, 16384, 32768), EVERY_N, PAPER_COLUMNS, 20),
    "quantised": Preset(quantised_table, ("stories110M", "tinyllama-1.1b"), (128,), FEW),
    "kernels": Preset(kernel_table, context=(2048,), steps=9),
    "tp": Preset(tp_table, ("tinyllama-1.1b",), (128,), FEW, steps=8),
    "moe": Preset(moe_table, context=(256,), num_samples=(1, 64), steps=20),
    "attention": Preset(attention_table, context=(1024, 2048, 4096), num_samples=(1, 4, 16, 64), steps=20),
    "prefill": Preset(prefill_table),
    "load": Preset(load_table),
}


def shape_of(name: str, settings: list[str]) -> ModelArgs:
    """Return the named shape with the fields of --set. Raises ValueError if there is no such field."""
    fields: dict[str, Any] = {}
    for setting in settings:
        field_name, _, value = setting.partition("=")
        if type(getattr(SHAPES[name], field_name, None)) is not int or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--set {setting}: write a field of ModelArgs and a number, such as n_kv_head=4")
        fields[field_name] = int(value)
    return replace(SHAPES[name], **fields)


def read_options() -> argparse.Namespace:
    """Return the flags, completed by the preset. Raises ValueError if they cannot be run."""
    parser = common.build_parser("Time the decode step, for every way to hold the context.")
    parser.add_argument("--preset", choices=PRESETS, default="decode", help="what to measure; other flags change it")
    parser.add_argument("--shape", choices=SHAPES, nargs="+")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="change a field of the shapes")
    parser.add_argument("--context", type=count, nargs="+", help="tokens")
    parser.add_argument("-n", "--num_samples", type=count, nargs="+")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, metavar="COLUMN", help=", ".join(map(repr, COLUMNS)))
    parser.add_argument("--steps", type=count, help="timed steps per cell, at most")
    parser.add_argument(
        "--budget", type=common.positive(float), default=2.0, help="seconds of timed steps per cell; default: 2"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plain_weights", action="store_true", help="do not pack them (linear.py)")
    parser.add_argument("--charts", type=Path, help="draw the cells as PNG files in this folder (needs matplotlib)")
    options = parser.parse_args()
    preset, given = PRESETS[options.preset], vars(options)
    missing = {name: value for name, value in preset._asdict().items() if given.get(name) is None}
    if options.charts is not None:
        if options.charts.is_file() or not options.charts.parent.is_dir():
            raise ValueError(f"--charts {options.charts} is not a folder, in one that exists")
        if preset.table not in (decode_table, attention_table):
            raise ValueError(f"--charts is not for --preset {options.preset}")
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--charts needs matplotlib: install requirements-dev.txt")
    if options.preset == "load" and options.dtype not in ("auto", "bfloat16"):
        raise ValueError(f"--preset load reads bfloat16: leave out --dtype {options.dtype}")
    device, dtype = common.begin(options.device, "bfloat16" if options.preset == "load" else options.dtype)
    pack = can_pack(device, dtype) and options.preset not in ("attention", "load") and not options.plain_weights
    return changed(options, **missing, device=device, dtype=dtype, pack=pack)


@common.reporting
@torch.no_grad()
def main() -> None:
    options = read_options()
    shapes = {name: shape_of(name, options.set) for name in options.shape}
    if os.environ.get("RANK", "0") != "0":  # under torchrun, one rank writes
        sys.stdout, options = open(os.devnull, "w"), changed(options, out=None)
    torch._dynamo.config.recompile_limit = 64  # every column of every shape compiles the same code
    # Loading multiplies nothing, and a bfloat16 product takes seconds on a CPU without instructions for it.
    rates = machine_rates(options.device, torch.float32 if options.preset == "load" else options.dtype)
    measured = f"{rates.bandwidth / 1e9:.0f} GB/s, {rates.operations / 1e12:.2f} T operations/s in a matrix product"
    units = "Milliseconds; of a decode step also the share of the limit that is reached."
    packed = ", packed weights" * options.pack
    common.print_heading(options.device, options.dtype, f"{packed}; measured in this run: {measured}. {units}")
    records, started = list[dict[str, Any]](), time.perf_counter()
    for shape, args in shapes.items():
        print(f"\n{shape}: {args.n_layer} layers, dim {args.dim}, {args.n_head} heads, {args.n_kv_head} for keys")
        options.table(Bench(options, shape, args, rates, records, started))
    if options.charts and records:
        from plot import draw

        print(*draw(records, options.charts), sep="\n", file=sys.stderr)


if __name__ == "__main__":
    common.finish(main)
