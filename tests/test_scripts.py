"""The scripts, run as their users run them, at sizes that take seconds. Oracle: their output; the engine itself."""

import argparse
import contextlib
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import warm
from conftest import GQA, PROMPT, ROOT, TINY, random_model, request, slow

import benchmark
import common
from cache import KVCache, Link
from engine import runner
from engine.engine import Engine
from engine.graphs import RecordedStep

BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
SMALL = ["--shape", "tiny", "--set", "n_layer=1", "--context", "33", "-n", "1", "3", "--steps", "2"]


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    return warm.run(ROOT / "scripts" / script, *arguments, cwd=ROOT, timeout=200)


@slow
def test_benchmark_of_every_eager_column(tmp_path):
    columns = [name for name in benchmark.COLUMNS if "compiled" not in name]
    files = ["--out", tmp_path / "cells.jsonl", "--charts", tmp_path / "charts"]
    result = run("benchmark.py", *SMALL, "--columns", *columns, *files)
    assert result.returncode == 0, result.stderr
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 2 * len(columns)
    refused = [cell for cell in cells if cell["column"] == "contiguous SDPA, efficient"]  # not a kernel of the CPU
    assert len(refused) == 2 and all((cell["ms"], cell["note"]) == (None, "no such kernel") for cell in refused)
    assert all(cell["ms"] > 0 for cell in cells if cell not in refused)
    assert len(re.findall(r"^\| 33 \| [13] \|", result.stdout, re.MULTILINE)) == 2
    left = re.findall(r"^tiny, .*, N [13], T 33: .*; about (\d+) s left$", result.stderr, re.MULTILINE)
    assert len(left) == len(cells) and left[-1] == "0"
    (chart,) = (tmp_path / "charts").iterdir()
    assert chart.name == "tiny-num_samples.png" and chart.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def in_this_process(monkeypatch):
    """What benchmark.py sets for its process is put back. How fast the machine is, is not measured: where the CPU has
    no instructions for bfloat16 that alone takes minutes."""
    monkeypatch.setattr(common, "keep_freed_memory", lambda: None)
    monkeypatch.setattr(benchmark, "machine_rates", lambda device, dtype: benchmark.Rates(1e10, 1e12))
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        yield


def test_commands_of_the_benchmarks_are_accepted(in_this_process, monkeypatch, capsys, tmp_path):
    """The commands of the page with smaller sizes: the last value of a flag counts."""
    monkeypatch.chdir(tmp_path)  # where --out writes
    commands = re.findall(r"^`?python scripts/benchmark\.py ?(.*?)`?$", BENCHMARKS, re.MULTILINE)
    assert "" in commands and len(commands) > 5 and "--preset cpu --out cells.jsonl" in commands
    for command in commands:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *shlex.split(command), *SMALL, "--columns", "bifurcated"])
        status, printed = benchmark.main(), capsys.readouterr()
        assert status == 0 and re.search(r"\| 33 \||MB \||, 33 tokens \|", printed.out), (command, printed.err)


@slow
def test_attention_alone_is_compared_with_sdpa():
    result = run("benchmark.py", *SMALL, "--preset", "attention")
    assert result.returncode == 0, result.stderr
    kinds = re.findall(r"^\| (\w+)[^|]*\| \d+ \| \d+ \| \d+\.\d+ \|", result.stdout, re.MULTILINE)
    assert set(kinds) == {"prefill", "decode", "hybrid"}


def test_loading_is_compared_with_mapping(in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *SMALL, "--preset", "load"])
    status, printed = benchmark.main(), capsys.readouterr()
    assert status == 0, printed.err
    assert len(re.findall(r"\| [\d.]+ MB \| mapped[^|]*\| [\d.]+ \| [\d.]+ \| [\d.]+ \|", printed.out)) == 2


@slow
def test_reading_a_prompt_is_compared_with_a_matrix_product():
    result = run("benchmark.py", *SMALL, "--preset", "prefill")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| 33 \| 512 \| \d+ \| \d\.\d\d \| \d+% \|$", result.stdout, re.MULTILINE)


def test_a_step_with_quantised_weights_is_compared_with_a_plain_one(in_this_process, monkeypatch, capsys):
    sizes = ["--shape", "tiny", "--set", "n_layer=1", "--context", "33", "-n", "1", "2", "--steps", "2"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *sizes, "--preset", "quantised", "--dtype", "bfloat16"])
    status, printed = benchmark.main(), capsys.readouterr()
    assert status == 0, printed.err
    rows = re.findall(r"^\| 33 \| ([12]) \| (\w+).*\| ([\d.]+) \| [\d.]+ \| (.*) \|$", printed.out, re.MULTILINE)
    assert [row[:2] for row in rows] == [(n, name) for n in "12" for name in ("plain", "int8", "int4")]
    assert all(float(row[2]) > 0 and sum(map(int, re.findall(r"\b\d+\b", row[3]))) == 8 for row in rows)


@slow
def test_ranks_are_compared_with_one_process(tmp_path):
    flags = ["--preset", "tp", "--shape", "tiny", "--set", "n_layer=1", "--context", "33", "-n", "3", "--steps", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    files = [str(ROOT / "scripts" / "benchmark.py"), *flags, "--out", str(tmp_path / "rows.jsonl")]
    result = subprocess.run([*command, *files], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    assert len(re.findall(r"^\| 33 \| 3 \| [\d.]+ \| [\d.]+ \| [\d.]+ \|$", result.stdout, re.MULTILINE)) == 1
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 1  # one rank writes


@slow
def test_a_cell_that_cannot_fit_says_what_it_needs():
    """120 GB of copies, which is computed and not tried; the row's other cell is measured."""
    sizes = ["--set", "n_kv_head=6", "--context", 10**4, "-n", 8000, "--steps", 1]
    result = run("benchmark.py", *SMALL, *sizes, "--columns", "bifurcated", "contiguous")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\| 10000 \| 8000 \| [\d.]+ \(\d+%\) \| needs [\d.]+ GB \|", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--set", "nonsense=3"],
        ["--steps", "0"],
        ["-n", "0"],
        ["--device", "cuda:99"],
        ["--set", "n_kv_head=0"],
        ["--budget", "0"],
        ["--budget", "nan"],
        ["--charts", "no/such/folder"],
        ["--out", "scripts"],
        ["--charts", "README.md"],
        ["--preset", "load", "--dtype", "float32"],
        ["--preset", "tp", "--shape", "tiny"],
        ["--preset", "nonsense"],
        ["--preset", "prefill", "--charts", "charts"],
    ],
)
def test_benchmark_refuses_bad_input_in_one_line(arguments, in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *SMALL, *arguments])
    try:
        status = benchmark.main()
    except SystemExit as end:  # what argparse refuses by itself
        status = end.code
    error = capsys.readouterr().err
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1


def test_a_measurement_of_one_point_is_no_chart(tmp_path):
    (tmp_path / "cells.jsonl").write_text("")
    result = run("plot.py", "--cells", tmp_path / "cells.jsonl", "--out", tmp_path / "charts")
    assert result.returncode == 2 and "no shape was measured at two values" in result.stderr


def test_conversion_refuses_bad_input_in_one_line(tmp_path):
    result = run("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "nothing")
    assert result.returncode == 2 and result.stderr.startswith("error: checkpoint ")


def test_conversion_says_that_a_tokenizer_is_missing(tmp_path):
    """One that is already at the output may be of another model."""
    for name in ("model.pth", "config.json"):
        shutil.copyfile(TINY / name, tmp_path / name)
    result = run("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "model.pth", "--out", tmp_path / "out")
    assert result.returncode == 0 and result.stdout == f"{tmp_path}/out/model.pth\n"
    assert result.stderr == f"no tokenizer found in {tmp_path}: copy the model's tokenizer to {tmp_path}/out\n"


def test_a_batch_is_compared_with_its_prompts_one_by_one(tmp_path):
    """The commands of the tables, with smaller sizes."""
    commands = re.findall(r"^`python scripts/benchmark_batch\.py ([^`]*)`", BENCHMARKS, re.MULTILINE)
    assert len(commands) == 3 and sum("--flat" in command for command in commands) == 1
    small = ["--shape", "tiny", "--prompts", 3, "--prompt_tokens", 6, "-n", 2, "--max_new_tokens", 4, "--preamble", 5]
    small += ["--vary", 3, "--dtype", "float32", "--out", tmp_path / "rows.jsonl"]
    for command in commands[1:]:  # the first is the second with other sizes
        flat = ["--flat", 20] if "--flat" in command else []
        result = run("benchmark_batch.py", *shlex.split(command), *small, *flat)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("`python scripts/benchmark_batch.py ")
    compared, *memory = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert compared["preamble"] == 5 and compared["samples that differ"] == "0 of 6"
    assert compared["ratio"] == pytest.approx(compared["one by one, s"] / compared["batch, s"])
    assert [row["prompts done"] for row in memory] == [2, 20] and all("MB" in row["resident"] for row in memory)


def test_a_draft_is_compared_with_plain_decoding_and_priced(tmp_path):
    """Both draw the same samples. The price is of two layers of five: most of their proposals are not accepted."""
    flags = ["--checkpoint_path", TINY, "--out", tmp_path / "rows.jsonl", "--length", 9, "--runs", 1]
    for more in (["--only", "copy"], ["--price"]):
        result = run("benchmark_drafts.py", *flags, *more)
        assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    names = ["copy, prompt look-up", "copy, prompt look-up, auto"]
    assert [(row["what"], row["N"]) for row in rows[:4]] == [(name, n) for n in (1, 8) for name in names]
    assert 0 < rows[4]["by the same numbers"] < rows[4]["standard rule"] < 0.5 < rows[6]["standard rule"] < 1
    refused = run("benchmark_drafts.py", "--checkpoint_path", tmp_path / "nothing")
    assert refused.returncode == 2 and refused.stderr.startswith("error: checkpoint")


@pytest.mark.parametrize("more, columns", [([], 7), (["--logprobs", "--length", 3], 8)])
def test_sharing_is_compared_with_transformers(more, columns, tmp_path):
    small = ["-n", 2, 3, "--context", 20, "--steps", 2, "--layers", 1, "--vocabulary", 99]
    result = run("benchmark_transformers.py", *small, *more, "--out", tmp_path / "rows.jsonl")
    assert result.returncode == 0, result.stderr
    rows = [list(json.loads(line).values()) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row[0] for row in rows] == [2, 3] and all(len(row) == columns for row in rows)
    for _, plain, shared, ratio, *_ in rows:
        assert ratio == pytest.approx(plain / shared)
    assert not more or all(row[-1] < 1e-4 for row in rows)


def test_a_table_prints_a_row_at_once_and_writes_it_unrounded(tmp_path, capsys):
    table = common.Table("what", "ms:.1f", "share:.0%", out=tmp_path / "rows.jsonl", shape="tiny")
    assert capsys.readouterr().out == "\n| what | ms | share |\n|---|---|---|\n"
    table.row("step", 1.25, None)
    assert capsys.readouterr().out == "| step | 1.2 | - |\n"
    written = json.loads((tmp_path / "rows.jsonl").read_text())
    assert written == {"shape": "tiny", "what": "step", "ms": 1.25, "share": None}
    with pytest.raises(ValueError):
        table.row("step", 1.25)


class FakeClock:
    """Stands in for torch.cuda: a device that takes 3 ms of its time for each kernel, and an event that notes it."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.log, clock = 0.0, [], self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now
                clock.log.append("record")

            def synchronize(self) -> None:
                clock.log.append("wait")

            def elapsed_time(self, end: "Event") -> float:
                assert clock.log[-1] == "wait", "read before the device was there"
                return end.at - self.at

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: clock.log.append("wait"))

    def kernel(self) -> None:
        self.now += 3.0
        self.log.append("kernel")


def test_calls_on_a_gpu_are_timed_by_its_events_without_a_wait_between_them(monkeypatch):
    """Five calls within the budget, and two without; by hand. A first call, which tells how many fit, is waited for."""
    clock = FakeClock(monkeypatch)
    assert common.timed(clock.kernel, 5, torch.device("cuda")) == [0.003] * 5
    assert clock.log == ["record", "kernel", "record", "wait", "record", *["kernel", "record"] * 4, "wait"]
    assert common.timed(clock.kernel, 5, torch.device("cuda"), budget=0.0065) == [0.003] * 2
    clock.log.clear()
    assert common.median_ms(clock.kernel, 20, torch.device("cuda")) == 3
    assert clock.log.count("kernel") == 1 + 3 + 20 and clock.log.count("wait") == 1 + 2 + 2


def test_the_limits_of_a_gpu_are_measured_by_events(monkeypatch):
    """A product of 8,192 rows and columns, and 1 GB copied and read, in 3 ms each. Oracle: arithmetic by hand."""
    clock = FakeClock(monkeypatch)

    class Tensors:
        nbytes = 4 << 28

        def __matmul__(self, other: "Tensors") -> None:
            clock.kernel()

        def copy_(self, other: "Tensors") -> None:
            clock.kernel()

        sum = __rmatmul__ = lambda self: clock.kernel()

    asked = []
    monkeypatch.setattr(torch, "ones", lambda *shape, **flags: asked.append(shape) or Tensors())
    monkeypatch.setattr(torch, "ones_like", lambda like: Tensors())
    rates = benchmark.machine_rates(torch.device("cuda"), torch.bfloat16)
    assert asked == [(1 << 28,), (8192, 8192)]
    assert rates == pytest.approx((2 * (4 << 28) / 0.003, 2 * 8192**3 / 0.003))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_benchmarked_cache_is_that_of_the_engine(rows):
    """At N = 1 too: its own slots behind the context, by one link that shows all of it. Oracle: the engine's."""
    engine = Engine(random_model(GQA, torch.float32), compile=False)
    run = engine.single(PROMPT, request(rows, 20))
    list(run.run())
    expected = run.contexts.cache
    root = engine.empty_cache(len(PROMPT))
    found = benchmark.COLUMNS["bifurcated"].make(root, expected.rows, expected.slots)
    for each in (found, expected):
        (link,) = each.links
        assert type(each) is KVCache and type(link) is Link and link.length is link.group is None
    assert [each.shape for each in found.tensors] == [each.shape for each in expected.tensors]
    assert found.links[0].cache.k[0].shape == expected.links[0].cache.k[0].shape


def test_a_timed_step_on_a_gpu_replays_the_engines_recording(monkeypatch):
    """One recording for all timed steps, at the warm-up, of slots in the engine's sizes. A stand-in replays."""
    clock, recorded = FakeClock(monkeypatch), []

    class OnCuda(Engine):
        def __init__(self, *given, **flags) -> None:
            super().__init__(*given, **flags)
            self.device = torch.device("cuda")

    def record(step, device):
        recorded.append(step)
        outputs = step()
        return clock.kernel, outputs

    monkeypatch.setattr(benchmark, "Engine", OnCuda)
    monkeypatch.setattr(runner, "RecordedStep", partial(RecordedStep, record=record))
    model = random_model(GQA, torch.float32)
    options = argparse.Namespace(steps=12, budget=1e9, device=torch.device("cuda"), dtype=torch.float32)
    bench = benchmark.Bench(options, "tiny", GQA, benchmark.Rates(1, 1), [], 0.0)
    assert bench.slots == runner.bucket(20) == 64
    cache = KVCache.fork(KVCache.empty(GQA.kv_shape, 1, 13, model.norm.weight), 1, bench.slots)
    assert bench.ms(benchmark.step_of(model), cache, 13) == 3
    assert len(recorded) == 1 and clock.log.count("kernel") == 1 + 3 + 12


def test_sides_take_turns_and_the_warm_up_does_not_count():
    calls = []
    sides = [lambda name=name: calls.append(name) or len(calls) for name in "ab"]
    assert common.alternate(sides, 2, warm_up=1) == [(3, 5), (4, 6)] and calls == list("ababab")


@slow
def test_training_makes_a_checkpoint_that_generates(tmp_path, monkeypatch):
    """Of stories of random words, as many as the vocabulary needs. Eager: compiling takes longer than all else here."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    stories = (" ".join(rng.choices(words, k=150)) for _ in range(60))
    (tmp_path / "stories.txt").write_text("\n<|endoftext|>\n".join(stories), "utf-8")
    out = tmp_path / "model"
    result = run(
        "train_tiny.py", "train", "--corpus", tmp_path / "stories.txt", "--out", out, "--steps", 2, "--batch", 1
    )
    assert result.returncode == 0, result.stderr
    generated = warm.run("generate.py", "--checkpoint_path", out, "--prompt", "Once", "--quiet", cwd=ROOT)
    assert generated.returncode == 0, generated.stderr
