"""Time examples/transformers_shared.py against transformers itself: a random Llama of 110 M parameters.

    python scripts/benchmark_transformers.py -n 8 16 --context 2048
    python scripts/benchmark_transformers.py --logprobs --context 1024 -n 8 --length 64

By default, N samples by generate and by generate_shared, one run each: the time to the first token, the median step.
--logprobs: N completions of --length tokens, forward and backward, as one plain batch and by logprobs_shared: the
median of --steps times, the peak of resident pages beyond the model and its gradients (Linux).
"""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "examples")]

from cli.system import finish, start

if __name__ == "__main__":
    start()

import argparse
import re
import statistics
import time
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from engine.plan import release_freed_memory
from transformers_shared import generate_shared, logprobs_shared, timed

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def decoding(model: Any, context: int, samples: int, steps: int) -> str:
    """Return a table row: seconds to the first token and ms per step, of generate and of generate_shared."""
    ids = torch.randint(model.config.vocab_size, (1, context))
    fields = {"attention_mask": torch.ones_like(ids), "max_new_tokens": steps + 1, "do_sample": True}
    cells = []
    for generate in (model.generate, partial(generate_shared, model)):
        _, first, step = timed(generate, ids, num_return_sequences=samples, **fields)
        cells.append((first, step))
    ratios = [plain / shared for plain, shared in zip(*cells, strict=True)]
    row = [f"{plain:.{digits}f} | {shared:.{digits}f}" for plain, shared, digits in zip(*cells, (2, 1), strict=True)]
    return f"| {samples} | {row[0]} | {ratios[0]:.1f}x | {row[1]} | {ratios[1]:.1f}x |"


def plain_logprobs(model: Any, prompt: Tensor, completions: Tensor) -> Tensor:
    """Score as trainers do: each completion after its own copy of the prompt."""
    rows = torch.cat([prompt.expand(len(completions), -1), completions], 1)
    logits = model(rows, use_cache=False, logits_to_keep=completions.shape[1] + 1).logits[:, :-1].float()
    return logits.gather(-1, completions[..., None])[..., 0] - logits.logsumexp(-1)


def resident(field: str) -> int:
    return 1024 * int(re.findall(field + r":\s+(\d+)", STATUS.read_text())[0])


def scoring(model: Any, context: int, samples: int, length: int, steps: int) -> str:
    """Return a table row: seconds forward and backward, megabytes at the peak, and how far gradients differ."""
    prompt = torch.randint(model.config.vocab_size, (1, context))
    completions = torch.randint(model.config.vocab_size, (samples, length))
    weights = torch.randn(samples, 1)
    cells, gradients = [], []
    for score in (plain_logprobs, logprobs_shared):
        model.zero_grad(set_to_none=False)
        times, peaks = [], []
        for _ in range(steps):
            release_freed_memory(model.device)
            CLEAR.write_text("5")  # reset the peak
            before, began = resident("VmRSS"), time.perf_counter()
            (score(model, prompt, completions) * weights).sum().backward()
            times.append(time.perf_counter() - began)
            peaks.append((resident("VmHWM") - before) / 1e6)
        cells.append((statistics.median(times), max(peaks)))
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    ratios = [plain / shared for plain, shared in zip(*cells, strict=True)]
    row = [f"{plain:.{digits}f} | {shared:.{digits}f}" for plain, shared, digits in zip(*cells, (2, 0), strict=True)]
    apart = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    return f"| {samples} | {row[0]} | {ratios[0]:.1f}x | {row[1]} | {ratios[1]:.1f}x | {apart:.1e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Shared contexts inside transformers, against transformers itself.")
    parser.add_argument("--context", type=int, default=2048, help="tokens of the prompt")
    parser.add_argument("-n", type=int, nargs="+", default=[8], help="samples, or completions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=5, help="decode steps, or repetitions of --logprobs")
    parser.add_argument("--logprobs", action="store_true", help="score completions, forward and backward")
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion")
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    torch.manual_seed(0)
    sizes = SHAPE | {"num_hidden_layers": options.layers, "vocab_size": options.vocabulary}
    config = transformers.LlamaConfig(**sizes, max_position_embeddings=options.context + 4096, eos_token_id=None)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, options.dtype)).eval()
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {options.dtype}, T {options.context}")
    if options.logprobs:
        print("\n| G | plain, s | shared, s | | plain, MB | shared, MB | | gradients differ by |\n|" + "---|" * 8)
    else:
        print("\n| N | first token, s | shared | | step, ms | shared | |\n|" + "---|" * 7)
    for samples in options.n:
        if options.logprobs:
            print(scoring(model, options.context, samples, options.length, options.steps), flush=True)
        else:
            print(decoding(model, options.context, samples, options.steps), flush=True)


if __name__ == "__main__":
    finish(main)
