"""What the tests of Triton's kernels share: launches that are recorded instead of run, kernels compiled for GPUs that
are not there, tests in Triton's interpreter, and the sources without one file."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from conftest import FOLDERS, ROOT
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}  # bytes of shared memory that a program may have
NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "i8", torch.uint8: "u8",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


class Launches:
    """In place of a kernel: its launches, each with the arguments by name, the grid and the options."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.made = kernel, []

    def __getitem__(self, grid: tuple[int, int]):
        def launch(*args: object, **options: int) -> None:
            self.made.append(dict(zip(self.kernel.arg_names, args, strict=True)) | {"grid": grid, "options": options})

        return launch


def compile_launch(launch: dict, function: Any, arch: int, cubin: Path) -> tuple[int, int, int, str]:
    """Compile a recorded launch -> registers, bytes of spills, shared memory, and its PTX."""
    constants, signature, attributes = {}, {}, {}
    for at, parameter in enumerate(function.params):
        value = launch[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name], attributes[at,] = "*" + NAMES[value.dtype], [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr:
            signature[parameter.name], constants[at,] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
            if not parameter.do_not_specialize and value % 16 == 0:
                attributes[at,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch["options"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin.write_bytes(made.asm["cubin"])
    done = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    registers, stack, local = map(int, found.groups())
    return registers, stack + local, made.metadata.shared, made.asm["ptx"]


def assert_passes_interpreted(name: str) -> None:
    """Run a test file in a process of its own, as Triton reads TRITON_INTERPRET when it is imported."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:xdist", f"tests/{name}"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # xdist's too
    done = subprocess.run(command, cwd=ROOT, env=kept | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-1000:]


def run_without(file: str, code: str, folder: Path) -> str:
    """Run code in a copy of the sources without a file of layers/ -> what it prints."""
    for each in FOLDERS:
        shutil.copytree(ROOT / each, folder / each, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "layers" / file).unlink()
    code = f"import sys; sys.path.insert(0, '.')\n{code}"
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def as_gpu(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """Give every CUDA device this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=major))
