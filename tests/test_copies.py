"""Files that are copied alone into another repository work there. Oracles: fp64 softmax over all keys of a row; the
same draws by the file where it lies."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

ATTENTION = """
import math
import torch
from bifurcated_attention import ScoreMod
from cache import KVCache, Prefill

def plain(q, k, v, at, first, mod):
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    scores, keys = q @ k.mT / math.sqrt(q.shape[-1]), first + torch.arange(k.shape[2])
    distance = at - keys
    if mod is not None and mod.slopes is not None:
        scores = scores - mod.slopes[:, None, None] * distance
    seen = (distance >= 0) & (distance < (mod and mod.window or 10**9))
    return scores.masked_fill(~seen, -math.inf).softmax(-1) @ v

torch.manual_seed(0)
slopes = torch.tensor([2.0**-i for i in range(1, 7)], dtype=torch.float64)
mods = [None, ScoreMod(window=50), ScoreMod(slopes=slopes), ScoreMod(window=3, slopes=slopes)]
for G in (6, 2, 1):  # MHA, GQA, MQA
    for mod in mods:
        T, N, D = 66, 5, 16
        k, v = torch.randn(2, 1, G, T, D, dtype=torch.float64)
        root = KVCache.empty((1, G, D), 1, T, k)
        q = torch.randn(1, 6, T, D, dtype=torch.float64)
        for begin, end in ((0, 40), (40, T)):
            part = torch.arange(begin, end)
            at = part[None]
            out = Prefill(root, begin, end - begin).attend(0, q[:, :, part], k[:, :, part], v[:, :, part], at, mod)
            expected = plain(q[:, :, part], k, v, at[0][:, None], 0, mod)
            assert (out - expected).abs().max() < 1e-12
        rows = KVCache.fork(root, N, 3)
        k, v = (t.expand(N, -1, -1, -1) for t in (k, v))
        for step in range(3):
            q = torch.randn(N, 6, 1, D, dtype=torch.float64)
            own_k, own_v = torch.randn(2, N, G, 1, D, dtype=torch.float64)
            k, v = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
            out = rows.attend(0, q, own_k, own_v, torch.full((N, 1), T + step), mod)
            assert (out - plain(q, k, v, T + step, 0, mod)).abs().max() < 1e-12
print("equal", sorted(name for name in ("layers", "engine", "model") if name in __import__("sys").modules))
"""

DRAW = """
from dataclasses import dataclass
import torch
from sampling import draw, uniform

@dataclass(frozen=True)
class How:
    temperature: float = 0.9
    top_k: int | None = 20
    top_p: float | None = 0.95
    min_p: float | None = None
    repetition_penalty: float = 1.2

logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
seen = torch.zeros(5, 97, dtype=torch.bool).index_fill_(1, torch.tensor([3, 9]), True)
numbers = uniform(torch.tensor(7), torch.arange(5), torch.tensor(66))
print(draw(logits, numbers, How(), seen)[0].tolist())
"""


def run(code: str, folder) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, '.')\n{code}"], cwd=folder,
        capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    "files,code", [(("cache", "bifurcated_attention"), ATTENTION), (("sampling",), DRAW)], ids=["attention", "sampling"]
)
def test_files_that_are_copied_alone(tmp_path, files, code):
    """With torch and nothing else: prefill in chunks, fork and decode, with windows and ALiBi; a draw."""
    for name in files:
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    found = run(code, tmp_path)
    assert found == ("equal []\n" if "cache" in files else run(code, ROOT))
