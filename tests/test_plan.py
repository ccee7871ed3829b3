"""What is decided from shapes alone. Oracles: bytes of tensors that are really allocated; arithmetic done by hand."""

import argparse
from dataclasses import replace

import pytest
import torch
from conftest import GQA, MHA, random_model

from model import KVCache, ModelArgs
from options import build_parser
from packed import IS_X86, can_pack
from plan import (
    Execution,
    choose_attention,
    choose_compile,
    choose_device,
    choose_dtype,
    choose_execution,
    choose_packing,
    copy_up_to,
    human,
    parse_size,
    plan_memory,
)
from report import Monitor, measure

CPU = torch.device("cpu")


@pytest.mark.parametrize("args", [GQA, MHA], ids=["GQA", "MHA, tied"])
def test_planned_bytes_are_those_of_the_tensors(args):
    model = random_model(args, torch.bfloat16)
    memory = plan_memory(args, torch.bfloat16, 50, 6, 16, "bifurcated", 10**9)
    root = KVCache.empty(args, 1, 50, model.norm.weight)
    assert memory.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert memory.context == root.nbytes
    assert memory.decoded == KVCache.fork(root, 6, 16).nbytes
    assert memory.unshared == KVCache.copy(root, 6, 16).nbytes
    assert memory.per_step == memory.weights + memory.context + memory.decoded
    assert memory.waves == 1


def test_waves_fit_what_is_available():
    one = plan_memory(GQA, torch.float32, 50, 1, 16, "bifurcated", 10**9)
    fixed, each = one.weights + one.context, one.decoded_per_sample + one.workspace_per_sample
    for fit, rows, waves in ((1, 1, 100), (3, 3, 34), (64, 50, 2), (100, 100, 1)):
        memory = plan_memory(GQA, torch.float32, 50, 100, 16, "bifurcated", fixed + fit * each + each // 2)
        assert (memory.rows_at_once, memory.waves) == (rows, waves)


def test_an_unshared_layout_plans_its_copies():
    shared = plan_memory(GQA, torch.float32, 50, 4, 16, "bifurcated", 10**9)
    copied = plan_memory(GQA, torch.float32, 50, 4, 16, "contiguous", 10**9)
    assert copied.decoded == shared.decoded and copied.workspace == shared.workspace + 4 * shared.context


def test_a_plan_that_cannot_hold_one_sample_says_what_it_needs():
    with pytest.raises(ValueError, match="one sample needs .* is available: shorten the prompt, or raise --max_memory"):
        plan_memory(GQA, torch.float32, 10**6, 4, 16, "bifurcated", 10**8)


@pytest.mark.parametrize(
    "text,size", [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5e3", 1500), ("2 kb", 2000), ("1TB", 10**12)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["-1MB", "0", "0.2"])
def test_sizes_must_be_above_0(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0"):
        parse_size(text)


@pytest.mark.parametrize("text", ["", "GB", "4 GBB", "four", "4XB", "infGB"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        parse_size(text)


@pytest.mark.parametrize(
    "size,text", [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.5e12, "1.5 TB"), (3.2e15, "3200 TB")]
)
def test_human(size, text):
    assert human(size) == text


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="'nonsense' is not known"):
        choose_device("nonsense")
    with pytest.raises(ValueError, match="'meta' is not supported"):
        choose_device("meta")
    with pytest.raises(ValueError, match="cuda:77' is not there"):
        choose_device("cuda:77")
    assert choose_device("cpu") == CPU


def test_dtypes():
    assert choose_dtype("float16", CPU) == torch.float16
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.skipif(not IS_X86, reason="asks what an x86 CPU has")
def test_bfloat16_needs_instructions_for_it(monkeypatch):
    """AVX-512 alone does not do: oneDNN multiplies bfloat16 there, slowly."""
    for has_avx512_bf16, has_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_avx512_bf16: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        expected = torch.bfloat16 if has_avx512_bf16 or has_amx else torch.float32
        assert choose_dtype("auto", CPU) == expected


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="asks what an x86 CPU does")
def test_weights_are_packed_where_it_is_repaid():
    large = replace(GQA, dim=512, hidden_dim=512)
    assert choose_packing(CPU, torch.float32, large, 20, 4)
    assert not choose_packing(CPU, torch.float32, large, 19, 4), "a short run"
    assert not choose_packing(CPU, torch.float32, large, 20, 3), "few rows"
    assert not choose_packing(CPU, torch.float32, GQA, 20, 4), "small weights"
    assert not choose_packing(CPU, torch.float16, large, 20, 4), "not measured"
    assert not choose_packing(torch.device("cuda"), torch.bfloat16, large, 20, 4), "not a CPU"


def test_compiling_pays_for_long_runs_only():
    assert choose_compile(None, CPU, 12, 10, 10**8)[0] is False
    long, why = choose_compile(None, CPU, 12, 10**5, 10**8)
    assert long is True and why.startswith("auto: 100000 steps take about")
    assert choose_compile(False, CPU, 12, 10**5, 10**8) == (False, "--no-compile")
    assert choose_compile(True, CPU, 12, 1, 1) == (True, "--compile")


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    compiled, why = choose_compile(True, CPU, 12, 10**5, 10**8)
    assert compiled is False and "no C++ compiler" in why


def execution(flags: str, args: ModelArgs, context: int, dtype: torch.dtype = torch.float32) -> Execution:
    options = build_parser().parse_args(["--prompt", "a", *flags.split()])
    return choose_execution(options, args, CPU, dtype, context)


def test_attention_follows_what_would_be_copied():
    """GQA has 6 heads of 10: 60 numbers a token."""
    limit = 60 * 400
    layout, why = choose_attention(limit, GQA, 92, 4, 16)
    assert layout == "contiguous" and "4 x 100 tokens x 60" in why
    assert choose_attention(limit, GQA, 93, 4, 16)[0] == "bifurcated"
    chosen = execution("--attention expanded", GQA, 9)
    assert (chosen.attention, chosen.attention_reason) == ("expanded", "--attention expanded")
    chosen = execution("--interactive", GQA, 9)
    assert (chosen.attention, chosen.attention_reason) == ("bifurcated", "auto: it may grow")


def test_sharing_pays_earlier_where_the_step_is_compiled():
    """On a CPU; on a GPU it always pays."""
    eager, half, compiled = (
        copy_up_to(CPU, *each) for each in ((torch.float32, False), (torch.bfloat16, False), (torch.float32, True))
    )
    assert 100_000 < compiled < half < eager
    assert copy_up_to(torch.device("cuda"), torch.bfloat16, False) == 0
    for flag, layout in (("--no-compile", "contiguous"), ("--compile", "bifurcated")):
        chosen = execution(f"-n 1 --max_new_tokens 2 {flag}", GQA, (eager + compiled) // 2 // 60)
        assert (chosen.attention, chosen.compiled) == (layout, flag == "--compile")
        context = chosen.memory.context // (4 * GQA.kv_values_per_token)
        sizes = (GQA, torch.float32, context, 1, 2, layout, chosen.memory.available)
        assert chosen.memory == plan_memory(*sizes)
        assert chosen.memory.copied_per_sample == (chosen.memory.context if layout == "contiguous" else 0)


def test_a_context_is_shared_where_memory_does_not_hold_the_copies():
    """To the byte: what the copies need is planned as such."""
    flags = "-n 4 --max_new_tokens 9 --no-compile"
    copies = plan_memory(GQA, torch.float32, 50, 4, 9, "contiguous", 10**9).needed
    assert execution(f"{flags} --max_memory {copies}", GQA, 50).attention == "contiguous"
    shared = plan_memory(GQA, torch.float32, 50, 4, 9, "bifurcated", 10**9).needed
    for available in (copies - 1, shared):
        chosen = execution(f"{flags} --max_memory {available}", GQA, 50)
        assert (chosen.attention, chosen.memory.waves) == ("bifurcated", 1)
        assert chosen.attention_reason == "auto: memory does not hold a copy for each sample"


def test_a_context_in_int8_is_shared():
    chosen = execution("--kv_dtype int8 --no-compile", GQA, 50)
    assert (chosen.attention, chosen.attention_reason) == ("bifurcated", "--kv_dtype int8")
    assert chosen.memory.context < plan_memory(GQA, torch.float32, 50, 1, 200, "bifurcated", 10**9).context


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="asks what an x86 CPU does")
def test_packing_follows_the_rows_and_steps_that_run():
    large = replace(GQA, dim=512, hidden_dim=512)
    assert not execution("-n 3", large, 50).packed
    assert execution("-n 4", large, 50).packed
    three = plan_memory(large, torch.float32, 50, 3, 200, "bifurcated", 10**9).needed
    waves = execution(f"-n 6 --max_memory {three}", large, 50)
    assert (waves.memory.rows_at_once, waves.packed) == (3, False)
    assert not execution("-n 4 --max_new_tokens 1 --num_runs 19", large, 50).packed
    assert execution("-n 4 --max_new_tokens 1 --num_runs 20", large, 50).packed


def test_a_prompt_whose_reading_was_compiled_has_no_time_of_its_own():
    """The first run's prefill is mostly the compiler's; that of the others is not."""
    chosen, runs = execution("--no-compile", GQA, 50), [Monitor(), Monitor()]
    for run, seconds in zip(runs, (9.0, 2.0), strict=True):
        run.prefill_s, run.first_token_s = seconds, seconds + 1
    names = ("prefill_s", "prefill_tokens_per_s", "first_token_s")
    for monitors, compiled, expected in (
        (runs[:1], False, (9.0, 50 / 9, 10.0)), (runs[:1], True, (None, None, None)), (runs, True, (2.0, 25.0, 3.0))
    ):  # fmt: skip
        report = measure(monitors, chosen, 50, CPU, compiled)
        assert tuple(report[name] for name in names) == expected
