"""What several test files need: small random models, a tokenizer of letters, one full pass as an oracle, and where the
shared data lies if it does."""

import inspect
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from cache import KVCache, NoCache, Prefill
from engine import plan
from engine.request import Request, Sampling
from engine.samples import Sample
from layers import linear as packed
from model import ModelArgs, Transformer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
FOLDERS = "cli", "engine", "loading", "layers"
SOURCES = sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.py"))])
TINY = ROOT / "checkpoints" / "tiny"
STORIES = SHARED / "models" / "stories15M"

# For a child: one that pytest was started to ignore (nohup) is inherited, and Ctrl-C would not reach it.
interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)

sys.path.insert(0, str(ROOT / "scripts"))
torch.set_num_threads(1)  # the models here are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # nor may the commands of tests that run side by side wait for each other's threads


ASKED = packed.multiplies_bfloat16  # of the CPU itself


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bf16", action="store_true", help="test as on a CPU with instructions for bfloat16")
    parser.addoption("--slow", action="store_true", help="what `make test` leaves to `make slow`, alone")


def pytest_configure(config: pytest.Config) -> None:
    """Register `slow`. Whether the CPU counts as one with instructions for bfloat16, for which --dtype auto is bfloat16
    and weights are held in other ways, depends on --bf16 alone, and not on the CPU that runs the tests."""
    config.addinivalue_line("markers", "slow: takes long, and looks at what seldom changes: run by `make slow`")
    count_as(pytest.MonkeyPatch(), config.getoption("--bf16"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the slow tests, or with --slow all others."""
    chosen = [item for item in items if (item.get_closest_marker("slow") is not None) == config.getoption("--slow")]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(chosen)])
    items[:] = chosen


def count_as(monkeypatch: pytest.MonkeyPatch, multiplies: bool) -> bool:
    for module in (packed, plan):
        monkeypatch.setattr(module, "multiplies_bfloat16", lambda: multiplies)
    return multiplies


@pytest.fixture
def bf16(request, monkeypatch) -> bool:
    """Whether the CPU counts as one with instructions for bfloat16, by `both_kinds`."""
    return count_as(monkeypatch, request.param)


# For a test that leaves the dtype to the machine: on both kinds of CPU.
both_kinds = pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"], indirect=True)

slow = pytest.mark.slow
needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="stories15M is not beside the repository")


def as_transformers(name: str) -> str:
    """A parameter's name in transformers."""
    ours = ("attention_norm", "ffn_norm", "attention.w", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    theirs = ("input_layernorm", "post_attention_layernorm", "self_attn.", "mlp.gate", "mlp.down", "mlp.up")
    for old, new in zip((*ours, "tok_embeddings"), (*theirs, "embed_tokens"), strict=True):
        name = name.replace(old, new)
    return "model." + re.sub(r"\b([qkvo]|gate|down|up)\.weight", r"\1_proj.weight", name)


@pytest.fixture(scope="session", params=["tiny", pytest.param("stories15M", marks=needs_stories)])
def published(request, tmp_path_factory) -> Path:
    """A trained model as one is published: transformers' names in model.safetensors, config.json, tokenizer.model."""
    if request.param == "stories15M":
        return STORIES
    from safetensors.torch import save_file  # not every machine with a GPU has it

    folder = tmp_path_factory.mktemp("published")
    state = {as_transformers(name): tensor for name, tensor in torch.load(TINY / "model.pth").items()}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(TINY / name, folder)
    return folder


# Odd on purpose: nothing here is a multiple of 8 but by accident.
GQA = ModelArgs(
    dim=30, n_layer=3, n_head=6, n_kv_head=2, head_dim=10, hidden_dim=52, vocab_size=97, context_limit=4096
)  # fmt: skip
MHA = ModelArgs(
    dim=28, n_layer=2, n_head=3, n_kv_head=3, head_dim=14, hidden_dim=44, vocab_size=61, context_limit=99,
    tied_output=True,
)  # fmt: skip

# One key/value head, for all six heads of queries.
MQA = replace(GQA, n_kv_head=1)

# Distance matters: a sliding window in two layers of three; biases by distance, with soft caps and norms of Gemma 2.
WINDOW = replace(GQA, windows=(5, None, 3), qkv_bias=True, qk_norm=True)
ALIBI = replace(
    GQA, alibi=True, windows=(None, 4, None), score_softcap=2.0, logit_softcap=3.0, post_norms=True, norm_offset=1.0
)


def random_model(args: ModelArgs, dtype: torch.dtype = torch.float64, seed: int = 0) -> Transformer:
    """Weights large enough that the logits differ clearly between tokens."""
    torch.manual_seed(seed)
    model = Transformer(args).to(dtype).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
        elif args.qkv_bias or args.norm_offset:
            parameter.normal_(1.0 - args.norm_offset, 0.3)
    model.tok_embeddings.weight.normal_()
    return model


def random_tokens(args: ModelArgs, *shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def shallow() -> Iterator[None]:
    """Room for some calls within each other, and not for hundreds."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 150)
    yield
    sys.setrecursionlimit(limit)


def positions(begin: int, rows: int, length: int) -> torch.Tensor:
    return (begin + torch.arange(length)).expand(rows, length)


def full(model: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [N,S] -> logits [N,S,V], each row alone, without a cache."""
    return torch.cat([model(row[None], positions(0, 1, len(row)), NoCache()) for row in tokens])


def prefilled(model: Transformer, tokens: torch.Tensor, chunk: int) -> KVCache:
    cache = KVCache.empty(model.args.kv_shape, 1, tokens.shape[1], model.norm.weight)
    for begin in range(0, tokens.shape[1], chunk):
        part = tokens[:, begin : begin + chunk]
        model.hidden(part, positions(begin, 1, part.shape[1]), Prefill(cache, begin, part.shape[1]))
    return cache


class Letters:
    """A tokenizer of one character per token, for the tests of text."""

    bos_id, eos_ids, vocab_size = None, frozenset(), GQA.vocab_size
    specials: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 32 for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(id + 32) for id in ids)


PROMPT = random_tokens(GQA, 13).tolist()


def request(n: int = 3, length: int = 20, sampling: Sampling | None = None, **fields) -> Request:
    return Request(n, length, sampling or Sampling(0.8, top_k=20), **{"seed": 5} | fields)


def draws(samples: list[Sample]) -> list[tuple]:
    return [(each.tokens, each.finish_reason, each.text) for each in samples]
