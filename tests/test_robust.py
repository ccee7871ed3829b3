"""Whatever goes wrong: one line on stderr that names the value and the remedy, exit status 2 (130 where the user
stopped it), nothing on stdout but samples, nothing overwritten. Oracle: exit status, both streams and the files, by
`main` in this process; what needs a signal, a terminal or a closed stream is a process of its own."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY
from test_cli import PROMPT, assert_refused, run

SHORT = [*PROMPT, "--max_new_tokens", 9]


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the shipped model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


def change(model: Path, name: str, factor: float) -> None:
    """Multiplies a tensor of the model."""
    state = torch.load(model / "model.pth")
    state[name] = (state[name].float() * factor).to(state[name].dtype)
    torch.save(state, model / "model.pth")


@pytest.mark.parametrize(
    "flags",
    [
        ["--temperature", 0],
        ["-n", 3],
        ["-n", 3, "--top_k", 0, "--top_p", 0.9, "--min_p", 0.1],
        ["-n", 3, "--draft", "prompt"],
        ["-n", 3, "--draft", "layers:2", "--temperature", 0],
        ["-n", 3, "--kv_dtype", "int8"],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(model, flags, factor):
    change(model, "layers.1.ffn_norm.weight", factor)
    assert_refused(run(*SHORT, *flags, "--checkpoint_path", model), "model.pth in float32: the logits are not finite")


def test_an_overflow_is_told_and_another_dtype_mends_it(model):
    """Some logits are infinite, the others fit: the text that comes of it would look like any other."""
    change(model, "norm.weight", 3e4)
    base = [*SHORT, "-n", 3, "--temperature", 0, "--checkpoint_path", model, "--dtype"]
    assert_refused(run(*base, "float16"), "give --dtype bfloat16 or float32")
    assert run(*base, "float32").returncode == 0
