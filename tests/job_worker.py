"""What tests/test_jobs.py runs: a batch that is killed in some rounds and then runs to its end.

python tests/job_worker.py ROUNDS SEED FLAGS...

Prints, as JSON, the size of the output after each round. Every round is a fork of this process, so that it need not
import anew. Half of them are killed at a random moment of the time that the first, which is not killed and writes
elsewhere, took; the others by themselves, in the middle of writing a block.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import torch

import generate
from cli import prompts
from cli.jobs import Output


def fork(flags: list[str], written: int | None = None) -> int:
    """A child that runs generate.py; written: it kills itself when it has written so many bytes of samples."""
    if child := os.fork():
        return child
    append = Output.append
    left = written

    def torn(output: Output, block: bytes) -> None:
        nonlocal left
        assert left is not None
        append(output, block[:left])
        left -= len(block)
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    if written is not None:
        Output.append = torn  # type: ignore[method-assign]
    os._exit(generate.main(flags))


def main(rounds: int, seed: int, flags: list[str]) -> None:
    torch.set_num_threads(1)
    prompts.WINDOW = 5
    rng, output, sizes = random.Random(seed), Path(flags[flags.index("--output") + 1]), []
    whole = output.with_name("whole.jsonl")
    begin = time.monotonic()
    assert os.waitpid(fork([*flags, "--output", str(whole)]), 0)[1] == 0
    took = time.monotonic() - begin
    for number in range(rounds):
        written = rng.randrange(whole.stat().st_size // 3) if number % 2 else None
        child = fork([*flags, "--resume"], written)
        if written is None:
            time.sleep(rng.uniform(0, took))
            os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
        sizes.append(output.stat().st_size if output.exists() else 0)
    assert os.waitpid(fork([*flags, "--resume"]), 0)[1] == 0
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
