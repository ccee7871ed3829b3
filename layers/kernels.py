"""Custom CPU ops: chain attention, int8/int4 linear, GEMV for one or two rows, and the sampler's random numbers.

Their C++ code and its design are in kernels.cpp. The reference is plain PyTorch, bifurcated_attention.py and
sampling.py, which runs if there is no compiler, the build fails, or dtype, device or head dimension are unsupported;
the report says so (`attention_kernel`). Everything else works without this file and the lines that call it.

The library is built on first use, by the compiler torch.compile would choose, into torch.compile's cache folder. It is
named by a hash of source, flags and CPU, so that other processes find it.

Shapes: N rows, S positions, H query heads, G key/value heads, L slots and R rows of one cache, D head dimension.
"""

import ctypes
import functools
import getpass
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import sampling
from bifurcated_attention import ScoreMod, differentiated
from layers.notices import Notice, showing

SOURCE = Path(__file__).with_name("kernels.cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC")
BUILD_SECONDS = 120  # timeout of the compiler

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # enum Type of kernels.cpp
LARGEST_HEAD_DIM = 256
NUMBERS_PER_THREAD = 1 << 15  # random numbers; the grain size of PyTorch's element-wise ops
NO_SUCH_ROW = 2  # in enum Status of kernels.cpp
STREAMED_ROWS = 2  # most rows of the GEMV; for more, packed weights are faster (docs/benchmarks.md)


@dataclass(frozen=True)
class Library:
    """The loaded ops, or None and a note that says why."""

    functions: ctypes.CDLL | None
    note: str


def cache_folder() -> Path:
    """The user's own folder in torch.compile's cache. Asking PyTorch for the latter would cost a second of imports."""
    user = os.getuid() if os.name == "posix" else getpass.getuser()
    default = Path(tempfile.gettempdir(), f"torchinductor_{user}")
    return Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default) / f"kernels-{user}"  # it may be shared by users


def check_own(path: Path) -> None:
    """Raise PermissionError if another user owns or can write the path, and so could choose the code that runs."""
    found = path.stat()
    if os.name == "posix" and (found.st_uid != os.getuid() or found.st_mode & 0o022):
        raise PermissionError(f"another user owns or can write {path}")


def cpu_flags() -> str:
    """CPU model and flags, on which a build with -march=native depends."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features", "CPU part", "model name"))]
    return "\n".join([platform.machine(), platform.processor(), *sorted(set(flags))])


def build(compiler: str, target: Path, *flags: str) -> None:
    """Compile kernels.cpp to `target`. Raises OSError or subprocess.SubprocessError."""
    target.parent.mkdir(0o700, parents=True, exist_ok=True)
    check_own(target.parent)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder, target.name)
        command = [compiler, *FLAGS, *flags, str(SOURCE), "-o", str(made)]
        with showing("building the CPU kernels (once)"):
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=BUILD_SECONDS)
        made.chmod(0o700)  # regardless of the umask: a library others can write is not loaded
        made.replace(target)  # atomic: another process may be building too


def compiler_name() -> str:
    """The C++ compiler that torch.compile would choose."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


@functools.cache
def library() -> Library:
    """Load the library, building it on first use."""
    compiler = compiler_name()
    try:
        key = "\0".join((SOURCE.read_text("utf-8"), compiler, *FLAGS, cpu_flags()))
        target = cache_folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
        if target.exists():
            with suppress(OSError, AttributeError):  # truncated or built for another system: rebuild
                return load(target)
        if not shutil.which(compiler):
            return Library(None, "no C++ compiler")
        build(compiler, target)
        return load(target)
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        why = f"not built: {reason(error)}"
        warnings.warn(f"kernels.cpp was {why}; using PyTorch's slower operators", Notice, stacklevel=2)
        return Library(None, why)


def reason(error: Exception) -> str:
    """Summarise why a build failed; for a compiler error, its first error line."""
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if "error" in line or "cannot find" in line]
        return f"{error.cmd[0]}: {lines[0]}" if lines else f"{error.cmd[0]} exited with status {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"{error.cmd[0]} took more than {BUILD_SECONDS} s"
    return str(error)


def load(path: Path) -> Library:
    """Load a built library. Raises OSError or AttributeError if it is damaged or another user can write it."""
    check_own(path.parent)
    check_own(path)
    functions = ctypes.CDLL(str(path))
    functions.attend.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_float, ctypes.c_float]
    functions.multiply.argtypes = [ctypes.c_void_p]
    functions.numbers.argtypes = [ctypes.c_void_p]
    functions.attend.restype = functions.multiply.restype = ctypes.c_int
    functions.numbers.restype = None
    return Library(functions, "kernels.cpp")


def takes(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the attention op supports such queries and is available. The first call may build it."""
    fits = head_dim % 2 == 0 and head_dim <= LARGEST_HEAD_DIM and dtype in (torch.float32, torch.bfloat16)
    return device.type == "cpu" and fits and library().functions is not None


def attention_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name the attention kernel used while decoding, for the report."""
    if takes(device, dtype, head_dim):
        return library().note
    wanted = device.type == "cpu" and library().functions is None
    return f"torch ({library().note})" if wanted else "torch"


class Part(NamedTuple):
    """One cache of a chain: k, v [R,G,L,D] and, if they are int8, k_scale, v_scale [R,G,L,1]. start [R]: position of
    each row's first slot. rows [N]: the cache row that each query row continues; None: its own, causally masked by
    position. length [R]: number of written slots; None: all. k_channel [R,G,1,D]: a further scale of int8 keys, per
    channel."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None
    start: Tensor
    rows: Tensor | None = None
    length: Tensor | None = None
    k_channel: Tensor | None = None


def attend(q: Tensor, parts: Sequence[Part], input_pos: Tensor, mod: ScoreMod | None) -> tuple[Tensor, Tensor]:
    """Attend from q [N,H,S,D] at input_pos [N,S] to all parts of a chain -> out [N,H,S,D] in q's dtype and its natural
    log-sum-exp, fp32 [N,H,S]; 0 and -inf if a query sees no key."""
    mod = mod or ScoreMod()
    window, softcap = mod.window or 0, mod.softcap or 0.0
    tensors = [tensor for part in parts for tensor in part]
    return torch.ops.bifurcated.attend(q, tensors, input_pos, mod.slopes, window, softcap)


class Chain(Protocol):
    """Attributes of a KVCache that attention reads. tensors: k, v and, if they are int8, their scales and the keys'
    channel scales, each for all layers. links: the ancestors; each has a cache, the index of the cache row that each
    of our rows continues, and the length: how many of its slots are written."""

    k: list[Tensor]
    start: Tensor

    @property
    def links(self) -> Sequence[Any]: ...

    @property
    def tensors(self) -> list[Tensor]: ...


def part(cache: Chain, layer: int, rows: Tensor | None = None, length: Tensor | None = None) -> Part:
    k, v, k_scale, v_scale, k_channel = (*cache.tensors[layer :: len(cache.k)], None, None, None)[:5]
    return Part(k, v, k_scale, v_scale, cache.start, rows, length, k_channel)  # type: ignore[arg-type]


def attend_chain(cache: Chain, layer: int, q: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
    """Attend from q [N,H,S,D] at input_pos [N,S] to a cache and all its ancestors -> [N,H,S,D]."""
    ancestors = [part(link.cache, layer, link.index, link.length) for link in cache.links]
    return attend(q, [part(cache, layer), *ancestors], input_pos, mod)[0]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pair(k: Tensor | None, v: Tensor | None) -> list[int]:
    """Addresses and strides of k and v, in the order kernels.cpp expects. k, v [R,G,L,...]"""
    if k is None or v is None:
        return [0] * 8
    of_k, of_v = k.stride(), v.stride()
    return [k.data_ptr(), v.data_ptr(), of_k[0], of_v[0], of_k[1], of_v[1], of_k[2], of_v[2]]


def check_gradients(name: str, *tensors: Tensor | None) -> None:
    """Raise NotImplementedError if autograd would need gradients of the op."""
    if differentiated(*tensors):
        raise NotImplementedError(f"{name} has no gradients: call it under torch.no_grad()")


def check(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """Raise ValueError if a tensor, unless it is left out, is not as kernels.cpp expects it."""
    if tensor is None:
        return
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        found = f"{tensor.dtype} {list(tensor.shape)}" + ", not contiguous" * (not tensor.is_contiguous())
        raise ValueError(f"{name} is {found}: expected {dtype} {list(shape)}, contiguous")


def check_part(part: Part, q: Tensor) -> None:
    """Raise ValueError if a part is not as kernels.cpp expects it for queries q [N,H,S,D]."""
    k, v, k_scale, v_scale, start, rows, length, k_channel = part
    R, G, L, D = k.shape
    N, H, _, head_dim = q.shape
    if head_dim != D or v.shape != k.shape or G == 0 or H % G or (rows is None and R != N):
        raise ValueError(f"q {list(q.shape)} does not fit k {list(k.shape)} and v {list(v.shape)}")
    if k.dtype not in (q.dtype, torch.int8) or v.dtype != k.dtype:
        raise ValueError(f"keys are {k.dtype} and values {v.dtype}: expected both in q's {q.dtype}, or in int8")
    if k.stride(3) != 1 or v.stride(3) != 1 or k.stride(2) % 2 and k.dtype == torch.bfloat16:
        raise ValueError(
            f"keys have strides {k.stride()}, values {v.stride()}: expected 1 last, in bfloat16 after an even one"
        )
    for scale in (k_scale, v_scale) if k.dtype == torch.int8 else ():
        if scale is None or scale.dtype != q.dtype or scale.shape != (R, G, L, 1):
            raise ValueError(f"int8 needs scales {[R, G, L, 1]} in {q.dtype}")
    check("start", start, torch.long, R)
    check("rows", rows, torch.long, N)
    check("length", length, torch.long, R)
    check("k_channel", k_channel, q.dtype, R, G, 1, D)


def run_attend(
    q: Tensor, tensors: list[Tensor | None], input_pos: Tensor, slopes: Tensor | None, window: int, softcap: float
) -> tuple[Tensor, Tensor]:
    """CPU implementation of the `attend` op. tensors: the fields of all parts, concatenated."""
    check_gradients("attention in kernels.cpp", q, slopes, *tensors)
    size = len(Part._fields)
    parts = [Part(*tensors[i : i + size]) for i in range(0, len(tensors), size)]  # type: ignore[arg-type]
    out, lse = attend_shape(q)
    functions = library().functions
    assert functions is not None, "called without the library"
    N, H, S, D = q.shape
    odd = D % 2 and q.dtype == torch.bfloat16
    if q.dtype not in (torch.float32, torch.bfloat16) or odd or D > LARGEST_HEAD_DIM:
        most = f"and a head dimension up to {LARGEST_HEAD_DIM}, in bfloat16 an even one"
        raise ValueError(f"queries are {q.dtype} [..., {D}]: expected float32 or bfloat16 {most}")
    q, input_pos = q if q.stride(3) == 1 else q.contiguous(), input_pos.contiguous()
    check("input_pos", input_pos, torch.long, N, S)
    check("slopes", slopes, torch.float32, H)
    call = [q.data_ptr(), *q.stride()[:3], out.data_ptr(), lse.data_ptr(), input_pos.data_ptr(), address(slopes)]
    call += [N, H, S, D, parts[0].k.shape[1], window, TYPES[q.dtype], torch.get_num_threads(), len(parts)]
    of_parts = len(call)
    for each in parts:
        check_part(each, q)
        k, v, _, _, *indices = each
        call += [*pair(k, v), *pair(each.k_scale, each.v_scale), *map(address, indices)]
        call += [k.shape[0], k.shape[2], TYPES[k.dtype]]
    given = (ctypes.c_int64 * len(call))(*call)
    first = ctypes.addressof(given)
    status = functions.attend(first, first + 8 * of_parts, D**-0.5, softcap)
    if status == NO_SUCH_ROW:
        sizes = " and ".join(
            f"{each.rows.tolist()} in a cache of {len(each.k)} rows" for each in parts if each.rows is not None
        )
        raise IndexError(f"row index out of range: {sizes}")
    if status:
        raise MemoryError(f"out of memory in attention of {N} rows at {S} positions")
    return out, lse


def attend_shape(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Allocate the outputs; also the meta implementation. The heads of a position are adjacent, for the next linear."""
    N, H, S, D = q.shape
    return q.new_empty(N, S, H, D).transpose(1, 2), q.new_empty(N, H, S, dtype=torch.float32)


def multiplies(dtype: torch.dtype, inputs: int, groupsize: int) -> bool:
    """Return whether the CPU linear ops support weights of this dtype and shape and are available."""
    fits = dtype in (torch.float32, torch.bfloat16) and inputs % 32 == groupsize % 32 == 0
    return fits and library().functions is not None


def run_streamed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x [...,in] by weight [out,in] of the same dtype -> [...,out]. Uses the GEMV for few rows, which are
    memory-bound; for more, PyTorch's linear is faster."""
    check_gradients("streamed_linear", x, weight, bias)
    fits = x.dtype == weight.dtype and weight.is_contiguous() and multiplies(x.dtype, x.shape[-1], x.shape[-1])
    if x.numel() > STREAMED_ROWS * x.shape[-1] or not fits:
        return F.linear(x, weight, bias)
    return run_linear(x, weight, None, None, bias)


def run_linear(x: Tensor, values: Tensor, scales: Tensor | None, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """Multiply x [...,in] by an Int8Weight (linear.py), an Int4Weight if zeros are given, or a plain weight if scales
    are None -> [...,out]. Sums are in fp32."""
    functions = library().functions
    assert functions is not None, "called without the library"
    check_gradients("linear in kernels.cpp", x, values, scales, zeros, bias)
    outputs, inputs = values.shape[0], x.shape[-1]
    group = inputs if zeros is None else inputs // zeros.shape[1]
    if not multiplies(x.dtype, inputs, group):
        raise ValueError(
            f"x is {x.dtype} [..., {inputs}] in groups of {group}: expected float32 or bfloat16 in multiples of 32"
        )
    if scales is None:
        check("weight", values, x.dtype, outputs, inputs)
    else:
        kind, width, *groups = (torch.int8, inputs) if zeros is None else (torch.uint8, inputs // 2, inputs // group)
        check("values", values, kind, outputs, width)
        check("scales", scales, torch.bfloat16, outputs, *groups)
        check("zeros", zeros, torch.bfloat16, outputs, *groups)
    product, x = linear_shape(x, values), x.contiguous()
    tensors = [x.data_ptr(), product.data_ptr(), values.data_ptr(), address(scales), address(zeros)]
    sizes = [x.numel() // inputs, outputs, inputs, group, TYPES[x.dtype], torch.get_num_threads()]
    if functions.multiply((ctypes.c_int64 * 11)(*tensors, *sizes)):
        raise MemoryError(f"out of memory in a linear layer of {sizes[0]} rows")
    return product if bias is None else product.add_(bias)


def linear_shape(x: Tensor, values: Tensor, *_: object) -> Tensor:
    """Allocate the output; also the meta implementation."""
    return x.new_empty(*x.shape[:-1], values.shape[0])


def token_uniforms(rows: Tensor, tokens: Tensor) -> Tensor:
    """sampling.token_uniforms, by the C++ kernel if it is available."""
    if rows.device.type != "cpu" or (functions := library().functions) is None:
        return sampling.token_uniforms(rows, tokens)
    keys = sampling.token_keys(rows)  # [N]
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()  # [N,K]
    assert keys.dtype == tokens.dtype == torch.int64 and keys.is_contiguous() and keys.shape == tokens.shape[:1]
    made = torch.empty(tokens.shape, dtype=torch.float64)
    threads = torch.get_num_threads() if made.numel() > NUMBERS_PER_THREAD else 1
    call = [keys.data_ptr(), tokens.data_ptr(), made.data_ptr(), *tokens.shape, tokens.stride(0), threads]
    functions.numbers((ctypes.c_int64 * len(call))(*call))
    return made


OPERATORS = torch.library.Library("bifurcated", "FRAGMENT")
OPERATORS.define(
    "attend(Tensor q, Tensor?[] tensors, Tensor input_pos, Tensor? slopes, int window, float softcap) "
    "-> (Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),  # or a compiled step would copy the keys and values that it has written
)
OPERATORS.impl("attend", run_attend, "CPU")
OPERATORS.impl("attend", attend_shape, "Meta")
OPERATORS.define("quantised_linear(Tensor x, Tensor values, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor")
OPERATORS.impl("quantised_linear", run_linear, "CPU")
OPERATORS.impl("quantised_linear", linear_shape, "Meta")
OPERATORS.define("streamed_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
OPERATORS.impl("streamed_linear", run_streamed, "CPU")
OPERATORS.impl("streamed_linear", linear_shape, "Meta")
