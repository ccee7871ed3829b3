"""Mixtures of experts. Oracles: plain loops over tokens and experts in fp64, counted calls, other cache layouts, the
eager step, dequantised weights, plain arithmetic; that experts are those of transformers, in test_families.py.

Nothing here has a size that divides by 8 but where a group has to.
"""

import json
import runpy
import sys
import weakref
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers
import warm
from conftest import GQA, PROMPT, ROOT, draws, random_model, random_tokens, request, slow
from test_checkpoint import CONFIG
from test_cuda import Recorder, needs_gpu
from test_quantize import quantised
from test_tokenizer import byte_level
from torch import Tensor, nn

import quantize
from cache import KVCache, NoCache
from engine.engine import Engine
from engine.graphs import RecordedStep, StepInput
from engine.plan import plan_run, weigh
from engine.request import Workload
from engine.runner import decode
from layers import linear as packed
from layers.gptq import gptq, quantise_int4
from layers.linear import can_pack, dequantise, group_experts, hold_linears, kernels, swap_linears
from layers.moe import (
    ExpertLinear,
    GroupedLinear,
    MixtureOfExperts,
    MoEConfig,
    by_expert,
    can_capture_graph,
    can_group,
)
from loading.checkpoint import load_model, read_checkpoint, read_weights, save_model, weight_sizes
from model import empty_model, make_feed_forward
from sampling import uniform

CPU, FP64 = torch.device("cpu"), torch.float64
SHAPES = {
    "renormalised": MoEConfig(5, 2, 37, True),
    "as they are": MoEConfig(7, 3, 21, False),
    "shared": MoEConfig(5, 2, 37, False, shared=29),
    "one of one": MoEConfig(1, 1, 19, True),
    "all": MoEConfig(3, 3, 13, True),
}
ARGS = replace(GQA, mixture=MoEConfig(5, 2, 37, True, shared=29, dense=(1,)))


def mixture_of(mixture: MoEConfig, dtype: torch.dtype = FP64, dim: int = GQA.dim) -> MixtureOfExperts:
    torch.manual_seed(3)
    made = make_feed_forward(replace(GQA, dim=dim, mixture=mixture), 0).to(dtype).requires_grad_(False)
    for parameter in made.parameters():
        parameter.normal_(std=1.5 / parameter.shape[1] ** 0.5)
    return made


def inputs(n: int, s: int, dtype: torch.dtype = FP64) -> Tensor:
    return torch.randn(n, s, GQA.dim, generator=torch.Generator().manual_seed(10 * n + s)).to(dtype)


def by_loops(made: MixtureOfExperts, x: Tensor) -> Tensor:
    """Token by token and expert by expert, as the papers have it: all softmax weights, the K largest of them."""
    mixture, y = made.mixture, torch.zeros_like(x)
    for n in range(x.shape[0]):
        for s in range(x.shape[1]):
            token = x[n, s]
            weights = (made.router.weight @ token).softmax(0)
            best = sorted(range(mixture.experts), key=lambda number: -weights[number].item())[: mixture.used]
            total = sum(weights[number].item() for number in best) if mixture.renormalised else 1.0
            for number in best:
                w1, w3, w2 = (each[number].weight for each in (made.w1, made.w3, made.w2))
                y[n, s] += weights[number] / total * (w2 @ (F.silu(w1 @ token) * (w3 @ token)))
            if mixture.shared:
                own = made.shared
                inner = own.w2.weight @ (F.silu(own.w1.weight @ token) * (own.w3.weight @ token))
                y[n, s] += (made.shared_gate.weight @ token).sigmoid() * inner
    return y


@pytest.mark.parametrize("mixture", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("s", [1, 2, 7])
def test_a_mixture_is_what_plain_loops_compute(mixture, s):
    """Three rows: a shape that is lost, or restored to another, gives each row another's result."""
    made, x = mixture_of(mixture), inputs(3, s)
    torch.testing.assert_close(made(x), by_loops(made, x), rtol=1e-10, atol=1e-10)


def reads(made: nn.Module) -> list[str]:
    """Fills with the names of the experts' matrices as they are multiplied by."""
    read: list[str] = []
    for name, module in made.named_modules():
        if isinstance(module, ExpertLinear):
            for number, linear in enumerate(module):
                linear.register_forward_pre_hook(lambda *_, name=f"{name}.{number}": read.append(name))
    return read


def test_all_rows_may_choose_one_expert_and_none_another():
    """The router sees only the first number of a token, which is positive: expert 3, then 1. The others are not read:
    their weights are NaN."""
    made, x = mixture_of(SHAPES["renormalised"]), inputs(3, 7)
    x[..., 0] = x[..., 0].abs() + 0.1
    made.router.weight.zero_()[:, 0] = torch.tensor([-1.0, 2.0, 0.0, 3.0, 1.0])
    expected = by_loops(made, x)
    for each in (made.w1, made.w2, made.w3):
        for number in (0, 2, 4):
            each[number].weight.fill_(torch.nan)
    read = reads(made)
    torch.testing.assert_close(made(x), expected, rtol=1e-10, atol=1e-10)
    assert sorted(read) == [f"w{matrix}.{number}" for matrix in (1, 2, 3) for number in (1, 3)]


def test_of_equal_experts_the_first_are_taken():
    made, x = mixture_of(MoEConfig(64, 3, 5, False)), inputs(3, 7)
    made.router.weight.zero_()
    weights, chosen = made.router(x.flatten(0, 1))
    assert chosen.tolist() == [[0, 1, 2]] * 21 and torch.equal(weights, torch.full((21, 3), 1 / 64, dtype=FP64))
    made.router.weight[40] = x[0, 0]
    assert made.router(x[0, :1])[1].tolist() == [[40, 0, 1]]


def test_rows_are_sorted_by_expert_then_by_token():
    order, ends = by_expert(torch.tensor([[3, 0], [0, 3], [3, 5]]), 6)
    assert order.tolist() == [1, 2, 0, 3, 4, 5] and ends.tolist() == [2, 2, 2, 5, 5, 6] and ends.dtype == torch.int32


def test_a_step_reads_the_experts_that_its_rows_choose_and_no_more():
    """Of a whole network. Oracle: the routers' choices, and the bytes of those matrices, one by one."""
    model = random_model(ARGS, torch.float32)
    chosen: list[set[str]] = []
    for number, block in enumerate(model.layers):
        if isinstance(block.feed_forward, MixtureOfExperts):
            block.feed_forward.router.register_forward_hook(
                lambda router, x, out, number=number: chosen.append({f"{number}.{e}" for e in out[1].unique().tolist()})
            )
    read = reads(model)
    for n in (1, 3, 40):
        del chosen[:], read[:]
        model(random_tokens(ARGS, n, 1), torch.zeros(n, 1, dtype=torch.long), NoCache())
        assert len(chosen) == 2 and len(read) == len(set(read))
        touched = [(name.split(".")[1], name.split(".")[4]) for name in read]
        assert {".".join(each) for each in touched} == set.union(*chosen) and len(read) == 3 * len(set.union(*chosen))
        nbytes = sum(model.get_submodule(name).weight.nbytes for name in read)
        assert nbytes == len(set.union(*chosen)) * weigh(model).experts / 10


def test_the_plan_counts_the_experts_that_a_step_is_expected_to_read():
    """Oracles: the parameters, one by one; how often an expert is missed by every row, drawn 20,000 times: within five
    standard deviations of its mean, less than one run in a million is further off."""
    model = random_model(ARGS, torch.bfloat16)
    weights = weigh(model)
    experts = [p for layer in (0, 2) for w in ("w1", "w3", "w2") for p in getattr(model.layers[layer].feed_forward, w)]
    assert weights.experts == sum(linear.weight.nbytes for linear in experts) == 2 * 5 * 3 * 30 * 37 * 2
    assert weights.total == sum(parameter.nbytes for parameter in model.parameters())
    generator = torch.Generator().manual_seed(1)
    for rows in (1, 3, 8):
        drawn = torch.rand(20_000, rows, 5, generator=generator).argsort(-1)[..., :2].flatten(1)
        distinct = F.one_hot(drawn, 5).amax(1).sum(1).double()
        assert (distinct.mean() - ARGS.mixture.expected(rows)).abs() <= 5 * distinct.std() / 20_000**0.5 + 1e-9
        plan = plan_run(ARGS, weights, Workload(50, rows, 16), CPU, torch.bfloat16, 10**9)
        unread = weights.experts * (1 - ARGS.mixture.expected(rows) / 5)
        assert plan.per_step == pytest.approx(weights.per_step - unread + plan.context + plan.decoded // 2, abs=1)
        assert f", {ARGS.mixture.expected(rows):.1f} of 5 experts per layer" in str(plan)


def test_a_copy_has_experts_of_its_own():
    """The operator finds experts by a number, which a copy must not share."""
    made, x = mixture_of(SHAPES["renormalised"]), inputs(3, 2)
    copy = deepcopy(made)
    expected = made(x)
    for parameter in made.w2.parameters():
        parameter.zero_()
    assert torch.equal(copy(x), expected) and not made(x).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_weights_multiply_as_the_loop_does(dtype, monkeypatch):
    """PyTorch's grouped product, here by its CPU kernel; on CUDA it has not run. One weight at most is held twice."""
    made = nn.ModuleList(mixture_of(MoEConfig(5, 2, width, True), dtype, 32) for width in (40, 41))
    x = F.pad(inputs(3, 7, dtype), (1, 1))
    expected = made[0](x)
    assert not can_capture_graph(made)
    group_experts(made)
    assert kernels(made) == {"plain": 30}, "a CPU has no grouped kernel"
    weights = [weakref.ref(module) for module in made[0].modules() if isinstance(module, nn.Linear)]
    alive, stack = [], torch.stack
    monkeypatch.setattr(
        torch, "stack", lambda each: alive.append(sum(ref() is not None for ref in weights)) or stack(each)
    )
    group_experts(made, lambda experts, _: None if 41 in experts[0].weight.shape else GroupedLinear)
    assert alive == [15, 10, 5]
    assert kernels(made) == {"grouped": 3, "plain": 15} and isinstance(made[0].w1, GroupedLinear)
    torch.testing.assert_close(made[0](x), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 0.02)
    assert can_capture_graph(made[0]) and not can_capture_graph(made)


def test_a_grouped_step_never_waits_for_the_host():
    """Traced on the meta device, which has no numbers to wait for, as CUDA's kernel takes them."""
    args = replace(GQA, dim=32, head_dim=16, hidden_dim=40, mixture=MoEConfig(5, 2, 40, True, shared=16))
    model = empty_model(args).to(torch.bfloat16).requires_grad_(False)
    tokens = torch.zeros(3, 2, dtype=torch.long, device="meta")
    group_experts(model, lambda *_: GroupedLinear)
    with Recorder() as recorder:
        logits = model(tokens, tokens, NoCache())
    assert logits.shape == (3, 2, 97) and recorder.devices == {"meta"} and recorder.count("_grouped_mm") == 3 * 3
    assert can_capture_graph(model) and not can_group(model.layers[0].feed_forward.w1.weight[0])


@needs_gpu
def test_recorded_steps_of_a_mixture_are_the_plain_steps_on_a_gpu():
    """bfloat16, by the grouped product where the device has it: of several prompts, with one recorded step. Elsewhere
    the loop, which is not recorded."""
    args = replace(GQA, dim=32, head_dim=16, n_head=4, hidden_dim=40, mixture=MoEConfig(5, 2, 40, True, shared=16))
    model = random_model(args, torch.float32).to(device="cuda", dtype=torch.bfloat16)
    loop = partial(decode, deepcopy(model), uniform)
    group_experts(model)
    grouped = partial(decode, model, uniform)
    recorded = RecordedStep(grouped) if can_capture_graph(model) else grouped
    for length in (40, 41, 40):
        context = KVCache.empty(args.kv_shape, 1, length, model.norm.weight)
        for tensor in context.tensors:
            tensor.normal_(generator=torch.Generator("cuda").manual_seed(length))
        tokens, samples = random_tokens(args, 17, 1).cuda(), torch.arange(17, device="cuda")
        step = StepInput(tokens, torch.full_like(tokens, length), samples, torch.tensor(7, device="cuda"))
        found, expected = (each(step, KVCache.fork(context, 17, 8))[0].float() for each in (recorded, loop))
        rows = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert rows.median().item() < 0.02  # a near-tie may send a row elsewhere


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="needs an x86 CPU")
def test_packed_experts_multiply_as_plain_ones(monkeypatch):
    monkeypatch.setattr(packed, "MIN_PACK_ELEMENTS", 1)
    made, x = mixture_of(SHAPES["shared"], torch.float32), inputs(3, 7, torch.float32)
    expected = made(x)
    hold_linears(made, pack=True)
    assert kernels(made) == {"plain, packed": 17}  # the shared w1 and w3 as one; no router, no gate
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-5)


def test_samples_are_the_same_in_every_layout():
    model = random_model(ARGS)
    prompt = random_tokens(ARGS, 13).tolist()
    layouts = ("bifurcated", "contiguous", "expanded")
    shared, copied, expanded = (
        draws(Engine(model, compile=False).generate(prompt, request(3, 20, attention=layout))) for layout in layouts
    )
    assert shared == copied == expanded and len({each[0][0] for each in map(list, shared)}) >= 1
    few = Engine(model, compile=False).generate(prompt, request(3, 20, rows_at_once=2))
    assert draws(few) == shared


@slow
def test_one_graph_serves_every_number_of_tokens():
    """Without a break, with experts in fp32 and in int4: its numbers are those of the loop."""
    torch.compiler.reset()
    made = mixture_of(MoEConfig(5, 2, 64, True, shared=32), torch.float32, 32)

    def make(name: str, linear: nn.Linear) -> nn.Module | None:
        if name not in ("w3.1", "w2.4"):
            return None
        return packed.QuantisedLinear(quantise_int4(linear.weight, 32), None, torch.float32)

    swap_linears(made, make)
    assert kernels(made) == {"plain": 16, "dequantised at each product": 2}
    graph = torch.compile(made, fullgraph=True, dynamic=False)

    def check(n: int) -> None:
        x = F.pad(inputs(n, 1, torch.float32), (1, 1))
        expected = made(x)
        torch._dynamo.mark_dynamic(x, 0)  # as graphs.py does
        torch.testing.assert_close(graph(x), expected, rtol=1e-4, atol=1e-5)

    check(5)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(3), check(17)


def test_a_router_that_is_not_finite_is_an_error():
    """Its rows still go to experts that there are."""
    model = random_model(replace(GQA, mixture=MoEConfig(4, 2, 32, True)), torch.float32)
    model.layers[1].feed_forward.router.weight[1, 2] = torch.nan
    with pytest.raises(FloatingPointError, match="the logits are not finite"):
        Engine(model).generate(PROMPT, request(3, 5))


# 64 inputs and a width of 32 divide by 32; the Hessians of w2 need 32 tokens for an expert, those of w1 and w3 64.
SMALL = CONFIG | {
    "architectures": ["MixtralForCausalLM"], "hidden_size": 64, "head_dim": 16, "num_attention_heads": 4,
    "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
    "rope_theta": 10000.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A mixture, and a text of 200 tokens. No token reaches expert 2 of layer 1: of equal ones the first are taken."""
    args = replace(GQA, dim=64, head_dim=16, n_head=4, hidden_dim=32, mixture=MoEConfig(4, 2, 32, True))
    model = random_model(args, torch.float32)
    model.layers[1].feed_forward.router.weight[:3] = model.layers[1].feed_forward.router.weight[0]
    save_model(tmp_path, SMALL, model.state_dict())
    assert read_checkpoint(tmp_path).args == args
    (tmp_path / "text").write_text("a text")
    tokenizer = type("Few", (), {"bos_id": 1, "encode": lambda self, text: random_tokens(args, 200).tolist()})
    monkeypatch.setattr(quantize, "load_tokenizer", lambda folder: tokenizer())
    monkeypatch.setattr(packed, "multiplies", lambda *_: False)  # what PyTorch multiplies by is asked here
    return tmp_path


def test_a_folder_of_quantised_experts_computes_with_its_dequantised_weights(folder, capsys):
    """Oracle: the plain network in fp64, given the dequantised weights. The router stays."""
    for mode in ("int8", "int4"):
        path, _ = quantised(capsys, "--checkpoint_path", folder, "--mode", mode)
        checkpoint = read_checkpoint(path)
        assert sum("feed_forward" in name for name in checkpoint.recipe.layers) == 3 * 3 * 4
        model, plain = load_model(checkpoint, "cpu", FP64), random_model(checkpoint.args)
        plain.load_state_dict(model.state_dict())
        tokens, input_pos = random_tokens(checkpoint.args, 3, 2), torch.arange(2).expand(3, 2)
        assert torch.equal(model(tokens, input_pos, NoCache()), plain(tokens, input_pos, NoCache()))
        sizes = {name: p.nbytes for name, p in load_model(checkpoint, "cpu", torch.float32).named_parameters()}
        assert weight_sizes(checkpoint, "cpu", torch.float32) == sizes


def test_an_expert_is_held_for_the_rows_that_it_is_expected_to_see(folder, capsys, monkeypatch):
    """Half of them here: up to 16 rows the operator of kernels.py is the fastest on a CPU that multiplies bfloat16."""
    if not packed.multiplies(torch.bfloat16, 32, 32):
        pytest.skip("no C++ compiler")
    monkeypatch.setattr(packed, "multiplies_bfloat16", lambda: True)
    path, _ = quantised(capsys, "--checkpoint_path", folder, "--mode", "int8")
    checkpoint = read_checkpoint(path)
    for rows, expected in ((16, {"widened": 49}), (17, {"widened": 36, "dequantised": 13}), (40, {"dequantised": 49})):
        model = load_model(checkpoint, "cpu", torch.bfloat16, rows)
        assert kernels(model) == expected
        sizes = weight_sizes(checkpoint, "cpu", torch.bfloat16, rows)
        held = [size for name, size in sizes.items() if "feed_forward.w1.3" in name]
        assert held == [2 * 64 * 32 if rows == 40 else 64 * 32 + 2 * 64] * 3


def test_gptq_has_a_hessian_for_each_expert(folder, capsys, monkeypatch):
    """Oracle: the inputs of each expert of the last layer, taken from a network that holds the quantised weights. An
    expert with fewer than its inputs is rounded and named, also where a run was interrupted and goes on."""
    source = {name: tensor.bfloat16().float() for name, tensor in read_weights(read_checkpoint(folder)).items()}
    save_model(folder, SMALL, source)
    calibration = ("--calibration_seq_length", 17, "--calibration_sequences", 12, "--calibration_file", folder / "text")
    command = ("--checkpoint_path", folder, "--mode", "int4-gptq", *calibration)
    plain, blocks = quantize.Calibration.quantise, []

    def interrupted(self, block, *rest):
        blocks.append(block)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return plain(self, block, *rest)

    monkeypatch.setattr(quantize.Calibration, "quantise", interrupted)
    assert quantize.main([str(each) for each in command]) == 130
    path, err = quantised(capsys, *command)
    checkpoint = read_checkpoint(path)
    model, rounded = load_model(checkpoint, "cpu", torch.float32), checkpoint.recipe.rounded
    assert f"than they have inputs (raise --calibration_sequences): {', '.join(rounded)}\n" in err
    names = {id(module): name for name, module in model.named_modules()}
    seen: dict[str, Tensor] = {name: torch.zeros(0) for name in checkpoint.recipe.layers if ".w" in name}
    for name in seen:
        if "feed_forward" in name:
            model.get_submodule(name).register_forward_pre_hook(lambda each, x: seen.update({names[id(each)]: x[0]}))
    options = SimpleNamespace(
        calibration_sequences=12, calibration_seq_length=17, calibration_file=folder / "text"
    )  # fmt: skip
    tokens = quantize.calibration_tokens(options, checkpoint)
    model(tokens, torch.arange(17).expand(12, 17), NoCache())
    few = {n for n, x in seen.items() if "feed_forward" in n and len(x) < model.get_submodule(n).in_features}
    assert {f"layers.1.feed_forward.w{each}.2" for each in (1, 2, 3)} <= few == set(rounded) < seen.keys()
    for name, x in seen.items():
        if name.startswith("layers.2.feed_forward"):
            weight, found = source[f"{name}.weight"], model.get_submodule(name).weight
            plainly = (dequantise(quantise_int4(weight, 32), torch.float32) == found).float().mean()
            by_gptq = (dequantise(gptq(weight, x.t() @ x, 32), torch.float32) == found).float().mean()
            # The order of fp32 sums may move a few.
            assert plainly == 1 if name in few else plainly < 0.9 < 0.97 < by_gptq, name


def test_a_mixtral_runs_from_the_command_line(tmp_path):
    """Made by transformers, with a tokenizer, converted, run with eight samples. Oracle: transformers' score of every
    token of theirs."""
    torch.manual_seed(0)
    backend = byte_level()
    config = transformers.MixtralConfig(
        hidden_size=48, intermediate_size=36, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=backend.get_vocab_size(), max_position_embeddings=64, num_local_experts=5, initializer_range=0.3,
        eos_token_id=None,
    )  # fmt: skip
    reference = transformers.MixtralForCausalLM(config).eval().requires_grad_(False)
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    backend.save(str(tmp_path / "tokenizer.json"))

    def run(*command) -> str:
        result = warm.run(*command, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        return result.stdout

    run("scripts/convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path, "--out", tmp_path / "tiny")
    command = ("generate.py", "--checkpoint_path", tmp_path / "tiny", "-n", 8, "--max_new_tokens", 11, "--seed", 1)
    rows = run(*command, "--prompt", "The cat", "--format", "jsonl", "--dtype", "float32").splitlines()
    prompt = backend.encode("The cat").ids
    assert len(rows) == 8 and len(list(tmp_path.glob("*.safetensors"))) > 2
    for row in map(json.loads, rows):
        scores = reference(torch.tensor([prompt + row["tokens"]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = scores.gather(1, torch.tensor(row["tokens"])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row["logprobs"]), expected, rtol=0, atol=1e-4)


def test_the_memory_table_is_what_its_script_prints(monkeypatch, capsys, tmp_path):
    folder = ROOT / "mixtral-moe"
    monkeypatch.setattr(sys, "argv", ["memory.py"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(folder / "memory.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 5 and printed in (folder / "README.md").read_text("utf-8")
    (tmp_path / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}')
    monkeypatch.setattr(sys, "argv", ["memory.py", str(tmp_path / "config.json")])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(folder / "memory.py"), run_name="__main__")
    assert capsys.readouterr().err.startswith("error: architecture GPT2LMHeadModel is not supported")
