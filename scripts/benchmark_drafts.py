"""Time speculative decoding against plain decoding of the same samples, alternating runs.

    python scripts/benchmark_drafts.py --checkpoint_path STORIES15M --medusa medusa_lm_head.pt

Prints a Markdown table. The time of a run is that of its decode steps; each line is the median of --runs ratios, whose
two runs draw the same tokens (fp32), or the line says how many samples differ.
"""

import common
from common import SAMPLING, Table, count  # isort: split

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from cache import NoCache
from cli.console import Stopwatch
from engine.engine import Engine
from engine.request import Request, Sampling
from engine.speculate import choose_draft
from loading.checkpoint import read_checkpoint
from loading.hub import locate
from model import Transformer
from sampling import candidates

STORY = "Once upon a time, there was a little girl named Lily."
# A story that stories15M repeats to its end if the prompt has it twice and begins it again.
TOLD = (
    "Once upon a time, there was a little girl named Lily. She loved to play with her toys and run around outside. "
    "One day, Lily's mom asked her to help with the laundry. Lily didn't want to help because she wanted to play. "
    "But her mom said, \"Lily, it's important to help out.\n"
)
COPY = TOLD * 2 + "Once upon a time, there was"
GREEDY, FREE = Sampling(0), Sampling(1.2, top_k=200)


class Case(NamedTuple):
    name: str
    draft: tuple[str, ...]
    draft_path: str | None
    k: str | None
    prompt: str
    num_samples: int
    sampling: Sampling


def cases(options: argparse.Namespace) -> Iterator[Case]:
    for n in (1, 8):
        yield Case("copy, prompt look-up", ("prompt",), None, "8", COPY, n, GREEDY)
        yield Case("copy, prompt look-up, auto", ("prompt",), None, "auto", COPY, n, GREEDY)
        yield Case("nothing repeats, prompt look-up", ("prompt",), None, None, STORY, n, FREE)
    yield Case("story, prompt look-up", ("prompt",), None, None, STORY, 1, GREEDY)
    if options.medusa:
        yield Case("story, Medusa heads", ("medusa", options.medusa), None, None, STORY, 1, GREEDY)
        yield Case("story at 0.8, Medusa heads", ("medusa", options.medusa), None, None, STORY, 8, SAMPLING)
    if options.quantised:
        yield Case("story, quantised copy", (), options.quantised, None, STORY, 1, GREEDY)
    yield Case("story, layers:4", ("layers:4",), None, None, STORY, 1, GREEDY)


def price(options: argparse.Namespace) -> None:
    """Tabulate the cost of drawing both tokens with the same numbers: the mean probability that a proposal is accepted,
    by the standard rule, the sum of min(p, q), and with shared numbers; on samples of the model's own."""
    engine = open_engine(options)
    prompt = engine.encode("Once upon a time")
    samples = engine.generate(prompt, Request(6, 120, SAMPLING, seed=1, eos_ids=frozenset()))
    tokens = torch.tensor([prompt + each.tokens for each in samples])  # [N,S]
    input_pos = torch.arange(tokens.shape[1]).expand_as(tokens)

    def probabilities(network: Transformer, layers: int | None = None) -> Tensor:
        logits = network.logits(network.hidden(tokens, input_pos, NoCache(), layers)).flatten(0, 1)  # [N*S,V]
        probs, ids = candidates(logits, SAMPLING)
        assert ids is not None
        return torch.zeros_like(logits).scatter(1, ids, probs)

    p = probabilities(engine.model)
    table = Table("draft", "standard rule:.3f", "by the same numbers:.3f", out=options.out)
    drafts = {f"layers:{layers}": (engine.model, layers) for layers in range(2, engine.args.n_layer)}
    if options.quantised:
        copy = Engine.open(options.quantised, "cpu", options.dtype, compile=False)
        drafts = {f"quantised copy, {Path(options.quantised).stem}": (copy.model, copy.args.n_layer)} | drafts
    for name, draft in drafts.items():
        q = probabilities(*draft)
        numbers = torch.minimum(p, q).sum(1), torch.stack(list(map(meeting, p, q)))
        table.row(name, *(each.mean().item() for each in numbers))


def meeting(p: Tensor, q: Tensor) -> Tensor:
    """Return the probability that draws from p and q [V] with the same numbers give the same token: the sum over i of 1
    / sum over j of max(p_j / p_i, q_j / q_i), the probability that i is first in both races."""
    either = ((p > 0) | (q > 0)).nonzero()[:, 0]
    p, q = p[either].double(), q[either].double()
    both = (p > 0) & (q > 0)
    return (1 / torch.maximum(p / p[both, None], q / q[both, None]).sum(1)).sum()


def open_engine(options: argparse.Namespace, case: Case | None = None) -> Engine:
    """Open the model, with the draft of that case."""
    engine = Engine.open(options.checkpoint_path, "cpu", options.dtype, compile=False)
    if case is not None:
        checkpoint, place = read_checkpoint(locate(options.checkpoint_path)), (engine.device, engine.dtype)
        draft = choose_draft(case.draft, case.draft_path, case.k, checkpoint, (*place, case.num_samples))
        assert draft is not None
        engine.use(draft, case.num_samples)
    return engine


def runs(engine: Engine, case: Case, length: int) -> Callable[[], tuple[float, list[list[int]]]]:
    """Return a callable that draws with another seed at each call: (milliseconds of a token, the samples' tokens)."""
    prompt, seeds = engine.encode(case.prompt), itertools.count()

    def run() -> tuple[float, list[list[int]]]:
        request, watch = Request(case.num_samples, length, case.sampling, next(seeds), eos_ids=frozenset()), Stopwatch()
        samples = engine.generate(prompt, request, watch)
        return 1000 * sum(watch.step_s) / length, [each.tokens for each in samples]

    return run


def times(options: argparse.Namespace) -> None:
    """Time every case without and with its draft."""
    table = Table(
        "what", "N", "plain, ms a token:.1f", "with the draft:.1f", "speed-up", "accepted", "draft's share:.0%",
        "rested", out=options.out,
    )  # fmt: skip
    for case in cases(options):
        if not case.name.startswith(options.only):
            continue
        length = min(72, options.length) if case.name.startswith("copy") else options.length  # it ends with the text
        plain, drafted = open_engine(options), open_engine(options, case)
        # The first turn is a warm-up.
        sides = common.alternate([runs(each, case, length) for each in (plain, drafted)], options.runs + 1)
        ms = [[ms for ms, _ in side[1:]] for side in sides]
        ratios = [before / after for before, after in zip(*ms, strict=True)]
        texts = [[text for _, texts in side for text in texts] for side in sides]
        differ = sum(one != other for one, other in zip(*texts, strict=True))
        report = drafted.decoder.report()  # type: ignore[union-attr]
        accepted = "-" if report["mean_accepted"] is None else f"{report['mean_accepted']:.2f}"
        table.row(
            case.name + f", {differ} samples differ" * (differ > 0), case.num_samples,
            *common.medians(ms),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            f"{accepted} of {report['speculate_k']}", report["draft_share"], report["draft_switched_off"],
        )  # fmt: skip


@common.reporting
def main() -> None:
    parser = common.build_parser("Time speculative decoding against plain decoding.", "float32")
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--medusa", help="heads made by scripts/train_medusa.py")
    parser.add_argument("--quantised", help="a quantised copy of the model")
    parser.add_argument("--length", type=count, default=200, help="tokens of each run")
    parser.add_argument("--only", default="", help="lines whose name begins so")
    parser.add_argument("--runs", type=count, default=3)
    parser.add_argument("--price", action="store_true", help="acceptance by the standard rule, and by ours")
    parser.add_argument("--cpu_time", action="store_true", help="of this process, one thread: for a busy machine")
    options = parser.parse_args()
    device, dtype = common.begin("cpu", options.dtype)
    if options.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # read by Stopwatch and DraftController
    common.print_heading(device, dtype)
    (price if options.price else times)(options)


if __name__ == "__main__":
    common.finish(main)
