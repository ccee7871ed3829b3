"""The scripts, run as their users run them, at sizes that take seconds. Oracle: their output; the engine itself."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED

BENCHMARKS = (ROOT / "BENCHMARKS.md").read_text("utf-8")
SMALL = ["--shape", "tiny", "--set", "n_layer=1", "--context", "33", "-n", "1", "3", "--steps", "2"]


def run(script: str, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_benchmark_of_every_eager_column(tmp_path):
    columns = ["bifurcated", "contiguous", "contiguous SDPA", "expanded SDPA"]
    result = run("benchmark.py", *SMALL, "--columns", *columns, "--out", tmp_path / "cells.jsonl")
    assert result.returncode == 0, result.stderr
    cells = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(cells) == 8 and all(cell["ms"] > 0 for cell in cells)
    assert len(re.findall(r"^\| 33 \| [13] \|", result.stdout, re.MULTILINE)) == 2


def test_commands_of_the_benchmarks_are_accepted():
    """The command of the tables with smaller sizes: the last value of a flag counts."""
    commands = re.findall(r"^`python scripts/(benchmark\.py) (.*)`$", BENCHMARKS, re.MULTILINE)
    assert commands
    for script, arguments in commands:
        names = re.findall(r"'([^']+)'|(\S+)", arguments)
        result = run(script, *[quoted or plain for quoted, plain in names], *SMALL, "--columns", "bifurcated")
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("arguments", [["--set", "nonsense=3"], ["--steps", "0"], ["-n", "0"], ["--device", "cuda:99"]])
def test_benchmark_refuses_bad_input_in_one_line(arguments):
    result = run("benchmark.py", *SMALL, *arguments)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_conversion_refuses_bad_input_in_one_line(tmp_path):
    result = run("convert_hf_checkpoint.py", "--checkpoint_dir", tmp_path / "nothing")
    assert result.returncode == 2 and result.stderr.startswith("error: no checkpoint at")


@pytest.mark.skipif(not SHARED.exists(), reason="the text is not beside the repository")
def test_training_makes_a_checkpoint_that_generates(tmp_path):
    text = (SHARED / "text" / "tinystories_sample.txt").read_text("utf-8").replace("\n\nO", "\n<|endoftext|>\nO")
    (tmp_path / "stories.txt").write_text(text, "utf-8")
    out = tmp_path / "model"
    result = run(
        "train_tiny.py", "train", "--corpus", tmp_path / "stories.txt", "--out", out, "--steps", 3, "--batch", 2
    )
    assert result.returncode == 0, result.stderr
    generated = subprocess.run(
        [sys.executable, str(ROOT / "generate.py"), "--checkpoint_path", str(out), "--prompt", "Once", "--quiet"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert generated.returncode == 0, generated.stderr
