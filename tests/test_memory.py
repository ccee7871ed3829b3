"""The memory promise, at the shape it is made for. Oracle: the kernel's own count of the process's resident pages."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPT = """
import re, sys
from pathlib import Path
import torch
sys.path.insert(0, {scripts!r})
from benchmark import SHAPES, random_model
from generate import Request, Sampling, generate
from plan import release_freed_memory
from report import Monitor

CPU = torch.device("cpu")

class Trim(Monitor):  # as the command line does
    def prefilled(self):
        release_freed_memory(CPU)
        super().prefilled()

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

args = SHAPES["stories110M"]
model = random_model(args, CPU, torch.bfloat16)
def run(context, n):
    request = Request(n, 64, Sampling(0.8, top_k=200), seed=0, prefill_chunk=512)
    generate(model, [token % args.vocab_size for token in range(context)], request, monitor=Trim())
run(600, 64)  # loads the code that PyTorch loads on first use
release_freed_memory(CPU)  # nothing that was freed is left to be used unseen
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
run(4096, 64)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the peak")
def test_memory_beyond_the_weights_is_the_context_once_and_the_decoded_part():
    """N = 64, context 4096, 64 new tokens, bfloat16: at most 1.15 x (context K/V once + decoded K/V)."""
    script = SCRIPT.format(scripts=str(ROOT / "scripts"))
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    token = 2 * 12 * 768 * 2
    assert int(result.stdout) <= 1.15 * (4096 + 64 * 64) * token
