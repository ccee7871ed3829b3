"""Log-probabilities of given tokens after given contexts; what several of them begin with is read once.

The sequences form a prefix tree: the preamble that many items share, the context of an item, its endings. Nodes that
run together are rows of one cache, which continue rows of the cache above (KVCache.branch). Their tokens lie end to end
in one row of the network, so that none is padding; attention alone sees them as rows.

Shapes: N rows, S positions of the longest, T tokens of all rows, H query heads, G key/value heads, D head dimension,
K positions that are scored, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cache import KVCache, Prefill
from model import Transformer
from rotary import ScoreMod

SHORTEST = 8  # tokens that are a node of their own: reading fewer again costs less than a further link of the chain
CHUNK = 512  # tokens of a single row that are read at a time
LOGITS_AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 28}


@dataclass(frozen=True)
class Scored:
    """A continuation. logprobs: of each token. greedy: whether every token was the likeliest."""

    logprobs: list[float]
    greedy: bool


@dataclass
class Node:
    """tokens: what is read here, after all that the nodes above have read. row: of the cache above, the row that it
    continues. At a leaf, ends: the sequences that end here, by number; scored: positions, the last ones, whose logits
    they ask for."""

    tokens: Sequence[int]
    scored: int = 0
    ends: Sequence[int] = ()
    children: list["Node"] = field(default_factory=list)
    row: int = 0

    @property
    def below(self) -> int:
        """Tokens of all nodes under this one."""
        return sum(len(child.tokens) + child.below for child in self.children)


class Packed:
    """Rows of ragged length, end to end in one row of the network, at the beginning of a cache of as many rows."""

    def __init__(self, cache: KVCache, lengths: Sequence[int]) -> None:
        device, S = cache.start.device, max(lengths)
        slots = torch.arange(S, device=device)
        self.inside = (slots < torch.tensor(lengths, device=device)[:, None]).nonzero(as_tuple=True)  # [T] twice
        # Where each position of a row lies; past its end that of some other token, which no position before it sees.
        self.place = torch.zeros(len(lengths), S, dtype=torch.long, device=device)  # [N,S]
        self.place[self.inside] = torch.arange(sum(lengths), device=device)
        self.positions = cache.start[:, None] + slots  # [N,S]
        self.input_pos = self.positions[self.inside][None]  # [1,T]
        self.rows = Prefill(cache, 0, S)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        """q [1,H,T,D], k and v [1,G,T,D] -> [1,H,T,D]."""
        q, k, v = (tensor[0].transpose(0, 1)[self.place].transpose(1, 2) for tensor in (q, k, v))  # [N,H or G,S,D]
        out = self.rows.attend(layer, q, k, v, self.positions, mod)  # [N,H,S,D]
        rows, slots = self.inside
        return out[rows, :, slots].transpose(0, 1)[None]  # [T,H,D] -> [1,H,T,D]


class Scorer:
    """Scores sequences with one network.

    batch_tokens: what runs at once has at most so many tokens, or is one row. done: is told how many more sequences
    have been scored. asked, read: tokens of all sequences so far, and those that the network has read for them.
    """

    def __init__(
        self, model: Transformer, batch_tokens: int = 4096, done: Callable[[int], None] = lambda count: None
    ) -> None:
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens} must be at least 1")
        self.model, self.batch_tokens, self.done = model, batch_tokens, done
        self.like = model.norm.weight
        scaling = model.args.rope_scaling
        # With dynamic scaling a token is rotated by the length of its whole sequence: nothing is shared.
        self.alone = scaling is not None and scaling.kind == "dynamic"
        self.asked = self.read = 0
        self.wanted: list[list[int]] = []  # of each sequence, the tokens that are scored
        self.found: list[Scored] = []

    @torch.no_grad()
    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """sequences: context, which is at least one token, and continuation."""
        leaves: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(sequences):
            if not context:
                raise ValueError("a context is empty: give at least one token")
            if continuation:  # the last token is only predicted
                leaves.setdefault(((*context, *continuation[:-1]), len(continuation)), []).append(number)
        self.asked += sum(len(tokens) * len(ends) for (tokens, _), ends in leaves.items())
        self.wanted = [list(continuation) for _, continuation in sequences]
        self.found = [Scored([], True)] * len(sequences)
        nodes = [Node(tokens, scored, ends) for (tokens, scored), ends in sorted(leaves.items())]
        self.descend(nodes if self.alone else tree(nodes), None, None)
        return self.found

    def descend(self, nodes: Sequence[Node], above: KVCache | None, length: Tensor | None) -> None:
        """Reads nodes that continue the cache above, of which `length` [its rows] slots are written; None: all."""
        for batch in batches(nodes, 1 if self.alone else self.batch_tokens):
            lengths = [len(node.tokens) for node in batch]
            if above is None:
                cache = KVCache.empty(self.model.args, len(batch), max(lengths), self.like)
            else:
                cache = KVCache.branch(above, [node.row for node in batch], max(lengths), length=length)
            self.read += sum(lengths)
            self.note(batch, self.run_one(batch[0], cache) if len(batch) == 1 else self.run_many(batch, cache))
            children = []
            for row, node in enumerate(batch):
                for child in node.children:
                    child.row = row
                    children.append(child)
            ragged = min(lengths) < max(lengths)
            self.descend(children, cache, torch.tensor(lengths, device=self.like.device) if ragged else None)

    def run_one(self, node: Node, cache: KVCache) -> Tensor:
        """Reads a node in chunks -> the last layer's output [K,dim] where it is scored."""
        tokens, found = torch.tensor([node.tokens], device=self.like.device), []
        size = tokens.shape[1] if self.alone else CHUNK
        begin = tokens.shape[1] - node.scored
        for first, part in enumerate(tokens.split(size, 1)):
            slots = first * size + torch.arange(part.shape[1], device=tokens.device)
            prefill = Prefill(cache, first * size, part.shape[1])
            hidden = self.model.hidden(part, cache.start[:, None] + slots, prefill)
            found.append(hidden[0, max(0, begin - first * size) :])
        return torch.cat(found)

    def run_many(self, batch: Sequence[Node], cache: KVCache) -> Tensor:
        """Reads nodes together -> the last layer's output [K,dim] where they are scored."""
        packed = Packed(cache, [len(node.tokens) for node in batch])
        tokens = torch.tensor([[token for node in batch for token in node.tokens]], device=self.like.device)  # [1,T]
        hidden = self.model.hidden(tokens, packed.input_pos, packed)
        scored = [at >= len(node.tokens) - node.scored for node in batch for at in range(len(node.tokens))]
        return hidden[0, torch.tensor(scored, device=hidden.device)]

    def note(self, batch: Sequence[Node], hidden: Tensor) -> None:
        """Keeps what the sequences that end in these nodes ask for. hidden [K,dim]."""
        asked = [(number, first) for node, first in zip(batch, starts(batch), strict=True) for number in node.ends]
        if not asked:
            return
        at = torch.tensor([first + i for number, first in asked for i in range(len(self.wanted[number]))])
        tokens = torch.tensor([token for number, _ in asked for token in self.wanted[number]])
        at, tokens = at.to(hidden.device), tokens.to(hidden.device)
        logprobs, greedy = self.lookup(hidden, at, tokens)
        for number, _ in asked:
            count = len(self.wanted[number])
            self.found[number] = Scored(logprobs[:count], all(greedy[:count]))
            logprobs, greedy = logprobs[count:], greedy[count:]
        self.done(len(asked))

    def lookup(self, hidden: Tensor, at: Tensor, tokens: Tensor) -> tuple[list[float], list[bool]]:
        """Log-probability of each of `tokens`, and whether it is the likeliest, at its place `at` in hidden [K,dim]."""
        size = max(1, LOGITS_AT_ONCE[hidden.device.type] // self.model.args.vocab_size)
        logprobs = torch.empty_like(at, dtype=torch.promote_types(hidden.dtype, torch.float32))
        greedy = torch.empty_like(at, dtype=torch.bool)
        for first in range(0, len(hidden), size):
            here = ((at >= first) & (at < first + size)).nonzero()[:, 0]
            logits = self.model.logits(hidden[None, first : first + size])[0].to(logprobs.dtype)  # [k,V]
            chosen = logits[at[here] - first, tokens[here]]
            logprobs[here] = chosen - logits.logsumexp(-1)[at[here] - first]
            greedy[here] = logits.argmax(-1)[at[here] - first] == tokens[here]
        return logprobs.tolist(), greedy.tolist()


def starts(batch: Sequence[Node]) -> Iterator[int]:
    """Where the scored positions of each node begin, among those of all."""
    first = 0
    for node in batch:
        yield first
        first += node.scored


def tree(
    leaves: Sequence[Node], shortest: int = SHORTEST, depth: int = 0, common: Sequence[int] | None = None
) -> list[Node]:
    """Leaves in order of their tokens, of which the first `depth` have been read, under nodes of what they share, which
    are of at least `shortest` tokens.

    common: how many tokens each leaf shares with the next; None: to be counted. What is scored is never shared.
    """
    if common is None:
        common = [shared(one, other) for one, other in zip(leaves, leaves[1:])]  # noqa: B905
    nodes, first = [], 0
    for last in range(len(leaves)):
        if last < len(common) and common[last] >= depth + shortest:
            continue
        if last == first:
            leaf = leaves[first]
            nodes.append(Node(leaf.tokens[depth:], leaf.scored, leaf.ends))
        else:
            end = min(common[first:last])
            below = tree(leaves[first : last + 1], shortest, end, common[first:last])
            nodes.append(Node(leaves[first].tokens[depth:end], children=below))
        first = last + 1
    return nodes


def shared(one: Node, other: Node) -> int:
    """Tokens that two sequences begin with alike, before what is scored of either."""
    low, high = 0, min(len(one.tokens) - one.scored, len(other.tokens) - other.scored)
    while low < high:  # the first `low` are alike, the first `high + 1` are not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.tokens[low:middle] == other.tokens[low:middle] else (low, middle - 1)
    return low


def batches(nodes: Sequence[Node], limit: int) -> Iterator[list[Node]]:
    """Nodes that run together, the longest first: at most `limit` tokens, padded, and as many in what is below them; or
    one node."""
    batch: list[Node] = []
    below = 0
    for node in sorted(nodes, key=lambda node: -len(node.tokens)):
        under = node.below
        if batch and ((len(batch) + 1) * len(batch[0].tokens) > limit or below + under > limit):
            yield batch
            batch, below = [], 0
        batch.append(node)
        below += under
    if batch:
        yield batch
