"""Time many prompts in one batch against the same prompts run one after another, in one process, on random weights.

    python scripts/benchmark_batch.py --preamble 1024 0 --prompts 32 --prompt_tokens 256 -n 8 --max_new_tokens 64
    python scripts/benchmark_batch.py --flat 10000 --shape tiny

Prints a Markdown table: seconds, their ratio, rows kept busy, context tokens read. Both draw the same samples, or the
line says how many differ (in fp32, only near-ties). --vary N: samples end after 8 to N tokens. --flat N: N short
prompts in one batch, and this process's resident memory when a tenth of them and when all are done.
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from cli.system import finish, start

if __name__ == "__main__":
    start()

import argparse
import random
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmark import SHAPES, random_model
from cli.options import OneLineParser
from engine import batch
from engine import engine as road
from engine.batch import BatchStats, Prompt, generate_many, seed_of
from engine.engine import Engine
from engine.plan import choose_device, choose_dtype, human, keep_freed_memory, release_freed_memory
from engine.request import Request, Sampling
from engine.samples import Row, StopConditions


def made_prompts(count: int, preamble: int, length: int, vocabulary: int) -> list[Prompt]:
    """Make prompts of length/2 to 3/2 length tokens, after the preamble."""
    rng = random.Random(0)
    begin = [rng.randrange(vocabulary) for _ in range(preamble)]
    sizes = [length // 2 + length * at // max(1, count - 1) for at in range(count)]
    rng.shuffle(sizes)
    return [Prompt(at, [*begin, *(rng.randrange(vocabulary) for _ in range(size))]) for at, size in enumerate(sizes)]


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def varied(longest: int) -> type[Row]:
    """Return a class of rows that end after 8 to `longest` tokens, depending on their index and history."""

    class Varied(Row):
        def __init__(self, index: int, ending: StopConditions, *rest) -> None:
            length = 8 + random.Random(index * 7919 + sum(rest[1])).randrange(longest - 7)
            super().__init__(index, replace(ending, length=length), *rest)

    return Varied


def compare(options: argparse.Namespace, engine: Engine) -> Iterator[str]:
    asked = Request(
        options.num_samples, options.max_new_tokens, Sampling(0.8, top_k=200), 1, eos_ids=frozenset(),
        rows_at_once=options.rows,
    )  # fmt: skip
    yield "| preamble | one by one, s | batch, s | ratio | rows busy | context tokens read | samples that differ |"
    yield "|---|---|---|---|---|---|---|"
    for preamble in options.preamble:
        prompts = made_prompts(options.prompts, preamble, options.prompt_tokens, engine.args.vocab_size)
        warm = made_prompts(2, 8, 16, engine.args.vocab_size)
        list(generate_many(engine, warm, replace(asked, max_new_tokens=3)))
        engine.generate(warm[0].tokens, replace(asked, max_new_tokens=3))
        begin, tally = time.perf_counter(), BatchStats()
        together = {each.prompt.id: each.samples for each in generate_many(engine, prompts, asked, tally)}
        middle = time.perf_counter()
        print(f"batch: {middle - begin:.1f} s", file=sys.stderr)
        alone = replace(asked, rows_at_once=None)
        apart = {}
        for p in prompts:
            plan = engine.plan(len(p.tokens), alone, len(prompts))
            apart[p.id] = engine.generate(p.tokens, replace(alone, seed=seed_of(1, p.id)), plan=plan)
        took, longer = middle - begin, time.perf_counter() - middle
        pairs = [pair for id, each in apart.items() for pair in zip(each, together[id], strict=True)]
        differ = sum(one.tokens != other.tokens for one, other in pairs)
        yield (
            f"| {preamble} | {longer:.1f} | {took:.1f} | {longer / took:.2f} | {tally.busy / tally.capacity:.0%} "
            f"| {tally.read} of {tally.asked} | {differ} of {len(pairs)} |"
        )


def flat(options: argparse.Namespace, engine: Engine) -> Iterator[str]:
    prompts = made_prompts(options.flat, 0, 16, engine.args.vocab_size)
    asked = Request(options.num_samples, options.max_new_tokens, Sampling(0.8, top_k=200), 1, eos_ids=frozenset())
    begin = time.perf_counter()
    for done, _ in enumerate(generate_many(engine, prompts, asked), 1):
        if done in (options.flat // 10, options.flat):
            seconds = time.perf_counter() - begin
            yield f"{done} prompts done after {seconds:.0f} s: {human(resident())} resident"


def main() -> None:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="stories110M")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--preamble", type=int, nargs="+", default=[1024, 0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=256)
    parser.add_argument("-n", "--num_samples", type=int, default=8)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--vary", type=int)
    parser.add_argument("--flat", type=int)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    keep_freed_memory()
    torch.manual_seed(0)
    device = choose_device("auto")
    model = random_model(SHAPES[options.shape], device, choose_dtype(options.dtype, device))
    engine = Engine(model, compile=options.compile)
    if options.vary:
        batch.Row = road.Row = varied(options.vary)  # type: ignore[misc]
    for line in flat(options, engine) if options.flat else compare(options, engine):
        print(line, flush=True)
    release_freed_memory(device)


if __name__ == "__main__":
    finish(main)
