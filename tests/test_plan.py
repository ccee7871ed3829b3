"""What is decided from shapes alone. Oracles: bytes of tensors that are really allocated; arithmetic done by hand."""

import contextlib
from dataclasses import replace

import pytest
import torch
from conftest import ASKED, GQA, MHA, both_kinds, random_model

from cache import KVCache
from cli.console import Stopwatch, measure
from engine.layouts import copied
from engine.plan import (
    Plan,
    Workspace,
    choose_chunk,
    choose_compile,
    choose_device,
    choose_dtype,
    choose_packing,
    estimate_step,
    human,
    longest_context,
    missing_compiler,
    plan_run,
    weigh,
)
from engine.request import Sampling, Workload
from layers.linear import IS_X86, can_pack
from layers.moe import MoEConfig
from layers.rope import RopeScaling
from model import ModelArgs, empty_model

CPU = torch.device("cpu")


@pytest.fixture
def by_torch(monkeypatch) -> None:
    """Attention that holds scores."""
    monkeypatch.setattr("engine.plan.takes", lambda *_: False)


def plan(
    args: ModelArgs, work: Workload, available: int = 10**9, dtype: torch.dtype = torch.float32, device=CPU, **flags
) -> Plan:
    return plan_run(args, weigh(empty_model(args).to(dtype)), work, device, dtype, available, **flags)


def nbytes(cache: KVCache) -> int:
    return sum(tensor.nbytes for tensor in cache.tensors)


@pytest.mark.parametrize("args", [GQA, MHA], ids=["GQA", "MHA, tied"])
def test_planned_bytes_are_those_of_the_tensors(args):
    model = random_model(args, torch.bfloat16)
    planned = plan(args, Workload(50, 6, 16), dtype=torch.bfloat16)
    root = KVCache.empty(args.kv_shape, 1, 50, model.norm.weight)
    assert planned.weights == weigh(model)
    assert planned.weights.total == sum(parameter.nbytes for parameter in model.parameters())
    assert planned.context == nbytes(root)
    assert planned.decoded == nbytes(KVCache.fork(root, 6, 16))
    assert planned.unshared == nbytes(copied(root, 6, 16))
    assert planned.per_step == planned.weights.per_step + planned.context + planned.decoded // 2
    assert planned.rows_at_once == 6


def test_a_step_reads_no_embedding_table_that_is_not_the_output_too():
    """Oracle: the parameters, one by one."""
    for args in (GQA, MHA):
        model = random_model(args)
        read = {id(each): each.nbytes for name, each in model.named_parameters() if name != "tok_embeddings.weight"}
        read |= {id(model.output.weight): model.output.weight.nbytes}
        assert weigh(model).per_step == sum(read.values())
    assert weigh(random_model(GQA)).total - weigh(random_model(GQA)).per_step == 97 * 30 * 8


def test_rows_fit_what_is_available():
    work = Workload(50, 100, 16, prefill_chunk=1)
    one = plan(GQA, work)
    fixed = one.weights.total + one.context
    for fit in (1, 3, 64, 100):
        planned = plan(GQA, work, fixed + fit * one.decoded_per_sample + one.space.decoding(fit))
        assert planned.rows_at_once == fit


def test_an_unshared_layout_plans_its_copies():
    shared, copied, expanded = (
        plan(GQA, Workload(50, 4, 16, layout)) for layout in ("bifurcated", "contiguous", "expanded")
    )
    assert copied.copied_per_sample == shared.context and shared.copied_per_sample == 0
    assert copied.decoded == expanded.decoded == shared.decoded
    assert copied.workspace > 4 * copied.context > shared.workspace
    assert expanded.workspace > 4 * 66 * 4 * GQA.kv_values_per_token // GQA.n_layer > shared.workspace


def test_scores_are_planned_where_they_are_held(by_torch, monkeypatch):
    """Arithmetic by hand. 64 rows of 6 heads after 20,000 tokens, in fp32: eagerly those of a key/value head's queries,
    which are more than SCORES_AT_ONCE; as one graph of all heads, with a copy of the keys; in bfloat16 a product and
    what is added beside them; none by a kernel, nor by PyTorch's own attention."""
    work = Workload(20_000, 64, 16)
    scores = 64 * 3 * 20_000

    def attention(dtype: torch.dtype = torch.float32, compile: bool = False, **fields) -> int:
        return plan(GQA, replace(work, **fields), 10**12, dtype, compile=compile).space.attention(64, 1, 64)

    assert attention() == 4 * scores
    assert attention(drafted=2) == 3 * 4 * scores
    assert attention(torch.bfloat16) == 10 * scores
    monkeypatch.setattr("engine.plan.missing_compiler", lambda device: "")
    assert attention(compile=True) == 2 * 4 * scores + 4 * 20_000 * 2 * 10
    assert attention(attention="contiguous") == 64 * 20_016 * 5  # what is visible: bool, and in fp32
    monkeypatch.setattr("engine.plan.takes", lambda *_: True)
    assert attention() == 0


def test_a_plan_that_cannot_hold_one_sample_says_what_it_needs():
    with pytest.raises(ValueError, match="one sample needs .* is available: shorten the prompt, or raise --max_memory"):
        plan(GQA, Workload(10**6, 4, 16), 10**8)


def test_what_is_needed_is_enough_to_the_byte():
    for layout in ("bifurcated", "contiguous", "expanded"):
        work = Workload(50, 4, 16, layout, prefill_chunk=1)
        needed = plan(GQA, work).needed
        assert plan(GQA, work, needed).rows_at_once == 4
        assert plan(GQA, work, needed - 1).rows_at_once == 3


def test_on_a_gpu_the_pool_of_a_recorded_step_counts(by_torch):
    """It holds a workspace of its own beside that of the steps that are not recorded."""
    cpu, cuda = (plan(GQA, Workload(50, 4, 16), device=torch.device(name), compile=False) for name in ("cpu", "cuda"))
    assert cuda.workspace == 2 * cpu.workspace


@pytest.mark.parametrize(
    "size,text", [(0, "0 B"), (999, "999 B"), (999_600, "1 MB"), (1.5e12, "1.5 TB"), (3.2e15, "3200 TB")]
)
def test_human(size, text):
    assert human(size) == text


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match="unknown device 'nonsense'"):
        choose_device("nonsense")
    with pytest.raises(ValueError, match="'meta' is not supported"):
        choose_device("meta")
    with pytest.raises(ValueError, match="cuda:77' not found"):
        choose_device("cuda:77")
    assert choose_device("cpu") == CPU


@both_kinds
def test_dtypes(bf16):
    assert choose_dtype("auto", CPU) == (torch.bfloat16 if bf16 else torch.float32)
    assert choose_dtype("float16", CPU) == torch.float16
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16


@pytest.mark.skipif(not IS_X86, reason="asks what an x86 CPU has")
def test_bfloat16_needs_instructions_for_it(monkeypatch):
    """AVX-512 alone does not do: oneDNN multiplies bfloat16 there, slowly."""
    for has_avx512_bf16, has_amx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_avx512_bf16: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has)
        assert ASKED() == (has_avx512_bf16 or has_amx)


@pytest.fixture
def streaming(monkeypatch) -> None:
    monkeypatch.setattr("layers.linear.streams", lambda *_: True)


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="asks what an x86 CPU does")
def test_weights_are_packed_where_it_is_repaid(streaming):
    large = replace(GQA, dim=512, hidden_dim=512)
    assert choose_packing(CPU, torch.float32, large, 20, 4)
    assert not choose_packing(CPU, torch.float32, large, 19, 4), "a short run"
    assert not choose_packing(CPU, torch.float32, large, 20, 2), "few rows"
    assert not choose_packing(CPU, torch.float32, GQA, 20, 4), "small weights"
    assert not choose_packing(CPU, torch.float16, large, 20, 4), "not measured"
    assert not choose_packing(torch.device("cuda"), torch.bfloat16, large, 20, 4), "not a CPU"
    mixture = replace(large, mixture=MoEConfig(8, 2, 512, True))
    assert choose_packing(CPU, torch.float32, mixture, 20, 12)
    assert not choose_packing(CPU, torch.float32, mixture, 20, 11), "few rows of an expert"


def test_compiling_pays_for_long_runs_only():
    assert choose_compile(None, CPU, 12, 10, 0.01)[0] is False
    long, why = choose_compile(None, CPU, 12, 10**5, 0.01)
    assert long is True and why.startswith("auto: 100000 steps take about")
    assert choose_compile(False, CPU, 12, 10**5, 0.01) == (False, "--no-compile")
    assert choose_compile(True, CPU, 12, 1, 0.01) == (True, "--compile")


LLAMA_7B = ModelArgs(4096, 32, 32, 32, 128, 11008, 32000, 1 << 20)


@pytest.fixture
def cuda(monkeypatch) -> torch.device:
    """A device that is not there, with the fused kernels and a compiler."""
    monkeypatch.setattr("engine.plan.has_fused", lambda *_: True)
    monkeypatch.setattr("engine.plan.missing_compiler", lambda device: "")
    return torch.device("cuda")


def on_cuda(device: torch.device, steps: int, args: ModelArgs = LLAMA_7B, rows: int = 1, **flags) -> Plan:
    with torch.device("meta"):
        weights = weigh(empty_model(args).to(torch.bfloat16))
    work = Workload(8192, rows, 200, runs=steps // 200)
    return plan_run(args, weights, work, device, torch.bfloat16, 80 * 10**9, **flags)


def test_on_a_gpu_compiling_pays_from_some_thousand_steps(cuda, monkeypatch):
    """By hand, for Llama-2-7B after 8,192 tokens: 45 s of compiling against 3 to 4 ms a step. A CPU's constants asked
    for a minute and more, and for steps that save twice as much."""
    assert not on_cuda(cuda, 200).compiled and not on_cuda(cuda, 45_000 // 4).compiled
    assert on_cuda(cuda, 45_000 // 3).compiled and "compiling about 45 s" in on_cuda(cuda, 15_000).compile_reason
    assert on_cuda(cuda, 200, compile=True).compiled and not on_cuda(cuda, 10**6, compile=False).compiled
    small = replace(LLAMA_7B, dim=768, n_layer=12, n_head=12, n_kv_head=12, head_dim=64, hidden_dim=2048)
    assert not on_cuda(cuda, 200, small).compiled and on_cuda(cuda, 10**5, small).compiled
    monkeypatch.setattr("engine.plan.missing_compiler", lambda device: "Triton")
    found = on_cuda(cuda, 10**6)
    assert (found.compiled, found.compile_reason) == (False, "no Triton found: running eagerly")


@pytest.mark.parametrize("rows,ms", [(1, 11.2), (16, 11.6), (128, 14), (1024, 63)])
def test_the_estimate_of_a_step_on_a_gpu_is_the_predicted_one(rows, ms):
    """Within 30 %. Oracle: the predictions for uncompiled steps on an H100 in docs/benchmarks.md, not measured."""
    with torch.device("meta"):
        size = weigh(empty_model(LLAMA_7B).to(torch.bfloat16)).per_step + 8192 * LLAMA_7B.kv_values_per_token * 2
    seconds = estimate_step(LLAMA_7B, torch.device("cuda"), torch.bfloat16, 8192, rows, size)
    assert 0.7 < 1000 * seconds / ms < 1.3


def test_on_a_gpu_compiling_needs_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert missing_compiler(torch.device("cuda")) in ("Triton", "C++ compiler or no Python.h")
    assert "Triton" not in missing_compiler(CPU)


STORIES110M = ModelArgs(768, 12, 12, 12, 64, 2048, 32000, 1 << 20)
SMOLLM = ModelArgs(576, 30, 9, 3, 64, 1536, 49152, 8192, tied_output=True)
# Milliseconds of eager steps without kernels.py: of docs/benchmarks.md, and of a run of a real model.
MEASURED = [
    *((STORIES110M, torch.float32, 4096, n, ms) for n, ms in ((1, 66.7), (8, 134.5), (16, 140.8), (64, 274.3))),
    (SMOLLM, torch.bfloat16, 7900, 64, 267),
]


@pytest.mark.parametrize("args,dtype,context,rows,ms", MEASURED)
def test_the_estimate_of_a_step_is_within_twice_what_was_measured(args, dtype, context, rows, ms, monkeypatch):
    monkeypatch.setattr("engine.plan.multiplies_bfloat16", lambda: True)  # as the machine of the last one does
    size = weigh(empty_model(args).to(dtype)).per_step + context * args.kv_values_per_token * dtype.itemsize
    assert 0.5 < 1000 * estimate_step(args, CPU, dtype, context, rows, size) / ms < 2


def test_without_a_compiler_it_runs_eagerly_and_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    compiled, why = choose_compile(True, CPU, 12, 10**5, 0.01)
    assert compiled is False and "no C++ compiler" in why


def test_a_context_in_int8_is_planned_as_such(by_torch):
    """Half, a scale, and a number for each channel of the keys; in fp32, two copies of a layer's keys while they are
    brought into int8, and three while they and the values are widened again."""
    plain, halved = (
        plan(GQA, Workload(5000, 1, 200, kv_dtype=kv_dtype, prefill_chunk=1), compile=False)
        for kv_dtype in ("auto", "int8")
    )
    held = 5000 * GQA.kv_values_per_token * 14 // 10 + GQA.kv_values_per_token // 2 * 4
    assert halved.context == held < plain.context == halved.context_while_read
    keys = plain.context // GQA.n_layer // 2
    assert halved.space.reading() == 2 * keys and halved.space.attention(1, 1, 1) == 3 * keys
    assert halved.needed == halved.weights.total + plain.context + 2 * keys


def test_a_prompt_that_is_read_whole_is_planned_as_such():
    """With a large chunk, or where the rotation depends on its length. By hand: six times the heads' width
    in fp32, the feed-forward part's three products, and four times the model's width."""
    by_length = replace(GQA, rope_scaling=RopeScaling("dynamic", 2.0, 64), hidden_dim=900)
    chunks, large, dynamic = (
        plan(args, Workload(5000, 1, 20, prefill_chunk=chunk)).space.reading()
        for args, chunk in ((replace(GQA, hidden_dim=900), 10), (replace(GQA, hidden_dim=900), 10**6), (by_length, 10))
    )
    assert large == dynamic == 5000 * 4 * (6 * 60 + 3 * 900 + 4 * 30) and chunks <= large // 5


@pytest.mark.parametrize("context,times", [(980, 1), (981, 3), (1000, 3), (1001, 1)])
def test_what_is_read_anew_is_held_thrice_meanwhile(context, times):
    """Where longrope changes its factors within the samples, of 20 tokens behind a context, past a length of 1,000: the
    context as it was, as it is stored again, and while it is prefilled; and what one row has decoded."""
    args = replace(GQA, rope_scaling=RopeScaling("longrope", 4.0, 1000, short=(1.0,) * 5, long=(2.0,) * 5))
    found, token = plan(args, Workload(context, 3, 20)), GQA.kv_values_per_token * 4
    own = found.weights.total + (times * context + (3 + (times > 1)) * 20) * token
    assert own < found.needed < own + found.space.reading() + found.space.decoding(3) + 20 * 4 * 24 * 60


def test_reading_counts_masks_and_scores_where_the_fused_kernels_do_not_serve(monkeypatch):
    """On a GPU of bfloat16: windows are masks, soft caps scores, of what a chunk of 512 sees. By hand."""
    monkeypatch.setattr("engine.plan.has_fused", lambda *_: True)
    gpu = Workload(8000, 1, 20, prefill_chunk=512), torch.device("cuda"), torch.bfloat16, False
    plain, near, capped = (
        Workspace(replace(GQA, head_dim=64, **fields), *gpu).reading()
        for fields in ({}, {"windows": (100, 200, 100)}, {"score_softcap": 5.0})
    )
    by_sdpa = 8 * 712 * 6 * (512 + 64)  # keys repeated for each head, and plain products
    assert near - plain == 512 * 712 * (10 + 3) + by_sdpa
    assert capped - plain > 6 * 512 * 8000 * 4


def test_on_a_gpu_a_prompt_is_read_in_large_chunks_where_no_scores_are_held(monkeypatch):
    """By hand, as above: 4,096 tokens, and 512 with a window, where the fused kernels do not serve, or on a CPU."""
    monkeypatch.setattr("engine.plan.has_fused", lambda device, *_: device.type == "cuda")
    gpu, args = (torch.device("cuda"), torch.bfloat16), replace(GQA, head_dim=64)
    assert choose_chunk(None, args, *gpu) == 4096 and choose_chunk(77, args, *gpu) == 77
    for fields in ({"windows": (100, None, 9)}, {"score_softcap": 5.0}, {"alibi": True}):
        assert choose_chunk(None, replace(args, **fields), *gpu) == 512
    assert choose_chunk(None, args, CPU, torch.bfloat16) == 512
    few, default, many = (
        Workspace(args, Workload(8000, 1, 20, prefill_chunk=chunk), *gpu, False).reading()
        for chunk in (512, None, 4096)
    )
    assert default == many == 8 * few


def test_prompts_behind_a_shared_context_are_planned_with_their_scores(by_torch):
    space = plan(GQA, Workload(12_000, 3, 20), 10**12, compile=False).space
    assert space.reading(True) - space.reading() >= 512 * 3 * 12_000 * 4  # a key/value head's, in fp32


def test_a_conversation_may_hold_what_a_plan_of_it_accepts(by_torch):
    """Also where a compiled step would hold more than an eager one."""
    args, work = replace(GQA, score_softcap=5.0, n_layer=1, context_limit=1 << 20), Workload(0, 1, 20, prefill_chunk=16)
    weights = weigh(empty_model(args))
    for compile in (None, False):
        room = longest_context(args, weights, work, CPU, torch.float32, 10**8, compile)
        for more in (0, 1):
            held = replace(work, context=room - 20 + more)
            with pytest.raises(ValueError, match="one sample needs") if more else contextlib.nullcontext():
                plan_run(args, weights, held, CPU, torch.float32, 10**8, compile)


def test_logits_are_planned_with_what_the_draw_makes_of_them():
    """Those of all rows and positions, and in fp32 and fp64 of at most LOGITS_AT_ONCE."""
    args, drawn = replace(GQA, vocab_size=50_000), {}
    for filters in ({"top_k": 200}, {}, {"top_p": 0.9}, {"top_k": 200, "repetition_penalty": 1.2}):
        for rows in (1, 900):
            work = Workload(50, rows, 16, sampling=Sampling(**filters))
            drawn[tuple(filters), rows] = plan(args, work, 10**12).space.logits(rows) - rows * 50_000 * 4
    assert [drawn[each] // 50_000 for each in drawn if each[1] == 1] == [10, 26, 56, 24]
    assert [drawn[each] >> 20 for each in drawn if each[1] == 900] == [10, 26, 56, 24]


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="asks what an x86 CPU does")
def test_packing_follows_the_rows_and_steps_that_run(streaming, monkeypatch):
    """Rows so few that they stream plain weights pack none; positions count as rows do."""
    large = replace(GQA, dim=512, hidden_dim=512)
    assert not plan(large, Workload(50, 2, 200)).packed
    assert plan(large, Workload(50, 3, 200)).packed and plan(large, Workload(50, 1, 200, drafted=2)).packed
    two, four = (Workload(50, rows, 200, prefill_chunk=1) for rows in (2, 4))
    few = plan(large, four, plan(large, two).needed)
    assert (few.rows_at_once, few.packed) == (2, False)
    assert not plan(large, Workload(50, 4, 1, runs=19)).packed
    assert plan(large, Workload(50, 4, 1, runs=20)).packed
    monkeypatch.setattr("layers.linear.streams", lambda *_: False)
    assert plan(large, Workload(50, 1, 200)).packed


@pytest.mark.skipif(not can_pack(CPU, torch.float32), reason="asks what an x86 CPU does")
def test_a_tied_output_is_packed_where_its_copy_fits(streaming):
    large = replace(GQA, dim=512, hidden_dim=512, tied_output=True)
    twice = plan(large, Workload(50, 4, 200))
    embedding = 4 * large.vocab_size * large.dim
    assert twice.packed_tied == embedding and "packed copy of the tied output" in str(twice)
    once = plan(large, Workload(50, 4, 200), twice.needed - 1)
    assert once.packed and once.packed_tied == 0 and once.needed == twice.needed - embedding
    assert plan(large, Workload(50, 2, 200)).packed_tied == 0
    after = plan_run(large, twice.weights.with_packed(embedding), Workload(50, 4, 200), CPU, torch.float32, 1 << 40)
    assert after.packed_tied == 0 and after.needed == twice.needed, "counted once"


def test_a_prompt_whose_reading_was_compiled_has_no_time_of_its_own():
    """The first run's prefill is mostly the compiler's; that of the others is not."""
    planned, runs = plan(GQA, Workload(50, 1, 200), compile=False), [Stopwatch(), Stopwatch()]
    for run, seconds in zip(runs, (9.0, 2.0), strict=True):
        run.prefill_s, run.first_token_s = seconds, seconds + 1
    names = ("prefill_s", "prefill_tokens_per_s", "first_token_s")
    for watches, compiled, expected in (
        (runs[:1], False, (9.0, 50 / 9, 10.0)), (runs[:1], True, (None, None, None)), (runs, True, (2.0, 25.0, 3.0))
    ):  # fmt: skip
        report = measure(watches, planned, CPU, compiled)
        assert tuple(report[name] for name in names) == expected


def test_the_first_step_of_a_compiled_run_counts_as_one_of_the_others():
    """It compiles. Four steps of two rows; by hand: the others take 0.1, 0.1 and 0.3 s, so it is taken for 0.1 s."""
    planned, run = plan(GQA, Workload(50, 2, 200)), Stopwatch()
    run.prefill_s = run.first_token_s = 1.0
    run.step_s, run.decode_tokens = [9.0, 0.1, 0.1, 0.3], 8
    names = ("decode_ms_per_step", "tokens_per_s", "tokens_per_s_per_sample", "compile_s")
    for compiled, expected in ((True, (100, 8 / 0.6, 4 / 0.6, 8.9)), (False, (200, 8 / 9.5, 4 / 9.5, None))):
        report = measure([run], replace(planned, compiled=compiled), CPU, False)
        assert [report[name] for name in names] == [pytest.approx(value) for value in expected]
