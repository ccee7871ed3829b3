"""README.md and docs/ are true. Oracle: their own commands and examples, run as they stand, and the files they name."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import warm
from conftest import FOLDERS, ROOT, slow
from torch.distributed.run import get_args_parser

import eval as evaluation
from cli.options import read_options

README = ROOT / "README.md"
PAGES = {path: path.read_text("utf-8") for path in (README, *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
BLOCKS = re.findall(r"```(bash|python)\n(.*?)```", TEXT, re.DOTALL)
EXAMPLES = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [
    line
    for language, code in BLOCKS
    for line in code.splitlines()
    if language == "bash" and line and not line.startswith("#")
]


def taken(*words: str) -> list[str]:
    """Take the commands that contain one of the words, of those that are left."""
    return [LEFT.pop(LEFT.index(line)) for line in COMMANDS if line in LEFT and any(word in line for word in words)]


LEFT = list(COMMANDS)
MAKE = taken("make ")
TORCHRUN = taken("torchrun")
FETCHED = taken("OWNER/NAME")
MANY = taken("PROMPTS.jsonl")
CONVERTED = taken("FOLDER", "checkpoints/NAME")
QUANTISED = taken("python quantize.py", "model_int8")
HEADS = taken("medusa")
HARNESS = taken("lm_eval", "--tasks")
EVALUATED = taken("python eval.py")
MEASURED = taken("cells.jsonl")
TWO_MODELS = taken("LARGE")
RUNS = taken("python generate.py")


@pytest.fixture
def checkout(tmp_path):
    """What a user has: the sources, in a folder of their own, so that nothing is written into the repository."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for name in (*FOLDERS, "scripts", "examples", "checkpoints"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def run(command: str, folder: Path, stdin: str = "") -> subprocess.CompletedProcess:
    """As a shell would; a python command, also one that is piped into, in a fork."""
    piped, _, last = command.rpartition(" | ")
    if piped:
        stdin = subprocess.run(piped, shell=True, capture_output=True, text=True, check=True).stdout
    program, *arguments = shlex.split(last)
    if program == "python" and arguments[0].endswith(".py"):
        return warm.run(*arguments, cwd=folder, input=stdin)
    command = command.replace("python ", f"{sys.executable} ", 1)
    return subprocess.run(command, shell=True, cwd=folder, input=stdin, capture_output=True, text=True, timeout=120)


def test_every_command_has_a_test():
    counts = [
        len(each) for each in (TORCHRUN, FETCHED, MANY, CONVERTED, QUANTISED, HEADS, HARNESS, EVALUATED, MEASURED)
    ]
    assert counts == [3, 5, 1, 2, 4, 2, 2, 3, 2] and not LEFT
    assert len(EXAMPLES) == 4 and len(RUNS) == 9 and len(TWO_MODELS) == 1
    assert [line.split("#")[0].split() for line in MAKE] == [["make", "generate"], ["make", "test"]]


def test_the_readme_is_short():
    assert len(PAGES[README].splitlines()) <= 150


def anchors(text: str) -> set[str]:
    """The links to a page's headings, as GitHub makes them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere():
    links = [(page, link) for page, text in PAGES.items() for link in re.findall(r"\]\(([^)\s]+)\)", text)]
    inside = [(page, *link.partition("#")[::2]) for page, link in links if not link.startswith("https://")]
    assert len(inside) > 30
    for page, name, anchor in inside:
        target = (page.parent / name).resolve() if name else page
        assert target.exists() and (not anchor or anchor in anchors(target.read_text("utf-8"))), (page, name, anchor)


def test_every_page_and_file_is_in_the_readme():
    readme = PAGES[README]
    assert all(f"docs/{page.name}" in readme for page in PAGES if page != README)
    named = set(re.findall(r"\w+", readme))
    sources = [path for folder in (".", *FOLDERS) for path in (ROOT / folder).glob("*.py")]
    assert not [path.name for path in sources if path.stem not in named and path.name != "__init__.py"]


def test_the_first_block_is_what_its_command_prints():
    """In fp32, which the command names, so that it is the same on every CPU; except where lines are broken."""
    command, printed = re.findall(r"```\n\$ (python .*?)\n(.*?)```", TEXT, re.DOTALL)[0]
    result = run(command, ROOT)
    assert "--dtype float32" in command and result.stdout.split() == printed.split(), result.stderr


def test_the_two_commands_are_targets_of_the_makefile():
    """`make generate` is what CI and a new user run; here its last line is run, without the set-up."""
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert all(re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE) for line in MAKE)
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
    (line,) = MANY
    for words in ("2 prompts, 2 samples of each", "every prompt is done"):
        result = run(line.replace("-n 16", "-n 2 --max_new_tokens 9"), checkout)
        assert result.returncode == 0 and words in result.stderr, result.stderr
    header, *lines = map(json.loads, (checkout / "samples.jsonl").read_text().splitlines())
    assert "header" in header and sum(line["count"] for line in lines) == 4


def test_several_processes(checkout):
    """Two draw what one draws. The other commands, whose runs are in test_tp.py, have flags that exist."""
    whole = [get_args_parser().parse_args(shlex.split(line)[1:]) for line in TORCHRUN]
    assert [(each.nnodes, each.nproc_per_node, each.standalone) for each in whole] == [
        ("1:1", "2", True),
        ("1:1", "4", True),
        ("2", "8", False),
    ]
    assert all(each.training_script == "generate.py" for each in whole)
    assert [read_options(each.training_script_args).tp for each in whole] == [None, 2, None]
    more = " --seed 1 --max_new_tokens 20 --dtype float32 --no-compile"
    result = run(TORCHRUN[0].replace("torchrun", "python -m torch.distributed.run") + more, checkout)
    assert result.returncode == 0, result.stderr
    flags = TORCHRUN[0].partition("generate.py")[2]
    assert result.stdout == run(f"python generate.py {flags}{more}", checkout).stdout


def test_a_draft_model():
    """That such a run works is tested in test_speculate.py; here that its flags exist."""
    options = read_options(shlex.split(TWO_MODELS[0])[2:])
    assert (options.checkpoint_path, options.draft_checkpoint_path) == ("LARGE", "SMALL")


def test_quantising(checkout):
    """As it stands, with a text of a few hundred words."""
    (checkout / "TEXT").write_text(
        "Once upon a time there was a cat. The cat sat on a red mat and saw a big dog. " * 60
    )
    for line in QUANTISED:
        result = run(line, checkout)
        assert result.returncode == 0, result.stderr
        assert "int8 weights" in result.stderr or "quantize.py" in line
    made = {path.name for path in (checkout / "checkpoints" / "tiny").glob("model_*")}
    assert made == {"model_int8.pth", "model_int4.g64.pth", "model_int4-gptq.g32.pth"}


def test_heads_that_are_trained_propose(checkout):
    """As it stands, for two steps of training."""
    (checkout / "TEXT").write_text("Once upon a time there was a cat. The cat sat on a red mat. " * 40)
    train, draw = HEADS
    assert run(f"{train} --steps 2", checkout).returncode == 0
    result = run(f"{draw} --max_new_tokens 20", checkout)
    assert result.returncode == 0, result.stderr
    assert "draft medusa" in result.stderr


def test_tasks_of_the_harness():
    """That they run is tested in test_eval.py; here that the package is the one tested with, and the flags exist."""
    install, tasks = HARNESS
    assert install.split()[-1] in re.findall(r"^\w+", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    options = evaluation.build_parser().parse_args(shlex.split(tasks)[2:])
    assert evaluation.check_options(options)[0] == "tasks" and options.tasks == ["hellaswag", "winogrande"]


def test_evaluating(checkout):
    """As it stands, with a text and problems of a few words."""
    (checkout / "TEXT").write_text("Once upon a time there was a cat. " * 20)
    (checkout / "PROBLEMS").write_text('{"task_id": "A", "prompt": "Once upon a time"}\n')
    for line in EVALUATED:
        result = run(line.replace("-n 20", "-n 11 --max_new_tokens 5"), checkout)
        assert result.returncode == 0, result.stderr
        if "--samples" in line:  # what the scorer does
            samples = (checkout / "samples.jsonl").read_text().replace('"count"', '"passed": true, "count"')
            (checkout / "samples.jsonl_results.jsonl").write_text(samples)
    assert "pass@10  1.0000" in result.stdout


@pytest.mark.parametrize("code", EXAMPLES, ids=["readme", "engine", "many prompts", "attention alone"])
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
    for line in CONVERTED:
        command = line.replace("FOLDER", str(published)).replace("NAME", "stories").replace('"..."', '"The cat"')
        result = run(command.replace("-n 8", "-n 2 --max_new_tokens 9"), checkout)
        assert result.returncode == 0, result.stderr
    assert "[1] mean log-probability" in result.stdout


@pytest.mark.parametrize("command", [FETCHED[0], *(pytest.param(each, marks=slow) for each in FETCHED[1:])])
def test_fetching_without_a_network_is_one_line(command, checkout, monkeypatch):
    """Check that the commands exist with these arguments; test_download.py tests their work with a hub."""
    (checkout / "TEXT").write_text("Once upon a time there was a cat.")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PYTHON", sys.executable)
    result = run(command, checkout)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_charts_are_drawn_of_measured_cells(checkout):
    """The command that measures is run in test_scripts.py."""
    measure, draw = MEASURED
    cell = {"shape": "tiny", "context": 33, "column": "bifurcated", "ms": 2.0, "limit_ms": 1.0}
    cells = [json.dumps(cell | {"num_samples": rows}) for rows in (1, 3)]
    (checkout / "cells.jsonl").write_text("\n".join(cells))
    result = run(draw, checkout)
    assert measure.startswith("python scripts/benchmark.py") and result.returncode == 0, result.stderr
    assert [path.name for path in (checkout / "docs" / "charts").iterdir()] == ["tiny-num_samples.png"]


def flags_of_help(printed: str) -> list[set[str]]:
    """The flags of each group of an argument parser's help, without --help."""
    groups = re.split(r"^\S.*:$", printed.partition("\n\n")[2], flags=re.MULTILINE)[1:]
    lines = [re.findall(r"^  (-.*?)(?:  |$)", group, re.MULTILINE) for group in groups]
    found = [
        {flag for line in group for flag in re.findall(r"(?<!\S)-[\w-]+", line)} - {"-h", "--help"} for group in lines
    ]
    return [group for group in found if group]


@pytest.mark.parametrize("program", ["generate.py", "eval.py", "quantize.py"])
def test_the_flags_of_a_command_are_listed_by_group(program):
    section = PAGES[ROOT / "docs" / "cli.md"].partition(f"\n## {program}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"^\| flag \|.*\n\|---.*\n((?:\|.*\n)+)", section, re.MULTILINE)
    cells = [re.findall(r"^\| (.*?) \|", table, re.MULTILINE) for table in tables]
    listed = [{flag for cell in table for flag in re.findall(r"`(-[\w-]+)", cell)} for table in cells]
    assert listed and listed == flags_of_help(run(f"python {program} --help", ROOT).stdout)


def test_every_flag_exists():
    """Of the three commands as they list them, of scripts as their sources name them, and of torchrun."""
    helps = "".join(run(f"python {name}.py --help", ROOT).stdout for name in ("generate", "quantize", "eval"))
    sources = "".join(
        path.read_text("utf-8") for name in ("scripts", "examples") for path in (ROOT / name).glob("*.py")
    )
    known = set(re.findall(r"--[a-z][a-z_-]*[a-z]", helps + get_args_parser().format_help().replace("-per-", "_per_")))
    known |= set(re.findall(r'"(--[a-z][a-z_-]*[a-z])"', sources))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", TEXT)) <= known
