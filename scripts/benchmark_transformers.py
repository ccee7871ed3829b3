"""Time examples/transformers_shared.py against transformers itself: a random Llama of 110 M parameters.

    python scripts/benchmark_transformers.py -n 8 16 --context 2048
    python scripts/benchmark_transformers.py --logprobs --context 1024 -n 8 --length 64

By default, N samples by generate and by generate_shared, one run each: the time to the first token, the median step.
--logprobs: N completions of --length tokens, forward and backward, as one plain batch and by logprobs_shared: the
median of --steps times, the peak of resident pages beyond the model and its gradients (Linux).
"""

import common
from common import Table, alternate, count  # isort: split

import argparse
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.plan import choose_dtype, release_freed_memory
from transformers_shared import generate_shared, logprobs_shared, timed

DECODED = (
    "N", "first token, s:.2f", "shared, s:.2f", "first token, ratio:.1f", "step, ms:.1f", "shared, ms:.1f",
    "step, ratio:.1f",
)  # fmt: skip
SCORED = (
    "G", "plain, s:.2f", "shared, s:.2f", "time, ratio:.1f", "plain, MB:.0f", "shared, MB:.0f", "memory, ratio:.1f",
    "gradients differ by:.1e",
)  # fmt: skip


def against(plain: Sequence[float], shared: Sequence[float]) -> list[float]:
    """Return each number of both sides, and their ratio."""
    return [cell for one, other in zip(plain, shared, strict=True) for cell in (one, other, one / other)]


def decoding(options: argparse.Namespace, model: Any, samples: int) -> list[float]:
    """Compare the time to the first token and a step, of generate and of generate_shared."""
    ids = torch.randint(model.config.vocab_size, (1, options.context))
    fields = {"attention_mask": torch.ones_like(ids), "max_new_tokens": options.steps + 1, "do_sample": True}
    ways = (model.generate, partial(generate_shared, model))
    sides = alternate([partial(timed, way, ids, num_return_sequences=samples, **fields) for way in ways], 1)
    return against(*(times for ((_, *times),) in sides))


def plain_logprobs(model: Any, prompt: Tensor, completions: Tensor) -> Tensor:
    """Score as trainers do: each completion after its own copy of the prompt."""
    rows = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    logits = model(rows, use_cache=False, logits_to_keep=completions.shape[1] + 1).logits[:, :-1].float()
    return logits.gather(-1, completions[..., None])[..., 0] - logits.logsumexp(-1)


def scoring(options: argparse.Namespace, model: Any, samples: int) -> list[float]:
    """Compare the time forward and backward and the memory at its peak, and tell how far gradients differ."""
    prompt = torch.randint(model.config.vocab_size, (1, options.context))
    completions, weights = torch.randint(model.config.vocab_size, (samples, options.length)), torch.randn(samples, 1)
    gradients: dict[Callable[..., Tensor], Tensor] = {}

    def once(way: Callable[..., Tensor]) -> tuple[float, float]:
        for parameter in model.parameters():  # before the peak is reset: they are not part of it
            parameter.grad = torch.zeros_like(parameter)
        release_freed_memory(model.device)
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = common.resident()
        (seconds,) = common.timed(lambda: (way(model, prompt, completions) * weights).sum().backward())
        peak = common.resident("VmHWM") - before
        gradients[way] = torch.cat([each.grad.flatten() for each in model.parameters()])
        return seconds, peak / 1e6

    sides = alternate([partial(once, way) for way in (plain_logprobs, logprobs_shared)], options.steps)
    plain, shared = gradients.values()
    # The median of the times, and the highest peak.
    numbers = [
        (statistics.median(seconds), max(peaks)) for seconds, peaks in (zip(*side, strict=True) for side in sides)
    ]
    return [*against(*numbers), ((plain - shared).norm() / plain.norm()).item()]


@common.reporting
def main() -> None:
    parser = common.build_parser("Shared contexts inside transformers, against transformers itself.", "float32")
    parser.add_argument("--context", type=count, default=2048, help="tokens of the prompt")
    parser.add_argument("-n", type=count, nargs="+", default=[8], help="samples, or completions")
    parser.add_argument("--steps", type=count, default=5, help="decode steps, or repetitions of --logprobs")
    parser.add_argument("--logprobs", action="store_true", help="score completions, forward and backward")
    parser.add_argument("--length", type=count, default=64, help="tokens of a completion")
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--vocabulary", type=count, default=32000)
    options = parser.parse_args()
    dtype, sizes = choose_dtype(options.dtype, common.CPU), (options.layers, options.vocabulary)
    model = common.random_llama(options.context + 4096, *sizes, eos_token_id=None).to(dtype)
    common.print_heading(common.CPU, dtype, f", transformers {transformers.__version__}, T {options.context}")
    way = scoring if options.logprobs else decoding
    table = Table(*(SCORED if options.logprobs else DECODED), out=options.out)
    for samples in options.n:
        table.row(samples, *way(options, model, samples))


if __name__ == "__main__":
    common.finish(main)
