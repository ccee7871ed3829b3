"""A decode step does nothing on the host: it makes no tensor there and reads none. Either would wait for a GPU, and
would break the recording of a step. Oracle: PyTorch's dispatcher, which sees every operator, on the meta device, which
has no numbers to read. A mixture's loop over its experts is one operator here; elsewhere it reads on the host."""

import pytest
import torch
import transformers
from conftest import ALIBI, slow
from test_families import FAMILIES, SHAPE
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import bifurcated_attention as ours
import cache as caches
import sampling
from cache import KVCache
from engine.contexts import RowMap
from engine.layouts import LAYOUTS, Int8Context
from engine.request import Sampling
from layers.kernels import token_uniforms
from loading.families import args_from_config
from model import ModelArgs, empty_model
from sampling import RowFilters, draw, uniform

CONTEXT, NEW, N = 60, 8, 3  # the step crosses the original context of 64 of longrope


class NoValues(TorchFunctionMode):
    """Fails if a tensor is made from Python numbers, which are copied from the host, or its value is asked for."""

    NAMES = ("tensor", "as_tensor", "new_tensor", "from_numpy", "item", "tolist", "__bool__", "cpu", "nonzero")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function.__name__ not in self.NAMES, function
        if function.__name__ in ("__getitem__", "__setitem__"):  # a list becomes a tensor
            assert not any(isinstance(part, list) for part in (args[1] if isinstance(args[1], tuple) else args[1:2]))
        return function(*args, **kwargs or {})


class NothingOnTheHost(TorchDispatchMode):
    """Fails if an operator takes or makes a tensor on the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        tensors = [each for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)]
        assert all(each.device.type == "meta" for each in tensors), function
        return result


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x * torch.tensor(2.0),
        lambda x: x + torch.zeros(2).to(x.device),
        lambda x: x[[1, 0]],
        lambda x: x if x.sum() > 0 else -x,
        lambda x: x * x.sum().item(),
        lambda x: x * float(x.sum()),
        lambda x: x[x > 0],
    ],
    ids=["tensor on the device", "scalar tensor", "tensor of the CPU", "list", "bool", "item", "float", "mask"],
)
def test_what_is_done_on_the_host_is_found(wrong):
    x = torch.empty(2, device="meta")
    with NothingOnTheHost(), NoValues(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        wrong(x)


def ragged(context: KVCache, n: int, slots: int, reserve: int) -> KVCache:
    """Rows that continue two contexts in unequal shares, as prompts of several lengths have them."""
    length = context.start.new_zeros(context.rows)
    cache = KVCache.branch(context, [1, *[0] * (n - 1)], slots, reserve, length)
    seats = RowMap(context, length, n, n)
    cache.extend_from(cache.links[0], seats)
    return cache


def int8(context: KVCache, *sizes: int) -> KVCache:
    return KVCache.fork(Int8Context.of(context), *sizes)


def args_of(family: str) -> ModelArgs:
    name, fields = FAMILIES[family]
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**SHAPE | fields)
    return args_from_config(config.to_dict() | {"architectures": [f"{name}ForCausalLM"]})


@pytest.mark.parametrize("every_cache", [False, pytest.param(True, marks=slow)], ids=["some caches", "every cache"])
@pytest.mark.parametrize("family", [*FAMILIES, "ALiBi"])
def test_a_step_does_nothing_on_the_host(family, every_cache, monkeypatch):
    """Of one position and of three, through the fused kernels and without; with every cache for a few families."""
    model = empty_model(ALIBI if family == "ALiBi" else args_of(family)).to(torch.bfloat16).requires_grad_(False)
    for kernels in (ours.FLASH, ours.MASKED):
        monkeypatch.setitem(kernels, "meta", kernels["cuda"])
    forks = [(KVCache.fork, 1, 3, True), (ragged, N, 1, False)]
    if every_cache or family in ("Phi-3, long", "dynamic", "Gemma 2", "Mixtral", "ALiBi"):
        forks += [*((fork, N, 1, True) for fork in LAYOUTS.values()), (int8, 1, 3, True), (ragged, N, 3, True)]
    for fork, n, size, is_fused in forks:
        for module in (ours, caches):
            monkeypatch.setattr(module, "has_fused", lambda *_, is_fused=is_fused: is_fused)
        context = KVCache.empty(model.args.kv_shape, 2 if fork is ragged else 1, CONTEXT, model.norm.weight)
        cache, tokens = fork(context, n, NEW, 0), torch.zeros(n, size, dtype=torch.long, device="meta")
        where = tokens + CONTEXT
        with NothingOnTheHost(), NoValues():
            assert model(tokens, where, cache).shape == (n, size, model.args.vocab_size)


@pytest.mark.parametrize("which", range(6))
def test_a_draw_does_nothing_on_the_host(which, monkeypatch):
    """Random numbers from seeds of all rows and of each; sampling parameters of all rows, and of each."""
    V, device = 101, torch.device("meta")
    monkeypatch.setitem(sampling.LOGITS_AT_ONCE, "meta", 2 * V)  # two of three rows at a time
    each = [
        Sampling(0.8, top_p=0.9),
        Sampling(0.0),
        Sampling(1.2, 20, min_p=0.1),
        Sampling(0.7, repetition_penalty=1.3),
    ]
    given = [*each, RowFilters.of(each[:N], V, device), RowFilters.of([each[0], *each[2:]], V, device)][which]
    seeds = torch.zeros(N if which % 2 else (), dtype=torch.long, device=device)
    samples, seen = torch.zeros(N, dtype=torch.long, device=device), torch.zeros(N, V, dtype=torch.bool, device=device)
    logits = torch.zeros(N, V, device=device, dtype=torch.bfloat16)
    with NothingOnTheHost(), NoValues():
        tokens, logprobs = draw(logits, uniform(seeds, samples, samples + 1), given, seen, numbers=token_uniforms)
    assert tokens.shape == logprobs.shape == (N,)
