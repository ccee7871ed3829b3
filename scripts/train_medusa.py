"""Trains Medusa heads for a model on a text file, for generate.py --draft medusa. The model stays as it is.

    python scripts/train_medusa.py --checkpoint_path checkpoints/tiny --text stories.txt --out medusa_lm_head.pt

A text of the model's own serves best: heads learn what it goes on to say. Head i learns the token i + 2 positions after
the one that the model has run (Cai et al. 2024, arXiv 2401.10774, section 2.1). The file has the public layout; with
--vocabulary, heads tell only the most frequent tokens of the text apart, which the file names ("tokens").
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import check_writable, finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import NoCache
from cli.flags import OneLineParser
from engine.plan import keep_freed_memory
from engine.request import check_tokens
from layers.linear import Quantised, dequantise
from loading.checkpoint import Checkpoint, load_model, read_checkpoint, write_whole
from loading.files import check_stays, companions, read_text
from loading.hub import locate
from loading.tokenizer import load_tokenizer
from model import Transformer

WINDOW = 256  # tokens that the model sees together
MOST_HEADS = WINDOW // 2  # each takes a token off the end of every window
BATCH = 512  # tokens of a training step
PEAK_LEARNING_RATE = 2e-3
HEAD_LOSS = 0.8  # a head's weight in the loss, against that of the one before


@torch.no_grad()
def read_windows(model: Transformer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [L] -> what heads see of each, [windows,WINDOW,dim], and the tokens [windows,WINDOW]."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    positions = torch.arange(WINDOW)
    seen = [model.norm(model.hidden(part, positions.expand_as(part), NoCache())) for part in windows.split(8)]
    return torch.cat(seen), windows


def training_pairs(seen: Tensor, windows: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What heads see [L,dim], and the token that each is to tell [L,heads]."""
    length = WINDOW - heads - 1
    ahead = torch.arange(2, heads + 2) + torch.arange(length)[:, None]  # [length,heads]
    return seen[:, :length].flatten(0, 1), windows[:, ahead].flatten(0, 1)


def frequent(tokens: Tensor, size: int, vocabulary: int) -> Tensor | None:
    """The most frequent tokens, in ascending order; None: all."""
    if not 0 < size < vocabulary:
        return None
    return tokens.bincount(minlength=vocabulary).topk(size).indices.sort().values


def run_head(head: list[Tensor], x: Tensor) -> Tensor:
    """x [L,dim] -> logits [L,tokens]."""
    weight, bias, output = head
    return F.linear(x + F.silu(F.linear(x, weight, bias)), output)


def train(heads: list[list[Tensor]], seen: Tensor, targets: Tensor, steps: int, seed: int) -> None:
    """targets: [L,heads], -1 where a token is not one of the heads'."""
    optimizer = torch.optim.AdamW([tensor for head in heads for tensor in head], weight_decay=0.0)
    generator, begin, right = torch.Generator().manual_seed(seed), time.perf_counter(), [0.0] * len(heads)
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * (1 - 0.95 * step / steps)
        some = torch.randint(len(seen), (BATCH,), generator=generator)
        for index, head in enumerate(heads):
            logits, target = run_head(head, seen[some]), targets[some, index]
            (HEAD_LOSS**index * F.cross_entropy(logits, target, ignore_index=-1)).backward()
            right[index] += 0.05 * ((logits.argmax(-1) == target).float().mean().item() - right[index])
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            shares, seconds = ", ".join(f"{each:.0%}" for each in right), time.perf_counter() - begin
            print(f"step {step}/{steps}, {seconds:.0f} s, right by head: {shares}", file=sys.stderr, flush=True)


def read_tokens(options: argparse.Namespace, checkpoint: Checkpoint) -> Tensor:
    """The text's [L], each story after a BOS. Raises ValueError where they are few, or not the model's."""
    tokenizer = load_tokenizer(checkpoint.folder)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    stories = read_text(options.text).split("<|endoftext|>")
    tokens = [id for story in stories for id in bos + tokenizer.encode(story.strip())][: options.tokens]
    if len(tokens) < 2 * WINDOW:
        raise ValueError(f"{options.text} has {len(tokens)} tokens: give at least {2 * WINDOW}")
    check_tokens(tokens, checkpoint.args.vocab_size)
    return torch.tensor(tokens)


def output_weight(model: Transformer) -> Tensor:
    """The model's head [vocab,dim] in fp32, from which heads begin."""
    weight: Tensor | Quantised = model.output.weight
    return weight if isinstance(weight, Tensor) else dequantise(weight, torch.float32)


def trained(options: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Train the heads and return the tensors to save."""
    tokens, args = read_tokens(options, checkpoint), checkpoint.args
    keep_freed_memory()
    model = load_model(checkpoint, "cpu", torch.float32)
    ids = frequent(tokens, options.vocabulary, args.vocab_size)
    seen, targets = training_pairs(*read_windows(model, tokens), options.heads)
    output = output_weight(model)
    if ids is not None:
        place = torch.full((args.vocab_size,), -1)
        place[ids] = torch.arange(len(ids))
        targets, output = place[targets], output[ids]
    # A head begins as the model's own: its block adds nothing.
    blocks = (torch.zeros(args.dim, args.dim), torch.zeros(args.dim))
    heads = [[t.clone().requires_grad_() for t in (*blocks, output)] for _ in range(options.heads)]
    train(heads, seen, targets, options.steps, options.seed)
    names = ("0.linear.weight", "0.linear.bias", "1.weight")
    pairs = (zip(names, head, strict=True) for head in heads)
    state = {f"{index}.{name}": tensor.detach() for index, head in enumerate(pairs) for name, tensor in head}
    return state if ids is None else state | {"tokens": ids}


def main() -> int:
    parser = OneLineParser(description="Train Medusa heads for a model on a text file.")
    parser.add_argument("--checkpoint_path", required=True)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8; the more like what is to be drawn, the better")
    parser.add_argument("--out", type=Path, required=True, help="such as medusa_lm_head.pt")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=0, help="tokens that heads tell apart; default: all")
    parser.add_argument("--tokens", type=int, default=300_000, help="of the text, at most")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        if not 1 <= options.heads <= MOST_HEADS or options.steps < 1:
            raise ValueError(f"heads {options.heads} must be 1 to {MOST_HEADS}, steps {options.steps} at least 1")
        if not 0 <= options.seed < 2**63 or options.tokens < 1:
            raise ValueError(f"seed {options.seed} must be 0 to 2^63 - 1, tokens {options.tokens} at least 1")
        check_writable(options.out)
        checkpoint = read_checkpoint(locate(options.checkpoint_path))
        check_stays([*checkpoint.weights, *companions(checkpoint.folder), options.text], options.out)
        write_whole(trained(options, checkpoint), options.out)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
