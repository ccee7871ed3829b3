"""scripts/gpu_check.sh, dry: its commands, at tiny sizes on the CPU. Oracle: its own logs; arithmetic by hand."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import warm
from conftest import ROOT, slow

SCRIPT = ROOT / "scripts" / "gpu_check.sh"
NAMES = ["versions", "test_cuda", "runs", "layer", "layers-1", "layers-2", "extrapolated", "gpt-fast"]


def dry_run(folder: Path, python: object, more: Mapping[str, str]) -> subprocess.CompletedProcess:
    env = {**os.environ, "GPU_CHECK_DRY": "1", "PYTHON": str(python), **more}
    return subprocess.run(["bash", SCRIPT, folder], env=env, capture_output=True, text=True, timeout=300)


def test_the_steps_end_within_ten_minutes():
    """All of them at their limits, that of the loop twice."""
    assert subprocess.run(["bash", "-n", SCRIPT]).returncode == 0
    seconds = [int(found) for found in re.findall(r"step \S+ (\d+) ", SCRIPT.read_text("utf-8"))]
    seconds += [int(found) for found in re.findall(r'step "layers-\$count" (\d+) ', SCRIPT.read_text("utf-8"))]
    assert len(seconds) == len(NAMES) + 1 and sum(seconds) <= 600


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    """A stand-in for Python that notes what it is asked to run, and fails one."""
    stub = tmp_path / "python"
    stub.write_text('#!/bin/sh\necho "$@" >>"$NOTES"\ncase "$*" in *" runs "*) exit 3;; esac\n')
    stub.chmod(0o755)
    result = dry_run(tmp_path / "out", stub, {"NOTES": str(tmp_path / "notes")})
    notes = (tmp_path / "notes").read_text().splitlines()
    found = re.findall(r"^(\S+): exit status (\d+)", result.stdout, re.MULTILINE)
    found = [each for each in found if each[0] != "test_triton"]
    assert found == [(name, "3" if name == "runs" else "0") for name in NAMES] and result.returncode == 1
    assert len(notes) >= len(NAMES) and all("--device cpu" in note for note in notes if "benchmark.py" in note)
    assert (tmp_path / "out" / "runs.log").read_text() == "exit status 3\n"


def test_layers_are_extrapolated_and_their_kernels_profiled(tmp_path):
    """28 more layers at 0.25 ms each; a cell without a time has none. Its other commands on the CPU, eager."""
    for number, times in ((4, (2.0, None)), (12, (4.0, 9.0))):
        cells = [
            {"context": 33, "num_samples": n, "ms": ms, "note": "" if ms else "none"}
            for n, ms in zip((1, 3), times, strict=True)
        ]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    files = [tmp_path / "4.jsonl", tmp_path / "12.jsonl"]
    result = warm.run(ROOT / "scripts" / "gpu_check.py", "extrapolate", *files, "--layers", 4, 12, cwd=ROOT)
    assert "| 33 | 1 | 2.00 | 4.00 | 9.00 |" in result.stdout and "| 33 | 3 | none | 9.00 | - |" in result.stdout
    small = ["--device", "cpu", "--shape", "tiny", "--context", 33, "-n", 1, 3]
    command = warm.Command(
        ROOT / "scripts" / "gpu_check.py", "layer", *small, cwd=ROOT, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    )
    result = command.end()
    assert result.returncode == 0, result.stderr
    assert set(re.findall(r"^\| (\d+) \| all \| [\d.]+ \| [\d.]+ \|$", result.stdout, re.MULTILINE)) == {"3", "9"}


@slow
def test_every_step_runs_on_the_cpu(tmp_path):
    """With torch alone: what reads files and texts is not there."""
    names = '("safetensors", "sentencepiece", "tokenizers", "tiktoken", "huggingface_hub", "transformers")'
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({names}))\n")
    result = dry_run(tmp_path / "out", sys.executable, {"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 0, result.stdout
    rows = re.findall(
        r"^\| (int8|longrope|100 new tokens) \|", (tmp_path / "out" / "runs.log").read_text(), re.MULTILINE
    )
    assert len(rows) == 12
    assert [
        len((tmp_path / "out" / name).read_text().splitlines()) for name in ("cells-1.jsonl", "gpt-fast.jsonl")
    ] == [2, 3]
