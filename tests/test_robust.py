"""Whatever goes wrong: one line on stderr that names the value and the remedy, exit status 2 (130 where the user
stopped it), nothing on stdout but samples, nothing overwritten. Oracle: exit status, both streams and the files, by
`main` in this process; what needs a signal, a terminal or a closed stream is a process of its own."""

import base64
import copy
import gzip
import io
import json
import os
import pickle
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NoReturn
from unittest import mock

import pytest
import torch
from conftest import ROOT, SOURCES, TINY, Letters, both_kinds, interruptible
from test_cli import PROMPT, assert_refused, lines_of, run
from test_tokenizer import byte_level
from tqdm import tqdm

import eval as evaluate
import generate
import quantize
from cli.console import Console
from cli.options import build_parser
from cli.repl import COMMANDS as COMMANDS_OF_TALK
from cli.system import SafeStderr, cache_folder, finish, start
from engine import decoding
from engine.engine import Engine
from engine.request import Request
from engine.samples import Row, StopConditions
from loading.checkpoint import read_checkpoint
from loading.tokenizer import Guarded

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
@both_kinds
def test_logits_that_are_not_finite_are_an_error(model, flags, factor, bf16):
    change(model, "layers.1.ffn_norm.weight", factor)
    dtype = "bfloat16" if bf16 else "float32"
    assert_refused(run(*SHORT, *flags, "--checkpoint_path", model), f"model.pth in {dtype}: the logits are not finite")


def test_an_overflow_is_told_and_another_dtype_mends_it(model):
    """Some logits are infinite, the others fit: the text that comes of it would look like any other."""
    change(model, "norm.weight", 3e4)
    base = [*SHORT, "-n", 3, "--temperature", 0, "--checkpoint_path", model, "--dtype"]
    assert_refused(run(*base, "float16"), "pass --dtype bfloat16 or float32")
    assert run(*base, "float32").returncode == 0


def forked(
    *arguments, prepare: Callable[[], object] = lambda: None, stdin: str = "", encoding: str = "utf-8"
) -> tuple[int, str, str]:
    """The command in a fork of this process, which has torch already: its status, stdout, of that encoding, and stderr.
    prepare: runs before the command starts."""
    with (
        tempfile.TemporaryFile("w+") as typed,
        tempfile.TemporaryFile("w+", encoding=encoding) as out,
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
    signal.alarm(60)  # rather than hang
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
        "error: stdout cannot be written (No space left on device): free up disk space, or redirect it elsewhere\n"
    )


def spoil_stdout(spoil: Callable[[int], object], buffered: bool) -> None:
    """Not buffered, as by PYTHONUNBUFFERED, what cannot be written fails where it is printed."""
    spoil(1)
    sys.__stdout__ = sys.stdout  # kept: closed, it would close the descriptor
    layer = open(1, "wb", -1 if buffered else 0)
    sys.stdout = io.TextIOWrapper(layer, encoding="utf-8", write_through=not buffered)


def leave_pipe(place: int) -> None:
    """As "| head -0" does."""
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, place)


@pytest.mark.parametrize("spoil", [fill, leave_pipe])
@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "flags",
    [[], ["-n", 3], ["-n", 3, "--format", "jsonl", "--unranked"], ["--prompts"]],
    ids=lambda flags: " ".join(map(str, flags)) or "live",
)
def test_a_report_is_written_where_stdout_takes_nothing(tmp_path, spoil, buffered, flags):
    prompts, report = tmp_path / "prompts", tmp_path / "r.json"
    prompts.write_text('"Once"\n"The cat"\n')
    asked = [*flags, prompts, *SHORT[2:]] if flags == ["--prompts"] else [*flags, *SHORT]
    prepare = partial(spoil_stdout, spoil, buffered)
    status, _, err = forked(*asked, "--report", report, "--quiet", prepare=prepare)
    assert status == (2 if spoil is fill else 0) and err.count("\n") == (spoil is fill)
    assert json.loads(report.read_text())["seed"] == 1


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_characters_that_stdout_lacks_are_escaped(tmp_path, encoding):
    """Oracle: the same on a stdout of UTF-8; each character that is not in the encoding as JSON spells it."""
    base = [*SHORT[2:], "--dtype", "float32", "--quiet"]
    said = 'Zo\u00eb saw \u2603 and \U0001f642 \u4e00"'
    (tmp_path / "prompts").write_text(json.dumps({"id": said, "prompt": said}) + "\n")

    def narrow() -> None:
        sys.stdout.reconfigure(encoding=encoding)

    def fits(character: str) -> bool:
        return character.encode(encoding, "ignore") != b""

    for flags in (
        ["--prompt", said, "-n", 3, "--echo"],
        ["--prompt", said, "--echo"],
        ["--prompts", tmp_path / "prompts"],
    ):
        expected = run(*base, *flags).stdout
        assert said in expected or json.dumps(said, ensure_ascii=False) in expected
        spelled = "".join(each if fits(each) else json.dumps(each)[1:-1] for each in expected)
        status, out, err = forked(*base, *flags, prepare=narrow, encoding=encoding)
        assert (status, out, err) == (0, spelled, "")
        if "--prompts" in flags:
            assert json.loads(out) == json.loads(expected)


def test_without_any_stream_a_file_is_none_of_them(tmp_path):
    """The first file opened would be the new stderr, and what is told there would stand in it."""
    report = tmp_path / "r.json"
    status, *_ = forked(*SHORT, "--report", report, prepare=lambda: [close(place) for place in range(3)])
    assert status == 0 and json.loads(report.read_text())["seed"] == 1


def limit_files() -> None:
    """A disk that is full, as it looks to a program."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


@pytest.mark.parametrize(
    "flag,name", [("--report", "file.json"), ("--profile", "file.json"), ("--profile", "file.json.gz")]
)
def test_a_full_disk_is_told_and_leaves_what_was_there(tmp_path, flag, name):
    path = tmp_path / "there" / name
    path.parent.mkdir()
    path.write_text("precious")
    status, out, err = forked(*SHORT, "--quiet", flag, path, prepare=limit_files)
    assert status == 2 and out
    assert re.fullmatch(
        rf"error: {path} cannot be written \(.*\): free up disk space, or choose another file\n", err
    ), err
    assert path.read_text() == "precious" and [path] == list(path.parent.iterdir())


def test_a_profile_is_a_trace_also_where_it_is_packed(tmp_path):
    for name, read in (("a.json", open), ("b.json.gz", gzip.open)):
        assert run(*SHORT, "--quiet", "--profile", tmp_path / name).returncode == 0
        with read(tmp_path / name, "rt") as file:
            assert any(event["name"] == "aten::mm" for event in json.load(file)["traceEvents"])
    assert len(list(tmp_path.iterdir())) == 2


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
    with mock.patch("generate.load_joined", side_effect=AssertionError("it runs")):
        result = run(*SHORT, flag, path)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    assert (
        "cannot be written: choose a regular file in an existing folder" in result.stderr and len(result.stderr) <= 301
    )


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
                assert_refused(result, f"{name} is an input and would be overwritten")
            os.remove(tmp_path / name)
        assert read.read_bytes() == before


def test_what_an_evaluation_reads_is_not_replaced_under_any_name(model, tmp_path, capsys):
    problems, output = tmp_path / "problems", tmp_path / "hard"
    problems.write_text('{"task_id": "A", "prompt": "Once"}')
    flags = ["--checkpoint_path", str(model), "--samples", str(problems), "--output", str(output), "--quiet"]
    for read in (problems, model / "config.json", model / "model.pth"):
        os.link(read, output)
        before = read.read_bytes()
        for more, words in (
            ([], "already exists: pass --resume"),
            (["--resume"], "is an input and would|has no header of a batch"),
        ):
            assert evaluate.main([*flags, "-n", "1", "--max_new_tokens", "1", *more]) == 2
            assert re.match(rf"error: {output} (?:{words})", capsys.readouterr().err)
        assert read.read_bytes() == before
        output.unlink()


def test_what_lies_beside_a_model_may_be_written_again(tmp_path, capsys):
    """An output of the run before is none of the files that are read."""
    model, text = tmp_path / "model", tmp_path / "text"
    shutil.copytree(TINY, model)
    text.write_text("Once upon a time there was a cat.")
    flags = ["--checkpoint_path", str(model), "--perplexity", str(text), "--output", str(model / "found.json")]
    assert [evaluate.main([*flags, "--quiet"]) for _ in range(2)] == [0, 0], capsys.readouterr().err


def test_a_pipe_of_calibration_is_refused(tmp_path, capsys):
    """It would be waited for; and it is read twice."""
    os.mkfifo(tmp_path / "pipe")
    flags = ["--checkpoint_path", str(TINY), "--mode", "int4-gptq", "--output", str(tmp_path / "a" / "m.pth")]
    assert quantize.main([*flags, "--calibration_file", str(tmp_path / "pipe")]) == 2
    assert (
        "pipe must be a regular file, not a folder or a pipe" in capsys.readouterr().err
        and not (tmp_path / "a").exists()
    )


@pytest.mark.parametrize("command", ["generate.py", "scripts/download.py"])
def test_help_that_cannot_be_written_is_one_line(command):
    """Where Python holds its output back, as it does by default."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        line = [sys.executable, ROOT / command, "--help"]
        result = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, env=environment)
    assert result.returncode == 2 and re.fullmatch("error: stdout cannot be written .*\n", result.stderr)


COMMANDS = ["generate.py", "eval.py", "quantize.py", "mixtral-moe/memory.py"]
COMMANDS += [f"scripts/{path.name}" for path in sorted((ROOT / "scripts").glob("*.py"))]


@pytest.mark.parametrize("modules", [["torch", "matplotlib"], ["argparse", "json"]], ids=" ".join)
def test_ctrl_c_while_a_command_imports_ends_it_without_a_traceback(tmp_path, modules):
    """In place of what takes seconds to import, or of what comes first, stands a module that is interrupted as a user
    would do it."""
    for name in modules:
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for command in COMMANDS:
        if command == "scripts/download.py" and "torch" in modules:  # which imports nothing that takes seconds
            continue
        result = subprocess.run(
            [sys.executable, ROOT / command],
            capture_output=True, text=True, env=environment, preexec_fn=interruptible, timeout=60,
        )  # fmt: skip
        assert (result.returncode, result.stdout, result.stderr) == (130, "", ""), command


def test_a_user_without_a_home_keeps_what_was_compiled_elsewhere(tmp_path, monkeypatch):
    """As in a container: no such user, a home that is no folder or of another user."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache"
    other = Path(tempfile.gettempdir(), f"cache-{os.getuid()}")
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert cache_folder() == other
    monkeypatch.setenv("HOME", str(tmp_path))
    with mock.patch("os.access", return_value=False):
        assert cache_folder() == other
    monkeypatch.delenv("HOME")
    with mock.patch("pwd.getpwuid", side_effect=KeyError):
        assert cache_folder() == other
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        result = run("--plan", "-n", 2)
        assert result.returncode == 0, result.stderr


def slowly(seconds: float = 0.05) -> None:
    """Every step takes so long that there is time to interrupt it, on any machine."""
    plain = decoding.PlainDecoder.next

    def next(*arguments):
        time.sleep(seconds)
        return plain(*arguments)

    mock.patch.object(decoding.PlainDecoder, "next", next).start()


class Terminal:
    """The command in a fork at a terminal of its own, where Ctrl-C is a key."""

    def __init__(self, *arguments, prepare: Callable[[], object] = slowly) -> None:
        self.child, self.master = pty.fork()
        if not self.child:
            become_command(arguments, prepare)
        self.seen = ""

    def until(self, pattern: str) -> str:
        """What has come since the last time, up to the pattern."""
        limit = time.monotonic() + 60
        while (found := re.search(pattern, self.seen)) is None:
            assert select.select([self.master], [], [], max(0, limit - time.monotonic()))[0], self.seen
            self.seen += os.read(self.master, 4096).decode()
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def end(self, keys: str = "") -> int:
        """The exit status, when all has been read. keys: typed until it ends, since Python's readline overlooks a
        signal that comes between the prompt and its waiting for a key."""
        with suppress(OSError):  # the terminal is gone
            while True:
                self.type(keys)
                while select.select([self.master], [], [], 1)[0]:
                    self.seen += os.read(self.master, 4096).decode()
        os.close(self.master)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
WORD = r"tokens of the prompt read.*\r +\r.*\w"  # the first of a reply, where the bar stood
LONG = ["--max_new_tokens", 250, "--ignore_eos", "--seed", 1, "--dtype", "float32"]


def test_ctrl_c_ends_a_reply_and_the_conversation_goes_on():
    """At a terminal, twice at different places. Oracle: the reply without an interrupt begins so."""
    flags = [*LONG, "--temperature", 0]
    expected = run(*flags, "--prompt", "Once upon a time", "--quiet").stdout.replace("\n", "\r\n")
    talk = Terminal("--interactive", *flags)
    talk.until("> ")
    talk.type("Once upon a time\r")
    talk.until(re.escape(expected[:15]))
    talk.type(CTRL_C)
    rest, _, note = talk.until("> $").partition("^C")
    assert expected.startswith(expected[:15] + rest) and len(rest) < 200
    assert "Ctrl-C once more, or Ctrl-D, ends the conversation" in note
    talk.type("The dog\r")
    talk.until(WORD)
    talk.type(CTRL_C)
    talk.until(r"ends the conversation\r\n.*> $")
    talk.type(UP + UP + "\x01\x0bThe cat\r")  # a line of the history; its beginning, and all after that is cut
    assert "Once upon a time" in talk.until("The cat\r\n")
    talk.until(WORD)
    talk.type(CTRL_C)
    talk.until(r"ends the conversation\r\n.*> $")
    assert talk.end(CTRL_C) == 130 and "Traceback" not in talk.seen


def test_what_was_said_of_a_reply_is_kept():
    """Of several replies, the one that is picked. Oracle: the engine's own samples, as far, after all tokens so far."""
    flags = [*LONG, "-n", 3, "--format", "jsonl", "--pick"]
    engine = Engine.open(TINY, dtype="float32")
    talk, context = Terminal("--interactive", *flags, prepare=partial(slowly, 0.1)), []
    for text in ("Once upon a time", "The dog"):
        talk.until("> ")
        talk.type(f"{text}\r")
        talk.until("[3-9] steps")
        talk.type(CTRL_C)
        (row,) = map(json.loads, re.findall(r"{.*}", talk.until(r"keep \[1-1\]: ")))
        talk.type("\r")
        context += (engine.encode if not context else engine.tokenizer.encode)(text)
        drawn = engine.generate(context, Request(3, len(row["tokens"]), seed=1, eos_ids=frozenset()))
        assert row["finish_reason"] == "interrupted" and row["tokens"] == drawn[row["sample"]].tokens
        context += row["tokens"]
    talk.until("> ")
    assert talk.end(CTRL_D) == 0


@pytest.mark.parametrize("n", [1, 3])
def test_an_interrupted_run_shows_what_it_has_and_writes_its_report(tmp_path, n):
    flags = [*LONG, "-n", n, "--prompt", "Once upon a time"]
    command = Terminal(*flags, "--report", tmp_path / "r.json", "--selfcheck")
    command.until("[3-9] steps" if n > 1 else WORD)
    command.type(CTRL_C)
    assert command.end() == 130 and "Traceback" not in command.seen
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["seed"], report["interrupted"], report["prefill_s"] > 0) == (1, True, True)
    assert "seed 1" in command.seen and (", interrupted" in command.seen) == (n > 1)


def test_a_command_that_dies_while_it_draws_its_bar_leaves_others_theirs():
    """tqdm's own lock is shared by all forks of a process."""
    lock = tqdm.get_lock()
    if not (child := os.fork()):
        lock.acquire()
        os._exit(0)
    os.waitpid(child, 0)
    command = Terminal("-n", 3, "--prompt", "Once upon a time", "--max_new_tokens", 9)
    command.until("[3-9] steps")
    assert command.end() == 0


def row_of(index: int, logprobs: list[float], finish_reason: str | None = None) -> Row:
    row = Row(index, StopConditions(frozenset(), (), 9), Letters(), [1], False)
    row.sample.logprobs[:], row.sample.tokens[:] = logprobs, range(10, 10 + len(logprobs))
    row.sample.finish_reason, row.sample.text = finish_reason, str(index) if finish_reason else ""
    return row


def test_of_an_interrupted_run_the_finished_are_shown_and_then_the_best_of_the_others(capsys):
    """The best of all is one that had only begun; it may have been stopped between a token and its log-probability."""
    options = build_parser().parse_args(["-n", "5", "--top", "2", "--format", "jsonl", "--quiet"])
    rows = [row_of(0, [-3.0], "eos"), row_of(1, [-0.5, -0.1]), row_of(2, [-2.0]), row_of(3, []), row_of(4, [-1], "eos")]
    rows[1].sample.tokens.append(77)
    with pytest.raises(KeyboardInterrupt), Console(options, None, torch.device("cpu"), None) as console:
        for row in rows:
            console.started(row)
        for row in rows[::4]:
            console.done(row.sample)
        raise KeyboardInterrupt
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["rank"], row["sample"], row["finish_reason"]) for row in shown] == [
        (1, 4, "eos"), (2, 0, "eos"), (3, 1, "interrupted")
    ]  # fmt: skip
    assert shown[2]["tokens"] == [10, 11] and shown[2]["text"] == Letters().decode([10, 11])


TALK = ["--interactive", "--max_new_tokens", 12, "--seed", 1, "--dtype", "float32", "--format", "jsonl"]


def said(*lines: str, flags: Sequence[object] = ()) -> list[list[int]]:
    """The tokens of every reply of a conversation."""
    return [row["tokens"] for row in lines_of(run(*TALK, *flags, input="".join(f"{line}\n" for line in lines)))]


def test_commands_of_a_conversation():
    """Oracle: the conversation without what was taken back; of /regenerate, the engine's next samples of the seed."""
    first, second = said("Once upon a time", "The dog")
    assert said("Once upon a time", "The cat", "/undo", "The dog")[2] == second
    assert said("Once", "/undo", "/undo", "Once upon a time", "The dog")[1:] == [first, second]
    assert said("Once", "The cat", "/reset", "Once upon a time", "The dog")[2:] == [first, second]
    assert said("/help", "/undo", "/regenerate", "", "Once upon a time") == [first]
    engine = Engine.open(TINY, dtype="float32")
    drawn = [each.tokens for each in engine.generate(engine.encode("Once upon a time"), Request(3, 12, seed=1))]
    assert said("Once upon a time", "/regenerate", "/regenerate") == drawn
    again = said("Once upon a time", "/regenerate", "/undo", "Once upon a time", "/regenerate", "The dog")
    assert again[:4] == [drawn[0], drawn[1]] * 2
    shown = run(*TALK, input="/help\nOnce\n/undo\n/undo\n").stderr
    assert all(command in shown for command in COMMANDS_OF_TALK) and "taken back: Once" in shown
    assert "there is no turn to take back" in shown


def test_a_reply_is_no_longer_than_what_the_conversation_has_left():
    """320 tokens in all. Oracle: the tokens of the texts and of the replies before."""
    base = ["--interactive", "--max_new_tokens", 500, "--seed", 1, "--ignore_eos", "--format", "jsonl"]
    text = "Once upon a time " * 60
    result = run(*base, input=f"{text}\nThe dog\n/reset\n{text}\n")
    first, second = lines_of(result)
    tokens = len(Engine.open(TINY).encode(text))
    assert len(first["tokens"]) == 320 - tokens and first["tokens"] == second["tokens"]
    assert result.stderr.count(f"{320 - tokens} tokens left of 320: a reply ends there; /reset starts over") == 2
    assert re.search(r"error: prompt of 32\d tokens .* shorten one of them; /reset starts over\n", result.stderr)
    once = run(*base, "--prompt", text, input="")
    assert lines_of(once) == [first]


def test_a_choice_survives_any_answer_and_ends_with_the_input():
    talk = [*TALK, "-n", 3, "--pick", "--temperature", 3]
    result = run(*talk, input="Once\n" + "9" * 5000 + "\n²\n-1\n 2 \nThe dog\n")
    assert len(lines_of(result)) == 6 and result.stderr.count("is not a number from 1 to 3") == 3
    assert len(result.stderr) < 1000
    plain = run(*talk, input="Once\n2\nThe dog\n1\n")
    assert lines_of(plain) == lines_of(result)


def test_a_conversation_is_planned_for_all_that_it_may_hold():
    """Oracle: the plan of one prompt of that length; a limit of memory that is between."""
    base = ["-n", 2, "--max_new_tokens", 20, "--dtype", "float32", "--no-compile"]
    whole = run(*base, "--plan", "--interactive", "--max_memory", "1GB").stdout
    assert whole == run(*base, "--plan", "--synthetic_prompt", 300, "--max_memory", "1GB").stdout
    result = run(*base, "--interactive", "--max_memory", "8.2MB", input="Once\n" + "word " * 290 + "\n")
    (room,) = re.findall(r"memory holds a conversation of (\d+) tokens, the model 320", result.stderr)
    assert 20 < int(room) < 320 and "error: one sample needs" in result.stderr and result.returncode == 0


def test_a_line_that_is_not_utf8_is_refused_and_the_conversation_goes_on():
    with mock.patch("cli.repl.ask", side_effect=[os.fsdecode(b"caf\xe9"), "Once", None]):
        result = run(*TALK)
    assert (
        len(lines_of(result)) == 1
        and "error: the text is not UTF-8 (invalid at character 3): convert it" in result.stderr
    )


def edit(model: Path, **fields: object) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000: expected at most 1024"),
        ({"head_dim": 1 << 40}, "head_dim is 1099511627776: expected at most 65536"),
        ({"hidden_size": 10**4000}, "hidden_size is a 13288-bit integer: expected at most 16777216"),
        ({"vocab_size": 1 << 63}, "vocab_size is 9223372036854775808: expected at most"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings is a 100-bit integer: expected at most"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf: expected a number above 0, at most 1e15"),
        ({"rope_theta": 10**400}, "rope_theta is a 1329-bit integer: expected a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": float("inf")}}, "factor is inf: expected a number above 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 1e308}}, "factor is 1e+308: expected a number above 0"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 1000, "num_experts_per_tok": 2,
             "num_hidden_layers": 1000},
            "num_experts is 1000 in 1000 layers: expected at most 131072 in all",
        ),
    ],
    ids=lambda value: value.split(" is ")[0] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_shape_beyond_any_model_is_refused_before_it_is_made(model, fields, message):
    edit(model, **fields)
    with mock.patch("model.Transformer", side_effect=AssertionError("it is made")):
        assert_refused(run(*SHORT, "--checkpoint_path", model, "--plan"), f"config.json: {message}")


def test_the_largest_shape_is_planned_in_seconds(model):
    """As far as each field goes by itself. Oracle: the plan says that it does not fit."""
    most = 1 << 24
    edit(model, hidden_size=most, intermediate_size=most, vocab_size=most, head_dim=1 << 16, num_hidden_layers=64)
    edit(model, num_attention_heads=1 << 14, num_key_value_heads=1)
    assert_refused(run(*SHORT, "--checkpoint_path", model, "--plan"), "one sample needs")


def test_files_that_are_none_are_named_and_not_waited_for(model):
    for name in ("config.json", "generation_config.json", "chat_template.jinja", "model.pth", "model.safetensors"):
        path, aside = model / name, model / "aside"
        weights = model / "model.pth"
        if path.exists():
            path.rename(aside)
        elif name == "model.safetensors":
            weights.rename(aside)
        for make in (os.mkfifo, os.mkdir):
            make(path)
            if name == "model.safetensors" and make is os.mkdir:
                (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
            result = run(*SHORT, "--checkpoint_path", model, "--chat")
            assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
            assert re.search(f"{name} must be a regular file|no \\*.safetensors or", result.stderr)
            path.unlink() if path.is_fifo() else path.rmdir()
        if aside.exists():
            aside.rename(weights if name == "model.safetensors" else path)


def test_a_config_that_nests_too_deeply_is_named(model):
    for name, why in (("config.json", "not valid JSON"), ("tokenizer_config.json", "invalid")):
        before = (model / name).read_text() if (model / name).exists() else "{}"
        (model / name).write_text('{"a":' * 10**5)
        assert_refused(run(*SHORT, "--checkpoint_path", model), f"{name} is {why}")
        (model / name).write_text(before)


class Harmful:
    """Runs a command where it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch harmed",)


ODD = {
    "meta": lambda tensor: tensor.to("meta"),
    "sparse_coo": lambda tensor: tensor.float().to_sparse(),
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.float()]),
    "qint8": lambda tensor: torch.quantize_per_tensor(tensor.float(), 1.0, 0, torch.qint8),
    "str": lambda tensor: "a tensor",
    "Parameter of strings": lambda tensor: {"weight": tensor},
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_dense_tensor_is_named(model, kind):
    name = "layers.1.ffn_norm.weight"
    state = torch.load(model / "model.pth")
    torch.save(state | {name: ODD[kind](state[name])}, model / "model.pth")
    result = run(*SHORT, "--checkpoint_path", model)
    assert_refused(result, f"model.pth is not a plain state dict ('{name}' is ")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_as_such(model, tmp_path, zipped):
    torch.save({"norm.weight": Harmful()}, model / "model.pth", _use_new_zipfile_serialization=zipped)
    result = run(*SHORT, "--checkpoint_path", model, cwd=tmp_path)
    assert_refused(result, "model.pth would run code when loaded (posix.system): save plain tensors")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("damage", ["cut", "twice", "gap"])
def test_a_damaged_tiktoken_vocabulary_is_refused_before_its_library_panics(model, damage):
    """Oracle: the library, which ends with a hundred lines where a byte or a rank is missing."""
    ranks = {"cut": range(200), "twice": [*range(256), 3], "gap": [*range(256), 300]}[damage]
    tokens = [bytes([place % 256] * (1 + place // 256)) for place in range(len(ranks))]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in zip(tokens, ranks, strict=True)]
    (model / "tokenizer.model").write_text("".join(lines))
    status, out, err = forked(*SHORT, "--checkpoint_path", model)
    assert (status, out, err.count("\n")) == (2, "", 1) and "it is truncated or damaged" in err


PANICS = {
    "on loading": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "on any text": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "on ids": {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 99}},
    "on this text": {"model": {"type": "WordLevel", "vocab": {".": 0, "b": 1}, "unk_token": "?"}},
}


@pytest.mark.parametrize("parts", PANICS.values(), ids=PANICS)
def test_a_tokenizer_whose_library_fails_is_one_line(model, parts):
    """Oracle: the library, which panics, with forty lines on stderr, or raises Exception itself."""
    (model / "tokenizer.model").unlink()
    byte_level([]).save(str(model / "tokenizer.json"))
    content = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").write_text(json.dumps(content | parts))
    status, out, err = forked(*SHORT, "--prompt", "a", "--format", "jsonl", "--quiet", "--checkpoint_path", model)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert re.fullmatch(
        f"error: (the tokenizer library failed on )?{model}/tokenizer.json .*: download it again\n", err
    )


def test_what_guards_a_library_lets_all_else_through(capfd):
    """Where Python is not a command, stderr stays what it is; of a command only the library's own words are lost."""

    def fail(error: BaseException) -> None:
        os.write(2, b"told")
        raise error

    path, kinds = Path("file"), (ValueError, KeyboardInterrupt, MemoryError)
    for error in kinds:
        with pytest.raises(error):
            Guarded(path, fail, error())
    with pytest.raises(ValueError, match=r"the tokenizer library failed on file \(why\): download it again"):
        Guarded(path, fail, type("PanicException", (BaseException,), {})("why"))
    assert capfd.readouterr().err == "told" * 4
    with mock.patch.object(sys, "stderr", SafeStderr(sys.stderr)), pytest.raises(ValueError):
        Guarded(path, fail, Exception())
    os.write(2, b"after")
    assert capfd.readouterr().err == "after"
    guarded = Guarded(path, dict, a=1)
    assert pickle.loads(pickle.dumps(guarded)).get("a") == copy.deepcopy(guarded).get("a") == guarded.get("a") == 1


def test_a_draft_whose_logits_are_not_finite_is_an_error(model, tmp_path):
    """Of a draft that is not the model, which is sound."""
    change(model, "norm.weight", float("nan"))
    args, heads = read_checkpoint(TINY).args, tmp_path / "heads.pt"
    shapes = {"linear.weight": (args.dim, args.dim), "linear.bias": (args.dim,)}
    state = {f"0.0.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(state | {"0.1.weight": torch.full((args.vocab_size, args.dim), float("nan"))}, heads)
    for flags in (["--draft", "medusa", heads], ["--draft_checkpoint_path", model]):
        result = run(*SHORT, *flags, "--speculate_k", 1, "-n", 2)
        assert_refused(result, f"the draft, {'medusa' if heads in flags else 'model'}: its logits are not finite")


def test_an_error_is_one_line_of_300_characters_with_value_and_remedy():
    long = ["9" * 5000 + "x", "y/" * 3000, "z\n" * 400]
    for flags in (
        ["--temperature", long[0]], ["--prompt_file", long[0]], ["--checkpoint_path", long[1]], ["--report", long[2]],
        ["--stop", "", "--draft", *long], [f"--{long[1]}"], ["--seed", "1" * 4000], ["--speculate_k", long[2]],
    ):  # fmt: skip
        result = run(*SHORT[4:], *flags)
        assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, flags
        assert result.stderr.startswith("error: ") and len(result.stderr) <= 301 and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "fail,told",
    [
        (lambda *_: torch.empty(1 << 50), "can't allocate memory: you tried to allocate"),
        (lambda *_: bytearray(1 << 60), "out of memory: "),
        (mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.\nMore")), "CUDA out of memory.: "),
    ],
    ids=["CPU", "Python", "CUDA"],
)
@pytest.mark.parametrize("where", ["generate.load_joined", "engine.contexts.KVCache.empty"])
def test_where_memory_runs_out_the_flags_that_help_are_named(fail, told, where):
    with mock.patch(where, side_effect=fail):
        result = run(*SHORT, "-n", 3)
    assert_refused(result, told)
    assert "lower --max_memory, -n or --prefill_chunk" in result.stderr


def test_a_system_that_lacks_what_linux_has_runs_all_the_same(tmp_path, monkeypatch):
    """As on Windows: no fcntl, no os.sysconf, nothing in /proc. Oracle: the same with them."""
    prompts, base = tmp_path / "prompts", [*SHORT[2:], "--dtype", "float32"]
    prompts.write_text('"Once"\n"The cat"\n')

    def drawn(name: str) -> tuple[str, bytes]:
        result = run(*base, "--prompts", prompts, "--output", tmp_path / name)
        assert result.returncode == 0, result.stderr
        return run(*base, *PROMPT).stdout, (tmp_path / name).read_bytes()

    expected, exists = drawn("with"), Path.exists
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(Path, "exists", lambda self: not str(self).startswith(("/proc", "/sys")) and exists(self))
    assert drawn("without") == expected


def test_what_some_systems_lack_is_imported_where_it_is_used():
    """Windows has none of these modules of Python."""
    for path in SOURCES:
        first = re.findall(r"^(?:import|from) (\w+)", path.read_text("utf-8"), re.MULTILINE)
        assert not {"resource", "readline", "fcntl", "termios", "pwd"} & set(first), path.name
