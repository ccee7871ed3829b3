"""Speculative decoding. Oracles: plain decoding, token by token; stub logits whose proposals are known; exact
enumeration of what a small network draws."""

import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GQA, PROMPT, STORIES, TINY, Letters, draws, needs_stories, random_model, random_tokens, request
from torch import Tensor

import engine as road
import speculate
from cache import LAYOUTS
from chat import Conversation
from checkpoint import read_checkpoint
from drafts import Draft, LayersDraft, MedusaDraft, ModelDraft, PromptDraft, Speculation, choose_draft
from engine import Engine, Request
from model import ModelArgs, Transformer
from packed import dequantise
from plan import Workload
from quantize import quantise_int4, quantise_int8
from rotary import RopeScaling
from sampling import Sampling
from speculate import Pace, Speculating

TWO = replace(GQA, n_layer=2)
EOS = frozenset(range(3, 97, 9))
GREEDY = Sampling(0)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return random_model(TWO)


def near(model: Transformer, seed: int = 3, size: float = 0.2) -> Transformer:
    """A network that agrees with another now and then."""
    other = random_model(model.args, model.norm.weight.dtype)
    generator = torch.Generator().manual_seed(seed)
    for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
        noise = torch.randn(theirs.shape, generator=generator, dtype=theirs.dtype)
        mine.copy_(theirs + size * theirs.std(unbiased=False) * noise)
    return other


def medusa(tmp_path, args: ModelArgs, heads: int = 3, ids: Tensor | None = None, seed: int = 0):
    """A file of random heads, in the public layout."""
    generator = torch.Generator().manual_seed(seed)
    state = {} if ids is None else {"tokens": ids}
    for head in range(heads):
        shapes = {"0.linear.weight": (args.dim, args.dim), "0.linear.bias": (args.dim,)}
        shapes["1.weight"] = (args.vocab_size if ids is None else len(ids), args.dim)
        state |= {f"{head}.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    path = tmp_path / "medusa_lm_head.pt"
    torch.save(state, path)
    return path


@pytest.fixture
def draft(request, model, tmp_path) -> Draft:
    kind = request.param
    if kind == "model":
        return ModelDraft(TWO, lambda *_: near(model))
    if kind == "other model":
        args = replace(TWO, dim=22, n_layer=1, n_head=4, n_kv_head=1, head_dim=6)
        return ModelDraft(args, lambda *_: random_model(args))
    if kind == "medusa":
        return MedusaDraft(medusa(tmp_path, TWO, ids=torch.arange(0, 97, 2)), TWO)
    return {"prompt": PromptDraft(), "layers": LayersDraft(1)}[kind]


KINDS = ("model", "other model", "prompt", "layers", "medusa")
every_draft = pytest.mark.parametrize("draft", KINDS, indirect=True)


@pytest.fixture
def always(monkeypatch) -> None:
    """Drafts from the first step on, and does not give up."""
    monkeypatch.setattr(Pace, "SETTLE", 1)
    monkeypatch.setattr(Pace, "TIMED", -1)
    monkeypatch.setattr(Pace, "PATIENCE", math.inf)


def speculating(model: Transformer, draft: Draft, k: int | None = 3, tokenizer=None) -> Engine:
    engine = Engine(model, tokenizer)
    Speculation(draft, k).place(engine, 3)
    return engine


CASES = {
    "length": {},
    "eos": {"eos_ids": EOS},
    "stop strings": {"stop": ("a", "Q", "zz")},
    "waves": {"eos_ids": EOS, "rows_at_once": 4},
    "rows one by one": {"eos_ids": EOS, "rows_at_once": 1},
    "contiguous": {"attention": "contiguous", "eos_ids": EOS},
    "expanded": {"attention": "expanded", "eos_ids": EOS},
}


@every_draft
@pytest.mark.parametrize("n", [1, 3, 17])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, top_k=20)], ids=["greedy", "drawn"])
def test_samples_are_those_of_plain_decoding(always, model, draft, n, sampling):
    """Token by token, at the end and through compaction, over the border of a bucket, in waves and layouts. Oracle: plain
    decoding of the same request."""
    plain, drafted = Engine(model, Letters()), speculating(model, draft, tokenizer=Letters())
    for name, fields in CASES.items():
        asked = request(n, 67, sampling, **fields)
        expected, found = plain.generate(PROMPT, asked), drafted.generate(PROMPT, asked)
        assert draws(found) == draws(expected), name
        for one, other in zip(found, expected, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-9)
    report = drafted.decoder.report()
    assert report["drafted_steps"] > 20 and sum(report["accept_histogram"]) > 20
    if draft.name in ("model", "layers:1"):
        assert 0.05 < report["mean_accepted"] < 2.95, "some are accepted and some are not"
