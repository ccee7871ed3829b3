"""Scheduler: the one loop that generates, for one prompt or many, N samples each.

    prompts = [Prompt("a", engine.encode("Once upon a time")), Prompt("b", engine.encode("The cat"))]
    for outcome in engine.generate_many(prompts, Request(num_samples=8)):
        print(outcome.prompt.id, [sample.text for sample in outcome.samples])

What prompts begin with alike is prefilled once (prefixes.py), then the rest of each. The rows that decode together are
seats: a row whose sample has finished is taken by the next sample, of any prompt. When none waits, the batch is
compacted to the rows still generating. Each prompt may have a request of its own.
Shapes: C rows that decode together, S positions, k tokens per row and step (at most), V vocabulary.
"""

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from cache import KVCache
from engine.contexts import Contexts, Place, Sizes
from engine.graphs import StepInput
from engine.plan import Plan
from engine.prefixes import Sharing
from engine.request import Request, Sampling, Workload, check_tokens
from engine.runner import SILENT, SYNC_EVERY, ModelRunner, Monitor, rows_to_keep
from engine.samples import Piece, Row, Sample, StopConditions
from model import ModelArgs
from sampling import Filters, RowFilters, add, seen_in, uniform

# Rows of many prompts that decode together, memory permitting: at 64 a step on a CPU is compute-bound
# (docs/benchmarks.md).
ROWS = {"cpu": 64, "cuda": 512}

# Output of one decode step: tokens [C,k], log-probabilities [C,k], number of valid leading tokens [C].
StepOutput = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prompt:
    """A prompt of a batch. id: unique within the batch. request: None: the batch's, whose seed and the id give the seed
    of the samples. A request of its own may have a seed; how contexts are stored and prefilled is always the batch's.
    alone: detokenise a sample, and search it for stop strings, by itself instead of as a continuation of the prompt."""

    id: str | int
    tokens: Sequence[int]
    request: Request | None = None
    alone: bool = False


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


def workload(asked: Sequence[tuple[int, Request]], request: Request, device: torch.device, runs: int = 1) -> Workload:
    """Return the workload to plan for prompts of (tokens, request): the rows of a single prompt, or of many as many as
    decode together, after the longest prompt, until all are done."""
    total = sum(each.num_samples for _, each in asked)
    longest, new = max(length for length, _ in asked), max(each.max_new_tokens for _, each in asked)
    how = replace(request, max_new_tokens=new, sampling=heaviest([each.sampling for _, each in asked]))
    if len(asked) == 1:
        return replace(how, num_samples=total).workload(longest, runs)
    rows = min(total, request.rows_at_once or ROWS[device.type])
    return replace(how, num_samples=rows).workload(longest, runs * -(-total // rows))


def heaviest(samplings: Sequence[Sampling]) -> Sampling:
    """Return parameters that need the memory of all these together."""
    first = samplings[0]
    if all(each == first for each in samplings):
        return first
    drawn = [each for each in samplings if each.temperature]
    few = all(each.top_k for each in drawn)
    penalty = next((each.repetition_penalty for each in samplings if each.repetition_penalty != 1), 1.0)
    sorts = any(each.top_p is not None or each.top_k is not None for each in drawn)
    top_k = max((each.top_k or 1 for each in drawn), default=1) if few else None
    return Sampling(1.0, top_k, 0.5 if sorts and not few else None, repetition_penalty=penalty)


def sizes_of(rows: int, asked: Sequence[tuple[int, Request]], sharing: Sharing, own: int, held: int = 1) -> Sizes:
    """Size what a batch of `rows` rows holds at once. A prompt's keys and values stay until its last sample ends, so
    there is room for twice as many as fill the rows; if each has one sample, a quarter more, read together.
    held: rows of each prompt in memory."""
    n = max(each.num_samples for _, each in asked)
    fill = -(-rows // n)
    prompts = min(len(asked), fill + (fill if n > 1 else fill // 4))
    groups = min(len(sharing.groups), prompts // 2 + 1) if len(asked) > 1 else 0
    return Sizes(
        rows,
        prompts * held,
        groups,
        sharing.root,
        sharing.longest_group,
        sharing.longest_rest,
        own,
        min(n, rows),
        len(asked) * held == 1,
    )


def needed(sizes: Sizes, plan: Plan) -> int:
    """Return the bytes that a batch of many prompts needs, weights included."""
    token = plan.context // plan.workload.context
    held = sizes.root + sizes.prompts * sizes.rest + (sizes.groups + 1) * sizes.group
    held = held * token + sizes.rows * (plan.decoded_per_sample + plan.copied_per_sample)
    # All rows may belong to one group, so each group has room for all, rounded up to a power of two (RowMap).
    share = 1 << max(1, (sizes.rows - 1).bit_length())
    folded = max(sizes.rows, sizes.prompts * sizes.share, (sizes.groups + 1) * share if sizes.groups else 0)
    linked = bool(sizes.root or sizes.groups)
    held += max(plan.space.reading(linked), plan.space.decoding(sizes.rows, sizes.prompts, folded))
    return plan.weights.total + held


@dataclass(eq=False)
class ActivePrompt:
    """A prompt that is prefilled, or about to be. place: of its context; longer: of the same, prefilled again for rows
    that have outgrown its rotation. hidden [1,dim]: the last layer's output at its end. begun: samples that have a
    first token. error: the reason why there will be no samples."""

    number: int
    prompt: Prompt
    request: Request
    seed: int
    ending: StopConditions
    place: Place
    hidden: Tensor | None = None
    longer: Place | None = None
    begun: int = 0
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None


@dataclass(eq=False)
class Seat:
    """A sample that decodes, or waits for a row. place: of the context that it continues."""

    held: ActivePrompt
    row: Row
    place: Place

    @property
    def position(self) -> int:
        """Position of the last token, which is not yet run."""
        return len(self.held.prompt.tokens) + len(self.row.sample.tokens) - 1

    @property
    def done(self) -> bool:
        return self.row.sample.finish_reason is not None or self.held.error is not None


class PlainDecoder:
    """The rows that decode together, one token per row and step. width: the most tokens per row that a step yields, k.
    All ranks of a sharded network get the same tokens.

    seats: the sample of each row; None: idle. token, input_pos [C,1]: the last token of each row, not yet run. samples,
    seeds [C]: index and seed of each row's sample. seen: bool [C,V], its tokens, or [C,0] without a penalty. tables:
    the caches of each network that decodes.
    """

    width = 1

    def __init__(
        self,
        runner: ModelRunner,
        contexts: Contexts,
        seats: list[Seat | None],
        plan: Plan,
        samplings: Sequence[Sampling],
    ) -> None:
        """samplings: the sampling parameters that occur."""
        self.runner, self.contexts, self.seats, self.plan = runner, contexts, seats, plan
        self.tables, self.shard, device = [contexts], runner.shard, runner.device
        self.kind_of = {each: kind for kind, each in enumerate(samplings)}
        self.only = samplings[0]
        self.kinds = RowFilters.of(samplings, runner.args.vocab_size, device) if len(samplings) > 1 else None
        penalised = any(each.repetition_penalty != 1 for each in samplings)
        self.noted = runner.model.args.vocab_size if penalised else 0  # columns of `seen`
        self.token = torch.zeros(len(seats), 1, dtype=torch.long, device=device)
        self.input_pos = self.token.clone()
        self.samples, self.seeds, self.kind, self.one = (self.token[:, 0].clone() for _ in range(4))
        self.one += 1
        self.seen = seen_in([[]] * len(seats), self.noted, device)
        self.step = runner.step(plan, self.filters)

    def filters(self) -> Filters | RowFilters:
        """Return the sampling parameters of the present rows."""
        return self.only if self.kinds is None else self.kinds.map(itemgetter(self.kind))

    def first(self, seats: Sequence[Seat]) -> StepOutput:
        """Sample the first token of samples, from the outputs at the ends of their prompts."""
        device, prompts = self.token.device, {id(seat.held): seat.held for seat in seats}
        order = {each: at for at, each in enumerate(prompts)}
        entries = [
            (order[id(each.held)], each.row.sample.index, each.held.seed, self.kind_of[each.held.request.sampling])
            for each in seats
        ]
        index, samples, seeds, kind = torch.tensor(entries, device=device).T
        positions = torch.tensor([len(seat.held.prompt.tokens) for seat in seats], device=device)
        hidden = torch.cat([held.hidden for held in prompts.values() if held.hidden is not None])  # [prompts,dim]
        logits = self.runner.model.logits(hidden[:, None])[:, 0]  # [prompts,V]
        seen = seen_in([held.prompt.tokens for held in prompts.values()], self.noted, device)
        if len(prompts) > 1:
            logits, seen = logits[index], seen[index]
        else:
            logits, seen = (each.expand(len(seats), -1) for each in (logits, seen))
        filters = self.only if self.kinds is None else self.kinds.map(itemgetter(kind))
        numbers = uniform(seeds, samples, positions)
        token, logprob = self.agreed(self.runner.draw(logits, numbers, filters, seen))
        return token[:, None], logprob[:, None], torch.ones_like(token)

    def agreed(self, drawn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Broadcast tokens and log-probabilities, so that all ranks of a sharded network finish the same rows."""
        if self.shard.world == 1:
            return drawn
        both = self.shard.broadcast(torch.stack([each.double() for each in drawn]))  # exact for token ids
        return both[0].long(), both[1]

    def seat(self, rows: Sequence[int]) -> None:
        """Start the samples now in `seats` in these rows. An idle row is at position 0: ALiBi biases are relative to
        the last position of a step, which must be a live row's."""
        seats = [self.seats[row] for row in rows]
        entries = [
            (0,) * 6
            if seat is None
            else (seat.row.sample.tokens[-1], seat.position, len(seat.held.prompt.tokens), seat.row.sample.index,
                  seat.held.seed, self.kind_of[seat.held.request.sampling])
            for seat in seats
        ]  # fmt: skip
        device = self.token.device
        index = torch.tensor(rows, device=device)
        token, position, start, samples, seeds, kind = torch.tensor(entries, device=device).T
        self.token[index, 0], self.input_pos[index, 0], self.kind[index] = token, position, kind
        self.samples, self.seeds = self.samples.clone(), self.seeds.clone()  # new identity: UniformBlocks starts over
        self.samples[index], self.seeds[index] = samples, seeds
        if self.noted:
            texts = [[] if seat is None else seat.held.prompt.tokens for seat in seats]
            self.seen[index] = seen_in(texts, self.noted, device)
        for each in self.tables:
            each.seat(rows, start, self.places())

    def places(self) -> list[Place | None]:
        return [None if seat is None else seat.place for seat in self.seats]

    def keep(self, rows: Sequence[int]) -> None:
        """Compact to the given rows; `seats` are theirs already."""
        for each in self.tables:
            each.keep(rows, self.places())
        self.token, self.input_pos, self.kind = self.token[rows], self.input_pos[rows], self.kind[rows]
        self.samples, self.seeds, self.one = self.samples[rows], self.seeds[rows], self.one[rows]
        self.seen = self.seen[rows]

    def reread(self, at: int) -> None:
        """Prefill the context and the tokens of the row `at` again, since its keys now rotate otherwise."""
        seat = self.seats[at]
        assert seat is not None
        held, longer = seat.held, seat.held.longer
        rows = {
            each.reread(None if longer is None else longer.row, held.prompt.tokens, seat.row.sample.tokens, at)
            for each in self.tables
        }
        held.longer = seat.place = Place(rows.pop())
        for each in self.tables:
            each.link(self.places())

    def resize(self, own: int) -> None:
        """Make `own` decoded slots of each row visible."""
        for each in self.tables:
            each.resize(own)
        slots = self.contexts.base + min(own, self.contexts.sizes.own)
        self.last = self.contexts.cache.start[:, None] + slots - self.width  # [C,1]

    def next(self) -> StepOutput:
        """Run one decode step."""
        self.input_pos = self.input_pos.minimum(self.last)  # clamp: a finished row may be past the visible slots
        inputs = StepInput(self.token, self.input_pos, self.samples, self.seeds, add(self.seen, self.token))
        token, logprob = self.agreed(self.step(inputs, self.contexts.cache))
        self.token, self.input_pos = token[:, None], self.input_pos + 1
        return token[:, None], logprob[:, None], self.one


class Queue(NamedTuple):
    """What replicas share: `take` returns the next number, of all replicas together. leads: whether this replica
    reports what cannot be run."""

    take: Callable[[], int]
    replicas: int
    leads: bool


class Given(NamedTuple):
    """The context of a single prompt that is prefilled already, and the last layer's output at its end [1,dim]."""

    context: KVCache
    hidden: Tensor


class Scheduler:
    """Generation of the samples of prompts.

    seats: the sample of each row; None: idle. units: prompts, by number, that are taken together. waiting: those taken
    and not yet prefilled. starting: prompts with
    samples that have no first token. ready: samples that have one and wait for a row. moved: whether rows have become
    idle since the last assignment.
    """

    def __init__(
        self,
        runner: ModelRunner,
        prompts: Sequence[Prompt],
        request: Request,
        monitor: Monitor = SILENT,
        stats: BatchStats | None = None,
        plan: Plan | None = None,
        queue: Queue | None = None,
    ) -> None:
        """plan: for `workload`, if already made. queue: takes units of prompts; None: all are this process's. Raises
        ValueError, before any kernel runs, if a prompt does not fit the model, or the batch the memory."""
        self.runner, self.request, self.monitor = runner, runner.seeded(request), monitor
        self.stats = BatchStats() if stats is None else stats
        self.prompts = [(prompt, prompt.request or self.request) for prompt in prompts]
        for prompt, own in self.prompts:
            own.check_length(runner.args.context_limit, len(prompt.tokens))
            check_tokens(prompt.tokens, runner.model.args.vocab_size)
        self.endings = {own: StopConditions.of(own, runner.eos_ids, runner.tokenizer) for _, own in self.prompts}
        asked = [(len(prompt.tokens), own) for prompt, own in self.prompts]
        scaling = runner.args.rope_scaling
        crossing = scaling is not None and any(scaling.crosses(T, T + own.max_new_tokens) for T, own in asked)
        self.scaling = scaling if crossing else None
        # Scaling by length rotates a token by the length of its whole sequence, int8 scales channels by the context.
        whole = scaling is not None and scaling.by_length or request.kv_dtype == "int8"
        shares = not whole and request.attention != "contiguous"
        self.sharing = Sharing.among([prompt.tokens for prompt in prompts], shares)
        self.make = runner.decoder or PlainDecoder
        self.plan = runner.plan_workload(workload(asked, self.request, runner.device)) if plan is None else plan
        runner.prepare(self.plan)
        self.sizes = self.fit(asked, 2 if crossing else 1)
        self.drafts = runner.decoder is not None
        self.stats.rows = self.sizes.rows
        self.seats: list[Seat | None] = [None] * self.sizes.rows
        self.units, self.at = self.sharing.units(1 if queue is None else queue.replicas), self.sharing.places()
        self.take = itertools.count().__next__ if queue is None else queue.take
        self.waiting: deque[int] = deque()
        self.starting: deque[ActivePrompt] = deque()
        self.ready: deque[Seat] = deque()
        self.resident: dict[int, int] = {0: 0}  # the row of each group in memory
        self.users = [0] * (len(self.sharing.groups) + 1)  # prompts of each group that wait or are in memory
        self.events: list[Piece | Outcome] = []
        self.active: set[ActivePrompt] = set()
        self.steps, self.moved = 0, True

    def fit(self, asked: Sequence[tuple[int, Request]], held: int) -> Sizes:
        """Return the sizes of the largest batch that fits into memory; at least one row and its prompt, as planned."""
        own = max(each.max_new_tokens for _, each in asked) + self.make.width - 1
        rows = min(sum(each.num_samples for _, each in asked), self.request.rows_at_once or self.plan.rows_at_once)
        if len(asked) == 1:
            return sizes_of(rows, asked, self.sharing, own, held)
        rows = min(rows, self.plan.rows_at_once)
        while rows and needed(sizes_of(rows, asked, self.sharing, own, held), self.plan) > self.plan.available:
            rows -= 1
        if not rows:
            self.sharing, rows, asked = Sharing(0, (), self.sharing.lengths), 1, asked
            return replace(sizes_of(1, asked, self.sharing, own, held), prompts=held)
        return sizes_of(rows, asked, self.sharing, own, held)

    @torch.no_grad()
    def run(
        self, live: bool = False, given: Given | None = None, kept: dict[int, KVCache] | None = None
    ) -> Iterator[Piece | Outcome]:
        """Yield each prompt when its last sample is finished. live: also yield pieces of text. given: the context of a
        single prompt. kept: filled with the keys and values that each finished sample has decoded, by its index."""
        self.live, self.given, self.kept = live, given, kept
        wraps = given is not None and self.sizes.single and self.request.kv_dtype != "int8"
        context = given.context if given is not None and wraps else None
        self.contexts = Contexts(self.runner, self.sizes, self.request, context)
        samplings = list(dict.fromkeys(own.sampling for _, own in self.prompts))
        self.decoder: PlainDecoder = self.make(self.runner, self.contexts, self.seats, self.plan, samplings)
        if self.sizes.root:
            for each in self.decoder.tables:
                each.read_root(self.prompts[0][0].tokens[: self.sizes.root])
            self.stats.read += self.sizes.root
        while True:
            self.admit()
            yield from self.hand_out()
            if any(self.seats):
                self.compact()
                self.advance()
                yield from self.hand_out()
            elif not (self.moved or self.waiting or self.starting or self.ready or self.take_unit()):
                break

    def hand_out(self) -> Iterator[Piece | Outcome]:
        events, self.events = self.events, []
        yield from events

    def admit(self) -> None:
        """Assign waiting samples to idle rows."""
        idle = [at for at, seat in enumerate(self.seats) if seat is None] if self.moved else []
        while len(self.ready) < len(idle) and not self.events and self.begin_samples():
            pass
        rows = idle[: len(self.ready)]
        for at in rows:
            self.seats[at] = self.ready.popleft()
        if moved := rows if self.sizes.single else idle:
            self.decoder.seat(moved)
        self.moved = bool(self.events)  # a first token may end a prompt: hand it out first

    def begin_samples(self) -> bool:
        """Sample the first tokens of further samples, at most one per row; prefill prompts if none is left to start.
        Return whether there was anything to begin."""
        if not self.starting:
            self.read(self.next_prompts())
        seats: list[Seat] = []
        while self.starting and len(seats) < self.sizes.rows:
            held = self.starting[0]
            history = () if held.prompt.alone else held.prompt.tokens
            index, tokenizer = held.request.first_index + held.begun, self.runner.tokenizer
            row = Row(index, held.ending, tokenizer, history, self.live, held.seed)
            seats.append(Seat(held, row, held.place))
            held.begun += 1
            if held.begun == held.request.num_samples:
                self.starting.popleft()
        if seats:
            self.monitor.stepped(0, self.record(seats, [self.decoder.first(seats)]))
            self.ready.extend(seat for seat in seats if not seat.done)
        return bool(seats)

    def take_unit(self) -> bool:
        """Take the next prompts of the queue. Return whether there were any."""
        number = self.take() if self.units else 0
        if number >= len(self.units):
            self.units = []
            return False
        self.waiting.extend(self.units[number])
        for each in self.units[number]:
            self.users[self.at[each][0]] += 1
        return True

    def next_prompts(self) -> list[ActivePrompt]:
        """Take the waiting prompts that fit, in order, prefilling groups that are not in memory."""
        found: list[ActivePrompt] = []
        while self.has_room() and (self.waiting or self.take_unit()):
            number = self.waiting[0]
            group, behind = self.at[number]
            if group not in self.resident:
                if not self.contexts.groups.free:
                    break
                shared, root = self.sharing.groups[group - 1], self.sizes.root
                tokens = self.prompts[shared.members[0]][0].tokens[root : shared.length]
                self.resident[group] = [each.read_group(tokens) for each in self.decoder.tables][0]
                self.stats.read += len(tokens)
            self.waiting.popleft()
            prompt, own = self.prompts[number]
            row = [each.prompts.take(behind, len(prompt.tokens) - behind) for each in self.decoder.tables][0]
            seed = None if prompt.request is None else prompt.request.seed
            if seed is None:
                assert self.request.seed is not None
                seed = seed_of(self.request.seed, prompt.id)
            place = Place(row, self.resident[group])
            found.append(ActivePrompt(number, prompt, own, seed, self.endings[own], place))
            self.active.add(found[-1])
        return found

    def has_room(self) -> bool:
        """Return whether there is a row for another prompt, and for each active one the row that it may need later."""
        later = 0 if self.scaling is None else 1 + sum(held.longer is None for held in self.active)
        return len(self.contexts.prompts.free) > later

    def read(self, found: Sequence[ActivePrompt]) -> None:
        """Prefill the rest of prompts, whose samples can then start."""
        if not found:
            return
        rests = [held.prompt.tokens[self.at[held.number][1] :] for held in found]
        asked = [(held.place, self.at[held.number][1], rest) for held, rest in zip(found, rests, strict=True)]
        for each in self.decoder.tables[1:]:
            each.read(asked)
        if self.given is None:
            hidden = self.contexts.read(asked, self.monitor)
            self.stats.read += sum(map(len, rests))
        else:
            context, hidden = self.given
            if self.contexts.prompts.cache is not context:
                self.contexts.store(found[0].place.row, context)
        self.monitor.prefilled()
        for held, end in zip(found, hidden, strict=True):
            held.hidden = end[None]
        self.stats.asked += sum(len(held.prompt.tokens) for held in found)
        self.starting.extend(found)

    def record(self, seats: Sequence[Seat | None], outputs: Sequence[StepOutput]) -> int:
        """Sync the output of steps to the host; finish samples at EOS, a stop string or the maximum length. Return the
        number of tokens recorded."""
        # Tokens and logprobs [C][steps][k], counts [C][steps].
        parts = [torch.stack(part, 1).tolist() for part in zip(*outputs, strict=True)]
        total = 0
        for at, (seat, *new) in enumerate(zip(seats, *parts, strict=True)):
            if seat is None or seat.done:
                continue
            row, before = seat.row, len(seat.row.sample.tokens)
            try:
                for tokens, logprobs, count in zip(*new, strict=True):
                    for token, logprob in zip(tokens[:count], logprobs[:count], strict=True):
                        if row.sample.finish_reason is None:
                            row.record(token, logprob)
            except FloatingPointError as error:
                self.fail(seat.held, str(error))
                continue
            total += len(row.sample.tokens) - before
            if not before:
                self.monitor.started(row)
            if self.live:
                self.events.append(row.piece(before, seat.held.prompt.id))
            if row.sample.finish_reason is not None:
                self.finish(seat, at)
        self.stats.drawn += total
        return total

    def finish(self, seat: Seat, at: int) -> None:
        """Collect a finished sample, of the row `at`; release its prompt after the last one."""
        held, sample = seat.held, seat.row.sample
        held.samples.append(sample)
        if self.kept is not None:
            begin = len(held.prompt.tokens)
            self.kept[sample.index] = self.contexts.cache.row(at, begin, len(sample.tokens) - 1)
        self.monitor.done(sample)
        if len(held.samples) == held.request.num_samples:
            self.release(held)

    def fail(self, held: ActivePrompt, error: str) -> None:
        """End a prompt without samples; its rows become idle with the finished ones."""
        held.error, held.samples = error, []
        self.starting = deque(each for each in self.starting if each is not held)
        self.ready = deque(each for each in self.ready if each.held is not held)
        self.release(held)

    def release(self, held: ActivePrompt) -> None:
        """Queue a prompt's outcome; free its rows, and its group's after the last member."""
        self.active.remove(held)
        group = self.at[held.number][0]
        self.users[group] -= 1
        for each in self.decoder.tables if self.given is None else ():
            for place in (held.place, held.longer):
                if place is not None:
                    each.prompts.give_back(place.row)
            if group and not self.users[group]:
                each.groups.give_back(self.resident[group])
        if group and not self.users[group]:
            del self.resident[group]
        held.samples.sort(key=lambda sample: sample.index)
        self.events.append(Outcome(held.prompt, held.samples, held.error))
        self.stats.prompts += held.error is None

    def compact(self) -> None:
        """Compact the batch once half of its rows have finished, if nothing waits."""
        if self.waiting or self.starting or self.ready:
            return
        kept = rows_to_keep([seat is not None for seat in self.seats])
        if len(kept) < len(self.seats) and not self.take_unit():
            self.seats[:] = [self.seats[at] for at in kept]
            self.decoder.keep(kept)

    def advance(self) -> None:
        """Run decode steps up to the next sync, and record their tokens."""
        live = [seat for seat in self.seats if seat is not None]
        longest = max(len(seat.row.sample.tokens) for seat in live)
        look = SYNC_EVERY[self.runner.device.type]
        if self.drafts or self.scaling is not None or self.steps < 2:  # the first step may compile
            look = 1
        look = min(look, max(seat.held.request.max_new_tokens - len(seat.row.sample.tokens) for seat in live))
        for at, seat in enumerate(self.seats):
            if self.scaling is not None and seat is not None and self.scaling.crosses(seat.position, seat.position + 1):
                self.decoder.reread(at)
        self.decoder.resize(longest + look * self.decoder.width - 1)
        outputs = [self.decoder.next() for _ in range(look)]
        stats, token = self.stats, self.plan.context // self.plan.workload.context
        saved = sum(len(seat.held.prompt.tokens) for seat in live) - self.contexts.tokens
        stats.kv_bytes_saved = max(stats.kv_bytes_saved, saved * token)
        stats.steps, stats.capacity = stats.steps + look, stats.capacity + look * len(self.seats)
        drawn = self.record(self.seats, outputs)
        self.steps, stats.busy = self.steps + look, stats.busy + drawn
        self.monitor.stepped(look, drawn)
        self.moved |= any(seat is not None and seat.done for seat in self.seats)
        self.seats[:] = [None if seat is None or seat.done else seat for seat in self.seats]


def rejection(args: ModelArgs, request: Request, prompt: Prompt) -> str | None:
    """Return the reason why a prompt cannot be run; None if it can."""
    try:
        (prompt.request or request).check_length(args.context_limit, len(prompt.tokens))
        check_tokens(prompt.tokens, args.vocab_size)
    except ValueError as error:
        return str(error)
    return None


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Raises ValueError if two prompts have the same id."""
    (id, times), *_ = Counter(json.dumps(prompt.id) for prompt in prompts).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{times} prompts have the id {id}: give each its own")


def pieces_of(events: Iterator[Piece | Outcome]) -> Generator[Piece]:
    """Yield the pieces of a single prompt's run. Raises FloatingPointError if its logits are not finite."""
    for each in events:
        if isinstance(each, Piece):
            yield each
        elif each.error is not None:
            raise FloatingPointError(each.error)


def samples_of(events: Iterator[Piece | Outcome]) -> list[Sample]:
    """Run a single prompt to its end, and return its samples. Raises as `pieces_of`."""
    (outcome,) = events
    assert isinstance(outcome, Outcome)
    if outcome.error is not None:
        raise FloatingPointError(outcome.error)
    return outcome.samples
