"""Planner: device, dtype, memory, packing and compilation, decided from plain values before anything is loaded.

Temporary memory besides weights, keys and values (Workspace) is whatever grows with rows, context or vocabulary on the
path that will run: kernels.cpp and PyTorch's fused kernels hold no scores, partial_attention holds those of one head, a
compiled step those of all heads. Not counted: buffers internal to libraries, freed blocks that an allocator keeps
(glibc: those below 32 MiB), a draft's workspace (mostly below its target's), and weights dequantised for a product.

Shapes: N rows, S positions, H query heads, G key/value heads, P = H // G query heads per key/value head, T context
length, L slots of one cache, D head dimension, V vocabulary; R rows of keys.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Self

import torch

from bifurcated_attention import SCORES_AT_ONCE, has_fused
from engine.request import Workload
from layers.kernels import compiler_name, takes
from layers.linear import multiplies_bfloat16, pays_to_pack
from layers.moe import MoEConfig
from loading.files import counted
from model import ModelArgs, Transformer
from sampling import LOGITS_AT_ONCE


@dataclass(frozen=True)
class Workspace:
    """Temporary memory of a workload. may_compile: allow for a compiled step as well as an eager one."""

    args: ModelArgs
    work: Workload
    device: torch.device
    dtype: torch.dtype
    may_compile: bool

    def reading(self, linked: bool = False) -> int:
        """Return the bytes for prefill in chunks, or for the conversion to int8 after it, whichever is larger. linked:
        the prompt continues a shared context, which takes partial attention instead of SDPA."""
        args, work = self.args, self.work
        scaling = args.rope_scaling
        whole = scaling is not None and scaling.by_length  # as in Engine.prefill
        chunk = choose_chunk(work.prefill_chunk, args, self.device, self.dtype)
        chunk = work.context if whole else min(chunk, work.context)
        held = chunk * self.activations
        if not self.has_kernel and not (self.is_fused and not any(args.windows)):
            near = max(work.context if window is None else window for window in args.windows or [None])
            seen = min(work.context, near + chunk)
            held += chunk * seen * self.masked(chunk < work.context) + self.by_sdpa(1, chunk, seen)
        if linked and not self.has_kernel and not self.is_fused:
            held += self.scores(1, chunk, work.context)
        # int8: two fp32 copies of the keys, or values, of one layer.
        return max(held, 8 * work.context * args.n_kv_head * args.head_dim if work.kv_dtype == "int8" else 0)

    def decoding(self, rows: int, contexts: int = 1, folded: int = 0) -> int:
        """Return the bytes for a step of N rows after R contexts. folded: rows, padding included, in the product with
        the contexts."""
        tokens = rows * (1 + self.work.drafted)  # [N,S]
        attention = self.attention(rows, contexts, folded or rows) + tokens * self.activations
        seen = rows * self.args.vocab_size * (self.work.sampling.repetition_penalty != 1)  # bool [N,V]
        held = seen + max(attention, self.logits(tokens))
        return held * (2 if self.device.type == "cuda" else 1)  # a recorded step also has its own memory pool

    @property
    def has_kernel(self) -> bool:
        return takes(self.device, self.dtype, self.args.head_dim)

    @property
    def layer_token(self) -> int:
        """Bytes of one token's keys and values in one layer."""
        return 2 * self.args.n_kv_head * self.args.head_dim * self.dtype.itemsize

    @property
    def activations(self) -> int:
        """Bytes per token in one layer: queries, rotated queries in fp32, attention output and the feed-forward part,
        summed since an allocator may keep the former."""
        args, mixture = self.args, self.args.mixture
        width = mixture.used * (mixture.width + args.dim) + mixture.shared if mixture else args.hidden_dim
        return 24 * args.n_head * args.head_dim + (3 * width + 4 * args.dim) * self.dtype.itemsize

    def attention(self, rows: int, contexts: int, folded: int) -> int:
        """Return the bytes for attention in one layer. Dequantising an int8 context peaks at 3/2 of its K/V."""
        work, positions = self.work, 1 + self.work.drafted
        total, layer = work.context + work.own_slots, work.context * self.layer_token
        if work.attention == "bifurcated":
            if self.has_kernel:
                return 0
            widened = contexts * layer if work.kv_dtype == "int8" else 0
            scores = folded * positions * work.context * self.masked(False)
            if not self.is_fused:
                context = self.scores(contexts, folded * positions, work.context)
                scores += max(context, self.scores(rows, rows * positions, work.own_slots))
            return max(3 * widened // 2, widened + scores)
        scores = rows * positions * total * self.masked(True) + self.by_sdpa(rows, rows * positions, total)
        if work.attention == "expanded":  # all keys of a layer, contiguous
            return rows * total * self.layer_token + scores
        return max(layer, scores)  # or one layer of the row being copied

    @property
    def is_scored(self) -> bool:
        """Whether scores are modified in a way that PyTorch's attention does not support: ALiBi or a soft cap."""
        return self.args.alibi or self.args.score_softcap is not None

    @property
    def is_fused(self) -> bool:
        return not self.is_scored and has_fused(self.device, self.dtype, self.args.head_dim)

    def masked(self, by_sdpa: bool) -> int:
        """Return the mask bytes per query and key: windows as int64 distances and bools; ALiBi biases of all heads,
        computed and reordered; by_sdpa: PyTorch's mask as bool and in the network's dtype."""
        windows = 10 if any(self.args.windows) else 0
        return windows + 8 * self.args.n_head * self.args.alibi + (1 + self.dtype.itemsize) * by_sdpa

    def by_sdpa(self, cached: int, queries: int, slots: int) -> int:
        """Return the bytes for cache.sdpa: scores if it calls partial_attention; on CUDA with grouped heads and a mask,
        which no fused kernel supports, scores and K/V repeated for each head."""
        args = self.args
        if self.is_scored:
            return self.scores(cached, queries, slots)
        if self.device.type != "cuda" or args.n_head == args.n_kv_head:
            return 0
        return 8 * slots * args.n_head * (queries + cached * args.head_dim)

    def scores(self, cached: int, queries: int, slots: int) -> int:
        """Return the bytes for partial_attention: N*S `queries` per head, L `slots` of R `cached` rows."""
        args, wide = self.args, self.dtype.itemsize
        of_head = queries * args.n_head // args.n_kv_head * slots  # [N,P,S,L]
        at_once = args.n_kv_head * of_head
        if not self.may_compile:
            at_once = min(at_once, max(of_head, SCORES_AT_ONCE[self.device.type]))
        # Scores in fp32; for bfloat16 also a product in it, and that product widened to be added.
        held = at_once * (10 if self.dtype == torch.bfloat16 else 4)
        # Copies of keys: contiguous for a compiled product; in fp32 for float16 or a single query.
        single = wide == 2 and (self.dtype == torch.float16 or queries * args.n_head == cached * args.n_kv_head)
        copied = max(wide * self.may_compile, 4 * single)
        return held + cached * slots * args.n_kv_head * args.head_dim * copied

    def logits(self, tokens: int) -> int:
        """Return the bytes for the logits of `tokens` tokens [N*S,V], and for drawing in chunks. Measured per logit:
        log-sum-exp in fp32; probabilities and cumulative sums in fp64; without top_k, all sorted for top_p."""
        args, sampling = self.args, self.work.sampling
        held = tokens * args.vocab_size * self.dtype.itemsize * (1 if args.logit_softcap is None else 3)
        few = sampling.temperature == 0 or sampling.top_k is not None
        drawn = 10 if few else 26 if sampling.top_p is None else 56
        if sampling.repetition_penalty != 1:
            drawn += 14
            held += tokens * args.vocab_size * (self.work.drafted > 0)  # seen tokens, for each position
        return held + drawn * min(tokens * args.vocab_size, max(args.vocab_size, LOGITS_AT_ONCE[self.device.type]))


@dataclass(frozen=True)
class WeightSizes:
    """Weight sizes of a network in bytes. per_step: weights that a decode step reads, all but an untied embedding.
    experts: the expert weights among them, of which a step reads only those that its rows are routed to. tied: the
    part of an embedding that is the output head too, of which a packed copy may be made."""

    total: int
    per_step: int
    experts: int = 0
    tied: int = 0

    def read(self, mixture: MoEConfig | None, rows: int) -> int:
        """Return the expected weight bytes read by a step of `rows` rows, assuming uniform routing."""
        unread = 0 if mixture is None else self.experts * (1 - mixture.expected(rows) / mixture.experts)
        return self.per_step - round(unread)

    def with_packed(self, tied: int) -> Self:
        """Add a packed copy of the tied output, of `tied` bytes; 0: rule such a copy out."""
        return replace(self, total=self.total + tied, tied=0)


def weigh(model: Transformer, parts: int = 1) -> WeightSizes:
    """Return the weight sizes of a network, in memory or on the meta device. parts: as in sum_weight_sizes."""
    tensors = dict(chain(model.named_parameters(), model.named_buffers()))
    if model.args.tied_output:  # the embedding, or a view of it
        tensors.pop("output.weight", None)
    return sum_weight_sizes({name: tensor.nbytes for name, tensor in tensors.items()}, model.args, parts)


def sum_weight_sizes(sizes: Mapping[str, int], args: ModelArgs, parts: int = 1) -> WeightSizes:
    """Sum tensor sizes. sizes: bytes of each tensor, by name (checkpoint.weight_sizes). parts: ranks among which the
    output layer is divided, each of which holds the whole embedding. A step reads a packed copy instead of its weight,
    of the same size."""
    total, mixture = sum(sizes.values()), args.mixture
    read = {name: size for name, size in sizes.items() if not name.endswith((".packed", ".packed_scales"))}
    experts = 0 if mixture is None else sum(size for name, size in read.items() if mixture.has(name))
    embedding = sizes["tok_embeddings.weight"]
    tied = embedding // parts if args.tied_output else 0
    return WeightSizes(total, sum(read.values()) - embedding + tied, experts, tied)


@dataclass(frozen=True)
class Plan:
    """Execution plan of a workload. Sizes are in bytes. rows_at_once: samples decoded together; others take the rows of
    those that have finished."""

    workload: Workload
    weights: WeightSizes
    context: int
    context_while_read: int
    decoded_per_sample: int
    copied_per_sample: int  # each row's copy of the context in the contiguous layout
    space: Workspace
    unshared: int
    available: int
    rows_at_once: int
    compiled: bool
    compile_reason: str
    packed: bool
    packed_tied: int  # packed copy of a tied output
    needed: int  # peak memory: the larger of prefill and of decoding

    @property
    def decoded(self) -> int:
        """Decoded keys and values of all rows at full length."""
        return self.decoded_per_sample * self.rows_at_once

    @property
    def workspace(self) -> int:
        """Scores, logits and context copies of a step."""
        return self.space.decoding(self.rows_at_once) + self.copied_per_sample * self.rows_at_once

    @property
    def per_step(self) -> int:
        """Bytes read by a decode step halfway: weights, the context's keys and values once, half of the decoded."""
        return self.weights.read(self.space.args.mixture, self.rows_at_once) + self.context + self.decoded // 2

    @property
    def experts_read(self) -> str:
        """Expected number of experts read per layer, as text."""
        if (mixture := self.space.args.mixture) is None:
            return ""
        number = mixture.expected(self.rows_at_once)
        return f", {number:.1f} of {mixture.experts} experts per layer, assuming uniform routing"

    def __str__(self) -> str:
        rows = f"{self.rows_at_once} of {counted(self.workload.num_samples, 'sample')}"
        twice = f"  and {human(self.packed_tied)} for a packed copy of the tied output" if self.packed_tied else ""
        return "\n".join(
            (
                f"weights                     {human(self.weights.total):>10}{twice}",
                f"context K/V, held once      {human(self.context):>10}  {human(self.context_while_read)} in prefill",
                f"decoded K/V                 {human(self.decoded):>10}  {rows} at once",
                f"scores, logits, copies      {human(self.workspace):>10}  {human(self.space.reading())} in prefill",
                f"an unshared K/V cache       {human(self.unshared):>10}  with a copy of the context for each sample",
                f"read per step               {human(self.per_step):>10}  at half length{self.experts_read}",
                f"available                   {human(self.available):>10}",
            )
        )


def held_context(args: ModelArgs, work: Workload, dtype: torch.dtype) -> int:
    """Return the bytes of the context's keys and values after prefill."""
    numbers = work.context * args.kv_values_per_token
    if work.kv_dtype != "int8":
        return numbers * dtype.itemsize
    scales = numbers * dtype.itemsize // args.head_dim
    channels = args.kv_values_per_token // 2 * dtype.itemsize  # the keys' per-channel scales
    return numbers + scales + channels


def plan_run(
    args: ModelArgs,
    weights: WeightSizes,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype,
    available: int,
    compile: bool | None = None,
) -> Plan:
    """Plan a workload. compile None: compile if it pays. Raises ValueError if not one sample fits `available`."""
    context, token = work.context, args.kv_values_per_token * dtype.itemsize
    own = work.own_slots
    total, decoded = context + own, own * (token + work.draft_token)
    copied = context * token if work.attention == "contiguous" else 0
    space = Workspace(args, work, device, dtype, compile is not False and not missing_compiler(device))
    sizes = context * token, held_context(args, work, dtype)
    read, held = (size + context * work.draft_token for size in sizes)  # during prefill, and after it

    scaling = args.rope_scaling
    anew = scaling is not None and scaling.crosses(context, total)  # recomputes the cache while the old one is held
    longer = replace(space, work=replace(work, context=scaling.original_context)) if scaling and anew else space

    # On a CPU reserved memory takes none until written, and writing it frees the prefilled context.
    stored = held if work.kv_dtype == "int8" and device.type == "cuda" else 0

    def needed(rows: int) -> int:
        most = max(read + stored + space.reading(), held + rows * (decoded + copied) + space.decoding(rows))
        if anew:
            most = 3 * read + (rows + 1) * (decoded + copied) + max(longer.reading(), space.decoding(rows))
        return weights.total + most

    if needed(1) > available:
        raise ValueError(
            f"one sample needs {human(needed(1))} (weights {human(weights.total)}, context K/V {human(read)} during "
            f"prefill), but {human(available)} is available: shorten the prompt, or raise --max_memory"
        )
    rows = bisect_right(range(1, work.num_samples + 1), available, key=needed)
    steps = work.runs * -(-work.num_samples // rows) * work.max_new_tokens
    step_bytes = weights.read(args.mixture, rows) + held + decoded * rows // 2
    seconds = estimate_step(args, device, dtype, total - own / 2, rows, step_bytes)
    compiled, why = choose_compile(compile, device, args.n_layer, steps, seconds)
    packed = choose_packing(device, dtype, args, steps, rows * (1 + work.drafted))
    packed_tied = weights.tied if packed and weights.tied <= available - needed(rows) else 0
    return Plan(
        workload=work,
        weights=weights,
        context=held,
        context_while_read=read,
        decoded_per_sample=decoded,
        copied_per_sample=copied,
        space=space,
        unshared=work.num_samples * total * token,
        available=available,
        rows_at_once=rows,
        compiled=compiled,
        compile_reason=why,
        packed=packed,
        packed_tied=packed_tied,
        needed=needed(rows) + packed_tied,
    )


def longest_context(
    args: ModelArgs,
    weights: WeightSizes,
    work: Workload,
    device: torch.device,
    dtype: torch.dtype,
    available: int,
    compile: bool | None,
) -> int:
    """Return the most tokens, prompt and new, that fit the model and, for one sample of this workload, the memory."""
    least, most = work.max_new_tokens, max(work.max_new_tokens, args.context_limit)  # `least` is assumed to fit
    while least < most:
        total = (least + most + 1) // 2
        try:
            context = total - work.max_new_tokens
            plan_run(args, weights, replace(work, context=context, num_samples=1), device, dtype, available, compile)
            least = total
        except ValueError:
            most = total - 1
    return min(least, args.context_limit)


def out_of_memory(error: BaseException, flags: str = "--max_memory, -n or --prefill_chunk") -> ValueError | None:
    """Turn an out-of-memory error into a ValueError naming the flags to lower; None for any other error. On a CPU
    PyTorch raises a RuntimeError."""
    told = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
    if not told:
        return None
    why = next(iter(str(error).splitlines()), "") or "out of memory"
    return ValueError(f"{why}: lower {flags}")


def human(size: float) -> str:
    """Return a human-readable size, in powers of 1000."""
    for unit in ("B", "KB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"


UNKNOWN_FREE_BYTES = 1 << 40  # free bytes assumed on a system that does not report them


def available_memory(device: torch.device, processes: int = 1) -> int:
    """Return the free bytes on the device; on a CPU, within the container's limit (control groups, version 2) and
    divided by the `processes` that share it."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_on_cpu() // processes


def free_on_cpu() -> int:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):  # e.g. Windows: give --max_memory
            return UNKNOWN_FREE_BYTES
    lines = meminfo.read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").exists() and (limit := (group / "memory.max").read_text().strip()).isdigit():
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(statistics["inactive_file"])  # file cache is evictable
        free = min(free, int(limit) - used)
    return free


def keep_freed_memory() -> None:
    """Make glibc keep large blocks freed by one step for the next, for the rest of this process.

    By default glibc returns them to the system, and every step pays for page faults on fresh ones: at N = 64 and a
    context of 4096 a third of a compiled step, whose scores are one block (docs/benchmarks.md). The setting is
    process-wide, so `main` calls this and a library does not. No effect without glibc.
    """
    if (mallopt := libc("mallopt")) is not None:
        mallopt(ctypes.c_int(-3), ctypes.c_int(32 << 20))  # M_MMAP_THRESHOLD, at its maximum
        mallopt(ctypes.c_int(-1), ctypes.c_int(2**31 - 1))  # M_TRIM_THRESHOLD


def peak_memory(device: torch.device) -> tuple[int, int | None]:
    """Return this process's own peak bytes on the device, and the bytes of mapped files resident now; None for the
    latter if the system does not separate the two, and the peak then covers both.

    Linux reports the joint peak. Pages of files stay resident, so they were part of it, except those read afterwards.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), None
    if os.name != "posix":
        return 0, None
    status = Path("/proc/self/status")
    pages = dict(re.findall(r"^(\w+):\s+(\d+) kB", status.read_text(), re.MULTILINE)) if status.exists() else {}
    if not {"VmHWM", "RssAnon", "RssFile", "RssShmem"} <= pages.keys():
        import resource  # not available on every system

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024), None
    peak, own, *mapped = (1024 * int(pages[name]) for name in ("VmHWM", "RssAnon", "RssFile", "RssShmem"))
    return max(own, peak - sum(mapped)), sum(mapped)


def release_freed_memory(device: torch.device) -> None:
    """Return freed memory to the system, between phases that need blocks of other sizes."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif (malloc_trim := libc("malloc_trim")) is not None:
        malloc_trim(ctypes.c_size_t(0))


def libc(name: str) -> Callable[..., int] | None:
    """Return a function of this process's C library; None if it has none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None


def choose_device(name: str) -> torch.device:
    """Resolve --device. Raises ValueError if it is not available."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"unknown device {name!r}: use cpu or cuda") from error
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device {name!r} is not supported: use cpu or cuda")
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise ValueError(
            f"device {name!r} not found ({torch.cuda.device_count()} CUDA devices available): use another, or cpu"
        )
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Resolve --dtype: auto is bfloat16, except on a CPU without instructions for it. Raises ValueError if unknown."""
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError(f"unknown dtype {name!r}: use auto, bfloat16, float16 or float32")
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if device.type == "cuda" or multiplies_bfloat16() else torch.float32


def choose_chunk(asked: int | None, args: ModelArgs, device: torch.device, dtype: torch.dtype) -> int:
    """Return the prompt tokens per prefill step, unless `asked`. On CUDA a step launches some 70 kernels a layer for
    any number of tokens, so it takes many if fused attention stores no scores or masks."""
    if asked is not None:
        return asked
    plain = not (args.alibi or args.score_softcap is not None or any(args.windows))
    return 4096 if plain and has_fused(device, dtype, args.head_dim) else 512


def choose_packing(device: torch.device, dtype: torch.dtype, args: ModelArgs, steps: int, rows: int) -> bool:
    """Return whether to pack the weights for `steps` decode steps of `rows` rows (or positions of one row), as it pays
    for the feed-forward weights. In a mixture the rows per expert count, since most weights are the experts'."""
    seen = rows if args.mixture is None else rows * args.mixture.used // args.mixture.experts
    return pays_to_pack((args.hidden_dim, args.dim), device, dtype, seen, steps)


@dataclass(frozen=True)
class StepCosts:
    """Seconds. Compiling a step: compile, per_layer a layer; an eager step: layer a layer, byte a byte read.
    saved: fraction of it that compiling cuts."""

    compile: float
    per_layer: float
    layer: float
    byte: float
    saved: float


# By device type; rough values suffice. CPU: measured on 2 cores with AVX-512 and a cold compile cache. CUDA: estimated,
# not measured: for a 7B model on an H100 that it compiles in 45 s with a cold cache, and saves 3 to 4 ms of a recorded
# step of 11 ms, after 8,192 tokens at N = 1.
STEP_COSTS = {
    "cpu": StepCosts(compile=10.0, per_layer=3.0, layer=0.0006, byte=1 / 15e9, saved=0.25),
    "cuda": StepCosts(compile=13.0, per_layer=1.0, layer=0.0001, byte=1 / 2.2e12, saved=0.3),
}
# Seconds of a multiplication or an addition in an eager step; True: native bfloat16, or CUDA, which is estimated too.
EAGER_PER_OPERATION = {("cpu", True): 1 / 400e9, ("cpu", False): 1 / 100e9, ("cuda", True): 1 / 350e12}


def step_operations(args: ModelArgs, context: float, rows: int) -> float:
    """Count the multiplications and additions of one step: each matrix weight once per row, and attention."""
    attention = args.n_head * args.head_dim
    width = args.mixture.used * args.mixture.width + args.mixture.shared if args.mixture else args.hidden_dim
    per_layer = args.dim * (2 * attention + 2 * args.n_kv_head * args.head_dim + 3 * width)
    weights = args.n_layer * per_layer + args.dim * args.vocab_size
    return 2 * rows * (weights + 2 * args.n_layer * attention * context)


def estimate_step(
    args: ModelArgs, device: torch.device, dtype: torch.dtype, context: float, rows: int, step_bytes: int
) -> float:
    """Estimate the seconds of an eager step of `rows` rows that reads step_bytes, after `context` tokens."""
    fast, costs = device.type == "cuda" or dtype == torch.bfloat16 and multiplies_bfloat16(), STEP_COSTS[device.type]
    operations = step_operations(args, context, rows) * EAGER_PER_OPERATION[device.type, fast]
    return args.n_layer * costs.layer + step_bytes * costs.byte + operations


def missing_compiler(device: torch.device) -> str:
    """Return what torch.compile would miss: a C++ compiler, Python.h, or on CUDA Triton; empty if nothing."""
    if not shutil.which(compiler_name()) or not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return "C++ compiler or no Python.h"
    return "Triton" if device.type == "cuda" and importlib.util.find_spec("triton") is None else ""


def choose_compile(
    asked: bool | None, device: torch.device, n_layer: int, steps: int, step_seconds: float
) -> tuple[bool, str]:
    """Return whether to compile the decode step, and why: if it should pay within this run, unless asked otherwise.

    steps: decode steps of the run; step_seconds: time of an eager one. The estimate uses no clock, so that the same
    command always takes the same path.
    """
    if asked is False:
        return False, "--no-compile"
    if missing := missing_compiler(device):
        return False, f"no {missing} found: running eagerly"
    if asked:
        return True, "--compile"
    costs = STEP_COSTS[device.type]
    decode, cost = steps * step_seconds, costs.compile + n_layer * costs.per_layer
    return (
        decode * costs.saved > cost,
        f"auto: {steps} steps take about {decode:.0f} s eagerly, compiling about {cost:.0f} s",
    )
