"""What each process of tests/test_tp.py runs under torchrun: every case of a pickled list, one after another.

python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py CASES OUT
python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py die FLAGS
python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py drafts CHECKPOINT OUT
python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py leave GO FLAGS
python -m torch.distributed.run --standalone --nproc_per_node=2 tests/tp_worker.py memory FLAGS
"""

import itertools
import json
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import generate
from cache import KVCache
from cli import prompts
from cli.jobs import Output
from cli.ranks import join, leave
from engine import runner
from engine.chat import Conversation
from engine.engine import Engine
from engine.graphs import RecordedStep, Recording, StepInput
from engine.request import Request, Sampling
from engine.scheduler import Prompt, Scheduler
from engine.speculate import (
    Draft,
    DraftController,
    LayersDraft,
    ModelDraft,
    PromptDraft,
    Speculation,
    SpeculativeDecoder,
)
from loading.checkpoint import load_model
from sampling import uniform


def die_while_decoding(flags: list[str]) -> int:
    """generate.py, of which all ranks but the first end in the middle."""
    if os.environ["RANK"] != "0":
        Scheduler.record = lambda self, *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    return generate.main(flags)


def leave_a_batch(go: str, flags: list[str]) -> int:
    """generate.py --prompts, whose first rank dies after its first prompt. The others go on when there is a file."""
    append = Output.append

    def appended(output: Output, block: bytes) -> None:
        append(output, block)
        if os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path(go).exists():
            time.sleep(0.05)

    Output.append = appended  # type: ignore[method-assign]
    return generate.main(flags)


def die_once(rank: str, flags: list[str]) -> int:
    """generate.py --prompts, of which one rank dies in the middle of its second prompt's lines, unless torchrun has
    started it again. The other waits until then, so that each has drawn some."""
    append, appended = Output.append, 0

    def dying(output: Output, block: bytes) -> None:
        nonlocal appended
        appended += 1
        if appended == 2 and os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            append(output, block[: len(block) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        append(output, block)

    Output.append = dying  # type: ignore[method-assign]
    return generate.main(flags)


def run_in_windows(flags: list[str]) -> int:
    """generate.py --prompts, which holds two prompts at a time."""
    prompts.WINDOW = 2
    return generate.main(flags)


def run_out_of_memory(flags: list[str]) -> int:
    """generate.py --interactive, of which all ranks but the first have no memory for a turn."""
    if os.environ["RANK"] != "0":

        def turn(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

        Conversation.turn = turn  # type: ignore[assignment, method-assign]
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


# Rows and sampling of the steps whose collectives are counted.
COUNTED = [(n, Sampling(0.9, top_k)) for n in (1, 3, 64) for top_k in (20, None)] + [(3, Sampling(0))]


@torch.no_grad()
def step(engine: Engine, n: int, sampling: Sampling) -> None:
    """A decode step with its draw."""
    cache = KVCache.empty(engine.args.kv_shape, n, 4, engine.model.norm.weight)
    tokens, samples = torch.zeros(n, 1, dtype=torch.long), torch.arange(n)
    plan = replace(engine.plan(1, Request(n, 4, sampling)), compiled=False)
    engine.step(plan, lambda: sampling)(StepInput(tokens, tokens, samples, torch.tensor(0)), cache)


def tokens_of(engine: Engine, prompt: list[int], requests: list[Request]) -> list[list[list[int]]]:
    """The samples of each request, and where there are several, of the prompt and its beginning in one batch, one of
    them greedy."""
    tokens = [[each.tokens for each in engine.generate(prompt, request)] for request in requests]
    batch = replace(requests[0], num_samples=3, rows_at_once=4)
    prompts = [Prompt("whole", prompt), Prompt("part", prompt[:5], replace(batch, sampling=Sampling(0)))]
    for outcome in engine.generate_many(prompts if len(requests) > 1 else [], batch):
        tokens.append([each.tokens for each in outcome.samples])
    return tokens


def record_steps() -> list[list[int]]:
    """Run steps as on CUDA from now on, with a stand-in for the recording that also runs a step three times. Returns
    the rows of each recording to come, and the steps before it."""
    made, steps, plain = list[list[int]](), itertools.count(), Engine.step

    def record(step: Callable[[], Any], device: torch.device) -> Recording:
        outputs = [step() for _ in range(3)][-1]
        made.append([len(outputs[0]), next(steps)])

        def replay() -> None:
            next(steps)
            for mine, new in zip(outputs, step(), strict=True):
                mine.copy_(new)

        return replay, outputs

    runner.UniformBlocks = lambda: uniform  # type: ignore[assignment, misc]  # which keeps nothing between two steps
    Engine.step = lambda *given: RecordedStep(plain(*given), record)  # type: ignore[assignment, method-assign]
    return made


def draw_cases(cases: str, out: str) -> None:
    ranks = join(None, torch.device("cpu"))
    drawn = {}
    for name, checkpoint, prompt, requests, compile in pickle.loads(Path(cases).read_bytes()):
        model = load_model(checkpoint, "cpu", torch.float32, 3, ranks.shard)
        engine = Engine(model, None, compile, ranks.shard)
        engine.available = 1 << 40
        stored = [each.untyped_storage() for each in (*model.parameters(), *model.buffers())]  # a view's once
        held = sum({each.data_ptr(): each.nbytes() for each in stored}.values())
        steps = [partial(step, engine, n, sampling) for n, sampling in COUNTED]
        counted = [collectives(each) if ranks.leads else each() for each in steps]
        made = record_steps() if name == "recorded" else []
        drawn[name] = tokens_of(engine, prompt, requests), held, counted, ranks.all(made)
    if ranks.leads:
        Path(out).write_text(json.dumps(drawn))
    leave()


class Apart(Draft):
    """Proposes other tokens on each rank, and at some steps nothing on one of them or on both."""

    name = "apart"

    def __init__(self, rank: int) -> None:
        self.rank, self.steps = rank, 0

    def begin(self, rows: SpeculativeDecoder) -> Self:
        return self

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        self.steps += 1
        ahead = 1 + self.rank + torch.arange(k)
        return (rows.token + ahead) % rows.model.args.vocab_size if self.steps % (2 + self.rank) else None


def draw_with_drafts(checkpoint: str, out: str) -> None:
    """The samples of a request by plain decoding and with each draft, of every rank. All but the first rank move their
    logits before they draw, as if they rounded otherwise, though far more."""
    ranks = join(None, torch.device("cpu"))
    saved, prompt, request = pickle.loads(Path(checkpoint).read_bytes())
    if not ranks.leads:
        draw, generator = runner.draw, torch.Generator().manual_seed(0)

        def moved(logits: Tensor, *rest: object, **more: object) -> tuple[Tensor, Tensor]:
            return draw(logits + 2 * torch.randn(logits.shape, generator=generator), *rest, **more)

        runner.draw = moved  # type: ignore[attr-defined]
    DraftController.SETTLE, DraftController.PATIENCE = 1, math.inf
    load = partial(load_model, saved)
    drafts = [LayersDraft(1), ModelDraft(saved.args, load), PromptDraft(), Apart(ranks.rank)]
    drawn = {}
    for draft in (None, *drafts):
        engine = Engine(load_model(saved, "cpu", torch.float32, 3, ranks.shard), None, False, ranks.shard)
        engine.available = 1 << 40
        if draft is not None:
            engine.use(Speculation(draft, 3), 3)
        tokens = [each.tokens for each in engine.generate(prompt, request)]
        report = engine.decoder.report() if engine.decoder is not None else {}  # type: ignore[attr-defined]
        drawn[draft.name if draft else "plain"] = tokens, report.get("drafted_steps"), report.get("accept_histogram")
    Path(f"{out}.{ranks.rank}").write_text(json.dumps(drawn))
    leave()


if __name__ == "__main__":
    if sys.argv[1] == "drafts":
        draw_with_drafts(*sys.argv[2:])
        sys.exit()
    if sys.argv[1] == "once":
        sys.exit(die_once(sys.argv[2], sys.argv[3:]))
    if sys.argv[1] == "leave":
        sys.exit(leave_a_batch(sys.argv[2], sys.argv[3:]))
    if sys.argv[1] == "windows":
        sys.exit(run_in_windows(sys.argv[2:]))
    if sys.argv[1] == "memory":
        sys.exit(run_out_of_memory(sys.argv[2:]))
    if sys.argv[1] == "die":
        sys.exit(die_while_decoding(sys.argv[2:]))
    draw_cases(*sys.argv[1:])
