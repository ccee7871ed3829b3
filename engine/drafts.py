"""Drafts of speculative decoding: prompt look-up, early exit, a second model, Medusa; and their flags.

Shapes: N rows, k proposals, T context length, V vocabulary, as in speculate.py.
"""

import math
from collections.abc import Callable, Sequence
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KVCache
from engine.engine import SILENT, Engine, Run
from engine.graphs import Step, StepInput
from engine.speculate import DEFAULT_K, Draft, Speculation, SpeculativeDecoder
from loading.checkpoint import Checkpoint, load_model, read_checkpoint, unpickle, weight_sizes
from loading.hub import locate
from loading.tokenizer import load_tokenizer
from model import ModelArgs, Transformer
from tp import WHOLE, VocabularyEmbedding


class PromptDraft(Draft):
    """Prompt look-up (Saxena 2023): proposes what followed the latest earlier occurrence of a row's last n-gram, in its
    own text or in the context. The index of the context is built once per run."""

    name, sizes = "prompt", (3, 2)  # n-gram lengths, in order of look-up
    context: Tensor
    vocabulary: int
    index: dict[int, tuple[Tensor, Tensor]]
    source: Tensor
    end: Tensor

    def read(self, run: Run) -> Self:
        mine = copy(self)
        mine.vocabulary = run.engine.args.vocab_size
        mine.context = torch.tensor(run.history, device=run.engine.device)  # [T]
        mine.index = {n: mine.keys(mine.context, n).sort(stable=True) for n in self.sizes if n <= len(mine.context)}
        return mine

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.source = mine.end = torch.zeros_like(rows.samples)[:, None]  # [N,1]
        return mine

    def keys(self, tokens: Tensor, n: int) -> Tensor:
        """Encode each n-gram as one integer: [...,L] -> [...,L-n+1]. Three tokens of 2^20 each fit into 63 bits."""
        windows = tokens.unfold(-1, n, 1)  # [...,L-n+1,n]
        return (windows * self.vocabulary ** torch.arange(n, device=tokens.device)).sum(-1)

    def tokens(self, rows: SpeculativeDecoder, where: Tensor) -> Tensor:
        """Return the tokens of each row at its positions `where` [N,S]."""
        T = len(self.context)
        own = rows.text.gather(1, (where - T).clamp_min(0))
        return torch.where(where < T, self.context[where.clamp(0, T - 1)], own)

    def followed(self, rows: SpeculativeDecoder, n: int, end: Tensor) -> Tensor:
        """Return the position [N,1] after the latest n-gram equal to the n tokens before `end`; 0: there is none."""
        context, key = self.context, self.keys(self.tokens(rows, end - rows.arange(n, 0, -1)), n)  # [N,1]
        before = context[len(context) - min(len(context), n - 1) :]  # an n-gram may begin in the context
        text = torch.cat([before.expand(len(end), -1), rows.text[:, : rows.view]], 1)
        keys = self.keys(text, n)
        after = len(context) - len(before) + n + rows.arange(keys.shape[1])
        own = torch.where((keys == key) & (after < end), after, 0).amax(1, keepdim=True)
        if n not in self.index:
            return own
        ordered, places = self.index[n]
        at = (torch.searchsorted(ordered, key, right=True) - 1).clamp_min(0)  # the last of equal keys
        return torch.where((own == 0) & (ordered[at] == key), places[at] + n, own)

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        end = rows.input_pos + 1  # [N,1]
        moved, self.end = self.source + end - self.end, end  # continue the last match while it agrees
        last = rows.arange(1, 3)
        agrees = (self.tokens(rows, moved - last) == self.tokens(rows, end - last)).all(1, keepdim=True)
        self.source = torch.where(agrees & (self.source > 0), moved, 0)
        for n in self.sizes:
            if (self.source == 0).any() and n <= len(self.context) + 1:
                self.source = torch.where(self.source == 0, self.followed(rows, n, end), self.source)
        if not self.source.any():
            return None
        found = torch.where(self.source == 0, end - 1, self.source)
        return self.tokens(rows, found + rows.arange(k) % (end - found))  # a match shorter than k repeats

    def keep(self, rows: Sequence[int]) -> None:
        self.source, self.end = self.source[rows], self.end[rows]


def sound(draft: Draft, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Return a draft's tokens. Raises ValueError if its logits hold nan or infinity."""
    if not math.isfinite(float(logprobs.sum())):
        raise ValueError(f"the draft, {draft.name}: its logits are not finite: give another, or --dtype float32")
    return tokens


class LayersDraft(Draft):
    """The target's first layers with its own norm and head (early exit: LayerSkip, arXiv 2404.16710). They use
    the target's cache: verification overwrites their keys and values."""

    step: Step
    cache: KVCache

    def __init__(self, layers: int) -> None:
        self.name, self.layers = f"layers:{layers}", layers

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.step, mine.cache = rows.network(rows.model, self.layers), rows.cache
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        tokens, logprobs = [rows.token], []
        for ahead in range(k):
            where = rows.input_pos + ahead
            logits, _ = self.step(StepInput(tokens[-1], where, rows.samples, rows.seed), self.cache)  # [N,1,V]
            token, logprob = rows.draw(logits[..., : rows.model.args.vocab_size], where + 1)
            tokens.append(token)
            logprobs.append(logprob)
        return sound(self, torch.cat(tokens[1:], 1), torch.cat(logprobs, 1))


class ModelDraft(LayersDraft):
    """A second model of the same vocabulary, with its own chain of caches over the same context. Its embedding may have
    more or fewer rows than the target's, whose last ones are padding."""

    PART = 32  # positions to catch up at a time
    engine: Engine
    context: KVCache
    base: int  # slots before the rows' own

    def __init__(
        self, args: ModelArgs, load: Callable[..., Transformer], weights: int = 0, token_bytes: int = 0
    ) -> None:
        """load: device, dtype, rows -> the model. weights, token_bytes: as in Draft, as far as known before loading."""
        self.name, self.layers, self.args, self.load = "model", args.n_layer, args, load
        self.weights, self.token_bytes = weights, token_bytes

    def place(self, engine: Engine, rows: int) -> None:
        model = self.load(engine.device, engine.dtype, rows)
        if self.args.vocab_size < engine.args.vocab_size:  # tokens that only the target has embed as 0
            model.tok_embeddings = VocabularyEmbedding(model.tok_embeddings.weight, 0, WHOLE)
        self.engine = Engine(model)
        self.weights = self.engine.weights.total
        self.token_bytes = self.args.kv_values_per_token * engine.dtype.itemsize

    def read(self, run: Run) -> Self:
        mine, like = copy(self), self.engine.model.norm.weight
        T = len(run.history)
        mine.context = KVCache.empty(self.args.kv_shape, 1, T, like, T + run.own_slots if run.extends else 0)
        self.engine.prefill(mine.context, run.history, run.request.prefill_chunk, SILENT)
        return mine

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine, run = copy(self), rows.run
        self.context.resize(run.begin)  # drop what an earlier one-row wave wrote
        mine.cache = self.context if run.extends else KVCache.fork(self.context, len(rows.samples), 0, run.own_slots)
        mine.base = mine.cache.slots
        mine.step = rows.network(self.engine.model)
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        self.cache.resize(self.base + rows.view)
        for behind in range(rows.behind, 0, -self.PART):  # positions run by the target alone
            where = rows.input_pos - rows.arange(behind, max(0, behind - self.PART), -1)
            where = where.clamp_min(rows.run.begin)  # [N,PART]
            self.engine.model.hidden(rows.text.gather(1, where - rows.run.begin), where, self.cache)
        return super().propose(rows, k)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)


class MedusaDraft(Draft):
    """Medusa heads on the last layer's output (Cai et al. 2024, arXiv 2401.10774): head i proposes the token i + 2
    positions after the one that was run. `tokens` in the file: token ids of the heads' logits; without it: all."""

    name = "medusa"

    def __init__(self, path: Path, args: ModelArgs) -> None:
        """Map a medusa_lm_head.pt. Raises FileNotFoundError, or ValueError if its shapes do not fit the network."""
        if not path.exists():
            raise FileNotFoundError(f"no file at {path}: give a medusa_lm_head.pt")
        state: Any = unpickle(path)
        parts = ("0.linear.weight", "0.linear.bias", "1.weight")
        dim, ids = args.dim, state.get("tokens") if isinstance(state, dict) else None
        shapes = [(dim, dim), (dim,), (args.vocab_size if ids is None else len(ids), dim)]
        try:
            self.longest = sum(name.endswith(parts[-1]) for name in state)
            self.heads = [[state[f"{head}.{part}"] for part in parts] for head in range(self.longest)]
            fits = self.longest and all([tuple(t.shape) for t in head] == shapes for head in self.heads)
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits or (ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < args.vocab_size):
            raise ValueError(f"{path} does not hold Medusa heads of dim {dim} for {args.vocab_size} tokens")
        self.ids = ids
        self.weights = sum(tensor.nbytes for head in self.heads for tensor in head)

    def place(self, engine: Engine, rows: int) -> None:
        self.heads = [[tensor.to(engine.device, engine.dtype) for tensor in head] for head in self.heads]
        self.ids = None if self.ids is None else self.ids.to(engine.device)

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        if rows.hidden is None:  # after prefill or a plain step: this step computes it
            return rows.token.expand(-1, k)
        x = rows.model.norm(rows.hidden)  # [N,1,dim]
        heads = (F.linear(x + F.silu(F.linear(x, *block)), output) for *block, output in self.heads[:k])
        where = rows.input_pos + rows.arange(1, k + 1)
        return sound(self, *rows.draw(torch.cat(list(heads), 1), where, names=self.ids))


def check_vocabulary(draft: Checkpoint, target: Checkpoint) -> None:
    """Raise ValueError naming the first token in which the two vocabularies differ."""
    if draft.folder.resolve() == target.folder.resolve():
        return
    ours, theirs = load_tokenizer(target.folder), load_tokenizer(draft.folder)
    begun = [each.encode("a")[-1:] for each in (ours, theirs)]  # a text's first token may lose its leading space
    names = [{id: name for name, id in each.specials.items()} for each in (ours, theirs)]
    for id in range(max(ours.vocab_size, theirs.vocab_size)):
        texts = [
            (each.decode([*before, id]), name.get(id)) if id < each.vocab_size else None
            for each, before, name in zip((ours, theirs), begun, names, strict=True)
        ]
        if texts[0] != texts[1]:
            raise ValueError(
                f"the draft's vocabulary is not the target's: token {id} differs, give a draft of the same one"
            )


def choose_draft(
    names: Sequence[str],
    path: str | None,
    k: str | None,
    target: Checkpoint,
    place: tuple[torch.device, torch.dtype, int],
) -> Speculation | None:
    """Resolve --draft, --draft_checkpoint_path and --speculate_k from metadata alone; None: plain decoding. place:
    device, dtype and rows. Raises ValueError or FileNotFoundError if the flags are invalid or do not fit the target."""
    kind, _, count = "".join(names[:1]).partition(":")
    if k not in (None, "auto") and not k.lstrip("-").isdecimal():
        raise ValueError(f"speculate_k {k!r} is not a number: give one of at least 1, or auto")
    if names and path:
        raise ValueError("--draft and --draft_checkpoint_path are both given: give one")
    if not (names or path):
        if k is not None:
            raise ValueError("--speculate_k is for a draft: add --draft or --draft_checkpoint_path")
        return None
    draft: Draft
    if path:
        checkpoint = read_checkpoint(locate(path))
        check_vocabulary(checkpoint, target)
        weights = sum(weight_sizes(checkpoint, *place).values())
        token_bytes = checkpoint.args.kv_values_per_token * place[1].itemsize
        draft = ModelDraft(checkpoint.args, partial(load_model, checkpoint), weights, token_bytes)
    elif kind == "layers" and len(names) == 1 and count.isdecimal() and 1 <= int(count) < target.args.n_layer:
        draft = LayersDraft(int(count))
    elif kind == "medusa" and len(names) == 2:
        draft = MedusaDraft(Path(names[1]), target.args)
    elif list(names) == ["prompt"]:
        draft = PromptDraft()
    else:
        most = target.args.n_layer - 1
        raise ValueError(f"--draft {' '.join(names)}: give prompt, layers:K with K from 1 to {most}, or medusa PATH")
    return Speculation(draft, None if k == "auto" else min(DEFAULT_K, draft.longest) if k is None else int(k))
