"""Quantises the linear layers of a model, and writes them with the recipe into one file beside its config.json.

python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int8
python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int4 --groupsize 32
python quantize.py --checkpoint_path checkpoints/X/model.pth --mode int4-gptq --calibration_file TEXT

int8 is symmetric with a scale per output channel, int4 asymmetric with a scale and a zero per group. In every mode an
output head of its own is int8; one tied to the embedding stays with it. The embedding, a tied head, and layers that the
groups do not divide are kept in 16 bits; norms and biases as they are.

Shapes: out and in: the features of a layer; groups: runs of `in` that share a scale; S positions.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

from cache import NoCache
from checkpoint import (
    Checkpoint,
    Recipe,
    check_output,
    check_weights,
    load_model,
    read_checkpoint,
    read_weights,
    save_quantised,
    unpickle,
    write_whole,
)
from model import Transformer, empty_model
from packed import Int4Weight, Int8Weight, Quantised, dequantise, tensors_of
from report import OneLineParser
from tokenizer import load_tokenizer

MODES = ("int8", "int4", "int4-gptq")
# What a calibrated block quantises together, in the order of its computation: layers with the same input.
STAGES = (
    ("attention.wq", "attention.wk", "attention.wv"),
    ("attention.wo",),
    ("feed_forward.w1", "feed_forward.w3"),
    ("feed_forward.w2",),
)
COLUMNS = 128  # a multiple of every groupsize; GPTQ corrects the columns after these once for all of them
TOKENS_AT_ONCE = 2048  # of calibration text, in one pass through a block
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # of a group of zeros


def quantise_int8(weight: Tensor) -> Int8Weight:
    """weight [out,in] -> its nearest int8 weight; no number is off by more than half its channel's scale."""
    weight = weight.float()
    scales = (weight.abs().amax(1) / 127).clamp_min(SMALLEST_SCALE).bfloat16()
    return Int8Weight((weight / scales.float()[:, None]).round_().to(torch.int8), scales)


def int4_grid(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups fp32 [...,groupsize] -> scales, zeros bfloat16 [...], such that no number of a group is further than half
    a scale from the nearest of the 16 values: a scale also covers what rounding the zero to bfloat16 may shift."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales = torch.maximum((high - low) / 15, torch.maximum(-low, high) / 240).clamp_min(SMALLEST_SCALE).bfloat16()
    return scales, ((low + high + scales.float()) / 2).bfloat16()


def int4_codes(weight: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The nearest codes, 0 to 15, in fp32. Any shapes that broadcast."""
    return ((weight - zeros.float()) / scales.float() + 8).round_().clamp_(0, 15)


def quantise_int4(weight: Tensor, groupsize: int) -> Int4Weight:
    """weight [out,in] -> its nearest int4 weight in groups of `groupsize` inputs."""
    groups = weight.float().unflatten(1, (-1, groupsize))  # [out,groups,groupsize]
    scales, zeros = int4_grid(groups)
    codes = int4_codes(groups, scales[..., None], zeros[..., None])
    return Int4Weight.from_codes(codes.flatten(1).to(torch.uint8), scales, zeros)


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian [in,in]; damped more where that is not definite."""
    damping = (0.01 * hessian.diagonal().mean()).clamp_min(1e-12)  # also where all inputs are 0
    for _ in range(8):
        lower, failed = torch.linalg.cholesky_ex(hessian + damping * torch.eye(len(hessian)))
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not (failed or failed_too):
            return upper
        damping *= 10
    raise ValueError("the calibration text gives activations that are not finite: quantise with --mode int4")


def gptq(weight: Tensor, hessian: Tensor, groupsize: int, act_order: bool = False) -> Int4Weight:
    """weight fp32 [out,in], hessian fp32 [in,in]: the sum of x x^T over the inputs x -> the int4 weight whose products
    with them are near to those of the weight. Frantar et al. 2022 (arXiv 2210.17323), algorithm 1.

    A column is rounded, and what that changes is made up for in the columns after it. act_order: those of the largest
    inputs first; the grid of a group is then taken from the weight as it was. The column of an input that is always 0
    is rounded plainly: the damping alone makes it independent of all others.
    """
    by_size = hessian.diagonal().argsort(descending=True, stable=True)
    order = by_size if act_order else torch.arange(len(hessian))
    scales, zeros = int4_grid(weight.unflatten(1, (-1, groupsize)))  # [out,groups]
    upper = inverse_factor(hessian[order][:, order])
    columns = weight.t()[order].contiguous()  # [in,out]
    codes = torch.empty(columns.shape, dtype=torch.uint8)
    for begin in range(0, len(columns), COLUMNS):
        end = min(begin + COLUMNS, len(columns))
        errors = torch.empty_like(columns[begin:end])
        for i in range(begin, end):
            group = int(order[i]) // groupsize
            if not act_order and i % groupsize == 0:
                scales[:, group], zeros[:, group] = int4_grid(columns[i : i + groupsize].t())
            scale, zero = scales[:, group].float(), zeros[:, group].float()
            code = int4_codes(columns[i], scale, zero)
            errors[i - begin] = (columns[i] - ((code - 8) * scale + zero)) / upper[i, i]
            columns[i + 1 : end] -= upper[i, i + 1 : end, None] * errors[i - begin]
            codes[order[i]] = code.to(torch.uint8)
        columns[end:] -= upper[begin:end, end:].t() @ errors
    return Int4Weight.from_codes(codes.t(), scales, zeros)


class Reached(Exception):
    """Ends a pass through a block where the layer that it was made for has its input."""


def input_hessian(run: Callable[[], object], linear: nn.Module) -> Tensor:
    """The sum of x x^T over all inputs that `linear` is given by `run`, fp32 [in,in]. run ends at that layer."""
    hessian = torch.zeros([linear.get_parameter("weight").shape[1]] * 2)

    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].flatten(0, -2).float()  # [N*S,in]
        hessian.addmm_(x.t(), x)
        raise Reached

    with linear.register_forward_pre_hook(add):
        run()
    return hessian


class Calibration:
    """The inputs of one block after another, for a text that passes through a network."""

    def __init__(self, model: Transformer, tokens: Tensor) -> None:
        """tokens [sequences,S]."""
        self.hidden = model.tok_embeddings(tokens) * model.embedding_scale  # [sequences,S,dim] in the weights' dtype
        self.positions = torch.arange(tokens.shape[1])[None]  # [1,S]
        self.rotation = model.rotation(self.positions)
        self.sequences = max(1, TOKENS_AT_ONCE // tokens.shape[1])

    def run(self, block: nn.Module, keep: bool = False) -> None:
        """Passes all inputs through the block. keep: its outputs become the inputs of the next."""
        for part in self.hidden.split(self.sequences):
            with suppress(Reached):
                output = block(part.float(), *self.rotation, self.positions.expand(len(part), -1), NoCache())
                if keep:
                    part.copy_(output)

    def quantise(self, block: nn.Module, layers: list[str], groupsize: int, act_order: bool) -> dict[str, Int4Weight]:
        """Those layers of the block: each sees what the layers before it make of the text once they are quantised."""
        found: dict[str, Int4Weight] = {}
        for stage in STAGES:
            if names := [name for name in stage if name in layers]:
                hessian = input_hessian(lambda: self.run(block), block.get_submodule(names[0]))
                new = {n: gptq(block.get_parameter(f"{n}.weight"), hessian, groupsize, act_order) for n in names}
                hold(block, new)
                found |= new
        assert found.keys() == set(layers), "a layer that has no stage"
        return found


def hold(block: nn.Module, weights: dict[str, Int4Weight]) -> None:
    for name, weight in weights.items():
        block.get_parameter(f"{name}.weight").copy_(dequantise(weight, torch.float32))


def calibrated(model: Transformer, recipe: Recipe, tokens: Tensor, folder: Path) -> Iterator[dict[str, Quantised]]:
    """The int4 layers of one block after another. What is done is kept in `folder`, and found there by the next run.

    Memory: the mapped model, one block in fp32, the inputs of a block, and one Hessian with its factors.
    """
    calibration = Calibration(model, tokens)
    for number, layer in enumerate(model.layers):
        prefix, path = f"layers.{number}.", folder / f"block{number}"
        names = [name.removeprefix(prefix) for name in recipe.layers if name.startswith(prefix)]
        block = deepcopy(layer).float()
        if path.exists():
            found = {name: Int4Weight(**tensors) for name, tensors in unpickle(path).items()}
            hold(block, found)
        else:
            found = calibration.quantise(block, names, recipe.groupsize, recipe.act_order)
            write_whole({name: tensors_of(weight) for name, weight in found.items()}, path)
        calibration.run(block, keep=True)
        yield {prefix + name: weight for name, weight in found.items()}


def choose_layers(model: Transformer, mode: str, groupsize: int) -> tuple[dict[str, str], tuple[str, ...]]:
    """(layer -> "int8" or "int4", those that the groups do not divide). A tied head is neither. Raises ValueError
    where the groups divide no layer."""
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if model.args.tied_output:
        del linears["output"]
    int8 = {name for name in linears if mode == "int8" or name == "output"}
    fits = {name for name, module in linears.items() if module.in_features % groupsize == 0} | int8
    if not fits - int8 and mode != "int8":
        sizes = ", ".join(map(str, sorted({module.in_features for module in linears.values()})))
        raise ValueError(f"groups of {groupsize} fit no layer, whose inputs are {sizes}: give another --groupsize")
    layers = {name: "int8" if name in int8 else "int4" for name in linears if name in fits}
    return layers, tuple(name for name in linears if name not in fits)


def calibration_tokens(options: argparse.Namespace, checkpoint: Checkpoint) -> Tensor:
    """[sequences,S], spread evenly over the text, each after a BOS where the tokenizer has one: its activations are
    like no other's, and every prompt has it. Raises ValueError where the text is too short, or S too long."""
    limit = checkpoint.args.context_limit
    count, length = options.calibration_sequences, options.calibration_seq_length
    length = min(2048, limit) if length is None else length
    if not 1 < length <= limit or count < 1:
        raise ValueError(f"{count} sequences of {length} tokens cannot be: give at least one, of 2 to {limit} tokens")
    tokenizer = load_tokenizer(checkpoint.folder)
    try:
        tokens = tokenizer.encode(options.calibration_file.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.calibration_file} is not a UTF-8 text: {error}") from error
    first = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    own = length - len(first)
    if len(tokens) < count * own:
        raise ValueError(
            f"{count} sequences of {length} tokens need {count * own}, {options.calibration_file} has {len(tokens)}: "
            "give a longer text, or fewer with --calibration_sequences or --calibration_seq_length"
        )
    begins = [number * (len(tokens) - own) // max(1, count - 1) for number in range(count)]
    return torch.tensor([[*first, *tokens[begin : begin + own]] for begin in begins])


def plain_layers(recipe: Recipe, state: dict[str, Tensor]) -> Iterator[dict[str, Quantised]]:
    """Those layers of the recipe that need no text, one at a time."""
    for name, kind in recipe.layers.items():
        if kind == "int8":
            yield {name: quantise_int8(state[f"{name}.weight"])}
        elif recipe.calibration_file is None:
            yield {name: quantise_int4(state[f"{name}.weight"], recipe.groupsize)}


def with_progress(steps: Iterable[dict[str, Quantised]], layers: int) -> Iterator[dict[str, Quantised]]:
    """The steps; on stderr, where that is a terminal, how many of so many layers are done, and the time left."""
    begin, done = time.perf_counter(), 0
    for step in steps:
        yield step
        done += len(step)
        left = (time.perf_counter() - begin) * (layers - done) / done
        if sys.stderr.isatty():
            note = f"\r[{'#' * (20 * done // layers):<20}] {done}/{layers} layers, {left:.0f} s left \033[K"
            print(note, end="\n" if done == layers else "", file=sys.stderr, flush=True)


def quantised_state(state: dict[str, Tensor], found: dict[str, Quantised]) -> dict[str, Tensor]:
    """The tensors to write: those matrices that are not quantised in 16 bits."""
    new = {name: t.bfloat16() if t.dim() == 2 and t.itemsize > 2 else t for name, t in state.items()}
    for layer, weight in found.items():
        del new[f"{layer}.weight"]
        new |= {f"{layer}.{name}": tensor for name, tensor in tensors_of(weight).items()}
    return new


def blocks_folder(output: Path, recipe: Recipe, checkpoint: Checkpoint) -> Path:
    """Where finished blocks of this very run lie until its end. What another run left there goes."""
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
    """Writes the quantised checkpoint; returns its path. Raises ValueError or OSError."""
    source, mode, text = options.checkpoint_path, options.mode, options.calibration_file
    checkpoint = read_checkpoint(source)
    if checkpoint.recipe is not None:
        raise ValueError(f"{checkpoint.weights[0]} is quantised already ({checkpoint.recipe.mode}): give its source")
    if (mode == "int4-gptq") != (text is not None) or (options.act_order and mode != "int4-gptq"):
        raise ValueError(f"--mode {mode}: int4-gptq needs --calibration_file TEXT, no other takes it, nor --act_order")
    groupsize = 0 if mode == "int8" else options.groupsize
    name = ("model" if source.is_dir() else source.stem) + f"_{mode}" + (f".g{groupsize}" if groupsize else "")
    output = options.output or checkpoint.folder / f"{name}.pth"
    check_output(output, checkpoint)
    layers, kept = choose_layers(empty_model(checkpoint.args), mode, options.groupsize)
    recipe, state, folder = Recipe(mode, layers, kept, groupsize), read_weights(checkpoint), None
    check_weights(empty_model(checkpoint.args), state)
    steps = plain_layers(recipe, state)
    if text is not None:
        ids, sha = calibration_tokens(options, checkpoint), hashlib.sha256(text.read_bytes()).hexdigest()
        recipe = Recipe(mode, layers, kept, groupsize, text.name, sha, len(ids), len(ids[0]), options.act_order)
        folder = blocks_folder(output, recipe, checkpoint)
        model = load_model(checkpoint, "cpu", state["tok_embeddings.weight"].dtype)
        steps = chain(plain_layers(recipe, state), calibrated(model, recipe, ids, folder))
    if kept:
        print(f"kept in 16 bits, since {groupsize} does not divide their inputs: {', '.join(kept)}", file=sys.stderr)
    found = {name: w for step in with_progress(steps, len(layers)) for name, w in step.items()}
    if checkpoint.args.tied_output:
        del state["output.weight"]
    save_quantised(checkpoint, output, quantised_state(state, found), recipe)
    if folder is not None:
        shutil.rmtree(folder)
    return output


def main(arguments: Sequence[str] | None = None) -> int:
    parser = OneLineParser(description="Quantise the linear layers of a model. Prints the file that was written.")
    flag = parser.add_argument
    flag("--checkpoint_path", type=Path, required=True, help="model.pth, or a model's folder")
    flag("--mode", choices=MODES, required=True, help="int4-gptq is int4 that loses less, at the price of a text")
    flag("--groupsize", type=int, choices=(32, 64, 128), default=32, help="of int4; default: 32")
    flag("--output", type=Path, help="file to write; default: beside the checkpoint, named after the mode")
    flag("--calibration_file", type=Path, help="a UTF-8 text such as the model is for")
    flag("--calibration_seq_length", type=int, help="tokens of one; default: 2048, or what the model holds")
    flag("--calibration_sequences", type=int, default=64, help="spread over the text; default: 64")
    flag("--act_order", action="store_true", help="int4-gptq: columns of the largest inputs first")
    try:
        print(quantise(parser.parse_args(arguments)))
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last finished block", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
