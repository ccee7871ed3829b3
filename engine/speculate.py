"""Speculative decoding: a draft proposes k tokens for each row, one step of the target verifies them all.

A sample's token at a position depends only on the target's logits there and the random numbers u(seed, sample,
position, token). So a step draws the tokens of k + 1 positions, given the proposals, and accepts them up to and
including the first that differs from its proposal: they are the tokens of plain decoding, for any draft at any step. A
deterministic proposal is accepted with its probability p(x), as by the rule of Leviathan et al. 2022 (arXiv 2211.17192)
and Chen et al. 2023 (arXiv 2302.01318). A draft that samples uses the target's numbers and filters, and is accepted
nearly as often as by their rule, which would make samples depend on the draft (drafter-invariant speculation: Daliri
et al. 2024, arXiv 2408.07978; its cost: docs/benchmarks.md).

Shapes: N rows, k proposals, S = k + 1 positions of a step, V vocabulary.
"""

import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KVCache
from engine.engine import Engine, PlainDecoder, Run, StepOutput
from engine.graphs import RecordedStep, Step, StepInput, compiled
from engine.plan import WeightSizes, Workload
from model import ModelArgs, Transformer
from sampling import NOTHING, UniformBlocks, seen_prefixes

DEFAULT_K, LARGEST_K = 4, 16  # proposals per step: the default; the most that `auto` tries


class Draft:
    """Base class of drafts: created once, loaded for an engine by `place`, copied for a run by `read` (shared by its
    waves) and for a wave by `begin`. weights, token_bytes: bytes of its weights, and of its K/V per token."""

    name = ""
    longest = 1 << 20  # most proposals per step
    weights = token_bytes = 0

    def place(self, engine: Engine, rows: int) -> None:
        """Load weights for steps of `rows` rows."""

    def read(self, run: Run) -> Self:
        return copy(self)

    def begin(self, rows: "SpeculativeDecoder") -> Self:
        return copy(self)

    def propose(self, rows: "SpeculativeDecoder", k: int) -> Tensor | None:
        """Return tokens [N,k] for the positions after each row's last one; None if there is nothing to propose."""
        raise NotImplementedError

    def keep(self, rows: Sequence[int]) -> None:
        """Compact to the given rows."""


class DraftController:
    """Controller of whether the next step drafts, and how many tokens, by the times and acceptances of past steps.

    Plain steps come first and are timed. Then `balance` is the recent gain of drafting, in plain steps; once it
    is below -PATIENCE, plain steps follow, more each time, before drafting is tried again. As no sample depends on the
    draft, timings may decide.
    """

    SETTLE, TIMED, RECENT, PATIENCE, REST, LONGEST_REST, WINDOW = 4, 3, 7, 3.0, 128, 1024, 8

    def __init__(self, k: int | None, longest: int) -> None:
        """k None: adapt it, up to `longest`."""
        self.auto, self.k, self.longest = k is None, k or min(DEFAULT_K, longest), longest
        self.accepted: Counter[int] = Counter()
        self.draft_s = self.drafted_s = self.plain_s = self.expected_s = self.taken_s = 0.0
        self.steps, self.drafted_steps, self.switched_off, self.rest = 0, 0, 0, self.REST
        self.restart()

    def restart(self) -> None:
        """Reset the timings for other rows."""
        self.seconds: dict[int | None, deque[float]] = defaultdict(lambda: deque(maxlen=self.RECENT))
        self.rates: dict[int, float] = {}
        self.gains: list[float] = []
        self.plain_left, self.balance = self.SETTLE, 0.0

    def stepped(self, proposed: int | None, counts: list[int], seconds: float, draft_s: float) -> None:
        """Record a finished step. proposed: tokens proposed per row; None for a planned plain step."""
        times, mean = self.seconds[proposed], sum(counts) / len(counts)
        times.append(seconds)
        self.steps, self.taken_s = self.steps + 1, self.taken_s + seconds
        if proposed is None:
            self.expected_s += seconds
            self.plain_left -= 1
            if self.plain_left == self.TIMED:
                times.clear()
            return
        plain = statistics.median(self.seconds[None])
        self.plain_s = self.plain_s or plain
        self.expected_s += mean * plain
        if proposed:
            self.accepted.update(count - 1 for count in counts)
            self.drafted_steps, self.draft_s = self.drafted_steps + 1, self.draft_s + draft_s
            self.drafted_s += seconds
        else:
            self.seconds[None].append(seconds - draft_s)
        if len(times) > 1:  # the first may be slow
            self.balance = min(self.PATIENCE, self.balance + mean - statistics.median(times) / plain)
        if self.balance < -self.PATIENCE:
            self.plain_left, self.balance, self.switched_off = self.rest, 0.0, self.switched_off + 1
            self.rest = min(2 * self.rest, self.LONGEST_REST)
        elif self.balance == self.PATIENCE:
            self.rest = self.REST
        if self.auto and proposed:
            self.adapt(mean, plain)

    def adapt(self, mean: float, plain: float) -> None:
        """Choose k every WINDOW drafted steps: the fastest so far; if that is the current one, double it where most
        proposals are accepted and halve it where few are, unless that was slower."""
        self.gains.append(mean)
        if len(self.gains) < self.WINDOW:
            return
        mean, k = statistics.mean(self.gains), self.k
        self.gains, rate = [], mean * plain / statistics.median(self.seconds[k])
        self.rates[k] = rate
        want = 2 * k if mean - 1 > 0.7 * k else k // 2 if mean - 1 < 0.4 * k else k
        best, want = max(self.rates, key=lambda each: self.rates[each]), max(1, min(want, self.longest))
        if self.rates[best] > 1.05 * rate or self.rates.get(want, rate) < rate:
            self.k, self.rates[want] = best, 1.05 * self.rates.get(want, rate)  # old rates go stale
        else:
            self.k = want


class SpeculativeDecoder(PlainDecoder):
    """Speculative decoder of one wave: each row advances by its accepted tokens. The host waits for every step.

    token, input_pos [N,1]: the last token of each row, not yet run. text [N,L]: the tokens from position run.begin on.
    hidden [N,1,dim]: the last layer's output for the token before it; None: unknown. behind: the most positions of a
    row that the target has run and the draft has not.
    """

    def __init__(self, speculation: "Speculation", run: Run, cache: KVCache, samples: Tensor) -> None:
        super().__init__(run, cache, samples)
        self.speculation, self.run, self.model = speculation, run, run.engine.model
        self.width, self.pace, self.numbers = speculation.width, speculation.pace, UniformBlocks()
        self.base, self.behind = run.begin - int(cache.start[0]), 0
        self.text = samples.new_zeros(len(samples), run.own_slots + 1)
        self.hidden: Tensor | None = None
        self.arange = partial(torch.arange, device=samples.device)
        self.verify = self.network(self.model)
        self.draft = speculation.of(run).begin(self)
        self.warm = not run.plan.compiled
        self.pace.restart()

    def network(self, model: Transformer, layers: int | None = None) -> Step:
        return self.speculation.network(model, layers, self.run.plan.compiled)

    @property
    def view(self) -> int:
        """Own slots of a row that a step reads."""
        return self.cache.slots - self.base

    def draw(
        self, logits: Tensor, where: Tensor, seen: Tensor = NOTHING, names: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw tokens and their log-probabilities at positions `where` [N,S] from logits [N,S,V]. A draft leaves `seen`
        empty. names [V]: token ids of the logits, for a draft with a reduced vocabulary."""
        numbers = self.numbers(self.seed, self.samples, where).flatten()
        tokens, logprobs = self.engine.draw(logits.flatten(0, 1), numbers, self.sampling, seen.flatten(0, 1), names)
        return self.shard.broadcast(tokens).view_as(where), logprobs.view_as(where)

    def proposed(self, k: int) -> Tensor | None:
        """Return the draft's proposals [N,k]. Ranks of a sharded network take the first rank's, since all must agree
        on a step's tokens, and on whether it drafts."""
        proposals = self.draft.propose(self, k)
        if self.shard.world == 1:
            return proposals
        agreed = self.shard.broadcast(self.token.new_full((len(self.token), k), -1) if proposals is None else proposals)
        return None if int(agreed[0, 0]) < 0 else agreed

    def first(self, logits: Tensor, position: int) -> StepOutput:
        drawn = super().first(logits, position)
        self.text[:, :1] = drawn[0]
        return drawn

    def next(self, token: Tensor, input_pos: Tensor) -> StepOutput:
        self.token, self.input_pos, proposals = token, input_pos, None
        if not self.warm:  # run both paths, so that all compilation is in the first step
            self.check(token.expand(-1, self.pace.k))
            self.draft.propose(self, self.pace.k)
            self.warm = True
        begin, drafts = self.speculation.clock(), self.pace.plain_left == 0
        if drafts:
            proposals = self.proposed(self.pace.k)
        proposed = self.speculation.clock()
        if proposals is None:
            tokens, logprobs, count = super().next(token, input_pos)
            self.hidden = None
        else:
            tokens, logprobs, count = self.check(proposals)
        size, counts = tokens.shape[1], count.tolist()
        self.text.scatter_(1, input_pos + 1 - self.run.begin + self.arange(size), tokens)
        # If all k proposals were accepted, the draft has not run the last one.
        self.behind = self.behind + 1 if proposals is None else int(max(counts) == size)
        seconds = self.speculation.clock() - begin
        self.pace.stepped(size - 1 if drafts else None, counts, seconds, proposed - begin)
        return F.pad(tokens, (0, self.width - size)), F.pad(logprobs, (0, self.width - size)), count

    def check(self, proposals: Tensor) -> StepOutput:
        """Verify proposals [N,k]: draw the tokens after each row's last one and after each proposal, and count them up
        to and including the first that differs from its proposal."""
        inputs = torch.cat([self.token, proposals], 1)  # [N,S]
        where = self.input_pos + self.arange(inputs.shape[1])
        logits, hidden = self.verify(StepInput(inputs, where, self.samples, self.seed), self.cache)
        seen = seen_prefixes(self.seen, inputs)  # [N,S,V]
        tokens, logprobs = self.draw(logits, where + 1, seen)
        right = (tokens[:, :-1] == proposals).long().cumprod(1).sum(1)  # [N]
        self.hidden, self.seen = (each[self.arange(len(right)), right] for each in (hidden[:, :, None], seen))
        return tokens, logprobs, right + 1

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.draft.keep(rows)
        self.text, self.hidden = self.text[rows], None if self.hidden is None else self.hidden[rows]
        self.pace.restart()


class Speculation:
    """Decoding with a draft (Engine.decoder), and its statistics."""

    def __init__(self, draft: Draft, k: int | None = DEFAULT_K) -> None:
        """k: proposals per step; None: adaptive. Raises ValueError if the draft cannot propose that many."""
        if k is not None and not 1 <= k <= draft.longest:
            most = f" and at most {draft.longest}" if draft.longest < LARGEST_K else ""
            raise ValueError(f"speculate_k {k} must be at least 1{most}, or auto")
        self.draft, self.k, self.pace = draft, k, DraftController(k, min(draft.longest, LARGEST_K))
        self.width = 1 + (k or self.pace.longest)
        self.runs: WeakKeyDictionary[Run, Draft] = WeakKeyDictionary()
        self.steps: dict[tuple[Transformer, int | None], Step] = {}

    def place(self, engine: Engine, rows: int) -> None:
        """Load the draft for an engine (Engine.use), for steps of `rows` rows."""
        self.draft.place(engine, rows)
        self.device, self.shard = engine.device, engine.shard

    def __call__(self, run: Run, cache: KVCache, samples: Tensor) -> PlainDecoder:
        return SpeculativeDecoder(self, run, cache, samples)

    def heavier(self, weights: WeightSizes) -> WeightSizes:
        """Add the draft's weights to the target's."""
        return replace(weights, total=weights.total + self.draft.weights)

    def widen(self, work: Workload, args: ModelArgs) -> Workload:
        if args.rope_scaling is not None and args.rope_scaling.by_length:
            raise ValueError(f"{args.rope_scaling.kind} rope scaling turns all positions of a step alike: no --draft")
        return replace(work, drafted=self.width - 1, draft_token=self.draft.token_bytes)

    def of(self, run: Run) -> Draft:
        """Return the draft with the run's context read."""
        if run not in self.runs:
            self.runs[run] = self.draft.read(run)
        return self.runs[run]

    def network(self, model: Transformer, layers: int | None, is_compiled: bool) -> Step:
        """Return a step of the model's first `layers` layers, compiled once for any number of positions."""
        step: Step = partial(forward, model, layers)
        if is_compiled:
            step = self.steps.setdefault((model, layers), compiled(step))
        return RecordedStep(step) if self.device.type == "cuda" else step

    def clock(self) -> float:
        """Return the time in seconds; ranks of a sharded network take the first rank's, so that all decide alike."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = torch.tensor([time.perf_counter()], dtype=torch.float64, device=self.device)
        return float(self.shard.broadcast(now))

    def report(self) -> dict[str, object]:
        """Return the draft's fields of the report; those that need drafted steps are None without any."""
        pace, drafted = self.pace, self.pace.accepted.total()
        accepted = sum(count * times for count, times in pace.accepted.items())
        return {
            "draft": self.draft.name,
            "speculate_k": "auto" if self.k is None else self.k,
            "accept_histogram": [pace.accepted[count] for count in range(self.width)],
            "mean_accepted": accepted / drafted if drafted else None,
            "drafted_steps": pace.drafted_steps,
            "plain_steps": pace.steps - pace.drafted_steps,
            "draft_share": pace.draft_s / pace.drafted_s if drafted else None,
            "plain_ms_per_step": 1000 * pace.plain_s if drafted else None,
            "speedup_over_plain": pace.expected_s / pace.taken_s if drafted else None,
            "draft_switched_off": pace.switched_off,
        }


def forward(model: Transformer, layers: int | None, inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
    """Return logits [N,S,V], and the last layer's output that they come from [N,S,dim]."""
    hidden = model.hidden(inputs.tokens, inputs.input_pos, cache, layers)
    return model.logits(hidden), hidden
