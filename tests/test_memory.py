"""The memory promise, at the shape it is made for. Oracle: the kernel's own count of the process's resident pages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, slow
from transformers import LlamaConfig, LlamaForCausalLM

from layers.kernels import library

SCRIPT = """
import re, sys
from dataclasses import replace
from pathlib import Path
import torch
sys.path.insert(0, {scripts!r})
from benchmark import SHAPES, random_model
from engine.engine import Engine
from engine.runner import Monitor
from engine.plan import release_freed_memory
from engine.request import Request, Sampling

CPU = torch.device("cpu")

class Trim(Monitor):  # as the command line does
    def prefilled(self):
        release_freed_memory(CPU)

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

args = replace(SHAPES["stories110M"], n_layer={layers}, hidden_dim=256)  # what is measured is beyond the weights
engine = Engine(random_model(args, CPU, torch.{dtype}), compile=False)
engine.packed = True  # a packed weight is a copy: what is held beyond the weights is to be seen
def run(context, n, length):
    request = Request(n, length, Sampling(0.8, top_k=200), seed=0, prefill_chunk=512)
    engine.generate([token % args.vocab_size for token in range(context)], request, Trim())
run(600, 64, 3)  # loads the code that PyTorch loads on first use
release_freed_memory(CPU)  # nothing that was freed is left to be used unseen
Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = resident("VmRSS")
run(4096, 64, 64)
print(resident("VmHWM") - before)
"""


@slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the peak")
def test_memory_beyond_the_weights_is_the_context_once_and_the_decoded_part():
    """N = 64, context 4096, 64 new tokens: at most 1.15 x (context K/V once + decoded K/V). In fp32, which every CPU
    is fast in."""
    layers = 6
    script = SCRIPT.format(scripts=str(ROOT / "scripts"), dtype="float32", layers=layers)
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    token = 2 * layers * 768 * 4
    assert int(result.stdout) <= 1.15 * (4096 + 64 * 64) * token


PLANNED = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from layers import kernels
from engine.engine import Engine
from engine.runner import Monitor
from engine.scheduler import Given
from model import ModelArgs, Transformer
from engine.plan import peak_memory, release_freed_memory
from engine.request import Request, Sampling

CPU, library = torch.device("cpu"), kernels.library()

def reset():
    release_freed_memory(CPU)
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(CPU)[0]

class Phases(Monitor):
    def prefilled(self):
        release_freed_memory(CPU)
        self.read = peak_memory(CPU)[0]
        Path("/proc/self/clear_refs").write_text("5")

def run(engine, request, length, is_read):
    prompt, phases = [token % engine.args.vocab_size for token in range(length)], Phases()
    before, run = reset(), engine.single(prompt, request, phases)
    if is_read:
        list(run.run())
    else:
        context = engine.empty_cache(length)
        [tensor.fill_(0.01) for tensor in context.tensors]
        list(run.run(given=Given(context, torch.zeros(1, engine.args.dim, dtype=engine.dtype))))
    return run.plan, phases.read - before, peak_memory(CPU)[0] - before

for name, by_kernel, length, n, shape, fields in json.loads(sys.argv[1]):
    kernels.library = lambda: library if by_kernel else kernels.Library(None, "off")
    args = ModelArgs(64, *shape, 1 << 20)
    dtype = getattr(torch, fields.pop("dtype", "float32"))
    model = Transformer(args).to(dtype).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.05)
    engine = Engine(model, compile=False)
    engine.packed, engine.available = True, 1 << 40  # a packed weight is a copy, of weights
    sampling, is_read = Sampling(**fields.pop("sampling", {"top_k": 200})), fields.pop("is_read", False)
    request = Request(n, 2, sampling, **fields)
    run(engine, replace(request, num_samples=min(n, 2)), 70, is_read)  # loads the code that PyTorch loads on first use
    plan, read, peak = run(engine, request, length, is_read)
    of_read = plan.context_while_read + n * plan.copied_per_sample + is_read * plan.space.reading()
    of_read = max(of_read, plan.needed - plan.weights.total) if fields.get("kv_dtype") else of_read
    print(json.dumps([name, of_read, read, plan.context + plan.decoded + plan.workspace, peak]))
"""

# Name, by kernels.cpp, tokens of the prompt, N, (layers, H, G, D, width, vocabulary), of the request.
RUNS = (
    ("cache, by torch", False, 20_000, 17, (2, 8, 8, 64, 64, 500), {}),
    ("scores, by torch", False, 20_000, 64, (1, 8, 1, 64, 64, 500), {}),
    ("scores in bfloat16, by torch", False, 40_000, 32, (1, 8, 1, 16, 64, 500), {"dtype": "bfloat16"}),
    ("no scores, by kernels.cpp", True, 20_000, 64, (2, 16, 4, 64, 64, 500), {}),
    ("one row", True, 20_000, 1, (2, 8, 8, 64, 64, 500), {}),
    ("copies of the cache", False, 4_000, 17, (2, 8, 2, 64, 64, 500), {"attention": "contiguous"}),
    ("copies at each step", False, 4_000, 17, (1, 8, 4, 64, 64, 500), {"attention": "expanded"}),
    ("int8, by kernels.cpp", True, 20_000, 17, (4, 8, 8, 64, 64, 500), {"kv_dtype": "int8"}),
    ("int8, by torch", False, 20_000, 17, (2, 8, 8, 64, 64, 500), {"kv_dtype": "int8"}),
    ("logits", True, 20, 128, (1, 8, 2, 64, 64, 100_000), {}),
    ("logits without filters", True, 20, 128, (1, 8, 2, 64, 64, 100_000), {"sampling": {}}),
    ("a prompt read whole", True, 4_000, 3, (2, 4, 4, 64, 3600, 500), {"is_read": True, "prefill_chunk": 4_000}),
    ("a prompt in chunks", False, 8_000, 3, (1, 2, 2, 64, 64, 500), {"is_read": True, "prefill_chunk": 4_000}),
)


@slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the peak")
def test_a_plan_is_within_15_percent_of_what_a_run_holds():
    """While the prompt is read, where it is, and while samples decode, beyond the weights: where keys and values are
    most of it, and where scores, copies, logits or activations are. Oracle: the kernel's count, of a process whose
    allocator keeps no large block that was freed."""
    runs = [each for each in RUNS if not each[1] or library().functions is not None]
    command = [sys.executable, "-c", PLANNED, json.dumps(runs)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)
    assert result.returncode == 0, result.stderr
    measured = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(measured) == len(runs)
    for name, *sizes in measured:
        phases = [pair for pair in (sizes[:2], sizes[2:]) if max(pair) > 4e7]  # or an allocator's habits are most of it
        assert phases and all(0.85 < held / planned < 1.15 for planned, held in phases), (name, sizes)


WIDENED = """
import re, sys
from pathlib import Path
import torch
from loading.checkpoint import load_model, read_checkpoint
from engine.plan import peak_memory

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_model(read_checkpoint(Path({small!r})), "cpu", torch.float32)  # loads the code that PyTorch loads on first use
own, mapped = resident("RssAnon"), resident("RssFile")
model = load_model(read_checkpoint(Path({large!r})), "cpu", torch.float32)
peak, files = peak_memory(torch.device("cpu"))
print(sum(each.nbytes for each in model.parameters()), peak - own, files - mapped)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's count of pages")
def test_the_peak_is_of_own_memory_and_files_that_were_converted_are_given_back(tmp_path):
    """A model stored in bfloat16, loaded in fp32: its own memory is the fp32 weights, and the file's pages are gone."""
    folders = {"small": tmp_path / "small", "large": tmp_path / "large"}
    for name, dim in (("small", 16), ("large", 512)):
        config = LlamaConfig(hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=2, num_attention_heads=8)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folders[name])
    script = WIDENED.format(**{name: str(path) for name, path in folders.items()})
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    weights, own, mapped = map(int, result.stdout.split())
    assert weights > 1e8 and 0.9 * weights < own < 1.1 * weights and mapped < 0.1 * weights / 2


CONVERT = """
import re, sys
from pathlib import Path
sys.path.insert(0, {scripts!r})
from convert_hf_checkpoint import convert

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

convert(Path({small!r}), Path({small!r}, "out"))  # loads the code that PyTorch loads on first use
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
convert(Path({large!r}), Path({large!r}, "out"))
print(resident("VmHWM") - before)
"""


@slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's count of the peak")
def test_converting_holds_at_most_the_output_and_one_shard(tmp_path):
    """A sharded folder: at most 1.1 x (output + the largest shard). The pages of mapped files count."""
    folders = {"small": tmp_path / "small", "large": tmp_path / "large"}
    for name, dim in (("small", 16), ("large", 512)):
        config = LlamaConfig(hidden_size=dim, intermediate_size=4 * dim, num_hidden_layers=6, num_attention_heads=8)
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folders[name], max_shard_size="12MB")
    script = CONVERT.format(scripts=str(ROOT / "scripts"), **{name: str(path) for name, path in folders.items()})
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr
    shards = [path.stat().st_size for path in folders["large"].glob("*.safetensors")]
    assert len(shards) > 3
    output = (folders["large"] / "out" / "model.pth").stat().st_size
    assert int(result.stdout) <= 1.1 * (output + max(shards)), (output, max(shards))
