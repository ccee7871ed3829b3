"""Scheduler: the one loop that generates, for one prompt or many, N samples each.

    prompts = [Prompt("a", engine.encode("Once upon a time")), Prompt("b", engine.encode("The cat"))]
    for outcome in engine.generate_many(prompts, Request(num_samples=8)):
        print(outcome.prompt.id, [sample.text for sample in outcome.samples])

Prefixes that prompts share are prefilled once (prefixes.py), then the rest of each. Batching is continuous: a row whose
sample has finished is taken by the next sample, of any prompt. When none waits, the batch is compacted to the rows
still generating. Each prompt may have a request of its own.
Shapes: C rows that decode together, S positions, k tokens per row and step (at most), V vocabulary.
"""

import hashlib
import itertools
import json
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from cache import KVCache
from engine.contexts import Contexts, Place
from engine.decoding import ActivePrompt, PlainDecoder, Prompt, Seat, StepOutput
from engine.plan import Plan
from engine.prefixes import Sharing
from engine.request import Request, check_tokens
from engine.runner import SILENT, SYNC_EVERY, ModelRunner, Monitor, rows_to_keep
from engine.samples import Piece, Row, Sample, StopConditions
from engine.sizes import fit, workload
from layers.rope import RopeScaling
from model import ModelArgs


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


class Queue(NamedTuple):
    """Queue of numbers shared by all replicas. take: return the next number. leads: whether this replica reports the
    prompts that cannot be run. more: whether another queue follows, so that a replica need not leave prompts of this
    one to others."""

    take: Callable[[], int]
    replicas: int
    leads: bool
    more: bool = False


class Given(NamedTuple):
    """The context of a single prompt that is prefilled already, and the last layer's output at its end [1,dim]."""

    context: KVCache
    hidden: Tensor


class Scheduler:
    """Generation of the samples of prompts.

    seats: the sample of each row; None: idle. units: lists of prompt numbers, each taken together. waiting: those taken
    and not yet prefilled. starting: prompts with samples that have no first token. ready: samples that have one and
    wait for a row. moved: whether rows may have become idle since `admit`.
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
        """prompts: those that `check_prompt` accepts. plan: for `workload`, if already made. queue: takes units of
        prompts; None: all are this process's. Raises ValueError, before any kernel runs, if the batch does not fit the
        memory."""
        self.runner, self.request, self.monitor = runner, runner.seeded(request), monitor
        self.stats = BatchStats() if stats is None else stats
        self.prompts = [(prompt, prompt.request or self.request) for prompt in prompts]
        self.endings = {own: StopConditions.of(own, runner.eos_ids, runner.tokenizer) for _, own in self.prompts}
        asked = Counter((len(prompt.tokens), own) for prompt, own in self.prompts)
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
        if self.request.rows_at_once is not None:
            self.plan = replace(self.plan, rows_at_once=min(self.request.rows_at_once, self.plan.rows_at_once))
        self.sizes, self.sharing = fit(asked, self.sharing, self.plan, self.make.width, 2 if crossing else 1)
        self.stats.rows = max(self.stats.rows, self.sizes.rows)
        self.seats: list[Seat | None] = [None] * self.sizes.rows
        self.units, self.at = self.sharing.units(1 if queue is None else queue.replicas), self.sharing.places()
        self.take, replicas = (itertools.count().__next__, 1) if queue is None else (queue.take, queue.replicas)
        self.share = len(prompts) if queue is not None and queue.more else -(-len(prompts) // replicas)
        self.waiting: deque[int] = deque()
        self.starting: deque[ActivePrompt] = deque()
        self.ready: deque[Seat] = deque()
        self.resident: dict[int, int] = {0: 0}  # the row of each group in memory
        self.users = [0] * (len(self.sharing.groups) + 1)  # prompts of each group that wait or are in memory
        self.events: list[Piece | Outcome] = []
        self.active: set[ActivePrompt] = set()
        self.steps, self.moved = 0, True

    @torch.no_grad()
    def run(
        self, live: bool = False, given: Given | None = None, kept: dict[int, KVCache] | None = None
    ) -> Iterator[Piece | Outcome]:
        """Yield each prompt when its last sample is finished. live: also yield pieces of text. given: the context of a
        single prompt. kept: filled with the keys and values that each finished sample has decoded, by its index."""
        self.live, self.given, self.kept = live, given, kept
        in_place = self.sizes.single and self.request.kv_dtype != "int8"
        context = given.context if given is not None and in_place else None
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
            active = self.starting[0]
            history = () if active.prompt.alone else active.tokens
            index, tokenizer = active.request.first_index + active.begun, self.runner.tokenizer
            row = Row(index, active.ending, tokenizer, history, self.live, active.seed)
            seats.append(Seat(active, row, active.place))
            active.begun += 1
            if active.begun == active.request.num_samples:
                self.starting.popleft()
        if seats:
            self.monitor.stepped(0, self.record(seats, [self.decoder.first(seats)]))
            self.ready.extend(seat for seat in seats if not seat.done)
        return bool(seats)

    def take_unit(self) -> bool:
        """Take the next prompts of the queue, unless as many are active here as an equal division would give. Return
        whether there were any."""
        if len(self.active) >= self.share:
            return False
        number = self.take() if self.units else 0
        if number >= len(self.units):
            self.units = []
            return False
        taken = self.units[number]
        self.waiting.extend(taken)
        for each in taken:
            self.users[self.at[each][0]] += 1
        if number == len(self.units) - 1:
            self.units = []
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
        later = 0 if self.scaling is None else 1 + sum(active.longer is None for active in self.active)
        return len(self.contexts.prompts.free) > later

    def read(self, found: Sequence[ActivePrompt]) -> None:
        """Prefill the rest of prompts, whose samples can then start."""
        if not found:
            return
        rests = [active.tokens[self.at[active.number][1] :] for active in found]
        asked = [(active.place, self.at[active.number][1], rest) for active, rest in zip(found, rests, strict=True)]
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
        for active, end in zip(found, hidden, strict=True):
            active.hidden = end[None]
        self.stats.asked += sum(len(active.tokens) for active in found)
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
                self.fail(seat.active, str(error))
                continue
            total += len(row.sample.tokens) - before
            if not before:
                self.monitor.started(row)
            if self.live:
                self.events.append(row.piece(before, seat.active.prompt.id))
            if row.sample.finish_reason is not None:
                self.finish(seat, at)
        self.stats.drawn += total
        return total

    def finish(self, seat: Seat, at: int) -> None:
        """Collect a finished sample, of the row `at`; release its prompt after the last one."""
        active, sample = seat.active, seat.row.sample
        active.samples.append(sample)
        if self.kept is not None:
            begin = len(active.tokens)
            self.kept[sample.index] = self.contexts.cache.row(at, begin, len(sample.tokens) - 1)
        self.monitor.done(sample)
        if len(active.samples) == active.request.num_samples:
            self.release(active)

    def fail(self, active: ActivePrompt, error: str) -> None:
        """End a prompt without samples; its rows become idle with the finished ones."""
        active.error, active.samples = error, []
        self.starting = deque(each for each in self.starting if each is not active)
        self.ready = deque(each for each in self.ready if each.active is not active)
        self.seats[:] = [None if seat is None or seat.active is active else seat for seat in self.seats]
        self.moved = True
        self.release(active)

    def release(self, active: ActivePrompt) -> None:
        """Queue a prompt's outcome; free its rows, and its group's after the last member."""
        self.active.remove(active)
        group = self.at[active.number][0]
        self.users[group] -= 1
        for each in self.decoder.tables if self.given is None else ():
            for place in (active.place, active.longer):
                if place is not None:
                    each.prompts.give_back(place.row)
            if group and not self.users[group]:
                each.groups.give_back(self.resident[group])
        if group and not self.users[group]:
            del self.resident[group]
        active.samples.sort(key=lambda sample: sample.index)
        self.events.append(Outcome(active.prompt, active.samples, active.error))
        self.stats.prompts += active.error is None

    def compact(self) -> None:
        """Compact the batch once half of its rows have finished, if nothing waits and no prompts can be taken."""
        if self.waiting or self.starting or self.ready:
            return
        kept = rows_to_keep([seat is not None for seat in self.seats])
        if len(kept) < len(self.seats) and not self.take_unit() and not self.units:
            self.seats[:] = [self.seats[at] for at in kept]
            self.decoder.keep(kept)

    def advance(self) -> None:
        """Run decode steps up to the next sync, and record their tokens."""
        live = [seat for seat in self.seats if seat is not None]
        longest = max(len(seat.row.sample.tokens) for seat in live)
        look = SYNC_EVERY[self.runner.device.type]
        if self.runner.decoder is not None or self.scaling is not None or self.steps < 2:  # the first step may compile
            look = 1
        look = min(look, max(seat.active.request.max_new_tokens - len(seat.row.sample.tokens) for seat in live))
        self.decoder.resize(longest + look * self.decoder.width - 1)
        if self.scaling is not None:
            self.reread(self.scaling)
        outputs = [self.decoder.next() for _ in range(look)]
        stats, token = self.stats, self.plan.context // self.plan.workload.context
        saved = sum(len(seat.active.tokens) for seat in live) - self.contexts.tokens
        stats.kv_bytes_saved = max(stats.kv_bytes_saved, saved * token)
        stats.steps, stats.capacity = stats.steps + look, stats.capacity + look * len(self.seats)
        drawn = self.record(self.seats, outputs)
        self.steps, stats.busy = self.steps + look, stats.busy + drawn
        self.monitor.stepped(look, drawn)
        self.moved |= any(seat is not None and seat.done for seat in self.seats)
        self.seats[:] = [None if seat is None or seat.done else seat for seat in self.seats]

    def reread(self, scaling: RopeScaling) -> None:
        """Prefill rows again if the next step's rotation does not match their stored keys."""
        for at, seat in enumerate(self.seats):
            if seat is not None and scaling.crosses(seat.position, seat.position + 1):
                self.decoder.reread(at)


def check_prompt(args: ModelArgs, request: Request, prompt: Prompt) -> None:
    """Raise ValueError if a prompt cannot be run. request: that of the batch."""
    (prompt.request or request).check_length(args.context_limit, len(prompt.tokens))
    check_tokens(prompt.tokens, args.vocab_size)


def rejection(args: ModelArgs, request: Request, prompt: Prompt) -> str | None:
    """Return the reason why a prompt cannot be run; None if it can."""
    try:
        check_prompt(args, request, prompt)
    except ValueError as error:
        return str(error)
    return None


def check_ids(prompts: Sequence[Prompt]) -> None:
    """Raise ValueError if two prompts have the same id."""
    (id, times), *_ = Counter(json.dumps(prompt.id) for prompt in prompts).most_common(1) or [("", 0)]
    if times > 1:
        raise ValueError(f"{times} prompts have the id {id}: ids must be unique")


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
