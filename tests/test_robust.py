"""Whatever goes wrong: one line on stderr that names the value and the remedy, exit status 2 (130 where the user
stopped it), nothing on stdout but samples, nothing overwritten. Oracle: exit status, both streams and the files, by
`main` in this process; what needs a signal, a terminal or a closed stream is a process of its own."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, interruptible
from test_cli import PROMPT, assert_refused, run

import eval as evaluate
import generate
from system import finish, start

SHORT = [*PROMPT, "--max_new_tokens", 9]


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the shipped model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change(model: Path, name: str, factor: float) -> None:
    """Multiplies a tensor of the model."""
    state = torch.load(model / "model.pth")
    state[name] = (state[name].float() * factor).to(state[name].dtype)
    torch.save(state, model / "model.pth")


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0],
        ["-n", 3],
        ["-n", 3, "--top_k", 0, "--top_p", 0.9, "--min_p", 0.1],
        ["-n", 3, "--draft", "prompt"],
        ["-n", 3, "--draft", "layers:2", "--temperature", 0],
        ["-n", 3, "--kv_dtype", "int8"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model, flags, factor):
    change(model, "layers.1.ffn_norm.weight", factor)
    assert_refused(run(*SHORT, *flags, "--checkpoint_path", model), "model.pth in float32: the logits are not finite")


def test_an_overflow_is_told_and_another_dtype_mends_it(model):
    """Some logits are infinite, the others fit: the text that comes of it would look like any other."""
    change(model, "norm.weight", 3e4)
    base = [*SHORT, "-n", 3, "--temperature", 0, "--checkpoint_path", model, "--dtype"]
    assert_refused(run(*base, "float16"), "give --dtype bfloat16 or float32")
    assert run(*base, "float32").returncode == 0


def forked(*arguments, prepare: Callable[[], object] = lambda: None, stdin: str = "") -> tuple[int, str, str]:
    """The command in a fork of this process, which has torch already: its status, stdout and stderr. prepare: runs
    before the command starts."""
    with (
        tempfile.TemporaryFile("w+") as typed,
        tempfile.TemporaryFile("w+") as out,
        tempfile.TemporaryFile("w+") as err,
    ):
        typed.write(stdin)
        typed.seek(0)
        if not (child := os.fork()):
            for place, file in enumerate((typed, out, err)):
                os.dup2(file.fileno(), place)
            become_command(arguments, prepare)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return status, *(file.seek(0) or file.read() for file in (out, err))


def become_command(arguments: Sequence[object], prepare: Callable[[], object]) -> NoReturn:
    """What a fork does, whose descriptors 0, 1 and 2 are the command's: as Python and `python generate.py` would."""
    status = 99
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)
        prepare()
        start()
        finish(partial(generate.main, [str(each) for each in arguments]))
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def close(place: int) -> None:
    """As ">&-" does."""
    os.close(place)
    setattr(sys, ("stdin", "stdout", "stderr")[place], None)


def fill(place: int) -> None:
    """As ">/dev/full" does."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), place)


@pytest.mark.parametrize("spoil", [close, fill])
@pytest.mark.parametrize("n", [1, 3])
def test_what_stderr_cannot_take_is_lost_and_nothing_else(tmp_path, spoil, n):
    base = [*SHORT, "-n", n, "--report", tmp_path / "r.json", "--verbose"]
    status, out, err = forked(*base, prepare=partial(spoil, 2))
    assert (status, err) == (0, "") and out == run(*base).stdout
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 1
    assert forked(*SHORT, "-n", 0, prepare=partial(spoil, 2)) == (2, "", "")
    assert forked(*SHORT, "--temperature", "x" * 400, prepare=partial(spoil, 2)) == (2, "", "")


@pytest.mark.parametrize("n", [1, 3])
def test_a_stdout_that_is_full_is_named(n):
    status, _, err = forked(*SHORT, "-n", n, "--quiet", prepare=partial(fill, 1))
    assert status == 2 and err == (
        "error: stdout cannot be written (No space left on device): make room, or send it elsewhere\n"
    )


def test_without_any_stream_a_file_is_none_of_them(tmp_path):
    """The first file opened would be the new stderr, and what is told there would stand in it."""
    report = tmp_path / "r.json"
    status, *_ = forked(*SHORT, "--report", report, prepare=lambda: [close(place) for place in range(3)])
    assert status == 0 and json.loads(report.read_text())["seed"] == 1


def limit_files() -> None:
    """A disk that is full, as it looks to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


@pytest.mark.parametrize("flag", ["--report", "--profile"])
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, flag):
    path = tmp_path / "there" / "file.json"
    path.parent.mkdir()
    path.write_text("precious")
    status, out, err = forked(*SHORT, "--quiet", flag, path, prepare=limit_files)
    assert status == 2 and out
    assert re.fullmatch(rf"error: {path} cannot be written \(.*\): make room, or give another file\n", err), err
    assert path.read_text() == "precious" and [path] == list(path.parent.iterdir())


@pytest.mark.parametrize("flag", ["--report", "--profile"])
@pytest.mark.parametrize("kind", ["fifo", "device", "circle", "long", "folder", "link to a folder that is not there"])
def test_an_output_that_is_no_file_is_refused_before_the_run(tmp_path, flag, kind):
    path = tmp_path / "out"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/full")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "long":
        path = tmp_path / ("x" * 300)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "none" / "file")
    with mock.patch("generate.load_model", side_effect=AssertionError("it runs")):
        result = run(*SHORT, flag, path)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert "cannot be written: give a plain file in a folder that exists" in result.stderr and len(result.stderr) <= 301


def test_an_output_may_be_a_link_to_a_file_and_stays_one(tmp_path):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    old.write_text("{}")
    for target in (old, new):
        link = tmp_path / f"to-{target.name}"
        link.symlink_to(target)
        assert run(*SHORT, "--report", link).returncode == 0
        assert link.is_symlink() and json.loads(target.read_text())["seed"] == 1


def test_what_the_run_reads_is_not_replaced_under_any_name(model, tmp_path):
    """A model as the hub's cache holds it, all links; another name of a file is a link to it, or a hard link."""
    blobs, prompt, heads = tmp_path / "blobs", tmp_path / "prompt.txt", tmp_path / "heads.pt"
    blobs.mkdir()
    for path in list(model.iterdir()):
        path.rename(blobs / path.name)
        path.symlink_to(blobs / path.name)
    prompt.write_text("Once")
    heads.write_text("heads")
    small = Path(shutil.copytree(TINY, tmp_path / "small"))
    base = ["--checkpoint_path", model / "model.pth", "--prompt_file", prompt, "--max_new_tokens", 3]
    drafts = {small / "model.pth": ["--draft_checkpoint_path", small], heads: ["--draft", "medusa", heads]}
    for read in (prompt, blobs / "model.pth", blobs / "tokenizer.model", *drafts):
        before = read.read_bytes()
        for name, link in (("soft", os.symlink), ("hard", os.link)):
            link(read, tmp_path / name)
            for flag in ("--report", "--profile"):
                result = run(*base, *drafts.get(read, []), flag, tmp_path / name)
                assert_refused(result, f"{name} is the prompt, or lies with the model: it would be replaced")
            os.remove(tmp_path / name)
        assert read.read_bytes() == before
    with mock.patch.object(sys, "argv", ["eval.py"]):
        os.link(prompt, tmp_path / "hard")
        assert evaluate.main(["--perplexity", str(prompt), "--output", str(tmp_path / "hard"), "--quiet"]) == 2
    assert prompt.read_text() == "Once"


COMMANDS = ["generate.py", "eval.py", "quantize.py", "mixtral-moe/memory.py"]
COMMANDS += [f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py"))]


def test_ctrl_c_while_a_command_imports_ends_it_without_a_traceback(tmp_path):
    """In place of what takes seconds to import stands a module that is interrupted as a user would do it."""
    for name in ("torch", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in COMMANDS:
        if command == "scripts/download.py":  # which imports nothing that takes seconds
            continue
        result = subprocess.run(
            [sys.executable, ROOT / command, "--help"],
            capture_output=True, text=True, env=environment, preexec_fn=interruptible, timeout=60,
        )  # fmt: skip
        assert (result.returncode, result.stdout, result.stderr) == (130, "", ""), command
