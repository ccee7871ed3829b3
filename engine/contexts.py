"""Chain of a batch's caches: the root (prefix of all prompts), groups (prefixes of some), the rest of each prompt, and
the rows that decode.

Rows of a cache are reused once their prompt or sample is finished: where a row begins, how much of it is written and
which row it continues are tensors that change in place, so prompts come and go within one compiled step.
Shapes: C rows that decode together, R rows of a pool, T tokens of all prompts in a prefill, H query heads, G key/value
heads, L slots, D head dimension.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bifurcated_attention import ScoreMod
from cache import KVCache, Link
from engine.layouts import CONTIGUOUS, Int8Context, own_cache
from engine.request import Request
from engine.runner import SILENT, ModelRunner, Monitor, bucket
from engine.scoring import SMALL, Node, Rows, batches
from engine.sizes import Sizes


class RowMap(Link):
    """A link whose children are reassigned in place during decoding, a few at a time."""

    def __init__(self, cache: KVCache, length: Tensor, children: int, share: int | None = None) -> None:
        """length [R]: written slots. share: the most children of a row; None: the largest number present, rounded up to
        a power of two."""
        self.cache, self.length, self.share = cache, length, share
        self.place = torch.zeros(children, dtype=torch.long, device=length.device)
        self.index = torch.zeros_like(self.place)
        self.group = self.place.new_zeros(cache.rows * (share or 2))

    def seat(self, parents: Sequence[int | None]) -> None:
        """Set the ancestor's row that each child continues; None: idle, its output is not used."""
        shares: list[list[int]] = [[] for _ in range(self.cache.rows)]
        for child, parent in enumerate(parents):
            if parent is not None:
                shares[parent].append(child)
        # Without a fixed share never 1, which would recompile.
        n = self.share or max(2, 1 << (max(map(len, shares)) - 1).bit_length())
        place = [0] * len(parents)
        for parent, share in enumerate(shares):
            for at, child in enumerate(share):
                place[child] = parent * n + at
        group = torch.tensor([child for share in shares for child in share + [0] * (n - len(share))])
        assert self.place is not None and self.group is not None
        self.place.copy_(torch.tensor(place))
        self.index.copy_(torch.tensor([parent or 0 for parent in parents]))
        self.group = self.group.copy_(group) if len(group) == len(self.group) else group.to(self.place.device)

    def keep(self, rows: Sequence[int]) -> "RowMap":
        """Return a map for len(rows) children, which `seat` has yet to assign."""
        assert self.length is not None
        return RowMap(self.cache, self.length, len(rows), self.share)


class SlotPool:
    """A cache whose rows, of up to `slots` slots each, are taken and given back one by one."""

    def __init__(self, cache: KVCache, slots: int) -> None:
        self.cache, self.slots = cache, slots
        self.length = cache.start.clone()
        self.used = [0] * cache.rows  # slots of each row
        self.free = list(range(cache.rows))[::-1]

    def take(self, start: int, length: int) -> int:
        row = self.free.pop()
        self.cache.start[row], self.length[row], self.used[row] = start, length, length
        self.cache.resize(min(self.slots, bucket(max(self.used))))
        return row

    def give_back(self, row: int) -> None:
        """Free a row and zero its slots: a masked slot has weight 0, and 0 * nan is nan."""
        for each in self.cache.tensors:
            each[row, :, : self.used[row]] = 0
        self.free.append(row)
        self.length[row], self.used[row] = 0, 0

    @property
    def tokens(self) -> int:
        """Slots in use."""
        return sum(self.used)

    def view(self, row: int, links: tuple[Link, ...] = ()) -> KVCache:
        """Return one row as a cache of its own, limited to the slots in use."""
        return self.cache.row_view(row, self.used[row], links)


class PackedPrefill(Rows):
    """Several prompts prefilled together, packed end to end; each is stored in a row of a slot pool."""

    def __init__(self, nodes: Sequence[Node], begin: int, links: Sequence[Link], pool: SlotPool) -> None:
        """nodes: one per prompt, whose `ends` is its row in the pool."""
        self.cache = pool.cache
        super().__init__(nodes, begin, links, self.cache.start.device)
        lengths = torch.tensor([len(node.tokens) for node in nodes], device=self.tokens.device)
        rows = torch.tensor([node.ends[0] for node in nodes], device=self.tokens.device)
        self.last = lengths.cumsum(0) - 1  # [prompts]
        self.row, self.slot = rows.repeat_interleave(lengths), self.input_pos[0] - begin  # [T] twice

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, input_pos: Tensor, mod: ScoreMod | None) -> Tensor:
        """Store k and v, then attend as Rows.attend."""
        self.cache.k[layer][self.row, :, self.slot] = k[0].transpose(0, 1)  # [T,G,D]
        self.cache.v[layer][self.row, :, self.slot] = v[0].transpose(0, 1)
        return super().attend(layer, q, k, v, input_pos, mod)


class Place(NamedTuple):
    """Rows of the pools that a prompt occupies: its own, and its group's (0: none)."""

    row: int
    group: int = 0


class Contexts:
    """The caches of one network for one batch, and their prefill."""

    def __init__(self, runner: ModelRunner, sizes: Sizes, request: Request, context: KVCache | None = None) -> None:
        """request: how contexts are stored and prefilled. context: of a single prompt, if it is already prefilled."""
        self.runner, self.sizes, self.chunk = runner, sizes, runner.chunk(request.prefill_chunk)
        self.int8, self.copies = request.kv_dtype == "int8", request.attention == CONTIGUOUS
        like, shape = runner.model.norm.weight, runner.args.kv_shape
        scaling = runner.args.rope_scaling
        self.packs = not (self.int8 or scaling is not None and scaling.by_length)  # several prompts in one prefill
        self.root = KVCache.empty(shape, 1, sizes.root, like)
        self.groups = SlotPool(KVCache.empty(shape, sizes.groups + 1, 0, like, sizes.group), sizes.group)
        self.groups.free.pop()  # row 0, of length 0, is for prompts without a group
        kind = Int8Context if self.int8 else KVCache
        made = kind.empty(shape, sizes.prompts, 0, like, sizes.rest) if context is None else context
        self.prompts = SlotPool(made, sizes.rest)
        self.base = sizes.rest if self.copies else 0  # slots before those that a row decodes
        self.cache = own_cache(request.attention).empty(shape, sizes.rows, self.base, like, self.base + sizes.own)
        self.fresh = set(range(sizes.rows))  # rows that have not decoded yet
        self.maps: list[RowMap] = []
        if sizes.single and not self.copies:
            self.cache.extend_from(Link(made, [0] * sizes.rows, None))
        elif not self.copies:
            self.maps = [RowMap(made, self.prompts.length, sizes.rows, sizes.share)]
            if sizes.groups:
                self.maps.append(RowMap(self.groups.cache, self.groups.length, sizes.rows))
            root = [Link(self.root, [0] * sizes.rows, None)] * bool(sizes.root)
            self.cache.extend_from(*self.maps, *root)
        self.above = (Link(self.root, [0], None),) if sizes.root else ()  # for a single row

    @property
    def tokens(self) -> int:
        """Context tokens held."""
        return self.prompts.tokens + self.groups.tokens + self.sizes.root

    def read_root(self, tokens: Sequence[int]) -> None:
        self.runner.prefill(self.root, tokens, self.chunk)

    def read_group(self, tokens: Sequence[int]) -> int:
        """Prefill a group's tokens after the root; return its row."""
        row = self.groups.take(self.sizes.root, len(tokens))
        self.runner.prefill(self.groups.view(row, self.above), tokens, self.chunk)
        return row

    def read(self, asked: Sequence[tuple[Place, int, Sequence[int]]], monitor: Monitor = SILENT) -> Tensor:
        """Prefill the rest of prompts into their rows, short ones of one group together -> the last layer's output at
        the end of each [prompts,dim]. asked: the prompt's place, tokens before its rest, and the rest."""
        ends: dict[int, Tensor] = {}  # by the prompt's row
        for group, behind in sorted({(place.group, behind) for place, behind, _ in asked}):
            view = (Link(self.groups.view(group, self.above), [0], None),) if group else ()
            links, short = (*view, *self.above), []
            for place, before, tokens in asked:
                if (place.group, before) != (group, behind):
                    continue
                if self.packs and len(asked) > 1 and len(tokens) <= SMALL:
                    short.append(Node(tokens, 1, (place.row,)))
                else:
                    ends[place.row] = self.read_one(place.row, links, tokens, monitor)
            for nodes in batches(short, self.chunk):
                reading = PackedPrefill(nodes, behind, links, self.prompts)
                hidden = self.runner.hidden(reading.tokens, reading.input_pos, reading)  # [1,T,dim]
                ends |= {node.ends[0]: each[None] for node, each in zip(nodes, hidden[0, reading.last], strict=True)}
        return torch.cat([ends[place.row] for place, _, _ in asked])

    def read_one(self, row: int, links: tuple[Link, ...], tokens: Sequence[int], monitor: Monitor) -> Tensor:
        if not self.int8:
            return self.runner.prefill(self.prompts.view(row, links), tokens, self.chunk, monitor)
        context = self.runner.empty_cache(len(tokens))
        hidden = self.runner.prefill(context, tokens, self.chunk, monitor)
        self.store(row, context)
        return hidden

    def store(self, row: int, context: KVCache) -> None:
        """Store a context, which is emptied, in a row of the prompts."""
        if isinstance(self.prompts.cache, Int8Context):
            self.prompts.cache.store(row, context)
        else:
            for mine, theirs in zip(self.prompts.cache.tensors, context.tensors, strict=True):
                mine[row, :, : context.slots] = theirs[0]

    def reread(self, row: int | None, tokens: Sequence[int], own: Sequence[int], at: int) -> int:
        """Prefill a context again, with the tokens decoded by row `at`, since the rotation has changed. row: that of
        the context if already prefilled again for another sample; None: not yet. Return that row."""
        T, n = len(tokens), len(own)
        if row is None:
            row, context = self.prompts.take(0, T), self.runner.empty_cache(T + n)
            self.runner.prefill(context, [*tokens, *own], self.chunk)  # together, to reach the length
            context.resize(T)
            self.store(row, context)
        if self.int8:
            one = KVCache.branch(self.prompts.cache, [row], n, length=self.prompts.length)
        else:
            one = KVCache.fork(self.prompts.view(row), 1, n)  # all slots are written: no mask
        self.runner.prefill(one, own, self.chunk)
        first = T if self.copies else 0
        for mine, theirs in zip(self.cache.tensors, one.tensors, strict=True):
            mine[at, :, first : first + n] = theirs[0]
        if self.copies:
            self.copy(row, at)
        return row

    def copy(self, row: int, at: int) -> None:
        """Copy a prompt's context into the decoding row `at`."""
        T = self.prompts.used[row]
        for mine, theirs in zip(self.cache.tensors, self.prompts.cache.tensors, strict=True):
            mine[at, :, :T] = theirs[row, :, :T]

    def seat(self, rows: Sequence[int], starts: Tensor, places: Sequence[Place | None]) -> None:
        """Prepare decoding rows for new samples. starts: position of each row's first decoded token. places: of the
        contexts that all rows continue."""
        used = [row for row in rows if row not in self.fresh]
        self.fresh -= set(rows)
        for each in self.cache.tensors if used else ():  # no nan in masked slots (SlotPool.give_back)
            each[used] = 0
        if self.copies:
            for row in rows:
                if (place := places[row]) is not None:
                    self.copy(place.row, row)
        else:
            self.cache.start[torch.tensor(rows, device=starts.device)] = starts
        self.link(places)

    def link(self, places: Sequence[Place | None]) -> None:
        """Update which rows of the pools each decoding row continues."""
        for at, each in enumerate(self.maps):
            each.seat([None if place is None else place[at] for place in places])

    def keep(self, rows: Sequence[int], places: Sequence[Place | None]) -> None:
        """Compact to the given decoding rows. places: theirs."""
        self.cache.keep(rows)
        self.fresh.clear()
        self.maps = [link for link in self.cache.links if isinstance(link, RowMap)]
        self.link(places)

    def resize(self, own: int) -> None:
        """Make at least `own` slots of the decoding rows visible, rounded up so that few sizes occur."""
        self.cache.resize(self.base + min(self.sizes.own, bucket(own)))
