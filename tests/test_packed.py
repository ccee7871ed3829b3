"""Packed weights. Oracles: the plain model, whose sums in bfloat16 are the same, eager and compiled; fp64."""

import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import GQA, random_model, random_tokens

import packed
from cache import KVCache, NoCache
from engine import decode
from graphs import StepInput, compiled
from packed import PackedLinear, can_pack, pack_linears
from sampling import uniform

pytestmark = pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="needs an x86 CPU")
DTYPES = [torch.float32]
DTYPES += [torch.bfloat16] if can_pack(torch.device("cpu"), torch.bfloat16) else []
# Of logits: what rounding may make of them.
NEAR = {torch.float32: 1e-5, torch.bfloat16: 0.01}


@pytest.fixture
def small_ones_too(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_products_are_those_of_the_plain_weights(dtype):
    """Odd sizes, with a bias and without, at one row and many, S = 1 and more: in bfloat16 equal to the last bit; in
    fp32 as near to the fp64 product."""
    for bias, inputs, outputs in ((False, 30, 52), (True, 97, 259)):
        linear = torch.nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
        product, exact = PackedLinear(linear), deepcopy(linear).double()
        for n, size in ((1, 1), (3, 17), (17, 1), (64, 5)):
            x = torch.randn(n, size, inputs, generator=torch.Generator().manual_seed(n)).to(dtype)
            if dtype == torch.bfloat16:
                assert torch.equal(product(x), linear(x)), (bias, n, size)
            else:
                torch.testing.assert_close(product(x).double(), exact(x.double()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_model_is_the_plain_model(small_ones_too, dtype):
    """All of its layers are packed, and no plain weight outlives its packing."""
    args = replace(GQA, qkv_bias=True)
    plain, model = (random_model(args, dtype) for _ in range(2))
    weights = [weakref.ref(module) for module in model.modules() if isinstance(module, torch.nn.Linear)]
    alive = []
    reorder = torch.ops.mkldnn._reorder_linear_weight
    with pytest.MonkeyPatch.context() as patch:
        count = lambda weight: alive.append(sum(ref() is not None for ref in weights)) or reorder(weight)  # noqa: E731
        patch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", count)
        pack_linears(model)
    assert alive == list(range(len(weights), 0, -1))
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 7 * args.n_layer + 1
    tokens, input_pos = random_tokens(args, 3, 17), torch.arange(17).expand(3, 17)
    expected, found = (each(tokens, input_pos, NoCache()) for each in (plain, model))
    assert ((found - expected).float().norm() / expected.float().norm()).item() < NEAR[dtype]


def test_what_is_shared_or_small_stays(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 30 * 52)
    model = random_model(replace(GQA, tied_output=True), torch.float32)
    pack_linears(model)
    assert model.output.weight is model.tok_embeddings.weight
    assert not isinstance(model.layers[0].attention.wk, PackedLinear)
    assert isinstance(model.layers[0].feed_forward.w2, PackedLinear)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_step_takes_packed_weights(small_ones_too, dtype):
    """One compiled step for N = 3 and 17; its logits are those of the plain eager step within the dtype's rounding."""
    torch.compiler.reset()
    args = replace(GQA, n_layer=1)
    plain, model = (random_model(args, dtype) for _ in range(2))
    pack_linears(model)
    steps = compiled(partial(decode, model, uniform)), partial(decode, plain, uniform)
    root = KVCache.empty(args, 1, 29, model.norm.weight)
    root.k[0].normal_(), root.v[0].normal_()

    def difference(n: int) -> float:
        rows = StepInput(random_tokens(args, n, 1), torch.full((n, 1), 29), torch.arange(n), torch.tensor(0))
        logits, expected = (step(rows, KVCache.fork(root, n, 4))[0] for step in steps)
        return ((logits - expected).float().norm() / expected.float().norm()).item()

    assert difference(5) < NEAR[dtype]
    with torch.compiler.set_stance("fail_on_recompile"):
        assert difference(3) < NEAR[dtype] and difference(17) < NEAR[dtype]


def test_weights_leave_with_their_model(small_ones_too):
    model = random_model(GQA, torch.float32)
    held = len(packed.WEIGHTS)
    pack_linears(model)
    assert len(packed.WEIGHTS) == held + 22
    del model
    assert len(packed.WEIGHTS) == held
