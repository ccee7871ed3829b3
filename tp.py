"""Tensor parallelism: which part of every weight a rank holds, as one table, and the sums that make the parts whole.

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053), section 3: of two products in a row the first is split by its
outputs and the second by its inputs, so that a layer needs two all-reduces of [N,S,dim], one after attention and one
after the feed-forward part. Attention, and so the cache, holds a rank's own heads. The network knows nothing of this:
the sums are hooks on its modules. The collectives are functional, so a compiled step stays one graph.

Shapes: N rows, S positions, k tokens that a step may give a row, V vocabulary.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from layers.moe import ExpertLinear
from model import Embedding, ModelArgs, Transformer

COLLECTIVES = torch.ops._c10d_functional

# Of each module that is split: the dimension of its weight [out,in], and what is divided among the ranks.
TABLE = {
    "attention.wq": (0, "n_head"),
    "attention.wk": (0, "n_kv_head"),
    "attention.wv": (0, "n_kv_head"),
    "attention.wo": (1, "n_head"),
    "feed_forward.w1": (0, "hidden_dim"),
    "feed_forward.w3": (0, "hidden_dim"),
    "feed_forward.w2": (1, "hidden_dim"),
    "feed_forward.w1.*": (0, "width"),  # of every expert
    "feed_forward.w3.*": (0, "width"),
    "feed_forward.w2.*": (1, "width"),
    "feed_forward.shared.w1": (0, "shared"),
    "feed_forward.shared.w3": (0, "shared"),
    "feed_forward.shared.w2": (1, "shared"),
    "tok_embeddings": (0, "vocab_size"),
    "output": (0, "vocab_size"),
}


@dataclass(frozen=True)
class Shard:
    """The part of a network that this rank of `world` holds. group: the name of the process group of those that hold
    the other parts; "": none, and nothing is summed."""

    rank: int = 0
    world: int = 1
    group: str = ""

    def local(self, args: ModelArgs) -> ModelArgs:
        """The shape of this rank's part: of heads and feed-forward width; the vocabulary stays whole. Raises ValueError
        where they cannot be divided."""
        world, mixture = self.world, args.mixture
        heads, groups, widths = args.n_head, args.n_kv_head, [args.hidden_dim]
        if mixture is not None:
            widths += [mixture.width, mixture.shared]
            mixture = replace(mixture, width=mixture.width // world, shared=mixture.shared // world)
        if not divides(world, heads, groups, widths):
            fits = [each for each in range(1, world) if world % each == 0 and divides(each, heads, groups, widths)]
            raise ValueError(
                f"{heads} heads, {groups} for keys, and feed-forward widths of {', '.join(map(str, widths))} cannot be "
                f"divided among {world} processes: give --tp {' or '.join(map(str, fits))} (1 makes replicas)"
            )
        if args.qk_norm_whole and world > 1:
            raise ValueError("queries that are normalised over all heads cannot be divided: give --tp 1")
        each = replace(args, n_head=heads // world, n_kv_head=max(1, groups // world), mixture=mixture)
        return replace(each, hidden_dim=args.hidden_dim // world)

    def cut(self, module: str, args: ModelArgs) -> tuple[int, int, int] | None:
        """(dimension, begin, end) of this rank's part of a module's weight; None: the whole. Where there are fewer
        heads of keys than ranks, each is held by several."""
        name = re.sub(r"\.\d+$", ".*", re.sub(r"^layers\.\d+\.", "", module))
        dim, divided = TABLE.get(name, (0, ""))
        count = (vars(args) | (vars(args.mixture) if args.mixture else {})).get(divided, 0)
        if self.world == 1 or count == 0 or (divided == "vocab_size" and count % self.world):
            return None
        size = args.head_dim if divided in ("n_head", "n_kv_head") else 1
        begin = self.rank * count // self.world
        end = max(begin + 1, (self.rank + 1) * count // self.world)
        return dim, begin * size, end * size

    def part(self, name: str, tensor: Tensor, args: ModelArgs) -> Tensor:
        """This rank's part of a parameter, in memory of its own, so that the file that it was in can be let go."""
        module, _, kind = name.rpartition(".")
        if self.world == 1:
            return tensor
        if (cut := self.cut(module, args)) is None:
            return tensor.clone()
        dim, begin, end = cut
        if kind == "bias" and dim == 1:  # is added to a sum: once
            return tensor.clone() if self.rank == 0 else torch.zeros_like(tensor)
        return tensor.narrow(dim, begin, end - begin).clone(memory_format=torch.contiguous_format)

    def attach(self, model: Transformer) -> None:
        """Makes a network whose weights are this rank's parts compute what the whole one does. Its args stay those of
        the whole; a cache for it is of the `local` shape."""
        args, heads = model.args, self.local(model.args).n_head
        for block in model.layers:
            mod = block.attention.score_mod
            if mod is not None and mod.slopes is not None:
                own = mod.slopes[self.rank * heads : (self.rank + 1) * heads]
                block.attention.score_mod = replace(mod, slopes=own)
            for module in (block.attention, block.feed_forward) if self.group else ():
                module.register_forward_hook(lambda module, inputs, output: self.sum(output))
        for name, module in model.named_modules():
            if isinstance(module, ExpertLinear) and (cut := self.cut(f"{name}.0", args)) is not None and cut[0] == 0:
                module.features = cut[2] - cut[1]
        if self.cut("output", args) is not None:
            model.output.register_forward_hook(lambda module, inputs, output: self.gather(output))
        if (cut := self.cut("tok_embeddings", args)) is not None:
            model.tok_embeddings = VocabularyEmbedding(model.tok_embeddings.weight, cut[1], self)

    def sum(self, tensor: Tensor) -> Tensor:
        """Over all ranks; the result is the same on each."""
        if not self.group:
            return tensor
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(tensor, "sum", self.group))

    def gather(self, logits: Tensor) -> Tensor:
        """[N,S,V/world] of each rank -> [N,S,V]."""
        if not self.group:
            return logits
        parts = COLLECTIVES.all_gather_into_tensor(logits.contiguous(), self.world, self.group)
        parts = COLLECTIVES.wait_tensor(parts).unflatten(0, (self.world, -1))  # [world,N,S,V/world]
        return parts.movedim(0, -2).flatten(-2)  # [N,S,V]

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Rank 0's tokens, for all: another kind of CPU may round a draw to the other side."""
        if not self.group:
            return tokens
        return COLLECTIVES.wait_tensor(COLLECTIVES.broadcast(tokens.contiguous(), 0, self.group))


def divides(world: int, heads: int, groups: int, widths: Sequence[int]) -> bool:
    """Whether so many ranks can each hold as much of the network."""
    return not any(size % world for size in (heads, *widths)) and (groups % world == 0 or world % groups == 0)


WHOLE = Shard()


class VocabularyEmbedding(Embedding):
    """An embedding table of which each rank holds the rows from `begin` on that `weight` has."""

    def __init__(self, weight: Tensor, begin: int, shard: Shard) -> None:
        nn.Module.__init__(self)
        self.weight, self.begin, self.shard = weight, begin, shard

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [N,S] -> [N,S,dim]."""
        own = tokens - self.begin
        foreign = (own < 0) | (own >= len(self.weight))
        x = F.embedding(own.masked_fill(foreign, 0), self.weight)  # [N,S,dim]
        return self.shard.sum(x.masked_fill(foreign[..., None], 0))
