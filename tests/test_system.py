"""The line on a terminal that tells what a command is doing before there is any progress to show. Oracle: what a
terminal of one line would show (`screen`)."""

import io
import os
import pty
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from conftest import GQA, PROMPT, ROOT, random_model, request

from cli.system import SafeStderr, Stream, begin, start
from engine.engine import Engine
from engine.graphs import warn_once
from layers import kernels
from layers.notices import Notice, showing


class Terminal(io.StringIO):
    """What is written, which both streams share."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> str:
        """Of the last line, what is left after it was cleared."""
        return re.split(r"\r\x1b\[K|\n", self.getvalue())[-1]


@contextmanager
def on_a_terminal() -> Iterator[Terminal]:
    """Both streams of a command, on one terminal."""
    terminal = Terminal()
    with redirect_stdout(Stream(terminal)), redirect_stderr(SafeStderr(terminal)):
        yield terminal


def test_a_status_stands_until_anything_else_is_written():
    with on_a_terminal() as terminal:
        begin(quiet=False)
        assert terminal.screen == "loading ..."
        with showing("building"):
            assert terminal.screen == "building ..."
        assert terminal.screen == "loading ..."
        print("out")
        assert terminal.screen == "" and terminal.getvalue().endswith("\r\x1b[Kout\n")
        with showing("compiling"):
            print("note", file=sys.stderr)
            assert terminal.screen == ""
        assert terminal.screen == "" and "compiling ...\r\x1b[Knote\n" in terminal.getvalue()
        with showing("compiling"):
            sys.stdout.flush()  # as input() does, which then writes past these objects
            assert terminal.screen == ""


def test_a_status_does_not_break_a_line():
    with on_a_terminal() as terminal:
        print("Once upon", end="", flush=True)
        with showing("compiling"):
            assert terminal.screen == "Once upon"
        print(" a time")
        assert terminal.getvalue() == "Once upon a time\n"


@pytest.mark.parametrize("why", ["quiet", "another rank", "no terminal"])
def test_nothing_is_told(monkeypatch, why):
    with on_a_terminal() as terminal:
        if why == "another rank":
            monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(Terminal, "isatty", lambda self: why != "no terminal")
        begin(quiet=why == "quiet")
        with showing("compiling"):
            sys.stderr.note(Notice("slower"))
        assert terminal.getvalue() == ("note: slower\n" if why == "no terminal" else "")


def test_of_warnings_notices_reach_the_user(monkeypatch, capsys):
    with warnings.catch_warnings():
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        monkeypatch.setattr(sys, "warnoptions", [])
        for name in ("stdin", "stdout", "stderr"):
            monkeypatch.setattr(sys, name, getattr(sys, name))
        start()
        warnings.warn("a library's", stacklevel=1)
        warnings.warn("it runs slower", Notice, stacklevel=1)
    assert capsys.readouterr() == ("", "note: it runs slower\n")


def test_compiling_is_told(monkeypatch):
    """While the first step is compiled, and not before or after."""
    with on_a_terminal() as terminal:
        seen = []
        monkeypatch.setattr(
            torch, "compile", lambda step, **_: lambda *args: seen.append(terminal.screen) or step(*args)
        )
        warn_once.cache_clear()
        Engine(random_model(GQA, torch.float32), compile=True).generate(PROMPT, request(3, 4))
        assert seen == ["compiling ...", "", ""] and terminal.screen == ""


def test_a_command_tells_that_it_loads_and_builds(tmp_path):
    """In order, before its own lines, in a cache folder without a library."""
    functions = kernels.library().functions
    if functions is None:
        pytest.skip("no C++ compiler")
    compiler = tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\nfor target; do :; done\ncp {functions._name} "$target"\n')
    compiler.chmod(0o755)
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "CXX": str(compiler), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "generate.py"), "-n", "2", "--max_new_tokens", "2", "--dtype", "float32"]
    master, slave = pty.openpty()
    with subprocess.Popen([*command, "--no-compile"], env=environment, stdout=slave, stderr=slave):
        os.close(slave)
        text = b""
        while piece := read(master):
            text += piece
    os.close(master)
    assert re.match(
        r"\r\x1b\[Kloading \.\.\.\r\x1b\[Kbuilding the CPU kernels \(once\) \.\.\.\r\x1b\[Kloading", text.decode()
    )
    assert re.search(r"\r +\r\[1\] mean log-probability", text.decode())


def read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # all have left it
        return b""


def test_an_interrupt_while_loading_leaves_a_clean_line(tmp_path: Path):
    code = "import os, signal; from cli import system; system.start(); system.begin(False)"
    code += "; os.kill(os.getpid(), signal.SIGINT)"
    master, slave = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=slave, stderr=slave)
    os.close(slave)
    text = b"".join(iter(lambda: read(master), b""))
    os.close(master)
    assert process.wait() == 130 and text == b"\r\x1b[Kloading ...\r\x1b[K"
