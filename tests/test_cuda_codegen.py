"""The CUDA code that Inductor generates for a decode step, as cuda_codegen.py makes it on any machine: its kernels, its
buffers and how often it is compiled. Oracle: counts that were right by hand when they were written down; only fewer
kernels pass."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec

import pytest
from conftest import ROOT, slow

from engine.runner import bucket

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or shutil.which(os.environ.get("CXX", "c++")) is None,
    reason="generating CUDA code needs triton and a C++ compiler",
)

MHA, GQA, WIDTH, NEW = 32, 8, 5, 100
# Kernels of a layer, and of what is outside the layers. attend_split launches one for the context and one for the rows'
# own keys, which also merges them.
LAYER = {"product": 4, "norm": 2, "rotate or write": 1, "attention": 1, "activation": 1}
OUTSIDE = {"product": 1, "norm": 1, "other": 1}
TORCH = {"mask": 1, "attention": 1, "merge": 1}  # without Triton
FOLDED = TORCH | {"copy of queries": 1, "mask": 2}  # where queries of several heads or positions fold
# The first operator that a kernel's name has tells its kind.
KINDS = {
    "mm": "product", "bmm": "product", "addmm": "product", "sin": "rotate or write", "index_put": "rotate or write",
    "rsqrt": "norm", "silu": "activation", "exp": "merge", "ge": "mask", "clone": "copy of queries",
    "copy": "copy of queries",
}  # fmt: skip


def own_slots(new: int, width: int) -> list[int]:
    """The own slots in view during a run of `new` tokens by steps of `width`, as Contexts.resize shows them."""
    most = new + width - 1
    return sorted({min(most, bucket(slots)) for slots in range(1, most + 1)})


def steps(new: int, width: int) -> list[tuple[int, int, int]]:
    """Steps of a run of N = 16, then of others with other rows, contexts and slots."""
    return [*((16, 8192, slots) for slots in own_slots(new, width)), (1024, 777, 104), (3, 64, 99), (2, 8, 8)]


ROTATED, COPIED = {"rotate or write": 1}, {"copy of queries": 1}  # keys apart from queries; several positions
# Each with the kernels that a layer has beyond LAYER.
CASES: dict[str, tuple[dict, dict[str, int]]] = {
    "MHA": ({"groups": MHA, "steps": steps(NEW, 1)}, {}),
    "GQA": ({"groups": GQA, "steps": steps(NEW, 1)}, ROTATED),
    "GQA, draft": ({"groups": GQA, "steps": steps(NEW + 1, WIDTH), "positions": WIDTH}, ROTATED | COPIED),
    "MHA without Triton": ({"groups": MHA, "steps": steps(NEW, 1), "triton": False}, TORCH),
}
ONE_ROW = [(1, 8192, slots) for slots in own_slots(NEW, 1)]
RARE: dict[str, tuple[dict, dict[str, int]]] = {
    "MHA, two layers": ({"groups": MHA, "steps": [(16, 8192, 64), (16, 8192, 99)], "layers": 2}, {}),
    "MHA, one row": ({"groups": MHA, "steps": ONE_ROW}, {}),
    "MHA, one row without Triton": ({"groups": MHA, "steps": ONE_ROW, "triton": False}, TORCH),
    "GQA without Triton": ({"groups": GQA, "steps": steps(NEW, 1), "triton": False}, FOLDED | ROTATED),
    "GQA, draft without Triton": (
        {"groups": GQA, "steps": steps(NEW + 1, WIDTH), "positions": WIDTH, "triton": False}, FOLDED | ROTATED
    ),
}  # fmt: skip


def generate(cases: list[dict]) -> list[list[dict]]:
    """Return the graphs of each case: `launches`, the names of its kernels in order, and `code`."""
    command, given = [sys.executable, str(ROOT / "tests" / "cuda_codegen.py")], json.dumps(cases)
    made = subprocess.run(command, input=given, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert made.returncode == 0, made.stderr[-3000:]
    return json.loads(made.stdout)


def kind(kernel: str) -> str:
    if kernel.startswith(("_scaled_dot_product", "attend_split")):
        return "attention"
    words = set(kernel.split("_")) | ({"index_put"} if "index_put" in kernel else set())
    return next((name for word, name in KINDS.items() if word in words), "other")


def surplus(launches: list[str], layers: int, more: dict[str, int]) -> Counter:
    """Count the kernels beyond those of LAYER, of `more` and of OUTSIDE, by kind."""
    most = Counter(OUTSIDE)
    for each in (LAYER, more):
        most += Counter({name: layers * count for name, count in each.items()})
    return Counter(map(kind, launches)) - most


def large(code: str) -> list[str]:
    """List the shapes of buffers that the code allocates by the slots of a cache, own or of the context."""
    slots = set(re.findall(r"assert_size_stride\(\w+, \(\w+, \d+, (\w+), 128\), .*'input'\)", code))
    made = re.findall(r"empty_strided_cuda\(\(([^)]*)\)", code)
    assert len(slots) >= 2 and len(made) > 5
    return [shape for shape in made if slots & set(re.findall(r"\w+", shape))]


@pytest.mark.parametrize("cases", [CASES, pytest.param(RARE, marks=slow)], ids=["common", "rare"])
def test_the_generated_code_of_a_step(cases):
    """For each case: one graph for every number of rows, length of context and number of own slots, also those that are
    no multiple of 8, such as the last of 100 tokens or of any draft; no more kernels than counted here; no buffer of a
    cache's size, so no copy of keys or values (without Triton, a layer's mask of the own slots [N,1,S,L]); no parts
    that are put side by side, which takes a kernel for each."""
    for name, graphs in zip(cases, generate([fields for fields, _ in cases.values()]), strict=True):
        fields, more = cases[name]
        assert any(slots % 8 for _, _, slots in fields["steps"]) and len(graphs) == 1, name
        launches, code, layers = graphs[0]["launches"], graphs[0]["code"], fields.get("layers", 1)
        assert not surplus(launches, layers, more), (name, launches)
        assert {"product", "attention", "norm"} <= set(map(kind, launches)), (name, launches)
        buffers = large(code)
        assert len(buffers) <= layers * (not fields.get("triton", True)) and not re.search(
            r"\b(32|128|4096)\b", " ".join(buffers)
        ), (name, buffers)
        assert "# alias" not in code, name
