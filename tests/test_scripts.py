"""The scripts, run as their users run them, at sizes that take seconds. Oracle: their output; the engine itself."""

import json
import random
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
import warm
from conftest import ROOT, TINY, slow

import benchmark
import common

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
    assert refused.returncode == 2 and refused.stderr.startswith("error: no checkpoint at")


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
