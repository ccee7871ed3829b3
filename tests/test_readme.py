"""README.md is true. Oracle: its own commands and examples, run as they stand."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import warm
from conftest import FOLDERS, ROOT

TEXT = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)
EXAMPLES = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines()]
MAKE = [line.split("#")[0].split() for line in COMMANDS if line.startswith("make")]
NETWORKED = [
    "scripts/prepare.sh",
    "python scripts/download.py",
    "python generate.py",
    "python examples/transformers_shared.py",
]
OTHERS = ("NAME", "model_int8", "SMALL", "medusa", "PROMPTS")
RUNS = [line for line in COMMANDS if "python generate.py" in line and not any(each in line for each in OTHERS)]


@pytest.fixture
def checkout(tmp_path):
    """What a user has: the sources, in a folder of their own, so that nothing is written into the repository."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in (*FOLDERS, "scripts", "examples", "checkpoints"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(command: str, folder, stdin: str = "") -> subprocess.CompletedProcess:
    """As a shell would; a single python command in a fork."""
    program, *arguments = shlex.split(command)
    if program == "python" and arguments[0].endswith(".py") and "|" not in arguments:
        return warm.run(*arguments, cwd=folder, input=stdin)
    command = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(command, shell=True, cwd=folder, input=stdin, capture_output=True, text=True, timeout=120)


def test_the_readme_has_what_is_tested_here():
    assert len(EXAMPLES) == 2 and len(RUNS) == 9 and MAKE == [["make", "generate"], ["make", "test"]]


def test_the_first_block_is_what_its_command_prints():
    """In fp32, which the command names, so that it is the same on every CPU; but for where lines are broken."""
    command, printed = re.findall(r"```\n\$ (python .*?)\n(.*?)```", TEXT, re.DOTALL)[0]
    result = run(command, ROOT)
    assert "--dtype float32" in command and result.stdout.split() == printed.split(), result.stderr


def test_the_two_commands_are_targets_of_the_makefile():
    """`make generate` is what CI and a new user run; here its last line is run, without the set-up."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for _, target in MAKE)
    (command,) = re.findall(r"^\t\.venv/bin/(python generate\.py .*)$", makefile, re.MULTILINE)
    result = run(command, ROOT)
    assert result.returncode == 0, result.stderr
    assert re.findall(r"^\[(\d)\]", result.stdout, re.MULTILINE) == ["1", "2", "3", "4"]


@pytest.mark.parametrize("command", RUNS)
def test_commands(command, checkout):
    result = run(command, checkout, stdin="Once upon a time\n2\n" if "--interactive" in command else "")
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_many_prompts_from_a_file(checkout):
    """As it stands, twice: the second time every prompt is done."""
    (checkout / "PROMPTS.jsonl").write_text('{"id": "A", "prompt": "Once upon a time"}\n"The cat"\n')
    (line,) = [line for line in COMMANDS if "PROMPTS" in line]
    for words in ("2 prompts, 2 samples of each", "every prompt is done"):
        result = run(line.replace("-n 16", "-n 2 --max_new_tokens 9"), checkout)
        assert result.returncode == 0 and words in result.stderr, result.stderr
    header, *lines = map(json.loads, (checkout / "samples.jsonl").read_text().splitlines())
    assert "header" in header and sum(line["count"] for line in lines) == 4


def test_several_processes(checkout):
    """Text equal to one process's; two machines are tested in test_tp.py."""
    lines = [line for line in COMMANDS if line.startswith("torchrun")]
    assert len(lines) == 3 and "--nnodes=2" in lines[2]
    for line in lines[:2]:
        more = " --seed 1 --max_new_tokens 20 --dtype float32"
        result = run(line.replace("torchrun", "python -m torch.distributed.run") + more, checkout)
        assert result.returncode == 0, result.stderr
        flags = line.partition("generate.py")[2].replace("--tp 2", "")
        assert result.stdout == run(f"python generate.py {flags}{more}", checkout).stdout


def test_quantising(checkout):
    """As it stands, with a text of a few hundred words."""
    (checkout / "TEXT").write_text(
        "Once upon a time there was a cat. The cat sat on a red mat and saw a big dog. " * 60
    )
    lines = [line for line in COMMANDS if line.startswith("python quantize.py") or "model_int8" in line]
    assert len(lines) == 4
    for line in lines:
        result = run(line, checkout)
        assert result.returncode == 0, result.stderr
    assert "int8 weights" in result.stderr
    made = {path.name for path in (checkout / "checkpoints" / "tiny").glob("model_*")}
    assert made == {"model_int8.pth", "model_int4.g64.pth", "model_int4-gptq.g32.pth"}


def test_heads_that_are_trained_propose(checkout):
    """As it stands, for two steps of training."""
    (checkout / "TEXT").write_text("Once upon a time there was a cat. The cat sat on a red mat. " * 40)
    train, draw = [line for line in COMMANDS if "medusa" in line]
    assert run(f"{train} --steps 2", checkout).returncode == 0
    result = run(f"{draw} --max_new_tokens 20", checkout)
    assert result.returncode == 0, result.stderr
    assert "draft medusa" in result.stderr


def test_evaluating(checkout):
    """As it stands, but for the tasks (test_eval.py), with a text and problems of a few words."""
    (checkout / "TEXT").write_text("Once upon a time there was a cat. " * 20)
    (checkout / "PROBLEMS").write_text('{"task_id": "A", "prompt": "Once upon a time"}\n')
    lines = [line for line in COMMANDS if line.startswith("python eval.py") and "--tasks" not in line]
    assert len(lines) == 3
    for line in lines:
        result = run(line.replace("-n 20", "-n 11 --max_new_tokens 5"), checkout)
        assert result.returncode == 0, result.stderr
        if "--samples" in line:  # what the scorer does
            samples = (checkout / "samples.jsonl").read_text().replace('"count"', '"passed": true, "count"')
            (checkout / "samples.jsonl_results.jsonl").write_text(samples)
    assert "pass@10  1.0000" in result.stdout


@pytest.mark.parametrize("code", EXAMPLES, ids=["engine", "attention alone"])
def test_python_examples(code, checkout):
    if "from bifurcated_attention" in code:  # needs torch and nothing else
        for path in checkout.glob("*.py"):
            if path.name != "bifurcated_attention.py":
                path.unlink()
        for folder in FOLDERS:
            shutil.rmtree(checkout / folder)
    (checkout / "example.py").write_text(code, "utf-8")
    result = run("python example.py", checkout)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


@pytest.mark.parametrize("published", ["tiny"], indirect=True)
def test_converting_and_running_another_model(published, checkout):
    """Also with --chat: its tokenizer.model has no template beside it, so Llama 2's form applies."""
    lines = [line for line in COMMANDS if "FOLDER" in line or "checkpoints/NAME --chat" in line]
    assert len(lines) == 2
    for line in lines:
        command = line.replace("FOLDER", str(published)).replace("NAME", "stories").replace('"..."', '"The cat"')
        result = run(command.replace("-n 8", "-n 2 --max_new_tokens 9"), checkout)
        assert result.returncode == 0, result.stderr
    assert "[1] mean log-probability" in result.stdout


@pytest.mark.parametrize("script", NETWORKED)
def test_fetching_without_a_network_is_one_line(script, checkout, monkeypatch):
    """What they do with a hub is tested in test_download.py; here that they are there, under the names given."""
    line = next(line for line in COMMANDS if line.startswith(script) and "OWNER/NAME" in line)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHON", sys.executable)
    result = run(line, checkout)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_the_commands_of_the_benchmark(checkout):
    measured, drawn = [line for line in COMMANDS if "cells.jsonl" in line]
    small = " --shape tiny --set n_layer=1 --context 33 50 -n 1 3 --steps 2 --columns bifurcated"
    for line in (measured + small, drawn):
        result = run(line, checkout)
        assert result.returncode == 0, result.stderr
    assert list((checkout / "charts").glob("*.png"))


def test_every_flag_of_the_readme_exists_and_every_flag_is_in_it():
    listed = "".join(run(f"python {name}.py --help", ROOT).stdout for name in ("generate", "quantize", "eval"))
    of_scripts = {"--checkpoint_dir", "--out", "--help", "--preset", "--cells", "--model", "--text"}
    of_torchrun = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv_backend", "--rdzv_endpoint"}
    mentioned = set(re.findall(r"--[a-z][a-z_-]*[a-z]", TEXT)) - of_scripts - of_torchrun
    known = set(re.findall(r"--[a-z][a-z_-]*[a-z]", listed))
    assert mentioned <= known
    assert known - mentioned <= {"--help", "--num_samples", "--parallel_samples"}
