"""What comes of a run, and how it is told: the Monitor that hears of its events, the ranking, the console, the report.

A room of its own because the road from prompt to samples should read without its stopwatch and its printing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Self

import torch

from model import KVCache
from plan import Execution, human, peak_memory, release_freed_memory

if TYPE_CHECKING:
    from generate import Sample, Session


class Monitor:
    """Times a run and hears of its events. Override the methods to show, stream or keep what passes.

    streams: whether `text` is to be called with each sample's text as it comes.
    """

    streams = False

    def __init__(self) -> None:
        self.begin = self.last = time.perf_counter()
        self.prefill_s = self.first_token_s = 0.0
        self.step_s: list[float] = []
        self.decode_tokens = self.waves = 0
        self.finished: list[Sample] = []

    def lap(self) -> float:
        last, self.last = self.last, time.perf_counter()
        return self.last - last

    def prefilled(self) -> None:
        self.prefill_s = self.lap()

    def wave(self) -> None:
        """A wave's cache is ready to decode."""
        self.waves += 1
        self.lap()

    def stepped(self, steps: int, tokens: int) -> None:
        """`steps` more decode steps have run, which drew `tokens` tokens for unfinished samples.

        steps is 0 for a wave's first tokens, which are drawn from the prompt's logits.
        """
        seconds = self.lap()
        if steps:
            self.step_s += [seconds / steps] * steps
            self.decode_tokens += tokens
        elif not self.first_token_s:
            self.first_token_s = self.last - self.begin

    def text(self, sample: "Sample") -> None:
        """A sample's text may have grown; called only where `streams` is set or there are stop strings."""

    def done(self, sample: "Sample", cache: KVCache, row: int, begin: int) -> None:
        """A sample is finished. Until the method returns, the keys and values of its tokens but the last stand in this
        row of the cache, from the position `begin` on."""
        self.finished.append(sample)


@dataclass(frozen=True)
class Ranked:
    """A sample's place (1 is best), and how many samples have its text; `sample` is the most likely of them."""

    rank: int
    count: int
    sample: "Sample"


def rank(samples: Sequence["Sample"]) -> list[Ranked]:
    """Samples by mean log-probability, best first; those of identical text (or tokens, where there is none) as one."""
    groups: dict[object, list[Sample]] = {}
    for each in sorted(samples, key=lambda sample: -sample.mean_logprob):
        groups.setdefault(tuple(each.tokens) if each.text is None else each.text, []).append(each)
    return [Ranked(place, len(group), group[0]) for place, group in enumerate(groups.values(), 1)]


class Console(Monitor):
    """Shows a run to a person: one sample live on stdout as it comes, several as a progress bar on stderr.

    Used as a context manager around a run: where it is interrupted, what is finished is printed. earlier: the samples
    of a run of the same request before.
    """

    def __init__(self, session: "Session", earlier: Sequence["Sample"] = ()) -> None:
        super().__init__()
        self.options, self.device, self.earlier = session.options, session.device, earlier
        self.streams = self.options.num_samples == 1 and self.options.format == "text"
        self.bar = not self.streams and not self.options.quiet and sys.stderr.isatty()
        # Text that may turn out to be the beginning of a stop string is held back.
        self.held = max(map(len, self.options.stop), default=1) - 1
        self.shown, self.live = 0, ""
        self.caches: dict[int, KVCache] = {}

    def prefilled(self) -> None:
        release_freed_memory(self.device)  # decoding needs blocks of other sizes
        super().prefilled()

    def text(self, sample: "Sample") -> None:
        self.live = sample.text
        end = len(sample.text) - (self.held if sample.finish_reason is None else 0)
        if self.streams and end > self.shown:
            print(sample.text[self.shown : end], end="", flush=True)
            self.shown = end

    def stepped(self, steps: int, tokens: int) -> None:
        super().stepped(steps, tokens)
        if self.bar:
            finished, total = len(self.finished), self.options.num_samples
            bar = "#" * (20 * finished // total)
            note = f"\r[{bar:<20}] {len(self.step_s)} steps, {finished}/{total} samples finished"
            print(note, end="", file=sys.stderr, flush=True)

    def done(self, sample: "Sample", cache: KVCache, row: int, begin: int) -> None:
        super().done(sample, cache, row, begin)
        if self.options.interactive:
            self.caches[sample.index] = cache.row(row, begin)

    def show(self, ranked: Sequence[Ranked]) -> None:
        """Prints these samples, unless they were shown live."""
        if not self.streams:
            print_samples(ranked, self.options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.bar:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if self.streams and kind in (None, KeyboardInterrupt):
            print(self.live[self.shown :], flush=True)
        if kind is KeyboardInterrupt:
            self.show(rank(self.earlier or self.finished)[: self.options.top])


def print_samples(ranked: Sequence[Ranked], options: argparse.Namespace) -> None:
    """The samples on stdout: text, under headings where there may be several, or one JSON object a line."""
    for each in ranked:
        drawn = each.sample
        if options.format == "jsonl":
            fields = asdict(drawn)
            row = {"rank": each.rank, "sample": fields.pop("index"), "count": each.count, **fields}
            print(json.dumps(row | {"mean_logprob": drawn.mean_logprob}, ensure_ascii=False))
        elif options.num_samples == 1:
            print(drawn.text)
        else:
            times = f", {each.count} times" if each.count > 1 else ""
            print(f"[{each.rank}] mean log-probability {drawn.mean_logprob:.3f}, {drawn.finish_reason}{times}")
            print(drawn.text, end="\n\n")
    sys.stdout.flush()


def describe(session: "Session") -> dict[str, object]:
    """The part of the report that was decided before the run."""
    request, execution = session.request, session.execution
    return {
        "attention": request.attention,
        "attention_reason": execution.attention_reason,
        "compiled": execution.compiled,
        "compile_reason": execution.compile_reason,
        "packed_weights": execution.packed,
        "device": torch.cuda.get_device_name(session.device) if session.device.type == "cuda" else "cpu",
        "kv_dtype": "int8" if request.kv_dtype == "int8" else str(session.dtype).removeprefix("torch."),
        "dtype": str(session.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "seed": request.seed,
        "context_tokens": len(session.prompt_tokens),
        "num_samples": request.num_samples,
    }


def measure(
    monitors: Sequence[Monitor], execution: Execution, context: int, device: torch.device, compiled_prefill: bool
) -> dict[str, object]:
    """The measured part of the report: medians over the steps of all runs. Values that do not apply are None, as are
    the times of a prompt whose reading was compiled on the way."""
    memory = execution.memory
    steps = [second for monitor in monitors for second in monitor.step_s]
    first, steps = (steps[:1], steps[1:]) if execution.compiled else ([], steps)
    step = statistics.median(steps) if steps else None
    drawn = sum(monitor.decode_tokens for monitor in monitors)
    rate = drawn / (sum(steps) + step * len(first)) if step else None
    reads = monitors[1:] if compiled_prefill else monitors
    prefill_s = statistics.median(monitor.prefill_s for monitor in reads) if reads else None
    return {
        "waves": memory.waves,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": prefill_s and context / prefill_s,
        "first_token_s": statistics.median(monitor.first_token_s for monitor in reads) if reads else None,
        "decode_ms_per_step": step and 1000 * step,
        "tokens_per_s_per_sample": rate and rate / memory.rows_at_once,
        "tokens_per_s": rate,
        # The first compiled call compiles: what it took beyond a step.
        "compile_s": first[0] - (step or 0.0) if first else None,
        "kv_context_bytes": memory.context,
        "kv_decoded_bytes": memory.decoded,
        "kv_unshared_bytes": memory.unshared,
        "bytes_per_step": memory.per_step,
        "bandwidth_gb_s": step and memory.per_step / step / 1e9,
        "peak_memory_bytes": peak_memory(device),
    }


def print_report(report: dict[str, object]) -> None:
    for name, value in report.items():
        text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
        size = f" ({human(value)})" if name.endswith("_bytes") and isinstance(value, int) else ""
        print(f"{name:>24}  {text}{size}", file=sys.stderr)
