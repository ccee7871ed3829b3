"""Layers of the same input as one product. Oracle: the same network with its layers apart."""

import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from conftest import ALIBI, GQA, MHA, WINDOW, draws, positions, random_model, random_tokens, request
from test_checkpoint import CONFIG
from test_linear import random_weight

from cache import NoCache
from engine.engine import Engine
from layers import linear as linears
from layers.joined import JoinedLinear
from layers.linear import MappedFiles, TinygemmLinear, join_linears, joined, kernels, make_linear, swap_linears
from layers.moe import MoEConfig
from loading.checkpoint import load_joined, load_model, read_checkpoint, save_model
from model import Transformer
from tp import Shard

CPU = torch.device("cpu")
SHARED = replace(GQA, mixture=MoEConfig(5, 2, 20, True, shared=36, dense=(1,)))
BIASES = replace(GQA, qkv_bias=True, mlp_bias=True, out_bias=True)
MODELS = {"GQA": GQA, "MHA": MHA, "biases": BIASES, "window, norms": WINDOW, "ALiBi": ALIBI, "mixture": SHARED}


def logits(model: Transformer) -> torch.Tensor:
    return model(random_tokens(model.args, 3, 17), positions(0, 3, 17), NoCache())


def count(model: Transformer) -> int:
    return sum(isinstance(module, JoinedLinear) for module in model.modules())


@pytest.mark.parametrize("args", MODELS.values(), ids=MODELS)
def test_a_joined_model_is_the_plain_one(args):
    """In fp64, and again after a copy of the whole and a move to fp32. Of a mixture, its shared expert."""
    plain, model = random_model(args), random_model(args)
    join_linears(model)
    assert count(model) == 2 * args.n_layer
    assert not [name for name, _ in model.named_parameters() if name.split(".")[-2] in ("wq", "wk", "wv")]
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-12)
    assert sum(p.nbytes for p in model.parameters()) == sum(p.nbytes for p in plain.parameters())
    join_linears(model)
    copied = deepcopy(model).float()
    assert count(copied) == 2 * args.n_layer
    torch.testing.assert_close(logits(copied).double(), logits(plain), rtol=0, atol=1e-3)


@pytest.mark.parametrize("way", ["widened", "dequantised at each product", "dequantised"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_layers_are_joined(kind, way, monkeypatch):
    """Bytes, scales and zeros of all outputs one after another: every way to hold them gives the same logits."""
    monkeypatch.setattr(linears, "choose_way", lambda *_, **__: way)
    args = replace(GQA, dim=64, hidden_dim=96, n_layer=2, qkv_bias=True)
    plain = random_model(args, torch.float32)

    def make(name: str, layer: torch.nn.Linear) -> torch.nn.Module:
        weight = random_weight(kind, *layer.weight.shape)
        return make_linear(weight, layer.bias, CPU, torch.float32, 3)

    swap_linears(plain, lambda name, layer: make(name, layer) if layer.in_features % 32 == 0 else None)
    model = deepcopy(plain)
    join_linears(model)
    assert count(model) == 4 and kernels(model)[way] == kernels(plain)[way] - 6
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_tiles_of_joined_layers_are_those_of_one():
    """On the meta device, so by shape: what CUDA's operator packs of all outputs together."""
    parts = [linears.Int4Weight.empty(outputs, 128, 32) for outputs in (64, 16, 16)]
    whole = TinygemmLinear(linears.Int4Weight.empty(96, 128, 32), None, torch.bfloat16)
    made = joined([TinygemmLinear(part, None, torch.bfloat16) for part in parts], MappedFiles(), False)
    assert made is not None and made.sizes == [64, 16, 16] and made.whole.features == 96
    assert made.whole.packed.shape == whole.packed.shape
    assert made.whole.packed_scales.shape == whole.packed_scales.shape


def test_what_differs_is_trained_or_hooked_stays_apart():
    model = random_model(BIASES, torch.float32)
    first, second, third = (block.attention for block in model.layers)
    first.wk.weight.requires_grad_(True)
    second.wv.register_forward_hook(lambda *_: None)
    third.wq.to(torch.float64)
    model.layers[0].feed_forward.w3.bias = None
    model.layers[1].feed_forward.w1 = make_linear(random_weight("int8", 52, 30), None, CPU, torch.float32, 300)
    join_linears(model)
    assert count(model) == 1 and isinstance(model.layers[2].feed_forward.products, JoinedLinear)


def test_at_most_the_layers_of_one_module_are_held_twice(monkeypatch):
    model = random_model(GQA, torch.float32)
    weights, alive = [weakref.ref(p) for n, p in model.named_parameters() if "wq" in n or "w1" in n], []
    make = linears.joined

    def counted(*given, **how) -> JoinedLinear | None:
        alive.append(sum(ref() is not None for ref in weights))
        return make(*given, **how)

    monkeypatch.setattr(linears, "joined", counted)
    join_linears(model)
    assert alive == list(range(len(weights), 0, -1))


@pytest.mark.parametrize("stored,held", [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_a_mapped_file_is_not_copied(tmp_path, stored, held):
    """Weights of the file's dtype stay where they are mapped; converted ones are joined, and draw the same."""
    save_model(tmp_path, CONFIG, random_model(GQA, stored).state_dict())
    checkpoint = read_checkpoint(tmp_path)
    model, plain = load_joined(checkpoint, "cpu", held), load_model(checkpoint, "cpu", held)
    assert count(model) == (0 if stored == held else 2 * GQA.n_layer)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-4)
    made, expected = (Engine(each, compile=False).generate([1, 2, 3], request(3, 9)) for each in (model, plain))
    assert draws(made) == draws(expected)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_joins_its_own_parts(tmp_path, rank):
    save_model(tmp_path, CONFIG, random_model(GQA, torch.float32).state_dict())
    checkpoint, shard = read_checkpoint(tmp_path), Shard(rank, 2)
    model, plain = (load(checkpoint, "cpu", torch.float32, 3, shard) for load in (load_joined, load_model))
    for block, apart in zip(model.layers, plain.layers, strict=True):
        own = torch.cat([apart.attention.get_parameter(f"{name}.weight") for name in ("wq", "wk", "wv")])
        assert own.shape == (50, 30) and torch.equal(block.attention.products.whole.weight, own)
