"""The compiled step. Oracles: torch.compile's own refusal to compile again; the eager step's tokens in fp32."""

from dataclasses import replace

import pytest
import torch
from conftest import ALIBI, GQA, random_model, random_tokens

from generate import Request, Sampling, generate, make_steps
from report import Monitor


@pytest.mark.parametrize(
    "args", [replace(GQA, n_layer=1), replace(ALIBI, n_layer=1, windows=(5,))], ids=["plain", "ALiBi, window"]
)
def test_one_compiled_step_serves_every_n_context_and_capacity(monkeypatch, args):
    """Also through compaction, which changes N on the way, and growth, which changes the slots."""
    monkeypatch.setattr("generate.DECODE_SLOTS", 8)
    torch.compiler.reset()
    model = random_model(args, torch.float32)
    steps, eos = make_steps(model, compile_decode=True), frozenset(range(3, 97, 9))

    def draw(n: int, context: int, length: int, compiled: bool) -> tuple[list, Monitor]:
        prompt, monitor = random_tokens(GQA, context, seed=context).tolist(), Monitor()
        request = Request(n, length, Sampling(0.9, top_k=30), seed=n, eos_ids=eos)
        samples = generate(model, prompt, request, steps=steps if compiled else None, monitor=monitor)
        return [each.tokens for each in samples], monitor

    draw(5, 13, 6, True)
    with torch.compiler.set_stance("fail_on_recompile"):
        for n, context, length in ((2, 2, 5), (3, 200, 30), (17, 33, 40), (64, 129, 12)):
            tokens, monitor = draw(n, context, length, True)
            assert tokens == draw(n, context, length, False)[0]
            assert len(monitor.step_s) > 1
