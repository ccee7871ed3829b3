"""Time many prompts in one batch against the same prompts run one after another, in one process, on random weights.

    python scripts/benchmark_batch.py --preamble 1024 0 --prompts 32 --prompt_tokens 256 -n 8 --max_new_tokens 64
    python scripts/benchmark_batch.py --flat 10000 --shape tiny

Prints a Markdown table: seconds, their ratio, rows kept busy, context tokens read. Both draw the same samples, or the
line says how many differ (in fp32, only near-ties). --vary N: a sample ends after N tokens on average. --flat N: N
short prompts in one batch, and this process's resident memory when a tenth of them and when all are done.
"""

import common
from common import SHAPES, Table, count, timed  # isort: split

import argparse
import random
import time
from dataclasses import replace

from engine.engine import Engine
from engine.plan import human
from engine.request import Request
from engine.scheduler import BatchStats, Outcome, Prompt, seed_of


def made_prompts(number: int, preamble: int, length: int, vocabulary: int) -> list[Prompt]:
    """Make prompts of length/2 to 3/2 length tokens, after the preamble."""
    rng = random.Random(0)
    begin = [rng.randrange(vocabulary) for _ in range(preamble)]
    sizes = [length // 2 + length * at // max(1, number - 1) for at in range(number)]
    rng.shuffle(sizes)
    return [Prompt(at, [*begin, *(rng.randrange(vocabulary) for _ in range(size))]) for at, size in enumerate(sizes)]


def compare(options: argparse.Namespace, engine: Engine, asked: Request) -> None:
    """Time a batch, and its prompts one by one."""
    table = Table(
        "preamble", "one by one, s:.1f", "batch, s:.1f", "ratio:.2f", "rows busy:.0%", "context tokens read",
        "samples that differ", out=options.out,
    )  # fmt: skip
    warm, short = made_prompts(2, 8, 16, engine.args.vocab_size), replace(asked, max_new_tokens=3)
    list(engine.generate_many(warm, short))
    engine.generate(warm[0].tokens, short)
    for preamble in options.preamble:
        prompts = made_prompts(options.prompts, preamble, options.prompt_tokens, engine.args.vocab_size)
        table.row(preamble, *both_ways(engine, prompts, asked))


def both_ways(engine: Engine, prompts: list[Prompt], asked: Request) -> tuple[object, ...]:
    """Return a row of the table."""
    together: list[Outcome] = []
    tally, apart = BatchStats(), {}

    def batch() -> None:
        together.extend(engine.generate_many(prompts, asked, stats=tally))

    def one_by_one() -> None:
        for prompt in prompts:
            request = replace(asked, rows_at_once=None, seed=seed_of(1, prompt.id))
            plan = engine.plan(len(prompt.tokens), request, len(prompts))
            apart[prompt.id] = engine.generate(prompt.tokens, request, plan=plan)

    (took,), (longer,) = timed(batch), timed(one_by_one)
    pairs = [pair for each in together for pair in zip(each.samples, apart[each.prompt.id], strict=True)]
    differ = sum(one.tokens != other.tokens for one, other in pairs)
    read = f"{tally.read} of {tally.asked}"
    return longer, took, longer / took, tally.busy / tally.capacity, read, f"{differ} of {len(pairs)}"


def flat(options: argparse.Namespace, engine: Engine, asked: Request) -> None:
    """Show that memory stays flat."""
    table = Table("prompts done", "seconds:.0f", "resident", out=options.out)
    prompts, begin = made_prompts(options.flat, 0, 16, engine.args.vocab_size), time.perf_counter()
    for done, _ in enumerate(engine.generate_many(prompts, asked), 1):
        if done in (options.flat // 10, options.flat):
            table.row(done, time.perf_counter() - begin, human(common.resident()))


@common.reporting
def main() -> None:
    parser = common.build_parser(__doc__)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="stories110M")
    parser.add_argument("--preamble", type=int, nargs="+", default=[1024, 0])
    parser.add_argument("--prompts", type=count, default=32)
    parser.add_argument("--prompt_tokens", type=count, default=256)
    parser.add_argument("-n", "--num_samples", type=count, default=8)
    parser.add_argument("--max_new_tokens", type=count, default=64)
    parser.add_argument("--rows", type=count)
    parser.add_argument("--vary", type=count)
    parser.add_argument("--flat", type=count)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    device, dtype = common.begin("auto", options.dtype)
    args = SHAPES[options.shape]
    engine = Engine(common.random_model(args, device, dtype), compile=options.compile)
    ends = frozenset(range(0, args.vocab_size, options.vary) if options.vary else ())
    asked = Request(
        options.num_samples, options.max_new_tokens, common.SAMPLING, 1, eos_ids=ends, rows_at_once=options.rows
    )
    common.print_heading(device, dtype)
    (flat if options.flat else compare)(options, engine, asked)


if __name__ == "__main__":
    common.finish(main)
