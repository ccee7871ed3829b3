"""Time lm_eval with this engine against its own `hf` model on multiple-choice items, in one process.

    python scripts/benchmark_eval.py --checkpoint_path FOLDER --items hellaswag_dev.jsonl
    python scripts/benchmark_eval.py --checkpoint_path FOLDER --items hellaswag_dev.jsonl --preamble 2000 --limit 5

FOLDER is one that transformers reads too. --items: JSON lines with ctx, endings and label. --preamble N: N tokens of
random text before every item, and a model of 110 M random weights in place of FOLDER's, with its tokenizer. The hf
model first runs --probe items at each of --batch_sizes, then all at the fastest. Needs: pip install "lm_eval[hf]".
"""

import common
from common import Table, count  # isort: split

import json
import logging
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from engine.engine import Engine
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


def save_random(source: Path, folder: Path) -> None:
    """Save a Llama of 110 M random weights, with the tokenizer of `source`."""
    from transformers import AutoTokenizer

    common.random_llama(4096, tie_word_embeddings=True).save_pretrained(folder)
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


@common.reporting
def main() -> None:
    parser = common.build_parser(__doc__, "float32")
    parser.add_argument("--checkpoint_path", type=Path, required=True)
    parser.add_argument("--items", type=Path, required=True)
    parser.add_argument("--preamble", type=int, default=0)
    parser.add_argument("--limit", type=count)
    parser.add_argument("--probe", type=count, default=30)
    parser.add_argument("--batch_sizes", type=count, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batch_tokens", type=count, default=16384)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    device, dtype = common.begin("cpu", options.dtype)  # for both models
    from lm_eval.models.huggingface import HFLM

    common.print_heading(device, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "model" if options.preamble else options.checkpoint_path
        if options.preamble:
            save_random(options.checkpoint_path, source)
        engine = Engine.open(source, "cpu", options.dtype, compile=False)
        tokenizer = HarnessTokenizer(engine, source, read_checkpoint(source).eos_ids)
        evaluator = Evaluator(engine, tokenizer, options.batch_tokens)
        items = [json.loads(line) for line in options.items.read_text("utf-8").splitlines()]
        write_task(folder, items, preamble_of(items, evaluator, options.preamble) if options.preamble else "")
        theirs, probed = HFLM(str(source), device="cpu", dtype=str(dtype)[6:]), {}
        table = Table("hf, batch size", f"seconds for {options.probe} items:.2f", out=options.out)
        for size in options.batch_sizes:
            theirs.batch_size_per_gpu = size
            probed[size] = evaluate(theirs, folder, options.probe)[1]
            table.row(size, probed[size])
        theirs.batch_size_per_gpu = min(probed, key=probed.__getitem__)
        found = {"eval.py": evaluate(harness_model(evaluator), folder, options.limit)}
        found[f"hf, batch size {theirs.batch_size_per_gpu}"] = evaluate(theirs, folder, options.limit)
    metrics = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    table = Table("by", "seconds:.2f", *(f"{metric}:.3f" for metric in metrics), out=options.out)
    for name, (results, seconds) in found.items():
        table.row(name, seconds, *(results["results"]["items"][f"{metric},none"] for metric in metrics))
    (ours, took), (other, longer) = found.values()
    pairs = zip(ours["samples"]["items"], other["samples"]["items"], strict=True)
    answers = (zip(*(item["filtered_resps"] for item in pair), strict=False) for pair in pairs)
    gap = max(abs(a[0] - b[0]) for both in answers for a, b in both)
    table = Table("ratio of times:.2f", "tokens asked", "read", "log-likelihoods differ by:.1e", out=options.out)
    table.row(longer / took, evaluator.asked, evaluator.read, gap)


if __name__ == "__main__":
    common.finish(main)
