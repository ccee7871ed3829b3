"""Decoding: the rows that decode together, and one step of them.

Shapes: C rows that decode together, S positions, k tokens per row and step (at most), V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from weakref import ref

import torch
from torch import Tensor

from engine.contexts import Contexts, Place
from engine.graphs import StepInput
from engine.plan import Plan
from engine.request import Request, Sampling
from engine.runner import ModelRunner
from engine.samples import Row, Sample, StopConditions
from sampling import NOTHING, Filters, RowFilters, add, seen_in, uniform

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


@dataclass(eq=False)
class ActivePrompt:
    """A prompt that is prefilled, or about to be. place: of its context; longer: of the same, prefilled again with the
    long factors of longrope. hidden [1,dim]: the last layer's output at its end. begun: samples that have a
    first token. error: the reason why there will be no samples."""

    number: int
    prompt: Prompt
    request: Request
    seed: int
    ending: StopConditions
    place: Place
    hidden: Tensor = NOTHING
    longer: Place | None = None
    begun: int = 0
    samples: list[Sample] = field(default_factory=list)
    error: str | None = None

    @property
    def tokens(self) -> Sequence[int]:
        return self.prompt.tokens


@dataclass(eq=False)
class Seat:
    """A sample that decodes, or waits for a row. place: of the context that it continues."""

    active: ActivePrompt
    row: Row
    place: Place

    @property
    def position(self) -> int:
        """Position of the last token, which is not yet run."""
        return len(self.active.tokens) + len(self.row.sample.tokens) - 1

    @property
    def done(self) -> bool:
        return self.row.sample.finish_reason is not None or self.active.error is not None


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
        self.kinds = RowFilters.of(samplings, runner.model.args.vocab_size, device) if len(samplings) > 1 else None
        penalised = any(each.repetition_penalty != 1 for each in samplings)
        self.noted = runner.model.args.vocab_size if penalised else 0  # columns of `seen`
        self.token = torch.zeros(len(seats), 1, dtype=torch.long, device=device)
        self.input_pos = self.token.clone()
        self.samples, self.seeds, self.kind, self.one = (self.token[:, 0].clone() for _ in range(4))
        self.one += 1
        self.seen = seen_in([[]] * len(seats), self.noted, device)
        self.step = runner.step(plan, self.weak_filters(), samplings)

    def weak_filters(self) -> Callable[[], Filters | RowFilters]:
        """Return `filters` behind a weak reference: with a strong one the step and this decoder form a cycle, which
        keeps a finished batch's caches until garbage collection."""
        itself = ref(self)

        def present() -> Filters | RowFilters:
            decoder = itself()
            assert decoder is not None, "a step runs while its decoder exists"
            return decoder.filters()

        return present

    def filters(self, kind: Tensor | None = None) -> Filters | RowFilters:
        """Return the sampling parameters of rows of these kinds [C]; None: of the present rows."""
        return self.only if self.kinds is None else self.kinds.map(itemgetter(self.kind if kind is None else kind))

    def first(self, seats: Sequence[Seat]) -> StepOutput:
        """Sample the first token of samples, from the outputs at the ends of their prompts."""
        device = self.token.device
        prompts = {active: at for at, active in enumerate(dict.fromkeys(seat.active for seat in seats))}
        index = torch.tensor([prompts[seat.active] for seat in seats], device=device)
        _, end, _, samples, seeds, kind = torch.tensor([self.entry(seat) for seat in seats], device=device).T
        hidden = torch.cat([each.hidden for each in prompts])  # [prompts,dim]
        logits = self.runner.model.logits(hidden[:, None])[:, 0]  # [prompts,V]
        seen = seen_in([each.tokens for each in prompts], self.noted, device)  # [prompts,V]
        if len(prompts) == 1:
            logits, seen = (each.expand(len(seats), -1) for each in (logits, seen))  # a view
        else:
            logits, seen = logits[index], seen[index]
        drawn = self.runner.draw(logits, uniform(seeds, samples, end + 1), self.filters(kind), seen)
        token, logprob = self.shard.agreed(drawn)
        return token[:, None], logprob[:, None], torch.ones_like(token)

    def entry(self, seat: Seat | None) -> tuple[int, int, int, int, int, int]:
        """Return a row's last token, its position, that of its first decoded token, the sample's index and seed, and
        the kind of its sampling. An idle row is at position 0: ALiBi biases are relative to the last position of a
        step, which must be a live row's."""
        if seat is None:
            return 0, 0, 0, 0, 0, 0
        active, sample = seat.active, seat.row.sample
        last = sample.tokens[-1] if sample.tokens else active.tokens[-1]
        start, kind = len(active.tokens), self.kind_of[active.request.sampling]
        return last, seat.position, start, sample.index, active.seed, kind

    def seat(self, rows: Sequence[int]) -> None:
        """Start the samples now in `seats` in these rows."""
        seats, device = [self.seats[row] for row in rows], self.token.device
        index = torch.tensor(rows, device=device)
        entries = torch.tensor([self.entry(seat) for seat in seats], device=device)
        token, position, start, samples, seeds, kind = entries.T
        self.token[index, 0], self.input_pos[index, 0], self.kind[index] = token, position, kind
        self.samples, self.seeds = self.samples.clone(), self.seeds.clone()  # new identity: UniformBlocks starts over
        self.samples[index], self.seeds[index] = samples, seeds
        if self.noted:
            texts = [[] if seat is None else seat.active.tokens for seat in seats]
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
        """Prefill the context and the tokens of the row `at` again, since the rotation has changed."""
        seat = self.seats[at]
        assert seat is not None
        active, contexts = seat.active, self.contexts  # alone: drafts are refused where rotations depend on the length
        row = None if active.longer is None else active.longer.row
        seat.place = active.longer = Place(contexts.reread(row, active.tokens, seat.row.sample.tokens, at))
        contexts.link(self.places())

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
        token, logprob = self.step(inputs, self.contexts.cache)
        self.token, self.input_pos = token[:, None], self.input_pos + 1
        return token[:, None], logprob[:, None], self.one
