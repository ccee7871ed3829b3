"""Time lm_eval with this engine against its own `hf` model on multiple-choice items, in one process.

    python scripts/benchmark_eval.py --checkpoint_path FOLDER --items hellaswag_dev.jsonl
    python scripts/benchmark_eval.py --checkpoint_path FOLDER --items hellaswag_dev.jsonl --preamble 2000 --limit 5

FOLDER is one that transformers reads too. --items: JSON lines with ctx, endings and label. --preamble N: N tokens of
random text before every item, and a model of 110 M random weights in place of FOLDER's, with its tokenizer. The hf
model first runs --probe items at each of --batch_sizes, then all at the fastest. Needs: pip install "lm_eval[hf]".
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, start

if __name__ == "__main__":
    start()

import argparse
import json
import logging
import random
import tempfile
import time
from typing import Any

import torch

from engine.engine import Engine
from engine.plan import keep_freed_memory
from eval import Evaluator, HarnessTokenizer, harness_model
from loading.checkpoint import read_checkpoint

TASK = """
task: items
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


def write_task(folder: Path, items: list[dict[str, Any]], preamble: str) -> None:
    lines = [json.dumps(item | {"ctx": preamble + item["ctx"]}) for item in items]
    (folder / "items.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "items.yaml").write_text(TASK.replace("FILE", str(folder / "items.jsonl")), "utf-8")


def random_model(source: Path, folder: Path) -> None:
    """Save a Llama of 110 M random weights, with the tokenizer of `source`."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        max_position_embeddings=4096, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def preamble_of(items: list[dict[str, Any]], evaluator: Evaluator, tokens: int) -> str:
    """Return words of the items in random order, as many as make `tokens` tokens."""
    words = [word for item in items for word in item["ctx"].split()]
    random.Random(0).shuffle(words)
    low, high = 0, len(words)
    while low < high:
        middle = (low + high) // 2
        enough = len(evaluator.texts.encode(" ".join(words[:middle]))) >= tokens
        low, high = (low, middle) if enough else (middle + 1, high)
    return " ".join(words[:low]) + "\n\n"


def evaluate(model: Any, folder: Path, limit: int | None) -> tuple[dict, float]:
    """Return the harness's results, and the model's seconds for the requests, encoding of texts included."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    answer, seconds = model.loglikelihood, []

    def timed(requests: list) -> list:
        begin = time.perf_counter()
        found = answer(requests)
        seconds.append(time.perf_counter() - begin)
        return found

    model.loglikelihood = timed
    results = simple_evaluate(model, tasks=["items"], task_manager=manager, limit=limit, log_samples=True)
    model.loglikelihood = answer
    return results, sum(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint_path", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--preamble", type=int, default=0)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--probe", type=int, default=30)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch_tokens", type=int, default=16384)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    keep_freed_memory()  # for both models
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import make_table

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model" if options.preamble else options.checkpoint_path
        if options.preamble:
            random_model(options.checkpoint_path, source)
        engine = Engine.open(source, "cpu", "float32", compile=False)
        evaluator = Evaluator(
            engine, HarnessTokenizer(engine, source, read_checkpoint(source).eos_ids), options.batch_tokens
        )
        items = [json.loads(line) for line in options.items.read_text("utf-8").splitlines()]
        write_task(folder, items, preamble_of(items, evaluator, options.preamble) if options.preamble else "")
        theirs = HFLM(str(source), device="cpu", dtype="float32")
        probed = {}
        for size in options.batch_sizes:
            theirs.batch_size_per_gpu = size
            probed[size] = evaluate(theirs, folder, options.probe)[1]
        print("hf, seconds for the probe by batch size:", {size: round(took, 2) for size, took in probed.items()})
        theirs.batch_size_per_gpu = min(probed, key=probed.__getitem__)
        found = {"eval.py": evaluate(harness_model(evaluator), folder, options.limit)}
        found[f"hf, batch_size {theirs.batch_size_per_gpu}"] = evaluate(theirs, folder, options.limit)
    for name, (results, seconds) in found.items():
        print(f"\n{name}: {seconds:.2f} s\n{make_table(results)}")
    print(f"{evaluator.asked} tokens asked, {evaluator.read} read")
    (ours, took), (other, longer) = found.values()
    pairs = zip(ours["samples"]["items"], other["samples"]["items"], strict=True)
    answers = (zip(*(item["filtered_resps"] for item in pair), strict=False) for pair in pairs)
    gap = max(abs(a[0] - b[0]) for both in answers for a, b in both)
    print(f"largest difference of a log-likelihood {gap:.1e}; ratio of times {longer / took:.2f}")


if __name__ == "__main__":
    finish(main)
