"""Continuous batching of many prompts, N samples each: shared prefixes are prefilled once, all rows decode together.

    prompts = [Prompt("a", engine.encode("Once upon a time")), Prompt("b", engine.encode("The cat"))]
    for outcome in generate_many(engine, prompts, Request(num_samples=8)):
        print(outcome.prompt.id, [sample.text for sample in outcome.samples])

The chain of caches: the root, a prefix of all prompts, in one row; groups, prefixes of some; the rest of each prompt;
its samples. Rows of a cache are reused once their prompt or sample is finished: where a row begins, how much of it is
written and which row it continues are tensors that change in place, so prompts come and go within one compiled step.
Shapes: N samples per prompt, C rows that decode together, R prompts in memory, T tokens of all rows in a prefill,
H query heads, G key/value heads, D head dimension, L slots, V vocabulary.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bifurcated_attention import ScoreMod
from cache import KVCache, Link
from engine.engine import SILENT, SYNC_EVERY, Engine, bucket, rows_to_keep
from engine.graphs import StepInput
from engine.plan import Plan
from engine.request import Request, Workload, as_tokens, check_tokens
from engine.samples import Row, Sample, StopConditions
from engine.scoring import SMALL, Node, Rows, batches, shared, tree
from model import ModelArgs
from sampling import uniform

# Rows that decode together, memory permitting: at 64 a step on a CPU is compute-bound (docs/benchmarks.md).
ROWS = {"cpu": 64, "cuda": 512}
# Fewest tokens worth a root, and a group: every step pays for one more link of the chain.
ROOT, GROUP = 8, 64


@dataclass(frozen=True)
class Prompt:
    """A prompt of a batch. id: unique within the batch; part of the seed of its samples."""

    id: str | int
    tokens: Sequence[int]


@dataclass(frozen=True)
class Outcome:
    """The samples of a prompt, ordered by index, or the reason why there are none."""

    prompt: Prompt
    samples: list[Sample]
    error: str | None = None


def seed_of(seed: int, id: str | int) -> int:
    """Derive the 53-bit seed of a prompt's samples: a run of that prompt alone with this seed generates the same."""
    digest = hashlib.sha256(json.dumps([seed, id]).encode()).digest()
    return int.from_bytes(digest[:8]) >> 11


@dataclass
class BatchStats:
    """Counters of a batch. rows: decoding together. drawn: tokens generated. asked: tokens of its prompts. read: tokens
    prefilled for them. busy: rows that sampled for an unfinished sample, summed over steps, out of `capacity`.
    kv_bytes_saved: peak bytes of keys and values that one context copy per row would have needed in addition."""

    rows: int = 0
    prompts: int = 0
    drawn: int = 0
    asked: int = 0
    read: int = 0
    steps: int = 0
    busy: int = 0
    capacity: int = 0
    kv_bytes_saved: int = 0

    def add(self, other: "BatchStats") -> None:
        """Add the counters of another replica or run."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Group:
    """Prompts, by number, with a shared prefix. length: tokens of the prefix, root included."""

    length: int
    members: tuple[int, ...]

    @property
    def saved(self) -> int:
        """Tokens saved by storing the prefix once instead of for every member."""
        return self.length * (len(self.members) - 1)


@dataclass(frozen=True)
class Sharing:
    """Shared prefixes of prompts. root: tokens of the prefix that all share. lengths: tokens of each prompt."""

    root: int
    groups: tuple[Group, ...]
    lengths: tuple[int, ...]

    @classmethod
    def among(cls, prompts: Sequence[Sequence[int]], share: bool = True) -> "Sharing":
        """Find the prefixes to share. A prompt's last token is never shared, so that each has logits of its own to
        sample from. share: whether to share at all."""
        leaves = [Node(tuple(tokens), 2, (number,)) for number, tokens in enumerate(prompts)]
        leaves.sort(key=lambda leaf: leaf.tokens)  # type: ignore[arg-type, return-value]
        lengths = tuple(map(len, prompts))
        if len(leaves) < 2 or not share:
            return cls(0, (), lengths)
        common = shared(leaves[0], leaves[-1])
        root = common if common >= ROOT else 0
        found = choose_groups(tree(leaves, GROUP, root), root)
        return cls(root, tuple(sorted(found, key=lambda group: group.members)), lengths)

    @property
    def longest_group(self) -> int:
        return max((group.length for group in self.groups), default=self.root) - self.root

    @property
    def longest_rest(self) -> int:
        """The most tokens that a prompt has after its shared prefix."""
        return max(length - behind for length, (_, behind) in zip(self.lengths, self.places(), strict=True))

    def places(self) -> list[tuple[int, int]]:
        """Return for each prompt the number of its group (from 1; 0: none) and the tokens that it shares."""
        found = [(0, self.root)] * len(self.lengths)
        for number, group in enumerate(self.groups, 1):
            for member in group.members:
                found[member] = number, group.length
        return found

    def order(self) -> list[int]:
        """Return the prompts in the order in which they start: as given, but the members of a group together."""
        first = list(range(len(self.lengths)))
        for group in self.groups:
            for member in group.members:
                first[member] = group.members[0]
        return sorted(range(len(first)), key=first.__getitem__)


def choose_groups(roots: Sequence[Node], above: int) -> list[Group]:
    """Choose the groups that save the most tokens, each prompt in at most one: for each subtree its top node, or the
    best groups below it. above: tokens of the root, which all share."""
    found: list[tuple[Node, int]] = []  # parents before children; each with the prefix length at its end
    todo = [(node, above) for node in roots]
    while todo:
        node, begin = todo.pop()
        found.append((node, begin + len(node.tokens)))
        todo += [(child, found[-1][1]) for child in node.children]
    best: dict[int, tuple[int, int, list[tuple[Node, int]]]] = {}  # by node id: members below, tokens saved, groups
    for node, length in reversed(found):
        below = [best.pop(id(child)) for child in node.children]
        members, saved = len(node.ends) + sum(each[0] for each in below), sum(each[1] for each in below)
        chosen = [each for _, _, parts in below for each in parts]
        if node.children and length * (members - 1) >= saved:
            saved, chosen = length * (members - 1), [(node, length)]
        best[id(node)] = members, saved, chosen
    every = [each for _, _, parts in best.values() for each in parts]
    return [Group(length, tuple(sorted(end for each in node.walk() for end in each.ends))) for node, length in every]


def workload(lengths: Sequence[int], request: Request, device: torch.device) -> Workload:
    """Return the workload to plan: rows decoding together after the longest prompt, run until all are done."""
    total = len(lengths) * request.num_samples
    rows = min(total, request.rows_at_once or ROWS[device.type])
    return replace(request, num_samples=rows).workload(max(lengths), -(-total // rows))


@dataclass(frozen=True)
class Capacity:
    """Decoding rows, prompts and groups that fit into memory at once. bytes: needed, weights included."""

    rows: int
    prompts: int
    groups: int
    bytes: int

    @classmethod
    def of(cls, rows: int, plan: Plan, sharing: Sharing, n: int) -> "Capacity":
        """Size the capacity for `rows` rows, n samples per prompt. A prompt's keys and values stay until its last
        sample ends, so there is room for twice as many as fill the rows; if n is 1, a quarter more, read together."""
        fill = -(-rows // n)
        prompts = min(len(sharing.lengths), fill + (fill if n > 1 else fill // 4))
        groups = min(len(sharing.groups), prompts // 2 + 1)
        token = plan.context // plan.workload.context
        held = sharing.root + prompts * sharing.longest_rest + (groups + 1) * sharing.longest_group
        held = held * token + rows * plan.decoded_per_sample
        # All rows may belong to one group, so each group has room for all, rounded up to a power of two (RowMap).
        share = 1 << max(1, (rows - 1).bit_length())
        folded = max(rows, prompts * n, (groups + 1) * share if sharing.groups else 0)
        linked = bool(sharing.root or sharing.groups)
        held += max(plan.space.reading(linked), plan.space.decoding(rows, prompts, folded))
        return cls(rows, prompts, groups, plan.weights.total + held)

    @classmethod
    def within(cls, plan: Plan, sharing: Sharing, n: int) -> "Capacity":
        """Return the largest capacity that fits into memory; at least one row and its prompts, even if they do not."""
        rows = plan.rows_at_once
        while rows > 1 and cls.of(rows, plan, sharing, n).bytes > plan.available:
            rows -= 1
        return cls.of(rows, plan, sharing, n)


class RowMap(Link):
    """A link whose children are reassigned in place during decoding, a few at a time."""

    def __init__(self, cache: KVCache, length: Tensor, children: int, share: int | None = None) -> None:
        """length [R]: written slots. share: the most children of a row; None: their number, as a power of two."""
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
        n = self.share or max(2, 1 << (max(map(len, shares)) - 1).bit_length())  # never 1: that recompiles
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
    """A cache of `rows` rows of up to `slots` slots each; rows are taken and given back one by one."""

    def __init__(self, engine: Engine, rows: int, slots: int) -> None:
        self.cache = KVCache.empty(engine.args.kv_shape, rows, 0, engine.model.norm.weight, slots)
        self.length, self.slots = self.cache.start.clone(), slots
        self.used = [0] * rows  # slots of each row
        self.free = list(range(rows))[::-1]

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

    def __init__(self, nodes: Sequence[Node], begin: int, links: Sequence[Link], shelf: SlotPool) -> None:
        """nodes: one per prompt, whose `ends` is its row in the pool `shelf`."""
        self.cache = shelf.cache
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


@dataclass
class ActivePrompt:
    """A prompt that is prefilled, or about to be. row, group: its own and its group's row, each in its slot pool. left:
    unfinished samples. error: the reason why there will be none."""

    number: int
    prompt: Prompt
    seed: int
    row: int
    group: int
    rows: list[Row]
    left: int
    error: str | None = None


class Batch:
    """Scheduler that generates the samples of many prompts.

    places: for each of the C rows that decode together, its prompt and sample; None: idle, at position 0. moved:
    whether rows have become idle since the last assignment. ready: samples that have their first token and wait for a
    row.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[Prompt], request: Request, tally: BatchStats, plan: Plan | None = None
    ) -> None:
        self.engine, self.prompts, self.request, self.tally = engine, prompts, request, tally
        self.ending = StopConditions.of(request, engine.eos_ids, engine.tokenizer)
        scaling = engine.args.rope_scaling
        # Scaling by length rotates a token by the length of its whole sequence: nothing can be shared.
        self.shares = scaling is None or not scaling.by_length
        sharing = Sharing.among([prompt.tokens for prompt in prompts], self.shares)
        plan = plan or engine.plan_workload(workload(sharing.lengths, request, engine.device))
        engine.prepare(plan)
        self.step, self.look = engine.step(request.sampling, plan), SYNC_EVERY[engine.device.type]
        room = Capacity.within(plan, sharing, request.num_samples)
        if room.bytes > plan.available:  # fall back to one row and its prompt, as planned
            sharing = Sharing(0, (), sharing.lengths)
            room = Capacity(1, 1, 0, plan.needed)
        self.sharing, self.room = sharing, room
        tally.rows = room.rows
        self.waiting, self.at = deque(sharing.order()), sharing.places()
        self.ready: deque[tuple[ActivePrompt, Row]] = deque()
        self.places: list[tuple[ActivePrompt, Row] | None] = [None] * room.rows
        self.moved = True
        self.ended: list[Outcome] = []
        self.token_bytes = plan.context // plan.workload.context
        self.build()

    def build(self) -> None:
        """Allocate the chain of caches, with nothing prefilled."""
        engine, room, sharing, like = self.engine, self.room, self.sharing, self.engine.model.norm.weight
        self.root = KVCache.empty(engine.args.kv_shape, 1, sharing.root, like)
        self.groups = SlotPool(engine, room.groups + 1, sharing.longest_group)
        self.groups.free.pop()  # row 0, of length 0, is for prompts without a group
        self.resident: dict[int, int] = {0: 0}  # the row of each group in memory
        self.remaining = [0, *(len(group.members) for group in sharing.groups)]  # unfinished members
        self.shelf = SlotPool(engine, room.prompts, sharing.longest_rest)
        self.cache = KVCache.empty(engine.args.kv_shape, room.rows, 0, like, self.request.max_new_tokens)
        links: list[Link] = [RowMap(self.shelf.cache, self.shelf.length, room.rows, self.request.num_samples)]
        if sharing.groups:
            links.append(RowMap(self.groups.cache, self.groups.length, room.rows))
        if sharing.root:
            links.append(Link(self.root, [0] * room.rows, None))
        self.cache.extend_from(*links)
        self.above = tuple(link.keep([0]) for link in self.cache.links[-1:] if sharing.root)  # for a single row
        self.token = torch.zeros(room.rows, 1, dtype=torch.long, device=like.device)
        self.input_pos = self.token.clone()
        self.samples, self.seeds = self.token[:, 0].clone(), self.token[:, 0].clone()

    @torch.no_grad()
    def outcomes(self) -> Iterator[Outcome]:
        """Yield each prompt when its last sample is finished."""
        if self.sharing.root:
            tokens = self.prompts[0].tokens[: self.sharing.root]
            self.engine.prefill(self.root, tokens, self.request.prefill_chunk, SILENT)
            self.tally.read += self.sharing.root
        while True:
            self.admit()
            yield from self.hand_out()
            if not any(self.places):
                if self.moved:
                    continue
                break
            self.shrink()
            self.advance()
            yield from self.hand_out()
        assert not self.waiting and not self.ready, "a prompt was left"

    def hand_out(self) -> Iterator[Outcome]:
        ended, self.ended = self.ended, []
        yield from ended

    def admit(self) -> None:
        """Assign waiting samples to idle rows, and prefill further prompts if too few wait."""
        idle = [at for at, place in enumerate(self.places) if place is None] if self.moved else []
        if not idle:
            self.moved = False
            return
        while len(self.ready) < len(idle) and not self.ended and (held := self.next_prompts()):
            self.read(held)
        for at in idle[: len(self.ready)]:
            self.places[at] = self.ready.popleft()
        rows = torch.tensor(idle, device=self.token.device)
        entries = [self.entry(self.places[at]) for at in idle]
        token, start, sample, seed = torch.tensor(entries, device=self.token.device).T
        self.token[rows, 0], self.input_pos[rows, 0] = token, start
        self.cache.start[rows] = start
        for each in self.cache.tensors:  # no nan in masked slots (SlotPool.give_back)
            each[rows] = 0
        self.samples, self.seeds = self.samples.clone(), self.seeds.clone()  # new identity: UniformBlocks starts over
        self.samples[rows], self.seeds[rows] = sample, seed
        self.moved = bool(self.ended)  # a first token may end a prompt: hand it out first
        self.seat()

    def entry(self, place: tuple[ActivePrompt, Row] | None) -> tuple[int, int, int, int]:
        """Return a row's last token, its position, the sample's index and seed. An idle row is at position 0: ALiBi
        biases are relative to the last position of a step, which must be a live row's."""
        if place is None:
            return 0, 0, 0, 0
        held, row = place
        return row.sample.tokens[-1], len(held.prompt.tokens), row.sample.index, held.seed

    def seat(self) -> None:
        """Update in each link which of its rows each decoding row continues."""
        parents = [None if place is None else (place[0].row, place[0].group) for place in self.places]
        seats = [link for link in self.cache.links if isinstance(link, RowMap)]
        for link, each in zip(seats, zip(*((p or (None, None)) for p in parents), strict=True), strict=False):
            link.seat(each)

    def next_prompts(self) -> list[ActivePrompt]:
        """Take the waiting prompts that fit, in order, prefilling groups that are not in memory."""
        found: list[ActivePrompt] = []
        n = self.request.num_samples
        while self.waiting and self.shelf.free:
            number = self.waiting[0]
            group, behind = self.at[number]
            if group not in self.resident:
                if not self.groups.free:
                    break
                self.read_group(group)
            self.waiting.popleft()
            prompt = self.prompts[number]
            row = self.shelf.take(behind, len(prompt.tokens) - behind)
            first = self.request.first_index
            tokenizer = self.engine.tokenizer
            assert self.request.seed is not None, "generate_many gives it one"
            seed = seed_of(self.request.seed, prompt.id)
            rows = [Row(first + each, self.ending, tokenizer, prompt.tokens, False, seed) for each in range(n)]
            found.append(ActivePrompt(number, prompt, seed, row, self.resident[group], rows, n))
        return found

    def read_group(self, number: int) -> None:
        group, root = self.sharing.groups[number - 1], self.sharing.root
        row = self.resident[number] = self.groups.take(root, group.length - root)
        tokens = self.prompts[group.members[0]].tokens[root : group.length]
        self.engine.prefill(self.groups.view(row, self.above), tokens, self.request.prefill_chunk, SILENT)
        self.tally.read += len(tokens)

    def read(self, found: Sequence[ActivePrompt]) -> None:
        """Prefill the rest of each prompt, short ones of one group together, and sample the first tokens."""
        chunk, model = self.request.prefill_chunk, self.engine.model
        for group, behind in sorted({self.at[held.number] for held in found}):
            view = (Link(self.groups.view(self.resident[group]), [0], None),) if group else ()
            links, short = (*view, *self.above), {}
            for held in found:
                if self.at[held.number][0] != group:
                    continue
                tokens = held.prompt.tokens[behind:]
                self.tally.asked, self.tally.read = (
                    self.tally.asked + behind + len(tokens),
                    self.tally.read + len(tokens),
                )
                if len(tokens) <= SMALL and self.shares:
                    short[held.row] = held, Node(tokens, 1, (held.row,))
                else:
                    self.start([held], self.engine.prefill(self.shelf.view(held.row, links), tokens, chunk, SILENT))
            for nodes in batches([node for _, node in short.values()], chunk):
                reading = PackedPrefill(nodes, behind, links, self.shelf)
                hidden = model.hidden(reading.tokens, reading.input_pos, reading)  # [1,T,dim]
                self.start([short[node.ends[0]][0] for node in nodes], model.logits(hidden[:, reading.last])[0])

    def start(self, found: Sequence[ActivePrompt], logits: Tensor) -> None:
        """Sample the first token of every sample from the logits [prompts,V] before it."""
        positions, seeds = (
            torch.tensor(each, device=logits.device)[:, None]
            for each in ([len(held.prompt.tokens) for held in found], [held.seed for held in found])
        )
        samples = torch.tensor([row.sample.index for row in found[0].rows], device=logits.device)
        random = uniform(seeds, samples, positions)  # [prompts,N]
        for each, held in enumerate(found):
            drawn = self.engine.draw(
                logits[each : each + 1].expand(len(samples), -1), random[each], self.request.sampling
            )
            self.record([(held, row) for row in held.rows], [self.agreed(drawn)])
            if held.error is None:
                self.ready.extend((held, row) for row in held.rows if row.sample.finish_reason is None)

    def agreed(self, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Broadcast tokens and log-probabilities [C], so that all ranks of a sharded network finish the same rows."""
        if self.engine.shard.world == 1:
            return drawn
        both = self.engine.shard.broadcast(torch.stack([each.double() for each in drawn]))  # exact for token ids
        return both[0].long(), both[1]

    def record(self, places: Sequence[tuple[ActivePrompt, Row] | None], drawn: Sequence[tuple[Tensor, Tensor]]) -> int:
        """Sync the output of steps, [C] each, to the host; finish samples. Returns the number of tokens recorded."""
        count = 0
        tokens, logprobs = (torch.stack(part, 1).tolist() for part in zip(*drawn, strict=True))  # [C][steps] each
        for place, *new in zip(places, tokens, logprobs, strict=True):
            if place is None:
                continue
            held, row = place
            if held.error is not None:
                continue
            try:
                for token, logprob in zip(*new, strict=True):
                    if row.sample.finish_reason is None:
                        row.record(token, logprob)
                        count += 1
            except FloatingPointError as error:
                self.fail(held, str(error))
            if row.sample.finish_reason is not None:
                self.end(held)
        self.tally.drawn += count
        return count

    def fail(self, held: ActivePrompt, error: str) -> None:
        """End a prompt without samples; its rows become idle with the finished ones."""
        held.error, held.left = error, 0
        self.ready = deque(each for each in self.ready if each[0] is not held)
        self.release(held)

    def end(self, held: ActivePrompt) -> None:
        """Count a finished sample of a prompt; release the prompt after its last one."""
        held.left -= 1
        if not held.left:
            self.release(held)

    def release(self, held: ActivePrompt) -> None:
        """Queue a prompt's outcome; free its row, and its group's after the last member."""
        self.shelf.give_back(held.row)
        group = self.at[held.number][0]
        self.remaining[group] -= 1
        if group and not self.remaining[group]:
            self.groups.give_back(self.resident.pop(group))
        samples = [] if held.error is not None else [row.sample for row in held.rows]
        self.ended.append(Outcome(held.prompt, samples, held.error))
        self.tally.prompts += held.error is None

    def shrink(self) -> None:
        """Compact the batch once half of its rows have finished, if nothing waits."""
        if self.waiting or self.ready:
            return
        kept = rows_to_keep([place is not None for place in self.places])
        if len(kept) < len(self.places):
            self.cache.keep(kept)
            self.places = [self.places[at] for at in kept]
            self.token, self.input_pos = self.token[kept], self.input_pos[kept]
            self.samples, self.seeds = self.samples[kept], self.seeds[kept]
            self.seat()

    def advance(self) -> None:
        """Run decode steps up to the next sync, and record their tokens."""
        longest = max(len(place[1].sample.tokens) for place in self.places if place is not None)
        slots = min(self.request.max_new_tokens, bucket(longest + self.look - 1))
        self.cache.resize(slots)
        last, drawn = self.cache.start[:, None] + slots - 1, []
        for _ in range(self.look):
            where = self.input_pos.minimum(last)  # clamp: a finished row may be past the visible slots
            inputs = StepInput(self.token, where, self.samples, self.seeds)
            drawn.append(self.agreed(self.step(inputs, self.cache)))
            self.token, self.input_pos = drawn[-1][0][:, None], self.input_pos + 1
        tally, held = self.tally, self.shelf.tokens + self.groups.tokens + self.sharing.root
        context = sum(len(place[0].prompt.tokens) for place in self.places if place is not None)
        tally.kv_bytes_saved = max(tally.kv_bytes_saved, (context - held) * self.token_bytes)
        tally.steps, tally.capacity = tally.steps + self.look, tally.capacity + self.look * len(self.places)
        tally.busy += self.record(self.places, drawn)
        for at, place in enumerate(self.places):
            if place is not None and (place[1].sample.finish_reason is not None or place[0].error is not None):
                self.places[at], self.moved = None, True


def rejection(args: ModelArgs, request: Request, prompt: Prompt) -> str | None:
    """Return the reason why a prompt cannot be run; None if it can."""
    try:
        request.check_length(args.context_limit, len(prompt.tokens))
        check_tokens(prompt.tokens, args.vocab_size)
    except ValueError as error:
        return str(error)
    return None


def generate_many(
    engine: Engine,
    prompts: Sequence[Prompt],
    request: Request,
    tally: BatchStats | None = None,
    plan: Plan | None = None,
) -> Iterator[Outcome]:
    """Generate request.num_samples continuations of each prompt, and yield each prompt when it is finished; first those
    that cannot be run, with the reason. A sample is a function of (request.seed, the prompt's id, its index), and in
    fp32 equals that of the prompt run alone with the seed `seed_of`. A prompt fails while running if its logits are not
    finite. tally: updated in place as the batch runs. plan: for `workload`, if already made.

    Raises ValueError, before any kernel runs, if ids repeat, or the request is not for many prompts or does not fit.
    """
    if len({json.dumps(prompt.id) for prompt in prompts}) < len(prompts):
        raise ValueError("two prompts have the same id: each needs one of its own")
    if request.attention != "bifurcated" or request.kv_dtype != "auto" or engine.decoder is not None:
        raise ValueError("many prompts run with attention bifurcated, kv_dtype auto and without a draft")
    if request.sampling.repetition_penalty != 1:
        raise ValueError("many prompts run without a repetition_penalty")
    prompts, request = [replace(prompt, tokens=as_tokens(prompt.tokens)) for prompt in prompts], engine.seeded(request)
    refused = [rejection(engine.args, request, prompt) for prompt in prompts]
    sound = [prompt for prompt, reason in zip(prompts, refused, strict=True) if reason is None]
    alone = [prompt for prompt in sound if needs_recompute(engine.args, request, prompt)]
    together, tally = (
        [prompt for prompt in sound if not needs_recompute(engine.args, request, prompt)],
        tally or BatchStats(),
    )
    batch = Batch(engine, together, request, tally, plan) if together else None

    def run() -> Iterator[Outcome]:
        for prompt, reason in zip(prompts, refused, strict=True):
            if reason is not None:
                yield Outcome(prompt, [], reason)
        for prompt in alone:
            yield run_alone(engine, prompt, request, tally)
        if batch is not None:
            yield from batch.outcomes()

    return run()


def needs_recompute(args: ModelArgs, request: Request, prompt: Prompt) -> bool:
    """Return whether rows of the prompt may grow so long that their cache is recomputed (RopeScaling.crosses)."""
    scaling, length = args.rope_scaling, len(prompt.tokens)
    return scaling is not None and scaling.crosses(length, length + request.max_new_tokens)


def run_alone(engine: Engine, prompt: Prompt, request: Request, tally: BatchStats) -> Outcome:
    """Run one prompt as a request of its own."""
    assert request.seed is not None
    tokens, samples, error = len(prompt.tokens), list[Sample](), None
    try:
        samples = engine.generate(prompt.tokens, replace(request, seed=seed_of(request.seed, prompt.id)))
    except (ValueError, FloatingPointError) as caught:
        error = str(caught)
    drawn = sum(len(sample.tokens) for sample in samples)
    tally.add(BatchStats(prompts=1, drawn=drawn, asked=tokens, read=tokens))
    return Outcome(prompt, samples, error)
