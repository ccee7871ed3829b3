"""Make the model that ships with the repository: sample a corpus of stories, train a vocabulary and a model on it.

    python scripts/train_tiny.py sample --checkpoint_path STORIES15M --out stories.txt --stories 18176
    python scripts/train_tiny.py train --corpus stories.txt --out checkpoints/tiny

`train` needs only a text file: stories with a line <|endoftext|> after each.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import io
import math
import random
import time
from collections.abc import Iterator

import sentencepiece
import torch
import torch.nn.functional as F
from torch import Tensor

from cache import NoCache
from engine.engine import Engine
from engine.plan import keep_freed_memory
from engine.request import Request, Sampling
from layers.linear import multiplies_bfloat16
from loading.checkpoint import args_from_config, load_model, read_checkpoint, save_model
from loading.files import read_text
from loading.tokenizer import load_tokenizer
from model import Transformer

SEPARATOR = "<|endoftext|>"
SEQUENCE = 320  # tokens per training window
PEAK_LEARNING_RATE = 3e-3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 2048,
    "max_position_embeddings": SEQUENCE,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def sample_corpus(checkpoint_path: Path, out: Path, stories: int, temperature: float, rows: int = 256) -> None:
    """Append whole stories, drawn from a bare BOS token, to `out`; drop unfinished ones."""
    checkpoint = read_checkpoint(checkpoint_path)
    tokenizer = load_tokenizer(checkpoint.folder)
    engine = Engine(load_model(checkpoint, torch.device("cpu"), torch.bfloat16), tokenizer)
    assert tokenizer.bos_id is not None, "sampling stories needs a BOS token"
    kept = 0
    with out.open("a", encoding="utf-8") as file:
        for seed in range(math.ceil(stories / rows)):
            request = Request(
                num_samples=rows,
                max_new_tokens=checkpoint.args.context_limit - 1,
                sampling=Sampling(temperature, top_k=200),
                seed=seed,
                # A model trained on stories separated only by BOS ends a story with BOS.
                eos_ids=checkpoint.eos_ids | {tokenizer.bos_id},
            )
            for each in engine.generate([tokenizer.bos_id], request):
                if each.finish_reason == "eos":
                    file.write(f"{(each.text or '').strip()}\n{SEPARATOR}\n")
                    kept += 1
            file.flush()
            log(f"{(seed + 1) * rows} sampled, {kept} complete, {file.tell() / 1e6:.1f} MB")


def train_tokenizer(stories: list[str], out: Path) -> None:
    """Train a SentencePiece BPE vocabulary with byte fallback, like Llama's."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for story in stories for line in story.splitlines() if line),
        model_writer=model,
        vocab_size=CONFIG["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.9999,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        input_sentence_size=200_000,
        shuffle_input_sentence=False,
        minloglevel=2,
    )
    out.write_bytes(model.getvalue())


def batches(tokens: Tensor, batch: int, length: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield random windows of the token stream, [batch,length+1] each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        begins = torch.randint(len(tokens) - length, (batch, 1), generator=generator)
        yield tokens[begins + torch.arange(length + 1)].long()


def loss_of(model: Transformer, batch: Tensor) -> Tensor:
    """Return the mean cross-entropy, nats per token; products in bfloat16 if the CPU has instructions for it. batch
    [N,S+1]."""
    inputs, targets = batch[:, :-1], batch[:, 1:]
    input_pos = torch.arange(inputs.shape[1], device=batch.device).expand_as(inputs)
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=multiplies_bfloat16()):
        logits = model(inputs, input_pos, NoCache())  # [N,S,V]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def initialise(model: Transformer) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            scale = 0.02 / math.sqrt(2 * model.args.n_layer) if name.endswith(("wo.weight", "w2.weight")) else 0.02
            torch.nn.init.normal_(parameter, std=scale)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: linear warm-up over 200 steps, then a cosine to a twentieth of the peak."""
    if step < 200:
        return peak * (step + 1) / 200
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def validation_loss(model: Transformer, tokens: Tensor, length: int) -> float:
    windows = tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length).long()  # [N,S+1]
    losses = [loss_of(model, part) * len(part) for part in windows.split(32)]
    return float(sum(losses)) / len(windows)


def read_stories(corpus: Path, seed: int) -> list[str]:
    """Return the distinct stories of a corpus, shuffled."""
    stories = [story.strip() for story in read_text(corpus).split(SEPARATOR)]
    stories = [story for story in dict.fromkeys(stories) if story]
    random.Random(seed).shuffle(stories)
    return stories


def train(corpus: Path, out: Path, steps: int, batch: int, seed: int) -> None:
    """Train the vocabulary on all stories, the model on all but 1 % of them, at least 16, held out for validation."""
    stories = read_stories(corpus, seed)
    out.mkdir(parents=True, exist_ok=True)
    train_tokenizer(stories, out / "tokenizer.model")
    tokenizer = load_tokenizer(out)
    (eos_id,) = tokenizer.eos_ids
    encoded = [[tokenizer.bos_id, *tokenizer.encode(story), eos_id] for story in stories]
    held_out = max(16, len(encoded) // 100)
    training, validation = (
        torch.tensor([token for story in part for token in story], dtype=torch.int16)
        for part in (encoded[:-held_out], encoded[-held_out:])
    )
    if min(len(training), len(validation)) <= SEQUENCE:
        raise ValueError(f"{corpus} has only {len(training)} tokens in {len(stories)} stories: use a longer text")
    log(f"{len(stories)} stories, {len(training)} training tokens, {len(validation)} validation tokens")

    torch.manual_seed(seed)
    model = Transformer(args_from_config(CONFIG))
    initialise(model)
    log(f"{sum(parameter.numel() for parameter in model.parameters())} parameters")
    keep_freed_memory()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    compiled_loss = torch.compile(loss_of)
    began, mean = time.perf_counter(), None
    for step, windows in enumerate(batches(training, batch, SEQUENCE, steps, seed), 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, steps, PEAK_LEARNING_RATE)
        loss = compiled_loss(model, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if step % 100 == 0 or step == steps:
            log(f"step {step}/{steps}, training loss {mean:.3f}, {(time.perf_counter() - began) / step:.3f} s per step")
        if step % 1000 == 0 or step == steps:
            log(f"validation loss {validation_loss(model, validation, SEQUENCE):.3f} nats per token")
            state = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
            state.pop("output.weight")  # tied
            save_model(out, CONFIG, state)


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train the model that ships with the repository.")
    commands = parser.add_subparsers(required=True, dest="command")
    corpus = commands.add_parser("sample", help="append stories sampled from a checkpoint to a text file")
    corpus.add_argument("--checkpoint_path", type=Path, required=True, help="model folder or model.pth")
    corpus.add_argument("--out", type=Path, required=True, help="text file to append to")
    corpus.add_argument("--stories", type=int, default=18176, help="number of stories to sample; default: 18176")
    corpus.add_argument("--temperature", type=float, default=0.9, help="sampling temperature; default: 0.9")
    training = commands.add_parser("train", help="train a vocabulary and a model on a text file")
    training.add_argument("--corpus", type=Path, required=True, help="text file of stories")
    training.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    training.add_argument("--steps", type=int, default=5000, help="number of optimiser steps; default: 5000")
    training.add_argument("--batch", type=int, default=32, help="sequences per step; default: 32")
    training.add_argument("--seed", type=int, default=0, help="seed of the random numbers; default: 0")
    options = vars(parser.parse_args())
    try:
        if options.pop("command") == "sample":
            sample_corpus(**options)
        else:
            train(**options)
    except (ValueError, OSError) as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
