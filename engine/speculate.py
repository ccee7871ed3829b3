"""Speculative decoding: a draft proposes k tokens for each row, one step of the target verifies them all.

A sample's token at a position depends only on the target's logits there and the random numbers u(seed, sample,
position, token). So a step draws the tokens of k + 1 positions, given the proposals, and accepts them up to and
including the first that differs from its proposal: they are the tokens of plain decoding, for any draft at any step. A
deterministic proposal is accepted with its probability p(x), as by the rule of Leviathan et al. 2022 (arXiv 2211.17192)
and Chen et al. 2023 (arXiv 2302.01318). A draft that samples uses the target's numbers and filters, and is accepted
nearly as often as by their rule, which would make samples depend on the draft (drafter-invariant speculation: Daliri
et al. 2024, arXiv 2408.07978; its cost: docs/benchmarks.md).

Shapes: C rows, k proposals, S = k + 1 positions of a step, V vocabulary.
"""

import math
import statistics
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import KVCache
from engine.contexts import Contexts
from engine.decoding import ActivePrompt, PlainDecoder, Seat, StepOutput
from engine.graphs import RecordedStep, Step, StepInput, compiled
from engine.plan import WeightSizes, Workload
from engine.request import Request
from engine.runner import ModelRunner
from engine.samples import Row
from loading.checkpoint import Checkpoint, load_joined, read_checkpoint, unpickle, weight_sizes
from loading.hub import locate
from loading.tokenizer import load_tokenizer
from model import Embedding, ModelArgs, Transformer
from sampling import NOTHING, RowFilters, UniformBlocks, seen_prefixes

DEFAULT_K, LARGEST_K = 4, 16  # proposals per step: the default; the most that `auto` tries


class Draft:
    """Base class of drafts: created once, loaded for a runner by `place`, copied for a batch by `begin`. weights,
    token_bytes: bytes of its weights, and of its K/V per token."""

    name = ""
    longest = 1 << 20  # most proposals per step
    weights = token_bytes = 0

    def place(self, runner: ModelRunner, rows: int) -> None:
        """Load weights for steps of `rows` rows."""

    def begin(self, rows: "SpeculativeDecoder") -> Self:
        return copy(self)

    def propose(self, rows: "SpeculativeDecoder", k: int) -> Tensor | None:
        """Return tokens [C,k] for the positions after each row's last one; None if there is nothing to propose."""
        raise NotImplementedError


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
    """Speculative decoder: each row advances by its accepted tokens. The host waits for every step.

    hidden [C,1,dim]: the last layer's output for the token before each row's last one; None: unknown. behind: the most
    positions of a row that the target has run and the draft has not.
    """

    def __init__(self, speculation: "Speculation", *given: Any) -> None:
        """given: as for a PlainDecoder."""
        super().__init__(*given)
        self.speculation, self.model, self.cache = speculation, self.runner.model, self.contexts.cache
        self.width, self.pace, self.numbers = speculation.width, speculation.pace, UniformBlocks()
        self.behind = 0
        self.hidden: Tensor | None = self.model.norm.weight.new_zeros(len(self.seats), 1, self.model.args.dim)
        self.arange = partial(torch.arange, device=self.token.device)
        self.verify = self.network(self.model)
        self.draft = speculation.draft.begin(self)
        self.warm = not self.plan.compiled
        self.pace.restart()

    def network(self, model: Transformer, layers: int | None = None) -> Step:
        return self.speculation.network(model, layers, self.plan.compiled)

    def draw(
        self, logits: Tensor, where: Tensor, seen: Tensor = NOTHING, names: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw tokens and their log-probabilities at positions `where` [C,S] from logits [C,S,V]. A draft leaves `seen`
        empty. names [V]: token ids of the logits, for a draft with a reduced vocabulary."""
        numbers, filters = self.numbers(self.seeds, self.samples, where).flatten(), self.filters()
        if isinstance(filters, RowFilters):
            filters = filters.map(lambda each: each.repeat_interleave(where.shape[1], 0))
        drawn = self.runner.draw(logits.flatten(0, 1), numbers, filters, seen.flatten(0, 1), names)
        tokens, logprobs = self.shard.agreed(drawn)
        return tokens.view_as(where), logprobs.view_as(where)

    def proposed(self, k: int) -> Tensor | None:
        """Return the draft's proposals [C,k]. Ranks of a sharded network take the first rank's, since all must agree
        on a step's tokens, and on whether it drafts."""
        proposals = self.draft.propose(self, k)
        if self.shard.world == 1:
            return proposals
        agreed = self.shard.broadcast(self.token.new_full((len(self.token), k), -1) if proposals is None else proposals)
        return None if int(agreed[0, 0]) < 0 else agreed

    def seat(self, rows: Sequence[int]) -> None:
        super().seat(rows)
        for row in rows:
            if self.hidden is not None and (seat := self.seats[row]) is not None:
                self.hidden[row] = seat.active.hidden

    def next(self) -> StepOutput:
        self.input_pos, proposals = self.input_pos.minimum(self.last), None
        if not self.warm:  # run both paths, so that all compilation is in the first step
            self.check(self.token.expand(-1, self.pace.k))
            self.draft.propose(self, self.pace.k)
            self.warm = True
        begin, drafts = self.speculation.clock(), self.pace.plain_left == 0
        if drafts:
            proposals = self.proposed(self.pace.k)
        proposed = self.speculation.clock()
        if proposals is None:
            tokens, logprobs, count = super().next()
            self.hidden = None
        else:
            tokens, logprobs, count = self.check(proposals)
            self.token, self.input_pos = tokens.gather(1, count[:, None] - 1), self.input_pos + count[:, None]
        size, counts = tokens.shape[1], count.tolist()
        # If all k proposals were accepted, the draft has not run the last one.
        self.behind = self.behind + 1 if proposals is None else int(max(counts) == size)
        seconds = self.speculation.clock() - begin
        self.pace.stepped(size - 1 if drafts else None, counts, seconds, proposed - begin)
        return F.pad(tokens, (0, self.width - size)), F.pad(logprobs, (0, self.width - size)), count

    def check(self, proposals: Tensor) -> StepOutput:
        """Verify proposals [C,k]: draw the tokens after each row's last one and after each proposal, and count them up
        to and including the first that differs from its proposal."""
        inputs = torch.cat([self.token, proposals], 1)  # [C,S]
        where = self.input_pos + self.arange(inputs.shape[1])
        logits, hidden = self.verify(StepInput(inputs, where, self.samples, self.seeds), self.cache)
        seen = seen_prefixes(self.seen, inputs)  # [C,S,V]
        tokens, logprobs = self.draw(logits, where + 1, seen)
        right = (tokens[:, :-1] == proposals).long().cumprod(1).sum(1)  # [C]
        self.hidden, self.seen = (each[self.arange(len(right)), right] for each in (hidden[:, :, None], seen))
        return tokens, logprobs, right + 1

    def keep(self, rows: Sequence[int]) -> None:
        super().keep(rows)
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.pace.restart()


class Speculation:
    """Decoding with a draft (ModelRunner.decoder), and its statistics."""

    def __init__(self, draft: Draft, k: int | None = DEFAULT_K) -> None:
        """k: proposals per step; None: adaptive. Raises ValueError if the draft cannot propose that many."""
        if k is not None and not 1 <= k <= draft.longest:
            most = f" and at most {draft.longest}" if draft.longest < LARGEST_K else ""
            raise ValueError(f"speculate_k {k} must be at least 1{most}, or auto")
        self.draft, self.k, self.pace = draft, k, DraftController(k, min(draft.longest, LARGEST_K))
        self.width = 1 + (k or self.pace.longest)
        self.steps: dict[tuple[Transformer, int | None], Step] = {}

    def place(self, runner: ModelRunner, rows: int) -> None:
        """Load the draft for a runner (ModelRunner.use), for steps of `rows` rows."""
        self.draft.place(runner, rows)
        self.device, self.shard = runner.device, runner.shard

    def __call__(self, *given: Any) -> SpeculativeDecoder:
        return SpeculativeDecoder(self, *given)

    def heavier(self, weights: WeightSizes) -> WeightSizes:
        """Add the draft's weights to the target's."""
        return replace(weights, total=weights.total + self.draft.weights)

    def widen(self, work: Workload, args: ModelArgs) -> Workload:
        if args.rope_scaling is not None and args.rope_scaling.by_length:
            raise ValueError(
                f"{args.rope_scaling.kind} rope scaling rotates all positions of a step by one length: remove --draft"
            )
        return replace(work, drafted=self.width - 1, draft_token=self.draft.token_bytes)

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
    """Return logits [C,S,V], and the last layer's output that they come from [C,S,dim]."""
    hidden = model.hidden(inputs.tokens, inputs.input_pos, cache, layers)
    return model.logits(hidden), hidden


Grams = dict[tuple[int, ...], int]  # n-grams of a text: the position after the latest occurrence of each


class RowIndex:
    """n-grams of what one sample has decoded. source: the position whose token a running match proposes next; 0: none.
    end: the text's length at that time. indexed: the text's length up to which n-grams are noted."""

    def __init__(self, begin: int) -> None:
        self.grams: Grams = {}
        self.source, self.end, self.indexed = 0, begin, begin


class PromptDraft(Draft):
    """Prompt look-up (Saxena 2023): proposes what followed the latest earlier occurrence of a row's last n-gram, in its
    own text or in its context. The index of a context is built once."""

    name, sizes = "prompt", (3, 2)  # n-gram lengths, in order of look-up
    indices: WeakKeyDictionary[ActivePrompt, Grams]
    rows: WeakKeyDictionary[Row, RowIndex]

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.indices, mine.rows = WeakKeyDictionary(), WeakKeyDictionary()
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        found = [None if seat is None else self.propose_row(seat, k) for seat in rows.seats]
        if not any(found):
            return None
        last = rows.token[:, 0].tolist()
        return torch.tensor([each or [token] * k for each, token in zip(found, last, strict=True)]).to(
            rows.token.device
        )

    def propose_row(self, seat: Seat, k: int) -> list[int] | None:
        """Return what followed the row's last n-gram; None if it did not occur before."""
        context, own = seat.active.tokens, seat.row.sample.tokens
        T, end = len(context), len(context) + len(own)
        row = self.rows.setdefault(seat.row, RowIndex(T))
        recent = max(0, row.indexed - max(self.sizes))  # the text from here on, of which n-grams are noted
        text = [*context[recent:], *own[max(0, recent - T) :]]
        for after in range(row.indexed + 1, end):  # an n-gram may begin in the context; the last one does not count
            self.note(row.grams, text, recent, after)
        row.indexed = end - 1
        source, row.end = row.source + end - row.end, end  # continue the last match while it agrees

        def token(position: int) -> int:
            return context[position] if position < T else own[position - T]

        if not (row.source and [token(source - 2), token(source - 1)] == text[-2:]):
            source = self.look_up(seat, row, text)
        row.source = source
        return [token(source + ahead % (end - source)) for ahead in range(k)] if source else None  # short ones repeat

    def look_up(self, seat: Seat, row: RowIndex, text: list[int]) -> int:
        """Return the position after the latest n-gram equal to the text's last; 0: there is none."""
        context = seat.active.tokens
        if seat.active not in self.indices:
            grams = self.indices[seat.active] = {}
            for after in range(1, len(context) + 1):
                self.note(grams, context, 0, after)
        for n in self.sizes:
            gram = tuple(text[-n:])
            if found := row.grams.get(gram, 0) or self.indices[seat.active].get(gram, 0):
                return found
        return 0

    def note(self, grams: Grams, text: Sequence[int], first: int, after: int) -> None:
        """Note the n-grams that end before the position `after`. first: position of the text's first token."""
        for n in self.sizes:
            if after - first >= n:
                grams[tuple(text[after - first - n : after - first])] = after


def sound(draft: Draft, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Return a draft's tokens. Raises ValueError if its logits hold nan or infinity."""
    if not math.isfinite(float(logprobs.sum())):
        raise ValueError(f"the draft, {draft.name}: its logits are not finite: choose another, or pass --dtype float32")
    return tokens


class LayersDraft(Draft):
    """The target's first layers with its own norm and head (early exit: LayerSkip, arXiv 2404.16710). They use
    the target's cache: verification overwrites their keys and values."""

    step: Step
    chain: Contexts

    def __init__(self, layers: int) -> None:
        self.name, self.layers = f"layers:{layers}", layers

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.step, mine.chain = rows.network(rows.model, self.layers), rows.contexts
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        tokens, logprobs = [rows.token], []
        for ahead in range(k):
            where = rows.input_pos + ahead
            inputs = StepInput(tokens[-1], where, rows.samples, rows.seeds)
            logits, _ = self.step(inputs, self.chain.cache)  # [C,1,V]
            token, logprob = rows.draw(logits[..., : rows.model.args.vocab_size], where + 1)
            tokens.append(token)
            logprobs.append(logprob)
        return sound(self, torch.cat(tokens[1:], 1), torch.cat(logprobs, 1))


class PaddedEmbedding(Embedding):
    """Embedding whose table is continued by zeros."""

    def __init__(self, weight: Tensor) -> None:
        torch.nn.Module.__init__(self)
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up tokens [N,S] -> [N,S,dim]."""
        foreign = tokens >= len(self.weight)
        return F.embedding(tokens.masked_fill(foreign, 0), self.weight).masked_fill(foreign[..., None], 0)


class ModelDraft(LayersDraft):
    """A second model of the same vocabulary, with its own chain of caches over the same context. Its embedding may have
    more or fewer rows than the target's: the surplus rows are padding."""

    PART = 32  # positions to catch up at a time
    runner: ModelRunner

    def __init__(
        self, args: ModelArgs, load: Callable[..., Transformer], weights: int = 0, token_bytes: int = 0
    ) -> None:
        """load: device, dtype, rows -> the model. weights, token_bytes: as in Draft, as far as known before loading."""
        self.name, self.layers, self.args, self.load = "model", args.n_layer, args, load
        self.weights, self.token_bytes = weights, token_bytes

    def place(self, runner: ModelRunner, rows: int) -> None:
        model = self.load(runner.device, runner.dtype, rows)
        if self.args.vocab_size < runner.args.vocab_size:  # tokens that only the target has embed as 0
            model.tok_embeddings = PaddedEmbedding(model.tok_embeddings.weight)
        self.runner = ModelRunner(model)
        self.weights = self.runner.weights.total
        self.token_bytes = self.args.kv_values_per_token * runner.dtype.itemsize

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine, target = copy(self), rows.contexts
        request = Request(prefill_chunk=target.chunk)
        mine.chain = Contexts(self.runner, target.sizes, request)
        mine.step = rows.network(self.runner.model)
        rows.tables.append(mine.chain)
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        self.catch_up(rows)
        return super().propose(rows, k)

    def catch_up(self, rows: SpeculativeDecoder) -> None:
        """Run the positions that the target alone has run."""
        own = [[0] if seat is None else seat.row.sample.tokens for seat in rows.seats]
        for behind in range(rows.behind, 0, -self.PART):
            ahead = [range(behind, max(0, behind - self.PART), -1)] * len(own)  # tokens before each row's last
            tokens = [
                [text[max(0, len(text) - 1 - back)] for back in each] for text, each in zip(own, ahead, strict=True)
            ]
            where = rows.input_pos - rows.arange(behind, max(0, behind - self.PART), -1)  # [C,PART]
            where = where.maximum(self.chain.cache.start[:, None])
            self.runner.model.hidden(torch.tensor(tokens, device=where.device), where, self.chain.cache)


class MedusaDraft(Draft):
    """Medusa heads on the last layer's output (Cai et al. 2024, arXiv 2401.10774): head i proposes the token i + 2
    positions after the one that was run. `tokens` in the file: token ids of the heads' logits; without it: all."""

    name = "medusa"

    def __init__(self, path: Path, args: ModelArgs) -> None:
        """Map a medusa_lm_head.pt. Raises FileNotFoundError, or ValueError if its shapes do not fit the network."""
        if not path.exists():
            raise FileNotFoundError(f"no file at {path}: pass a medusa_lm_head.pt")
        state: Any = unpickle(path)
        parts = ("0.linear.weight", "0.linear.bias", "1.weight")
        dim, ids = args.dim, state.get("tokens") if isinstance(state, dict) else None
        shapes = [(dim, dim), (dim,), (args.vocab_size if ids is None else len(ids), dim)]
        try:
            self.longest = sum(name.endswith(parts[-1]) for name in state)
            self.heads = [[state[f"{head}.{part}"] for part in parts] for head in range(self.longest)]
            fits = self.longest and all([tuple(t.shape) for t in head] == shapes for head in self.heads)
        except (KeyError, TypeError, AttributeError):
            fits = False
        if not fits or (ids is not None and not 0 <= int(ids.min()) <= int(ids.max()) < args.vocab_size):
            raise ValueError(f"{path} does not hold Medusa heads of dim {dim} for {args.vocab_size} tokens")
        self.ids = ids
        self.weights = sum(tensor.nbytes for head in self.heads for tensor in head)

    def place(self, runner: ModelRunner, rows: int) -> None:
        self.heads = [[tensor.to(runner.device, runner.dtype) for tensor in head] for head in self.heads]
        self.ids = None if self.ids is None else self.ids.to(runner.device)

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        if rows.hidden is None:  # after prefill or a plain step: this step computes it
            return rows.token.expand(-1, k)
        x = rows.model.norm(rows.hidden)  # [C,1,dim]
        heads = (F.linear(x + F.silu(F.linear(x, *block)), output) for *block, output in self.heads[:k])
        where = rows.input_pos + rows.arange(1, k + 1)
        return sound(self, *rows.draw(torch.cat(list(heads), 1), where, names=self.ids))


def check_vocabulary(draft: Checkpoint, target: Checkpoint) -> None:
    """Raise ValueError naming the first token in which the two vocabularies differ."""
    if draft.folder.resolve() == target.folder.resolve():
        return
    ours, theirs = load_tokenizer(target.folder), load_tokenizer(draft.folder)
    begun = [each.encode("a")[-1:] for each in (ours, theirs)]  # a text's first token may lose its leading space
    names = [{id: name for name, id in each.specials.items()} for each in (ours, theirs)]
    for id in range(max(ours.vocab_size, theirs.vocab_size)):
        texts = [
            (each.decode([*before, id]), name.get(id)) if id < each.vocab_size else None
            for each, before, name in zip((ours, theirs), begun, names, strict=True)
        ]
        if texts[0] != texts[1]:
            raise ValueError(
                f"the draft's vocabulary is not the target's: token {id} differs: choose a draft with the same"
            )


def choose_draft(
    names: Sequence[str],
    path: str | None,
    k: str | None,
    target: Checkpoint,
    place: tuple[torch.device, torch.dtype, int],
) -> Speculation | None:
    """Resolve --draft, --draft_checkpoint_path and --speculate_k from metadata alone; None: plain decoding. place:
    device, dtype and rows. Raises ValueError or FileNotFoundError if the flags are invalid or do not fit the target."""
    kind, _, count = "".join(names[:1]).partition(":")
    if k not in (None, "auto") and not k.lstrip("-").isdecimal():
        raise ValueError(f"speculate_k {k!r} is not a number: pass a whole number of at least 1, or auto")
    if names and path:
        raise ValueError("--draft and --draft_checkpoint_path are both given: pass one of them")
    if not (names or path):
        if k is not None:
            raise ValueError("--speculate_k needs --draft or --draft_checkpoint_path")
        return None
    draft: Draft
    if path:
        checkpoint = read_checkpoint(locate(path))
        check_vocabulary(checkpoint, target)
        weights = sum(weight_sizes(checkpoint, *place).values())
        token_bytes = checkpoint.args.kv_values_per_token * place[1].itemsize
        draft = ModelDraft(checkpoint.args, partial(load_joined, checkpoint), weights, token_bytes)
    elif kind == "layers" and len(names) == 1 and count.isdecimal() and 1 <= int(count) < target.args.n_layer:
        draft = LayersDraft(int(count))
    elif kind == "medusa" and len(names) == 2:
        draft = MedusaDraft(Path(names[1]), target.args)
    elif list(names) == ["prompt"]:
        draft = PromptDraft()
    else:
        most = target.args.n_layer - 1
        raise ValueError(f"--draft {' '.join(names)}: pass prompt, layers:K with K from 1 to {most}, or medusa PATH")
    return Speculation(draft, None if k == "auto" else min(DEFAULT_K, draft.longest) if k is None else int(k))
