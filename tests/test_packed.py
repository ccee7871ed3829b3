"""Packed weights. Oracle: the plain model, whose sums are the same, eager and compiled."""

from dataclasses import replace

import pytest
import torch
from conftest import GQA, random_model, random_tokens

import packed
from generate import make_steps
from model import KVCache, NoCache
from packed import PackedLinear, can_pack, pack_linears

pytestmark = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="needs an x86 CPU with bfloat16 instructions"
)


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)


def test_packed_products_are_those_of_the_plain_model(small_ones_too):
    """Odd sizes, with biases, at one row and many, S = 1 and more: equal to the last bit or its neighbour."""
    args = replace(GQA, qkv_bias=True)
    plain, model = (random_model(args, torch.bfloat16) for _ in range(2))
    pack_linears(model)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 7 * args.n_layer + 1
    for n, size in ((1, 1), (3, 17), (17, 1), (64, 5)):
        tokens = random_tokens(args, n, size)
        input_pos = torch.arange(size).expand(n, size)
        expected, found = (each(tokens, input_pos, NoCache()) for each in (plain, model))
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7 * expected.abs().max().item())


def test_what_is_shared_or_small_stays(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 30 * 52)
    model = random_model(replace(GQA, tied_output=True), torch.bfloat16)
    pack_linears(model)
    assert model.output.weight is model.tok_embeddings.weight
    assert not isinstance(model.layers[0].attention.wk, PackedLinear)
    assert isinstance(model.layers[0].feed_forward.w2, PackedLinear)


def test_a_compiled_step_takes_packed_weights(small_ones_too):
    """One compiled step for N = 3 and 17; its logits are those of the plain eager step within bfloat16's rounding."""
    torch.compiler.reset()
    args = replace(GQA, n_layer=1)
    plain, model = (random_model(args, torch.bfloat16) for _ in range(2))
    pack_linears(model)
    compiled, eager = make_steps(model, compile_decode=True).decode, make_steps(plain).decode
    root = KVCache.empty(args, 1, 29, model.norm.weight)
    root.k[0].normal_(), root.v[0].normal_()

    def difference(n: int) -> float:
        token, input_pos = random_tokens(args, n, 1), torch.full((n, 1), 29)
        logits, expected = (step(token, input_pos, KVCache.fork(root, n, 4)) for step in (compiled, eager))
        return ((logits - expected).float().norm() / expected.float().norm()).item()

    assert difference(5) < 0.01
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3) < 0.01 and difference(17) < 0.01


def test_weights_leave_with_their_model(small_ones_too):
    model = random_model(GQA, torch.bfloat16)
    held = len(packed.WEIGHTS)
    pack_linears(model)
    assert len(packed.WEIGHTS) == held + 22
    del model
    assert len(packed.WEIGHTS) == held
