"""What each process of tests/test_tp.py runs under torchrun: every case of a pickled list, one after another.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py CASES OUT
python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py die FLAGS
"""

import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from batch import Prompt, generate_many
from cache import KVCache
from checkpoint import load_model
from engine import Engine, Run
from ranks import join, leave
from request import Request


def die_while_decoding(flags: list[str]) -> int:
    """generate.py, of which all ranks but the first end in the middle."""
    if os.environ["RANK"] != "0":
        Run.collect = lambda self, *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return generate.main(flags)


def collectives(function: Callable[[], object]) -> list[tuple[str, int]]:
    """The collectives of a call, and the numbers that this rank gives to each."""
    counted: list[tuple[str, int]] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "_c10d_functional" and "wait" not in func.name():
                counted.append((func.name().partition("::")[2], args[0].numel()))
            return func(*args, **(kwargs or {}))

    with Count():
        function()
    return counted


@torch.no_grad()
def step(engine: Engine, n: int) -> None:
    cache = KVCache.empty(engine.args, n, 4, engine.model.norm.weight)
    engine.model(torch.zeros(n, 1, dtype=torch.long), torch.zeros(n, 1, dtype=torch.long), cache)


def tokens_of(engine: Engine, prompt: list[int], requests: list[Request]) -> list[list[list[int]]]:
    """The samples of each request, and where there are several, of the prompt and its beginning in one batch."""
    tokens = [[each.tokens for each in engine.generate(prompt, request)] for request in requests]
    prompts = [Prompt("whole", prompt), Prompt("part", prompt[:5])] if len(requests) > 1 else []
    for outcome in generate_many(engine, prompts, replace(requests[0], num_samples=3, rows_at_once=4)):
        tokens.append([each.tokens for each in outcome.samples])
    return tokens


def draw_cases(cases: str, out: str) -> None:
    ranks = join(None, torch.device("cpu"))
    drawn = {}
    for name, checkpoint, prompt, requests, compile in pickle.loads(Path(cases).read_bytes()):
        model = load_model(checkpoint, "cpu", torch.float32, 3, ranks.shard)
        engine = Engine(model, None, compile, ranks.shard)
        engine.available = 1 << 40
        held = sum(tensor.nbytes for tensor in {*model.parameters(), *model.buffers()})
        steps = {n: partial(step, engine, n) for n in (1, 3)}
        counted = {n: collectives(each) if ranks.leads else each() for n, each in steps.items()}
        drawn[name] = tokens_of(engine, prompt, requests), held, counted
    if ranks.leads:
        Path(out).write_text(json.dumps(drawn))
    leave()


if __name__ == "__main__":
    if sys.argv[1] == "die":
        sys.exit(die_while_decoding(sys.argv[2:]))
    draw_cases(*sys.argv[1:])
