"""Inductor's CUDA code of a decode step, generated without a GPU.

Run as `python tests/cuda_codegen.py`: reads cases from stdin, a JSON list of the fields of Case, and prints for each
the kernels that a step launches, in order, and the code. Tensors are fake, the device's properties are those of an
H100, and compilation stops after code generation. Needs triton and a C++ compiler, for the device guard that
PyTorch's CPU build lacks. Test_cuda_codegen.py runs it as a process of its own, since it changes PyTorch.

Shapes: N rows, S positions, T context length, G key/value heads.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch._dynamo.device_interface
import torch._inductor.config
import torch._inductor.fx_passes.fuse_attention
import torch._inductor.fx_passes.misc_patterns
import torch._inductor.fx_passes.pad_mm
import torch._subclasses.fake_tensor
import torch.utils._triton
import triton
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bifurcated_attention
import cache as caches
from cache import KVCache
from engine.graphs import StepInput, mark_dynamic
from engine.runner import decode
from layers.linear import join_linears
from model import ModelArgs, Transformer

GUARD = """#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10::impl;
namespace { DeviceGuardImplRegistrar made(c10::DeviceType::CUDA, new NoOpDeviceGuardImpl<c10::DeviceType::CUDA>()); }
"""
H100 = SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30, warp_size=32,
    regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20, gcnArchName="",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Steps of a network of `layers` layers of Llama-2-7B's shape with G key/value heads, one after another: for each
    the rows N, the tokens T of the context and the own slots of a row. positions: S. triton: attend by its kernels."""

    groups: int
    steps: list[tuple[int, int, int]]
    positions: int = 1
    layers: int = 1
    triton: bool = True


class Generated(Exception):
    """Raised in place of running the generated code."""


def load_guard() -> None:
    """Register a CUDA device guard that does nothing."""
    root, folder = Path(torch.__file__).parent, Path(tempfile.mkdtemp())
    source, library = folder / "guard.cpp", folder / "guard.so"
    source.write_text(GUARD)
    flags = ["-shared", "-fPIC", "-std=c++20", f"-I{root}/include", f"-L{root}/lib", "-lc10"]
    subprocess.run([os.environ.get("CXX", "c++"), str(source), "-o", str(library), *flags], check=True)
    ctypes.CDLL(str(library))


def fake_device() -> None:
    """Make PyTorch and triton see one H100."""
    interface, target = torch._dynamo.device_interface.CudaInterface, GPUTarget("cuda", 90, 32)
    state = torch.zeros(16, dtype=torch.uint8)
    faked = {
        torch.cuda: {
            "is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": H100,
            "get_device_capability": (9, 0), "is_initialized": False, "_lazy_init": None, "synchronize": None,
            "get_rng_state": state, "set_rng_state": None, "is_bf16_supported": True, "set_device": None,
            "_exchange_device": -1, "_maybe_exchange_device": -1,
        },
        interface: {
            "is_available": True, "current_device": 0, "get_device_properties": H100, "get_compute_capability": 90,
            "exchange_device": -1, "maybe_exchange_device": -1, "raise_if_triton_unavailable": None,
        },
        interface.Worker: {"get_device_properties": H100},
        torch._subclasses.fake_tensor: {"init_gpu_context": None},
        torch.utils._triton: {"has_triton": True},
        # Patterns that are traced on real tensors.
        torch._inductor.fx_passes.fuse_attention: {"_sfdp_init": None},
        torch._inductor.fx_passes.misc_patterns: {"_misc_patterns_init": None},
        torch._inductor.fx_passes.pad_mm: {"_pad_mm_init": None},
    }  # fmt: skip
    for owner, values in faked.items():
        for name, value in values.items():
            fake = partial(lambda value, *args, **options: value, value)
            setattr(owner, name, staticmethod(fake) if isinstance(owner, type) else fake)
    torch.version.cuda = "13.0"
    driver = {"get_current_target": target, "get_current_device": 0, "get_device_interface": torch.cuda}
    triton.runtime.driver.set_active(SimpleNamespace(**{k: partial(lambda v, *_: v, v) for k, v in driver.items()}))


def numbers(seed: torch.Tensor, sample: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """In place of `uniform`, whose kernels are not a layer's."""
    return sample * position + seed


def tensor(data, device="cpu", make=torch.tensor, **options) -> torch.Tensor:
    """As torch.tensor, which makes no fake tensors on another device than the CPU; without the values."""
    made = make(data, device="cpu", **options)
    return torch.empty(made.shape, dtype=made.dtype, device=device)


def generate(case: Case) -> list[str]:
    """Run the steps of a case -> the code of each graph that was compiled."""
    args = ModelArgs(4096, case.layers, 32, case.groups, 128, 11008, 32000, 1 << 20)
    codes: list[str] = []

    def module_of(graph: GraphLowering) -> SimpleNamespace:
        codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=refuse, __file__="generated.py")

    def refuse(inputs: list) -> None:
        raise Generated

    torch.compiler.reset()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = Transformer(args).eval().requires_grad_(False)
            torch.set_default_dtype(torch.float32)
            join_linears(model)
        step = torch.compile(partial(decode, model, numbers), fullgraph=True, dynamic=False)
        for rows, length, slots in case.steps:
            with torch.device("cuda"):
                tokens = torch.zeros(rows, case.positions, dtype=torch.long)
                inputs = StepInput(tokens, tokens + length, tokens[:, 0].clone(), tokens[0, 0].clone())
            chosen = caches.chain_operator if case.triton else lambda *_: None
            with patch.object(torch, "tensor", tensor), patch.object(caches, "chain_operator", chosen):
                cache = KVCache.fork(KVCache.empty(args.kv_shape, 1, length, model.norm.weight), rows, slots, 256)
            mark_dynamic(inputs, cache)
            with patch.object(GraphLowering, "compile_to_module", module_of), suppress(Generated):
                step(inputs, cache)
    return codes


def launches(code: str) -> list[str]:
    """List the kernels that the code launches, in order."""
    body = code[code.index("def call(") : code.index("def get_args")]
    found = re.finditer(r"extern_kernels\.(\w+)\(|torch\.ops\.\w+\.(\w+)\.\w+\(|(triton_\w+)\.run\(", body)
    return [next(filter(None, each.groups())) for each in found]


def main() -> None:
    load_guard()
    fake_device()
    config = torch._inductor.config
    config.joint_graph_constant_folding, config.compile_threads, config.force_disable_caches = False, 1, True
    bifurcated_attention.has_fused = caches.has_fused = lambda device, dtype, head_dim: True
    found = [generate(Case(**fields)) for fields in json.load(sys.stdin)]
    json.dump([[{"launches": launches(code), "code": code} for code in codes] for codes in found], sys.stdout)


if __name__ == "__main__":
    main()
