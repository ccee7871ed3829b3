"""Log-probabilities of given tokens after given contexts; shared prefixes are read once.

The sequences form a prefix tree: the preamble that many items share, the context of an item, its endings. Large nodes
are read one by one, depth first, into one cache, which holds the path to the current node. Small subtrees, such as an
item with its endings, run together as rows: a row holds a whole subtree, and a token attends to earlier tokens of its
own branch. The rows are packed end to end into one row of the network, without padding; only attention sees them as
rows.

Shapes: N rows, S positions of the longest, T tokens of all rows, H query heads, G key/value heads, D head dimension,
K positions that are scored, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from bifurcated_attention import ScoreMod, fused_partial, has_fused, merge_partials, shared_attention
from cache import KVCache, Link, Prefill, sdpa
from engine.request import check_tokens
from engine.samples import check_finite
from model import ModelArgs, Transformer

SHORTEST = 8  # tokens of the shortest shared node: it is cheaper to read fewer again
SMALL = 256  # most tokens of a subtree run as a row; in a larger one most scores would be masked
CHUNK = 512  # tokens of a large node read at a time
PADDED = 4  # most tokens of a batch once padded for attention, in multiples of batch_tokens
LOGITS_AT_ONCE = {"cpu": 1 << 23, "cuda": 1 << 28}


@dataclass(frozen=True)
class Scored:
    """Scores of a continuation. logprobs: one per token. greedy: whether every token was the likeliest."""

    logprobs: list[float]
    greedy: bool


@dataclass
class Node:
    """Node of the prefix tree. tokens: read here, after those of all nodes above. At a leaf, ends: indices of the
    sequences that end here; scored: how many of their last positions are scored. Those lie in this node, except that
    the first may be the last position above it."""

    tokens: Sequence[int]
    scored: int = 0
    ends: Sequence[int] = ()
    children: list["Node"] = field(default_factory=list)

    def walk(self) -> Iterator["Node"]:
        """Yield this node and all below it, parents first. No recursion: a thousand prompts, each extending
        the last, form a tree of that depth."""
        todo = [self]
        while todo:
            node = todo.pop()
            yield node
            todo += reversed(node.children)

    @property
    def size(self) -> int:
        """Tokens of this node and all below it."""
        return sum(len(node.tokens) for node in self.walk())


# A node still to be read, the last layer's output before it, its position.
Pending = tuple[Node, Tensor, int]
# Requested scores: the index of each sequence, and the places of its scored positions.
Asked = list[tuple[int, list[int]]]


class Rows:
    """Subtrees as rows, packed end to end, that continue the linked caches.

    asked: places count from 1 at the first token; 0 is the last token before all of them.
    """

    def __init__(self, nodes: Sequence[Node], begin: int, links: Sequence[Link], device: torch.device) -> None:
        """begin: position of each row's first token."""
        self.links = links
        self.asked: Asked = []
        tokens: list[int] = []
        positions: list[int] = []
        ends: list[int] = []  # for each token, the end of its node's subtree

        def lay(node: Node, position: int, before: int) -> None:
            first, count = len(tokens), len(node.tokens)
            tokens.extend(node.tokens)
            positions.extend(range(position, position + count))
            ends.extend([0] * count)
            places = [before, *range(first + 1, first + count + 1)]
            self.asked.extend((number, places[-node.scored :]) for number in node.ends)
            for child in node.children:
                lay(child, position + count, places[-1])
            ends[first : first + count] = [len(tokens)] * count

        starts = [0]
        for node in nodes:
            lay(node, begin, 0)
            starts.append(len(tokens))
        self.tokens, self.input_pos = (torch.tensor([each], device=device) for each in (tokens, positions))  # [1,T]
        self.first = torch.tensor(starts, device=device)
        lengths = self.first.diff()[:, None]  # [N,1]
        slots = torch.arange(int(lengths.max()), device=device)  # [S]
        inside = slots < lengths  # [N,S]
        # Packed index of each row position; padding takes the first token, which only other padding sees.
        self.place = (self.first[:-1, None] + slots).masked_fill(~inside, 0)
        self.ends = torch.tensor(ends, device=device)[self.place].masked_fill(~inside, len(tokens) + len(slots))
        self.branches = any(node.children for node in nodes)
        self.positions = self.input_pos[0][self.place]  # [N,S]
        self.inside = inside.flatten().nonzero()[:, 0]  # [T]

    @cached_property
    def visible(self) -> Tensor:
        """The mask of earlier tokens of each token's branch, bool [N,1,S,S]."""
        slots, end = torch.arange(self.place.shape[1], device=self.place.device), self.ends - self.first[:-1, None]
        return ((slots[:, None] >= slots) & (slots[:, None] < end[:, None]))[:, None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        """Attend within the rows and to the linked caches: q [1,H,T,D], k and v [1,G,T,D] -> [1,H,T,D]. Rows without
        branches need no mask: they are causal, and the padding is behind their tokens."""
        rows = (tensor[0].transpose(0, 1)[self.place].transpose(1, 2) for tensor in (q, k, v))
        q_rows, k_rows, v_rows = rows  # [N,H,S,D], [N,G,S,D] twice
        fused = bool(self.links) and has_fused(q.device, q.dtype, q.shape[-1])
        if mod is None and not self.branches and (fused or not self.links):
            if not self.links:
                return self.end_to_end(sdpa(q_rows, k_rows, v_rows, None))
            k_rows, v_rows = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k_rows, v_rows))  # [N,H,S,D]
            out, lse = fused_partial(q_rows, k_rows, v_rows, causal=True)
        else:
            mask = self.visible if mod is None else mod.mask(self.visible, self.positions, self.positions)
            softcap = None if mod is None else mod.softcap
            if not self.links:
                return self.end_to_end(sdpa(q_rows, k_rows, v_rows, mask, softcap))
            out, lse = shared_attention(q_rows, k_rows, v_rows, mask, softcap)
        partials = [(self.end_to_end(out), self.end_to_end(lse))]
        partials += [link.attend(layer, q, input_pos, mod) for link in self.links]
        return merge_partials(partials)[0].to(q.dtype)

    def end_to_end(self, tensor: Tensor) -> Tensor:
        """Pack rows end to end, dropping padding: [N,H,S,...] -> [1,H,T,...]."""
        return tensor.transpose(1, 2).flatten(0, 1)[self.inside].transpose(0, 1)[None]


class Scorer:
    """Scorer of sequences that shares prefixes, for one network.

    batch_tokens: most tokens of rows that run together. done(read, total): progress callback, called after each batch
    and each chunk of a large node. asked, read: tokens of all sequences so far, and tokens that the network read for
    them. path: one row of cache for all nodes above the current one; siblings reuse its slots.
    """

    def __init__(
        self,
        model: Transformer,
        batch_tokens: int = 4096,
        done: Callable[[int, int], None] = lambda read, total: None,
        args: ModelArgs | None = None,
    ) -> None:
        """args: dimensions of this rank's part if the model is sharded."""
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens {batch_tokens} must be at least 1")
        self.model, self.batch_tokens, self.done, self.args = model, batch_tokens, done, args or model.args
        self.like = model.norm.weight
        scaling = model.args.rope_scaling
        # Dynamic scaling rotates a token by the length of its whole sequence: nothing can be shared.
        self.alone = scaling is not None and scaling.by_length
        self.asked = self.read = 0
        self.begun = self.total = 0  # tokens read before this call, and in this call
        self.wanted: list[Sequence[int]] = []  # scored tokens of each sequence
        self.found: list[Scored] = []

    @torch.no_grad()
    def score(self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Scored]:
        """Score (context, continuation) pairs, each part of at least one token. Raises ValueError if a part is empty
        or a token is not in the vocabulary, FloatingPointError if logits are not finite."""
        leaves: dict[tuple[tuple[int, ...], int], list[int]] = {}
        for number, (context, continuation) in enumerate(sequences):
            if not context or not continuation:
                raise ValueError(f"a {'continuation' if context else 'context'} is empty: pass at least one token")
            tokens = (*context, *continuation)
            check_tokens(tokens, self.model.args.vocab_size)
            leaves.setdefault((tokens[:-1], len(continuation)), []).append(number)  # the last token is only predicted
        self.asked += sum(len(tokens) * len(ends) for (tokens, _), ends in leaves.items())
        self.wanted = [continuation for _, continuation in sequences]
        self.found = [Scored([], True)] * len(sequences)
        nodes = [Node(tokens, scored, ends) for (tokens, scored), ends in sorted(leaves.items())]
        nodes = nodes if self.alone else tree(nodes, SHORTEST)
        longest = max((len(tokens) for tokens, _ in leaves), default=0)
        self.path = KVCache.empty(self.args.kv_shape, 1, 0, self.like, longest)
        self.begun, self.total = self.read, sum(node.size for node in nodes)
        self.descend(nodes, self.like.new_zeros(1, self.model.args.dim))
        return self.found

    def descend(self, roots: Sequence[Node], before: Tensor) -> None:
        """Read nodes and all below them. before [1,dim]: the last layer's output before them."""
        todo = self.spread(roots, before, 0)
        while todo:
            node, before, begin = todo.pop()
            before = self.run(node, before, begin)
            todo += self.spread(node.children, before, begin + len(node.tokens))

    def spread(self, nodes: Sequence[Node], before: Tensor, begin: int) -> list[Pending]:
        """Read the small nodes among those that continue the first `begin` positions of the path; return the others in
        reverse order. before [1,dim]: the last layer's output at the position before them."""
        small = [] if self.alone else [node for node in nodes if node.size <= SMALL]
        links = (Link(self.path, [0], None),) if begin else ()
        for batch in batches(small, self.batch_tokens):
            rows = Rows(batch, begin, links, self.like.device)
            hidden = self.model.hidden(rows.tokens, rows.input_pos, rows)[0] if rows.tokens.numel() else before[:0]
            self.note(rows.asked, torch.cat([before, hidden]))
            self.advance(len(hidden))
        large = nodes if self.alone else [node for node in nodes if node.size > SMALL]
        return [(node, before, begin) for node in reversed(large)]

    def run(self, node: Node, before: Tensor, begin: int) -> Tensor:
        """Read a node into the path, scoring each chunk -> the last layer's output [1,dim] at its end. before [1,dim]:
        that output at the position before it."""
        tokens = torch.tensor([node.tokens], device=self.like.device)
        count = tokens.shape[1]
        size, scored = count if self.alone else CHUNK, count + 1 - node.scored  # the first scored place
        self.path.resize(begin + count)
        for first in range(0, count, size):
            part = tokens[:, first : first + size]
            slots = begin + first + torch.arange(part.shape[1], device=tokens.device)
            prefill = Prefill(self.path, begin + first, part.shape[1])
            hidden = torch.cat([before, self.model.hidden(part, slots[None], prefill)[0]])
            # Place 0 is the last position of the previous chunk.
            places = list(range(max(scored - first, int(first > 0)), len(hidden)))
            self.note([(number, places) for number in node.ends if places], hidden)
            self.advance(part.shape[1])
            before = hidden[-1:]
        return before

    def advance(self, count: int) -> None:
        """Record that `count` more tokens have been read, and report progress."""
        self.read += count
        self.done(self.read - self.begun, self.total)

    def note(self, asked: Asked, hidden: Tensor) -> None:
        """Score the next tokens of sequences at the requested places in hidden [...,dim]."""
        if not asked:
            return
        wanted: list[int] = []
        for number, places in asked:
            begin = len(self.found[number].logprobs)
            wanted += self.wanted[number][begin : begin + len(places)]
        unique = sorted({place for _, places in asked for place in places})
        index = {place: at for at, place in enumerate(unique)}
        at = torch.tensor([index[place] for _, places in asked for place in places], device=hidden.device)
        tokens = torch.tensor(wanted, device=hidden.device)
        logprobs, greedy = self.lookup(hidden[torch.tensor(unique, device=hidden.device)], at, tokens)
        first = 0
        for number, places in asked:
            last = first + len(places)
            for logprob in logprobs[first:last]:
                check_finite(logprob)
            found = self.found[number]
            self.found[number] = Scored(found.logprobs + logprobs[first:last], found.greedy and all(greedy[first:last]))
            first = last

    def lookup(self, hidden: Tensor, at: Tensor, tokens: Tensor) -> tuple[list[float], list[bool]]:
        """Return each token's log-probability, and whether it is the likeliest, at its place `at` in hidden [K,dim]."""
        size = max(1, LOGITS_AT_ONCE[hidden.device.type] // self.model.args.vocab_size)
        logprobs = torch.empty_like(at, dtype=torch.promote_types(hidden.dtype, torch.float32))
        greedy = torch.empty_like(at, dtype=torch.bool)
        for first in range(0, len(hidden), size):
            here = ((at >= first) & (at < first + size)).nonzero()[:, 0]
            logits = self.model.logits(hidden[None, first : first + size])[0].to(logprobs.dtype)  # [k,V]
            places, chosen = at[here] - first, tokens[here]
            # On a CPU argmax is slower than log_softmax: compute it only where the token has the maximum.
            likely = logits[places, chosen] == logits.amax(-1)[places]
            greedy[here] = likely
            greedy[here[likely]] = logits[places[likely]].argmax(-1) == chosen[likely]
            logprobs[here] = logits.log_softmax(-1)[places, chosen]
        return logprobs.tolist(), greedy.tolist()


def tree(leaves: Sequence[Node], shortest: int, depth: int = 0) -> list[Node]:
    """Build the prefix tree of leaves sorted by tokens, of which the first `depth` have been read. Inner nodes hold
    shared tokens, at least `shortest`."""
    common = [shared(one, other) for one, other in zip(leaves, leaves[1:])]  # noqa: B905
    roots: list[Node] = []
    todo = [(0, len(leaves), depth, roots)]  # leaves first to end - 1, tokens read above them, where their nodes go
    while todo:
        first, end, depth, nodes = todo.pop()
        for last in range(first, end):
            if last + 1 < end and common[last] >= depth + shortest:
                continue
            leaf = leaves[first]
            if last == first:
                nodes.append(Node(leaf.tokens[depth:], leaf.scored, leaf.ends))
            else:
                length = min(common[first:last])
                nodes.append(Node(leaf.tokens[depth:length]))
                todo.append((first, last + 1, length, nodes[-1].children))
            first = last + 1
    return roots


def shared(one: Node, other: Node) -> int:
    """Return the length of the common prefix of two sequences, within the contexts of both."""
    low, high = 0, min(len(one.tokens) - one.scored, len(other.tokens) - other.scored) + 1
    while low < high:  # the first `low` tokens match, the first `high + 1` do not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one.tokens[low:middle] == other.tokens[low:middle] else (low, middle - 1)
    return low


def batches(nodes: Sequence[Node], limit: int) -> Iterator[list[Node]]:
    """Yield subtrees that run together: of similar size, with at most `limit` tokens; or a single one."""
    batch: list[Node] = []
    tokens = 0
    for node in sorted(nodes, key=lambda node: -node.size):
        padded = (len(batch) + 1) * batch[0].size if batch else 0
        if batch and (tokens + node.size > limit or padded > PADDED * limit):
            yield batch
            batch, tokens = [], 0
        batch.append(node)
        tokens += node.size
    if batch:
        yield batch
