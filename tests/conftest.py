"""What several test files need: small random models, and where the shared data lies if it does."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model import ModelArgs, Transformer

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
TINY = ROOT / "checkpoints" / "tiny"
STORIES = SHARED / "models" / "stories15M"

sys.path.insert(0, str(ROOT / "scripts"))
torch.set_num_threads(1)  # the models here are too small to share
os.environ["OMP_NUM_THREADS"] = "1"  # nor may the commands of tests that run side by side wait for each other's threads

needs_stories = pytest.mark.skipif(not STORIES.exists(), reason="stories15M is not beside the repository")

# Odd on purpose: nothing here is a multiple of 8 but by accident.
GQA = ModelArgs(
    dim=30, n_layer=3, n_head=6, n_kv_head=2, head_dim=10, hidden_dim=52, vocab_size=97, context_limit=4096
)  # fmt: skip
MHA = ModelArgs(
    dim=28, n_layer=2, n_head=3, n_kv_head=3, head_dim=14, hidden_dim=44, vocab_size=61, context_limit=99,
    tied_output=True,
)  # fmt: skip

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
