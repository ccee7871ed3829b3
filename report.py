"""What is measured of a run, and how it is told: the Monitor that hears of its events, and the report of its times.

A room of its own because the road from prompt to samples should read without its stopwatch.
"""

import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from model import KVCache
from plan import Memory, human, peak_memory

if TYPE_CHECKING:
    from generate import Sample


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


def measure(
    monitors: Sequence[Monitor], memory: Memory, context: int, compiled: bool, device: torch.device
) -> dict[str, object]:
    """The measured part of the report: medians over the steps of all runs. Values that do not apply are None."""
    steps = [second for monitor in monitors for second in monitor.step_s]
    first, steps = (steps[:1], steps[1:]) if compiled else ([], steps)
    step = statistics.median(steps) if steps else None
    drawn = sum(monitor.decode_tokens for monitor in monitors)
    rate = drawn / (sum(steps) + step * len(first)) if step else None
    prefill_s = statistics.median(monitor.prefill_s for monitor in monitors)
    return {
        "waves": memory.waves,
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": context / prefill_s,
        "first_token_s": statistics.median(monitor.first_token_s for monitor in monitors),
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
