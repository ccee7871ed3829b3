"""Console output: timing, progress, printed samples, JSON report."""

import argparse
import gzip
import json
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from cache import chain_operator
from engine.engine import Engine
from engine.plan import Plan, human, peak_memory, release_freed_memory
from engine.request import Request
from engine.runner import Monitor
from engine.samples import Piece, Ranked, Row, Sample, rank
from layers.kernels import attention_kernel
from layers.linear import kernels
from loading.files import counted, write_file
from loading.tokenizer import Tokenizer

tqdm.set_lock(threading.RLock())  # its own is shared by forks: one that is killed while it holds it stops all others


def note_names(prompts: Iterable[str], tokenizer: Tokenizer) -> None:
    """Print a note if prompts contain names of control tokens, which are text here but which some models expect as
    tokens (code infilling)."""
    names = list(dict.fromkeys(name for prompt in prompts for name in tokenizer.names.cut(prompt)[1::2]))
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        told = f"{', '.join(names[:3])}{more} in a prompt is text here, not a control token"
        print(f"note: {told}: pass such tokens as ids, from Python", file=sys.stderr)


# The flags, besides --seed, that determine the samples of a prompt.
SAMPLE_FLAGS = (
    "checkpoint_path",
    "dtype",
    "kv_dtype",
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "stop",
    "ignore_eos",
)


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the flags of SAMPLE_FLAGS that a command has."""
    return {name: getattr(options, name) for name in SAMPLE_FLAGS if hasattr(options, name)}


class Stopwatch(Monitor):
    """Monitor that times a run."""

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.prefill_s = self.first_token_s = 0.0
        self.step_s: list[float] = []
        self.decode_tokens = 0
        self.interrupted = False
        self.finished: list[Sample] = []

    def lap(self) -> float:
        last, self.last = self.last, time.perf_counter()
        return self.last - last

    def prefilled(self) -> None:
        self.prefill_s = self.lap()

    def stepped(self, steps: int, tokens: int) -> None:
        if steps:
            self.step_s += [self.lap() / steps] * steps
            self.decode_tokens += tokens
        elif self.first_token_s:  # of samples that took the rows of others: a part of the next step
            self.decode_tokens += tokens
        else:
            self.lap()
            self.first_token_s = self.last - self.begin

    def done(self, sample: Sample) -> None:
        self.finished.append(sample)


class Bar:
    """Progress bar on stderr, if stderr is a terminal; it appears with the first `show`."""

    def __init__(self, quiet: bool) -> None:
        self.shown = not quiet and sys.stderr.isatty()
        self.bar: tqdm | None = None

    def show(self, share: float, note: str) -> None:
        """share: of the whole that is done, from 0 to 1."""
        if not self.shown:
            return
        if self.bar is None:
            form, columns = "[{bar:20}] {desc}, {remaining} left", shutil.get_terminal_size().columns
            # Each update is drawn, the first too. Of a terminal of 0 columns or rows tqdm would show nothing.
            how = {
                "ascii": " #",
                "smoothing": 0,
                "delay": 1e-9,
                "mininterval": 0,
                "miniters": 0,
                "ncols": columns,
                "nrows": 20,
            }
            self.bar = tqdm(total=1.0, bar_format=form, leave=False, file=sys.stderr, **how)
        self.bar.set_description_str(note, refresh=False)
        self.bar.update(share - self.bar.n)

    def clear(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class Console(Stopwatch):
    """Monitor that shows a run: one sample is streamed to stdout, several get a progress bar on stderr.

    Used as a context manager around a run: if interrupted, it prints the finished samples and the best unfinished one.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        plan: Plan,
        device: torch.device,
        prompt: str | None,
        earlier: Sequence[Sample] = (),
        turn: int | None = None,
    ) -> None:
        """prompt: printed before each sample by --echo. earlier: samples of a previous run of the same request. turn:
        of a conversation, from 1."""
        super().__init__()
        self.options, self.plan, self.device = options, plan, device
        self.prompt, self.earlier = prompt or "", earlier
        self.streams, self.unranked = options.num_samples == 1 and options.format != "jsonl", options.unranked
        self.marks: dict[str, Any] = {"settings": settings_of(options)} | ({} if turn is None else {"turn": turn})
        self.told: set[int] = set()  # indices of the samples already printed
        self.bar = Bar(self.options.quiet)
        self.rows: dict[int, Row] = {}  # unfinished samples, by index
        self.ranked: list[Ranked] = []  # what an interrupted run printed

    def hold(self) -> None:
        """Show nothing during the run, which will be repeated."""
        self.streams = self.unranked = False

    def done(self, sample: Sample) -> None:
        super().done(sample)
        self.rows.pop(sample.index, None)
        if self.unranked:
            self.bar.clear()
            self.tell(sample)

    def tell(self, sample: Sample) -> None:
        """Print a sample as one JSON object, without a rank."""
        self.told.add(sample.index)
        line = sample_fields({"sample": sample.index}, sample, self.marks)
        print(json.dumps(line, ensure_ascii=False), flush=True)

    def prefilling(self, tokens: int, total: int) -> None:
        self.bar.show(tokens / total, f"{tokens}/{total} tokens of the prompt read")

    def prefilled(self) -> None:
        release_freed_memory(self.device)  # decoding needs blocks of other sizes
        super().prefilled()

    def started(self, row: Row) -> None:
        self.rows[row.sample.index] = row

    def stepped(self, steps: int, tokens: int) -> None:
        super().stepped(steps, tokens)
        if self.step_s and not self.streams:
            finished, total = len(self.finished), self.plan.workload.num_samples
            begun = sum(len(row.sample.tokens) for row in self.rows.values()) / self.options.max_new_tokens
            note = f"{counted(len(self.step_s), 'step')}, {finished}/{total} samples finished"
            self.bar.show((finished + begun) / total, note)

    def show_live(self, pieces: Generator[Piece]) -> None:
        """Run to the end, printing text as it arrives if there is one sample. A compiled run prints after its first
        step, which may take minutes: no status can be shown inside a line."""
        text = self.prompt if self.streams and self.options.echo else ""
        if not self.plan.compiled:
            print(text, end="", flush=True)
            text = ""
        try:
            with closing(pieces):  # now, not at garbage collection after an interrupt
                for piece in pieces:
                    text += piece.text * self.streams
                    if self.step_s or not self.plan.compiled:
                        self.bar.clear()
                        print(text, end="", flush=True)
                        text = ""
        finally:
            self.bar.clear()
            print(text, end="", flush=True)

    def show(self, samples: Sequence[Sample]) -> list[Ranked]:
        """Print these samples, unless they were streamed; return their ranking up to --top."""
        ranked = rank(samples, self.options.rank)[: self.options.top]
        self.put(ranked, samples)
        return ranked

    def put(self, ranked: Sequence[Ranked], samples: Sequence[Sample]) -> None:
        if self.options.unranked:
            for sample in samples:
                if sample.index not in self.told:  # another replica's, or an interrupted one
                    self.tell(sample)
        elif not self.streams:
            print_samples(ranked, self.options, self.prompt, self.marks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        self.bar.clear()
        if self.streams and kind in (None, KeyboardInterrupt):
            print(flush=True)
        self.interrupted = kind is not None
        if kind is KeyboardInterrupt:
            finished = rank(self.earlier or self.finished, self.options.rank)
            begun = [] if self.earlier else [row.cut() for row in self.rows.values()]
            best = rank([sample for sample in begun if sample.tokens])[:1]
            best = [replace(each, rank=len(finished) + 1) for each in best]
            self.ranked = finished[: self.options.top] + best
            self.put(self.ranked, [each.sample for each in self.ranked])


def sample_fields(place: dict[str, int], sample: Sample, marks: dict[str, Any]) -> dict[str, object]:
    """Return a sample as one JSON object. place: its number and rank. marks: the flags that determine it, and the turn
    of a conversation."""
    fields = asdict(sample)
    del fields["index"]
    return place | {"seed": fields.pop("seed")} | marks | fields | {"mean_logprob": sample.mean_logprob}


def placed(each: Ranked) -> dict[str, int]:
    return {"rank": each.rank, "sample": each.sample.index, "count": each.count}


def largest_difference(
    options: argparse.Namespace, engine: Engine, prompt: Sequence[int], samples: Sequence[Sample]
) -> float:
    """Score the samples that are printed again, in one pass each, and return the largest difference of a
    log-probability."""
    drawn = [each.sample for each in rank(samples, options.rank)[: options.top]]
    scores = engine.score(prompt, [sample.tokens for sample in drawn])
    return max(
        abs(decoded - scored)
        for sample, score in zip(drawn, scores, strict=True)
        for decoded, scored in zip(sample.logprobs, score.logprobs, strict=True)
    )


def print_samples(ranked: Sequence[Ranked], options: argparse.Namespace, prompt: str, marks: dict[str, Any]) -> None:
    """Print samples to stdout: text, with headings if there may be several, or one JSON object per line."""
    before = prompt if options.echo else ""
    for each in ranked:
        drawn = each.sample
        if options.format == "jsonl":
            print(json.dumps(sample_fields(placed(each), drawn, marks), ensure_ascii=False))
        elif options.num_samples == 1:
            print(f"{before}{drawn.text}")
        else:
            times = f", {each.count} times" if each.count > 1 else ""
            print(f"[{each.rank}] mean log-probability {drawn.mean_logprob:.3f}, {drawn.finish_reason}{times}")
            print(f"{before}{drawn.text}", end="\n\n")
    sys.stdout.flush()


def decode_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name the attention kernel of a decode step, for the report."""
    by_triton = device.type == "cuda" and chain_operator(device, dtype, head_dim) is not None
    return "Triton" if by_triton else attention_kernel(device, dtype, head_dim)


def describe(engine: Engine, request: Request, plan: Plan, quantised: str | None) -> dict[str, object]:
    """Return the part of the report known before the run. quantised: the mode; None for unquantised weights."""
    return {
        "attention": request.attention,
        "attention_path": PATHS[request.attention],
        "attention_kernel": decode_kernel(engine.device, engine.dtype, engine.args.head_dim),
        "compiled": plan.compiled,
        "compile_reason": plan.compile_reason,
        "packed_weights": plan.packed,
        "quantised": quantised,
        "linear_kernels": ", ".join(f"{count} {name}" for name, count in kernels(engine.model).items()),
        "device": torch.cuda.get_device_name(engine.device) if engine.device.type == "cuda" else "cpu",
        "kv_dtype": "int8" if request.kv_dtype == "int8" else str(engine.dtype).removeprefix("torch."),
        "dtype": str(engine.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "seed": request.seed,
        "context_tokens": plan.workload.context,
        "num_samples": request.num_samples,
    }


PATHS = {
    "bifurcated": "the context is held once and read once per step",
    "contiguous": "a copy of the context for each sample",
    "expanded": "the context is held once and copied for each sample at each step",
}


def measure(runs: Sequence[Stopwatch], plan: Plan, device: torch.device, compiled_prefill: bool) -> dict[str, object]:
    """Return the measured part of the report: medians over the steps of all runs. Values that do not apply are None, as
    are the times of a prefill that included compilation."""
    steps = [second for run in runs for second in run.step_s]
    first, steps = (steps[:1], steps[1:]) if plan.compiled else ([], steps)
    step = statistics.median(steps) if steps else None
    drawn = sum(run.decode_tokens for run in runs)
    rate = drawn / (sum(steps) + step * len(first)) if step else None
    reads = [run for run in (runs[1:] if compiled_prefill else runs) if run.first_token_s]  # with a first token
    prefill_s = statistics.median(run.prefill_s for run in reads) if reads else None
    peak, mapped = peak_memory(device)
    return {
        "interrupted": any(run.interrupted for run in runs),
        "rows": plan.rows_at_once,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": prefill_s and plan.workload.context / prefill_s,
        "first_token_s": statistics.median(run.first_token_s for run in reads) if reads else None,
        "decode_ms_per_step": step and 1000 * step,
        "tokens_per_s_per_sample": rate and rate / plan.rows_at_once,
        "tokens_per_s": rate,
        # The first compiled call compiles: its time beyond a step.
        "compile_s": first[0] - (step or 0.0) if first else None,
        "kv_context_bytes": plan.context,
        "kv_decoded_bytes": plan.decoded,
        "kv_unshared_bytes": plan.unshared,
        "bytes_per_step": plan.per_step,
        "bandwidth_gb_s": step and plan.per_step / step / 1e9,
        "peak_memory_bytes": peak,
        "mapped_file_bytes": mapped,
    }


def summary(report: dict, plan: Plan) -> str:
    """Return three lines: what ran, how fast, in how much memory."""

    def number(name: str, form: str = ".3g") -> str:
        return "-" if report[name] is None else format(report[name], form)

    how = "compiled" if report["compiled"] else "eager"
    held = report["quantised"] or "packed" * report["packed_weights"]
    packed = f", {held} weights" if held else ""
    rows = f", {plan.rows_at_once} at a time," * (plan.workload.num_samples > plan.rows_at_once)
    replicas = f"{report['replicas']} replicas of " * (report["replicas"] > 1)
    processes = f", {replicas}{counted(report['tp'], 'process')}" * (report["tp"] * report["replicas"] > 1)
    drafted = ""
    if report.get("mean_accepted") is not None:
        off = f", switched off {counted(report['draft_switched_off'], 'time')}" * bool(report["draft_switched_off"])
        gain = f"{number('speedup_over_plain')} times plain decoding"
        drafted = f"; draft {report['draft']}: {number('mean_accepted')} accepted per step, {gain}{off}"
    copies = f", {human(plan.unshared)} if each sample held its own" * (plan.workload.num_samples > 1)
    mapped = report["mapped_file_bytes"]
    files = "" if mapped is None else f" beside {human(mapped)} of mapped files"
    samples, context = counted(report["num_samples"], "sample"), counted(report["context_tokens"], "token")
    return (
        f"{samples}{rows} after {context}, seed {report['seed']}: "
        f"{report['attention']} attention, {how}, {report['dtype']} on {report['device']}{packed}{processes}\n"
        f"prompt read in {number('prefill_s')} s, {number('decode_ms_per_step')} ms per step, "
        f"{number('tokens_per_s', '.0f')} tokens/s{drafted}\n"
        f"weights {human(plan.weights.total)}, context K/V {human(plan.context)}, decoded K/V {human(plan.decoded)}"
        f"{copies}; peak {human(report['peak_memory_bytes'])}{files}"
    )


def print_report(report: dict[str, object]) -> None:
    for name, value in report.items():
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        size = f" ({human(value)})" if name.endswith("_bytes") and isinstance(value, int) else ""
        print(f"{name:>24}  {text}{size}", file=sys.stderr)


@contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Write a trace of the block, also if it is interrupted."""
    profile = torch.profiler.profile()
    try:
        with profile:
            yield
    finally:
        write_file(path, partial(export, profile))


def export(profile: torch.profiler.profile, path: Path) -> None:
    """Write the trace. Raises OSError if it is incomplete: PyTorch does not report a full disk, but writing more to the
    file fails."""
    trace = path.with_name("trace")  # for a name in .gz PyTorch would first write elsewhere
    profile.export_chrome_trace(str(trace))
    with trace.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        file.write(bytes(1 << 16))
        file.truncate(size)
    if path.suffix == ".gz":
        with trace.open("rb") as file, gzip.open(path, "wb") as packed:
            shutil.copyfileobj(file, packed)
    else:
        trace.replace(path)
