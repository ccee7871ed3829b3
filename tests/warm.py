"""Commands in forks of a process that has imported PyTorch and nothing of this repository: they do what they do when
they are started, without the seconds that this takes."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch"])
LIBRARIES = [path for path in sys.path if path.startswith((sys.prefix, sys.base_prefix))]
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def child(arguments: list[str], folder: Path, streams: Path, environment: dict[str, str]) -> None:
    """In the fork: as `python SCRIPT ...` in that folder, with the files of those names as its streams."""
    os.environ.clear()
    os.environ.update(environment)
    for number, (name, mode) in enumerate(STREAMS):
        file = os.open(streams / name, os.O_RDONLY if mode == "r" else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
        setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    os.chdir(folder)
    sys.argv = arguments
    sys.path[:] = [str(Path(arguments[0]).resolve().parent), *LIBRARIES]
    runpy.run_path(arguments[0], run_name="__main__")


class Command:
    """A script and its arguments, running."""

    def __init__(self, *arguments: object, cwd: Path, input: str = "", env: Mapping[str, str] = os.environ) -> None:
        self.arguments, self.streams = [*map(str, arguments)], tempfile.TemporaryDirectory()
        self.folder = Path(self.streams.name)
        for name, _ in STREAMS:
            (self.folder / name).write_text(input if name == "stdin" else "", "utf-8")
        self.process = SERVER.Process(target=child, args=(self.arguments, cwd, self.folder, dict(env)))
        self.process.start()

    def end(self, timeout: float = 120) -> subprocess.CompletedProcess:
        """Waits for it. Raises subprocess.TimeoutExpired, and kills it."""
        self.process.join(timeout)
        if (status := self.process.exitcode) is None:
            self.process.kill()
            self.process.join()
        out, err = ((self.folder / name).read_text("utf-8") for name in ("stdout", "stderr"))
        self.streams.cleanup()
        if status is None:
            raise subprocess.TimeoutExpired(self.arguments, timeout, out, err)
        return subprocess.CompletedProcess(self.arguments, status, out, err)


def run(*arguments: object, cwd: Path, input: str = "", timeout: float = 120) -> subprocess.CompletedProcess:
    """A script to its end."""
    return Command(*arguments, cwd=cwd, input=input).end(timeout)
