"""Quantise the linear layers of a model, and write them with the recipe into one file beside its config.json.

python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int8
python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int4 --groupsize 32
python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int4-gptq --calibration_file TEXT

int8 is symmetric with a scale per output channel, int4 asymmetric with a scale and a zero per group. In every mode an
untied output head is int8. The embedding, with a head tied to it, and layers whose inputs the groups do not divide are
kept in 16 bits; norms and biases are unchanged.

Shapes: out and in: the features of a layer; groups: runs of `in` that share a scale; S positions.
"""

from cli.system import INTERRUPTED, begin, finish, print_error, start

if __name__ == "__main__":
    start()
    begin(quiet=False)

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from tqdm import tqdm

from cache import NoCache
from cli.options import OneLineParser
from engine.request import check_tokens
from layers.gptq import gptq, quantise_int4, quantise_int8
from layers.linear import Int4Weight, Quantised, dequantise, tensors_of
from layers.moe import ExpertLinear
from loading.checkpoint import (
    Checkpoint,
    Recipe,
    check_output,
    load_model,
    read_checkpoint,
    read_weights,
    save_atomically,
    save_quantised,
    unpickle,
)
from loading.files import check_plain, read_text
from loading.tokenizer import load_tokenizer
from model import Transformer, empty_model

MODES = ("int8", "int4", "int4-gptq")
# Layers quantised together in a calibrated block, in order of computation: those with the same input, or experts.
STAGES = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
    ("feed_forward.shared.w1", "feed_forward.shared.w3"),
    ("feed_forward.shared.w2",),
)
TOKENS_AT_ONCE = 2048  # calibration tokens in one pass through a block


class Reached(Exception):
    """Signal that ends a pass through a block once the observed layer has its input."""


@dataclass
class Inputs:
    """Statistics of the inputs x of a linear layer: the sum of x x^T, fp32 [in,in], and their number."""

    hessian: Tensor
    tokens: int = 0

    def add(self, x: Tensor) -> None:
        x = x.flatten(0, -2).float()  # [tokens,in]
        self.hessian.addmm_(x.t(), x)
        self.tokens += len(x)


def inputs_of(run: Callable[[], object], layer: nn.Module) -> list[Inputs]:
    """Collect the inputs that `run` gives a linear layer, or each of its experts. `run` is stopped at that layer."""
    linears = layer if isinstance(layer, ExpertLinear) else [layer]
    found = [Inputs(torch.zeros([linear.get_parameter("weight").shape[1]] * 2)) for linear in linears]

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x, *ends = inputs  # ends: of each expert's rows
        parts = x.tensor_split(ends[0][:-1].tolist()) if ends else [x]
        for each, part in zip(found, parts, strict=True):
            each.add(part)
        raise Reached

    with layer.register_forward_pre_hook(add):
        run()
    return found


class Calibration:
    """Activations of a calibration text as it passes through a network, block by block."""

    def __init__(self, model: Transformer, tokens: Tensor) -> None:
        """tokens [sequences,S]."""
        self.hidden = model.tok_embeddings(tokens) * model.embedding_scale  # [sequences,S,dim] in the weights' dtype
        self.positions = torch.arange(tokens.shape[1])[None]  # [1,S]
        self.rotation = model.rotation(self.positions)
        self.sequences = max(1, TOKENS_AT_ONCE // tokens.shape[1])

    def run(self, block: nn.Module, keep: bool = False) -> None:
        """Run all inputs through the block. keep: its outputs become the inputs of the next."""
        for part in self.hidden.split(self.sequences):
            with suppress(Reached):
                output = block(part.float(), *self.rotation, self.positions.expand(len(part), -1), NoCache())
                if keep:
                    part.copy_(output)

    def quantise(
        self, block: nn.Module, layers: list[str], groupsize: int, act_order: bool
    ) -> tuple[dict[str, Int4Weight], list[str]]:
        """Quantise `layers` of the block, each on the activations of the quantised layers before it. An expert that saw
        fewer tokens than it has inputs is rounded, since its Hessian is singular; also returns the names of those."""
        found, rounded = dict[str, Int4Weight](), list[str]()
        for stage in STAGES:
            names = [name for name in layers if name in stage or name.rpartition(".")[0] in stage]
            inputs = inputs_of(lambda: self.run(block), block.get_submodule(stage[0])) if names else []
            for name in names:
                weight, expert = block.get_parameter(f"{name}.weight"), name.rpartition(".")[2]
                seen = inputs[int(expert)] if expert.isdecimal() else inputs[0]
                if expert.isdecimal() and seen.tokens < weight.shape[1]:
                    rounded.append(name)
                    found[name] = quantise_int4(weight, groupsize)
                else:
                    found[name] = gptq(weight, seen.hessian, groupsize, act_order)
            hold(block, {name: found[name] for name in names})
        assert found.keys() == set(layers), "a layer belongs to no stage"
        return found, rounded


def hold(block: nn.Module, weights: dict[str, Int4Weight]) -> None:
    for name, weight in weights.items():
        block.get_parameter(f"{name}.weight").copy_(dequantise(weight, torch.float32))


def calibrated(
    model: Transformer, recipe: Recipe, tokens: Tensor, folder: Path, rounded: list[str]
) -> Iterator[dict[str, Quantised]]:
    """Yield the int4 layers of one block after another; `rounded` collects the names of those that were rounded.
    Finished blocks are kept in `folder` for the next run.

    Memory: the mapped model, one block in fp32, the inputs of a block, and one Hessian with its factors, or those of
    all experts.
    """
    calibration = Calibration(model, tokens)
    for number, layer in enumerate(model.layers):
        prefix, path = f"layers.{number}.", folder / f"block{number}"
        names = [name.removeprefix(prefix) for name in recipe.layers if name.startswith(prefix)]
        block = deepcopy(layer).float()
        if path.exists():
            saved = unpickle(path)
            found, few = {name: Int4Weight(**each) for name, each in saved["layers"].items()}, saved["rounded"]
            hold(block, found)
        else:
            found, few = calibration.quantise(block, names, recipe.groupsize, recipe.act_order)
            tensors = {name: tensors_of(weight) for name, weight in found.items()}
            save_atomically({"layers": tensors, "rounded": few}, path)
        calibration.run(block, keep=True)
        rounded += [prefix + name for name in few]
        yield {prefix + name: weight for name, weight in found.items()}


def choose_layers(model: Transformer, mode: str, groupsize: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return layer -> "int8" or "int4", and the layers that the groups do not divide. A tied head is in neither. Raises
    ValueError if the groups divide no layer."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if model.args.tied_output:
        del linears["output"]
    int8 = {name for name in linears if mode == "int8" or name == "output"}
    fits = {name for name, module in linears.items() if module.in_features % groupsize == 0} | int8
    if not fits - int8 and mode != "int8":
        sizes = ", ".join(map(str, sorted({module.in_features for module in linears.values()})))
        raise ValueError(f"groups of {groupsize} divide the inputs of no layer ({sizes}): choose another --groupsize")
    layers = {name: "int8" if name in int8 else "int4" for name in linears if name in fits}
    return layers, tuple(name for name in linears if name not in fits)


def calibration_tokens(options: argparse.Namespace, checkpoint: Checkpoint) -> Tensor:
    """Return tokens [sequences,S] spread evenly over the text, each after BOS if there is one: every prompt begins with
    it, and its activations are like no other's. Raises ValueError if the text is too short, or S too long."""
    limit = checkpoint.args.context_limit
    count, length = options.calibration_sequences, options.calibration_seq_length
    length = min(2048, limit) if length is None else length
    if not 1 < length <= limit or count < 1:
        raise ValueError(f"{count} sequences of {length} tokens: expected at least 1 sequence, of 2 to {limit} tokens")
    tokenizer = load_tokenizer(checkpoint.folder)
    try:
        tokens = tokenizer.encode(read_text(options.calibration_file))
    except OSError as error:
        raise ValueError(f"{options.calibration_file} cannot be read ({error.strerror}): pass a text file") from error
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    check_tokens([*first, *tokens], checkpoint.args.vocab_size)
    own = length - len(first)
    if len(tokens) < count * own:
        raise ValueError(
            f"{count} sequences of {length} tokens need {count * own}, {options.calibration_file} has {len(tokens)}: "
            "use a longer text, or lower --calibration_sequences or --calibration_seq_length"
        )
    begins = [number * (len(tokens) - own) // max(1, count - 1) for number in range(count)]
    return torch.tensor([[*first, *tokens[begin : begin + own]] for begin in begins])


def plain_layers(recipe: Recipe, state: dict[str, Tensor]) -> Iterator[dict[str, Quantised]]:
    """Yield the layers of the recipe that need no calibration, one at a time."""
    for name, kind in recipe.layers.items():
        if kind == "int8":
            yield {name: quantise_int8(state[f"{name}.weight"])}
        elif recipe.calibration_file is None:
            yield {name: quantise_int4(state[f"{name}.weight"], recipe.groupsize)}


def quantised_state(state: dict[str, Tensor], found: dict[str, Quantised]) -> dict[str, Tensor]:
    """Return the tensors to write; matrices that are not quantised are in 16 bits."""
    wide = {name for name, tensor in state.items() if tensor.dim() == 2 and tensor.itemsize > 2}
    new = {name: t.bfloat16() if name in wide and "norm" not in name else t for name, t in state.items()}
    for layer, weight in found.items():
        del new[f"{layer}.weight"]
        new |= {f"{layer}.{name}": tensor for name, tensor in tensors_of(weight).items()}
    return new


def blocks_folder(output: Path, recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """Return the folder of this run's finished blocks, removed at its end. Removes blocks of any other run."""
    folder = output.with_name(f"{output.name}.blocks.unfinished")
    sources = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in checkpoint.weights]
    key = json.dumps([asdict(recipe), sources])
    if not (folder / "run.json").exists() or (folder / "run.json").read_text("utf-8") != key:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(key, "utf-8")
    return folder


@torch.no_grad()
def quantise(options: argparse.Namespace) -> Path:
    """Write the quantised checkpoint and return its path. Raises ValueError or OSError."""
    source, mode, text = options.checkpoint_path, options.mode, options.calibration_file
    checkpoint = read_checkpoint(source)
    if checkpoint.recipe is not None:
        raise ValueError(
            f"{checkpoint.weights[0]} is already quantised ({checkpoint.recipe.mode}): pass the original model"
        )
    if (mode == "int4-gptq") != (text is not None) or (options.act_order and mode != "int4-gptq"):
        raise ValueError(
            f"--mode {mode}: --calibration_file is required with int4-gptq and, like --act_order, only allowed there"
        )
    groupsize = 0 if mode == "int8" else options.groupsize
    name = ("model" if source.is_dir() else source.stem) + f"_{mode}" + (f".g{groupsize}" if groupsize else "")
    output = options.output or checkpoint.folder / f"{name}.pth"
    check_output(output, checkpoint, text)
    if text is not None:
        check_plain(text)  # it is read twice
    layers, kept = choose_layers(empty_model(checkpoint.args), mode, options.groupsize)
    recipe, state, folder = Recipe(mode, layers, kept, groupsize), read_weights(checkpoint), None
    steps, rounded = plain_layers(recipe, state), list[str]()
    if text is not None:
        ids, sha = calibration_tokens(options, checkpoint), hashlib.sha256(text.read_bytes()).hexdigest()
        recipe = Recipe(mode, layers, kept, groupsize, text.name, sha, len(ids), len(ids[0]), options.act_order)
        folder = blocks_folder(output, recipe, checkpoint)
        model = load_model(checkpoint, "cpu", state["tok_embeddings.weight"].dtype)
        steps = chain(plain_layers(recipe, state), calibrated(model, recipe, ids, folder, rounded))
    if kept:
        print(f"kept in 16 bits, since {groupsize} does not divide their inputs: {', '.join(kept)}", file=sys.stderr)
    found: dict[str, Quantised] = {}
    # As the bar of generate.py: only on a terminal, also on one of 0 columns or rows.
    form = "[{bar:20}] {n_fmt}/{total_fmt} layers, {remaining} left"
    columns = shutil.get_terminal_size().columns
    with tqdm(total=len(layers), bar_format=form, ascii=" #", disable=None, ncols=columns, nrows=20) as bar:
        for step in steps:
            found |= step
            bar.update(len(step))
    if rounded:
        why = "rounded to nearest, since they saw fewer tokens than they have inputs (raise --calibration_sequences)"
        print(f"{why}: {', '.join(rounded)}", file=sys.stderr)
    if checkpoint.args.tied_output:
        del state["output.weight"]
    save_quantised(checkpoint, output, quantised_state(state, found), replace(recipe, rounded=tuple(rounded)))
    if folder is not None:
        shutil.rmtree(folder)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Quantise the linear layers of a model and print the name of the written file.")
    flag = parser.add_argument
    flag("--checkpoint_path", type=Path, required=True, help="model.pth, or a model folder")
    flag("--mode", choices=MODES, required=True, help="int4-gptq loses less quality than int4, but needs a text")
    flag("--groupsize", type=int, choices=(32, 64, 128), default=32, help="inputs per group of int4; default: 32")
    flag("--output", type=Path, help="file to write; default: beside the checkpoint, named after the mode")
    flag("--calibration_file", type=Path, help="UTF-8 text for int4-gptq, similar to the texts that the model will see")
    flag("--calibration_seq_length", type=int, help="tokens per sequence; default: 2048, or the model's limit if lower")
    flag("--calibration_sequences", type=int, default=64, help="number of sequences from the text; default: 64")
    flag("--act_order", action="store_true", help="with int4-gptq, quantise the columns of the largest inputs first")
    options = parser.parse_args(arguments)
    try:
        print(quantise(options))
    except KeyboardInterrupt:
        if options.calibration_file is not None:
            print("\ninterrupted: run the same command again to continue after the last block", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
