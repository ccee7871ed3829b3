"""Time speculative decoding against plain decoding of the same samples, alternating runs.

    python scripts/benchmark_drafts.py --checkpoint_path STORIES15M --medusa medusa_lm_head.pt

Prints a Markdown table. The time of a run is that of its decode steps; each line is the median of --runs ratios, whose
two runs draw the same tokens (fp32), or the line says how many samples differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cache import NoCache
from cli.console import Stopwatch
from cli.options import OneLineParser
from engine.engine import Engine, Request
from engine.plan import keep_freed_memory
from engine.request import Sampling
from engine.speculate import choose_draft
from loading.checkpoint import Checkpoint, load_model, read_checkpoint
from loading.hub import locate
from loading.tokenizer import load_tokenizer
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
GREEDY, DRAWN, FREE = Sampling(0), Sampling(0.8, top_k=200), Sampling(1.2, top_k=200)


@dataclass(frozen=True)
class Case:
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
        yield Case("story at 0.8, Medusa heads", ("medusa", options.medusa), None, None, STORY, 8, DRAWN)
    if options.quantised:
        yield Case("story, quantised copy", (), options.quantised, None, STORY, 1, GREEDY)
    yield Case("story, layers:4", ("layers:4",), None, None, STORY, 1, GREEDY)


def price(checkpoint: Checkpoint, quantised: str | None) -> Iterator[str]:
    """Tabulate the cost of drawing both tokens with the same numbers: the mean probability that a proposal is accepted,
    by the standard rule, the sum of min(p, q), and with shared numbers; on samples of the model's own."""
    engine, sampling = open_engine(checkpoint, None), Sampling(0.8, top_k=200)
    request = Request(6, 120, sampling, seed=1, eos_ids=frozenset())
    prompt = engine.encode("Once upon a time")
    tokens = torch.tensor([prompt + each.tokens for each in engine.generate(prompt, request)])  # [N,S]
    input_pos = torch.arange(tokens.shape[1]).expand_as(tokens)
    model = load_model(checkpoint, "cpu", torch.float32)

    def probabilities(network: Transformer, layers: int | None = None) -> Tensor:
        logits = network.logits(network.hidden(tokens, input_pos, NoCache(), layers)).flatten(0, 1)  # [N*S,V]
        probs, ids = candidates(logits, sampling)
        assert ids is not None
        return torch.zeros_like(logits).scatter(1, ids, probs)

    def row(name: str, q: Tensor) -> str:
        standard = torch.minimum(p, q).sum(1).mean()
        return f"| {name} | {standard:.3f} | {torch.stack(list(map(meeting, p, q))).mean():.3f} |"

    p = probabilities(model)
    yield "| draft | standard rule | by the same numbers |\n|---|---|---|"
    if quantised:
        copy = load_model(read_checkpoint(Path(quantised)), "cpu", torch.float32)
        yield row(f"quantised copy, {Path(quantised).stem}", probabilities(copy))
    for layers in range(2, checkpoint.args.n_layer):
        yield row(f"layers:{layers}", probabilities(model, layers))


def meeting(p: Tensor, q: Tensor) -> Tensor:
    """Return the probability that draws from p and q [V] with the same numbers give the same token: the sum over i of 1
    / sum over j of max(p_j / p_i, q_j / q_i), the probability that i is first in both races."""
    either = ((p > 0) | (q > 0)).nonzero()[:, 0]
    p, q = p[either].double(), q[either].double()
    both = (p > 0) & (q > 0)
    return (1 / torch.maximum(p / p[both, None], q / q[both, None]).sum(1)).sum()


def open_engine(checkpoint: Checkpoint, case: Case | None) -> Engine:
    place = (torch.device("cpu"), torch.float32, 1 if case is None else case.num_samples)
    engine = Engine(load_model(checkpoint, *place), load_tokenizer(checkpoint.folder), compile=False)
    if case is not None:
        speculation = choose_draft(case.draft, case.draft_path, case.k, checkpoint, place)
        assert speculation is not None
        engine.use(speculation, case.num_samples)
    return engine


def line(checkpoint: Checkpoint, case: Case, length: int, runs: int) -> str:
    plain, drafted = open_engine(checkpoint, None), open_engine(checkpoint, case)
    prompt, ratios, each_ms, differ = plain.encode(case.prompt), [], [], 0
    for run in range(runs + 1):  # the first run is a warm-up
        request = Request(case.num_samples, length, case.sampling, run, eos_ids=frozenset())
        watches, drawn = (Stopwatch(), Stopwatch()), []
        for engine, watch in zip((plain, drafted), watches, strict=True):
            drawn.append([each.tokens for each in engine.generate(prompt, request, watch)])
        before, after = (sum(watch.step_s) for watch in watches)
        if run:
            ratios.append(before / after)
            each_ms.append((1000 * before / length, 1000 * after / length))
        differ += sum(one != other for one, other in zip(*drawn, strict=True))
    plain_ms, drafted_ms = (statistics.median(side) for side in zip(*each_ms, strict=True))
    report = drafted.decoder.report()  # type: ignore[union-attr]
    accepted = report["mean_accepted"]
    note = f", {differ} samples differ" if differ else ""
    return (
        f"| {case.name}{note} | {case.num_samples} | {plain_ms:.1f} | {drafted_ms:.1f} | "
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) | "
        f"{'-' if accepted is None else format(accepted, '.2f')} of {report['speculate_k']} | "
        f"{'-' if accepted is None else format(report['draft_share'], '.0%')} | {report['draft_switched_off']} |"
    )


def times(checkpoint: Checkpoint, options: argparse.Namespace) -> Iterator[str]:
    yield "| what | N | plain, ms a token | with the draft | speed-up | accepted | draft's share | rested |"
    yield "|---|---|---|---|---|---|---|---|"
    for case in cases(options):
        if case.name.startswith(options.only):
            # The copy ends with the text.
            length = min(72, options.length) if case.name.startswith("copy") else options.length
            yield line(checkpoint, case, length, options.runs)


def main() -> int:
    parser = OneLineParser(description="Time speculative decoding against plain decoding.")
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--medusa", help="heads made by scripts/train_medusa.py")
    parser.add_argument("--quantised", help="a quantised copy of the model")
    parser.add_argument("--length", type=int, default=200, help="tokens of each run")
    parser.add_argument("--only", default="", help="lines whose name begins so")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--price", action="store_true", help="acceptance by the standard rule, and by ours")
    parser.add_argument("--cpu_time", action="store_true", help="of this process, one thread: for a busy machine")
    options = parser.parse_args()
    keep_freed_memory()
    if options.cpu_time:
        torch.set_num_threads(1)
        time.perf_counter = time.process_time  # read by Stopwatch and DraftController
    try:
        checkpoint = read_checkpoint(locate(options.checkpoint_path))
        for each in price(checkpoint, options.quantised) if options.price else times(checkpoint, options):
            print(each, flush=True)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
