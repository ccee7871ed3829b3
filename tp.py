"""Tensor parallelism: shard table and all-reduces.

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053), section 3: of two consecutive linear layers the first is split by
outputs and the second by inputs, so a layer needs two all-reduces of [N,S,dim], one after attention and one after
feed-forward. Attention, and so the cache, holds a rank's own heads. The output layer is split by vocabulary; the
embedding is held whole by each rank, which saves an all-reduce in every step, and a tied output is a view of it. The
network is unchanged: the all-reduces are hooks on its modules. The collectives are functional, so a compiled step stays
one graph.

Shapes: N rows, S positions, V vocabulary, K candidate tokens of a rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layers.moe import ExpertLinear
from model import ModelArgs, Transformer
from sampling import Filters, deciding, likeliest

MOST_GATHERED = 1024  # candidates of a rank and row; for more of them the logits are gathered

COLLECTIVES = torch.ops._c10d_functional

# Per module: the dimension of its weight [out,in] that is split, and the size that is divided among the ranks.
TABLE = {
    "attention.wq": (0, "n_head"),
    "attention.wk": (0, "n_kv_head"),
    "attention.wv": (0, "n_kv_head"),
    "attention.wo": (1, "n_head"),
    "feed_forward.w1": (0, "hidden_dim"),
    "feed_forward.w3": (0, "hidden_dim"),
    "feed_forward.w2": (1, "hidden_dim"),
    "feed_forward.w1.*": (0, "width"),  # every expert
    "feed_forward.w3.*": (0, "width"),
    "feed_forward.w2.*": (1, "width"),
    "feed_forward.shared.w1": (0, "shared"),
    "feed_forward.shared.w3": (0, "shared"),
    "feed_forward.shared.w2": (1, "shared"),
    "output": (0, "vocab_size"),
}


@dataclass(frozen=True)
class Shard:
    """One rank's part of a network split over `world` ranks. group: name of the process group of the ranks that hold
    the other parts; "": none, and nothing is reduced."""

    rank: int = 0
    world: int = 1
    group: str = ""

    def local(self, args: ModelArgs) -> ModelArgs:
        """Return the args of this rank's part, with heads and feed-forward width divided; the vocabulary stays whole.
        Raises ValueError if they cannot be divided."""
        world, mixture = self.world, args.mixture
        heads, groups, widths = args.n_head, args.n_kv_head, [args.hidden_dim]
        if mixture is not None:
            widths += [mixture.width, mixture.shared]
            mixture = replace(mixture, width=mixture.width // world, shared=mixture.shared // world)
        if not divides(world, heads, groups, widths):
            fits = [each for each in range(1, world) if world % each == 0 and divides(each, heads, groups, widths)]
            raise ValueError(
                f"{heads} heads, {groups} key/value heads and feed-forward widths {', '.join(map(str, widths))} do not "
                f"divide among {world} processes: pass --tp {' or '.join(map(str, fits))} (1: one replica per process)"
            )
        if args.qk_norm_whole and world > 1:
            raise ValueError("this model normalises queries over all heads, which cannot be divided: pass --tp 1")
        each = replace(args, n_head=heads // world, n_kv_head=max(1, groups // world), mixture=mixture)
        return replace(each, hidden_dim=args.hidden_dim // world)

    def cut(self, module: str, args: ModelArgs) -> tuple[int, int, int] | None:
        """Return (dimension, begin, end) of this rank's slice of a module's weight; None: the whole. With fewer
        key/value heads than ranks, several ranks hold the same head."""
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
        """Return this rank's slice of a parameter, copied so that the mapped file can be released; one that is not
        divided as it is, so that the ranks of a machine share the pages of its file."""
        module, _, kind = name.rpartition(".")
        if (cut := self.cut(module, args)) is None:
            return tensor
        dim, begin, end = cut
        if kind == "bias" and dim == 1:  # added on rank 0 only, since the outputs are all-reduced
            return tensor.clone() if self.rank == 0 else torch.zeros_like(tensor)
        return tensor.narrow(dim, begin, end - begin).clone(memory_format=torch.contiguous_format)

    def attach(self, model: Transformer) -> None:
        """Install the hooks that make a network of this rank's weights compute what the whole network does. Its args
        stay those of the whole; a cache for it has the `local` shape."""
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
        if (cut := self.cut("output", args)) is not None:
            model.output.register_forward_hook(lambda module, inputs, output: self.gather(output))
            model.tie_output(*cut[1:])

    def parts(self, args: ModelArgs) -> int:
        """Return among how many ranks the output layer is divided."""
        return 1 if self.cut("output", args) is None else self.world

    def sum(self, tensor: Tensor) -> Tensor:
        """All-reduce over the ranks; the result is the same on each."""
        if not self.group:
            return tensor
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(tensor, "sum", self.group))

    def gather(self, logits: Tensor) -> Tensor:
        """All-gather the logits: each rank's [N,S,V/world] -> [N,S,V]."""
        if not self.group:
            return logits
        return self.stacked(logits).movedim(0, -2).flatten(-2)  # [N,S,V]

    def stacked(self, tensor: Tensor) -> Tensor:
        """All-gather a tensor: each rank's [N,...] -> [world,N,...]."""
        parts = COLLECTIVES.all_gather_into_tensor(tensor.contiguous(), self.world, self.group)
        return COLLECTIVES.wait_tensor(parts).unflatten(0, (self.world, -1))

    def deciding(self, rows: Sequence[Filters], args: ModelArgs) -> int | None:
        """Return how many of each rank's likeliest tokens to gather for the draws of rows, instead of the logits. None:
        the logits, if all of them are needed or are not much more."""
        most, parts = deciding(rows), self.parts(args)
        small = most is not None and parts > 1 and most <= MOST_GATHERED and 2 * most < args.vocab_size // parts
        return most if small else None

    def candidates(self, logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Gather the `most` likeliest tokens K of each rank's logits [N,V/world] -> logits fp32 [N,world*K], token ids
        [N,world*K], and the log-sum-exp of the whole vocabulary, fp32 [N,1]. In one all-gather of 2K + 1 words of 32
        bits a row. Ranks are in the order of their tokens, so argmax finds the lowest id among equals."""
        values, ids, total = likeliest(logits, most)
        words = torch.cat([values, total], 1).view(torch.int32)  # [N,K+1]
        parts = self.stacked(torch.cat([words, (ids + self.rank * logits.shape[-1]).int()], 1))  # [world,N,2K+1]
        found, ids = parts.split([words.shape[1], ids.shape[1]], -1)  # [world,N,K+1] [world,N,K]
        values, total = found.view(torch.float32).split([ids.shape[-1], 1], -1)  # [world,N,K] [world,N,1]
        return values.movedim(0, 1).flatten(1), ids.movedim(0, 1).flatten(1).long(), total.logsumexp(0)

    def broadcast(self, tokens: Tensor) -> Tensor:
        """Broadcast rank 0's tokens to all: on another type of CPU rounding may change a draw."""
        if not self.group:
            return tokens
        return COLLECTIVES.wait_tensor(COLLECTIVES.broadcast(tokens.contiguous(), 0, self.group))

    def agreed(self, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Broadcast tokens and log-probabilities, so that all ranks of a network finish the same rows."""
        if self.world == 1:
            return drawn
        both = self.broadcast(torch.stack([each.double() for each in drawn]))  # exact for token ids
        return both[0].long(), both[1]


def divides(world: int, heads: int, groups: int, widths: Sequence[int]) -> bool:
    """Return whether heads and widths divide evenly among `world` ranks."""
    return not any(size % world for size in (heads, *widths)) and (groups % world == 0 or world % groups == 0)


WHOLE = Shard()
