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
from engine.engine import SILENT, Engine, PlainDecoder, Run, StepOutput
from engine.graphs import RecordedStep, Step, StepInput, compiled
from engine.plan import WeightSizes, Workload
from loading.checkpoint import Checkpoint, load_model, read_checkpoint, unpickle, weight_sizes
from loading.hub import locate
from loading.tokenizer import load_tokenizer
from model import ModelArgs, Transformer
from sampling import NOTHING, UniformBlocks, seen_prefixes
from tp import WHOLE, VocabularyEmbedding

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


class PromptDraft(Draft):
    """Prompt look-up (Saxena 2023): proposes what followed the latest earlier occurrence of a row's last n-gram, in its
    own text or in the context. The index of the context is built once per run."""

    name, sizes = "prompt", (3, 2)  # n-gram lengths, in order of look-up
    context: Tensor
    vocabulary: int
    index: dict[int, tuple[Tensor, Tensor]]
    source: Tensor
    end: Tensor

    def read(self, run: Run) -> Self:
        mine = copy(self)
        mine.vocabulary = run.engine.args.vocab_size
        mine.context = torch.tensor(run.history, device=run.engine.device)  # [T]
        mine.index = {n: mine.keys(mine.context, n).sort(stable=True) for n in self.sizes if n <= len(mine.context)}
        return mine

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.source = mine.end = torch.zeros_like(rows.samples)[:, None]  # [N,1]
        return mine

    def keys(self, tokens: Tensor, n: int) -> Tensor:
        """Encode each n-gram as one integer: [...,L] -> [...,L-n+1]. Three tokens of 2^20 each fit into 63 bits."""
        windows = tokens.unfold(-1, n, 1)  # [...,L-n+1,n]
        return (windows * self.vocabulary ** torch.arange(n, device=tokens.device)).sum(-1)

    def tokens(self, rows: SpeculativeDecoder, where: Tensor) -> Tensor:
        """Return the tokens of each row at its positions `where` [N,S]."""
        T = len(self.context)
        own = rows.text.gather(1, (where - T).clamp_min(0))
        return torch.where(where < T, self.context[where.clamp(0, T - 1)], own)

    def followed(self, rows: SpeculativeDecoder, n: int, end: Tensor) -> Tensor:
        """Return the position [N,1] after the latest n-gram equal to the n tokens before `end`; 0: there is none."""
        context, key = self.context, self.keys(self.tokens(rows, end - rows.arange(n, 0, -1)), n)  # [N,1]
        before = context[len(context) - min(len(context), n - 1) :]  # an n-gram may begin in the context
        text = torch.cat([before.expand(len(end), -1), rows.text[:, : rows.view]], 1)
        keys = self.keys(text, n)
        after = len(context) - len(before) + n + rows.arange(keys.shape[1])
        own = torch.where((keys == key) & (after < end), after, 0).amax(1, keepdim=True)
        if n not in self.index:
            return own
        ordered, places = self.index[n]
        at = (torch.searchsorted(ordered, key, right=True) - 1).clamp_min(0)  # the last of equal keys
        return torch.where((own == 0) & (ordered[at] == key), places[at] + n, own)

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        end = rows.input_pos + 1  # [N,1]
        moved, self.end = self.source + end - self.end, end  # continue the last match while it agrees
        last = rows.arange(1, 3)
        agrees = (self.tokens(rows, moved - last) == self.tokens(rows, end - last)).all(1, keepdim=True)
        self.source = torch.where(agrees & (self.source > 0), moved, 0)
        for n in self.sizes:
            if (self.source == 0).any() and n <= len(self.context) + 1:
                self.source = torch.where(self.source == 0, self.followed(rows, n, end), self.source)
        if not self.source.any():
            return None
        found = torch.where(self.source == 0, end - 1, self.source)
        return self.tokens(rows, found + rows.arange(k) % (end - found))  # a match shorter than k repeats

    def keep(self, rows: Sequence[int]) -> None:
        self.source, self.end = self.source[rows], self.end[rows]


def sound(draft: Draft, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """Return a draft's tokens. Raises ValueError if its logits hold nan or infinity."""
    if not math.isfinite(float(logprobs.sum())):
        raise ValueError(f"the draft, {draft.name}: its logits are not finite: give another, or --dtype float32")
    return tokens


class LayersDraft(Draft):
    """The target's first layers with its own norm and head (early exit: LayerSkip, arXiv 2404.16710). They use
    the target's cache: verification overwrites their keys and values."""

    step: Step
    cache: KVCache

    def __init__(self, layers: int) -> None:
        self.name, self.layers = f"layers:{layers}", layers

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine = copy(self)
        mine.step, mine.cache = rows.network(rows.model, self.layers), rows.cache
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        tokens, logprobs = [rows.token], []
        for ahead in range(k):
            where = rows.input_pos + ahead
            logits, _ = self.step(StepInput(tokens[-1], where, rows.samples, rows.seed), self.cache)  # [N,1,V]
            token, logprob = rows.draw(logits[..., : rows.model.args.vocab_size], where + 1)
            tokens.append(token)
            logprobs.append(logprob)
        return sound(self, torch.cat(tokens[1:], 1), torch.cat(logprobs, 1))


class ModelDraft(LayersDraft):
    """A second model of the same vocabulary, with its own chain of caches over the same context. Its embedding may have
    more or fewer rows than the target's: the surplus rows are padding."""

    PART = 32  # positions to catch up at a time
    engine: Engine
    context: KVCache
    base: int  # slots before the rows' own

    def __init__(
        self, args: ModelArgs, load: Callable[..., Transformer], weights: int = 0, token_bytes: int = 0
    ) -> None:
        """load: device, dtype, rows -> the model. weights, token_bytes: as in Draft, as far as known before loading."""
        self.name, self.layers, self.args, self.load = "model", args.n_layer, args, load
        self.weights, self.token_bytes = weights, token_bytes

    def place(self, engine: Engine, rows: int) -> None:
        model = self.load(engine.device, engine.dtype, rows)
        if self.args.vocab_size < engine.args.vocab_size:  # tokens that only the target has embed as 0
            model.tok_embeddings = VocabularyEmbedding(model.tok_embeddings.weight, 0, WHOLE)
        self.engine = Engine(model)
        self.weights = self.engine.weights.total
        self.token_bytes = self.args.kv_values_per_token * engine.dtype.itemsize

    def read(self, run: Run) -> Self:
        mine, like = copy(self), self.engine.model.norm.weight
        T = len(run.history)
        mine.context = KVCache.empty(self.args.kv_shape, 1, T, like, T + run.own_slots if run.extends else 0)
        self.engine.prefill(mine.context, run.history, run.request.prefill_chunk, SILENT)
        return mine

    def begin(self, rows: SpeculativeDecoder) -> Self:
        mine, run = copy(self), rows.run
        self.context.resize(run.begin)  # drop what an earlier one-row wave wrote
        mine.cache = self.context if run.extends else KVCache.fork(self.context, len(rows.samples), 0, run.own_slots)
        mine.base = mine.cache.slots
        mine.step = rows.network(self.engine.model)
        return mine

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        self.cache.resize(self.base + rows.view)
        for behind in range(rows.behind, 0, -self.PART):  # positions run by the target alone
            where = rows.input_pos - rows.arange(behind, max(0, behind - self.PART), -1)
            where = where.clamp_min(rows.run.begin)  # [N,PART]
            self.engine.model.hidden(rows.text.gather(1, where - rows.run.begin), where, self.cache)
        return super().propose(rows, k)

    def keep(self, rows: Sequence[int]) -> None:
        self.cache.keep(rows)


class MedusaDraft(Draft):
    """Medusa heads on the last layer's output (Cai et al. 2024, arXiv 2401.10774): head i proposes the token i + 2
    positions after the one that was run. `tokens` in the file: token ids of the heads' logits; without it: all."""

    name = "medusa"

    def __init__(self, path: Path, args: ModelArgs) -> None:
        """Map a medusa_lm_head.pt. Raises FileNotFoundError, or ValueError if its shapes do not fit the network."""
        if not path.exists():
            raise FileNotFoundError(f"no file at {path}: give a medusa_lm_head.pt")
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

    def place(self, engine: Engine, rows: int) -> None:
        self.heads = [[tensor.to(engine.device, engine.dtype) for tensor in head] for head in self.heads]
        self.ids = None if self.ids is None else self.ids.to(engine.device)

    def propose(self, rows: SpeculativeDecoder, k: int) -> Tensor | None:
        if rows.hidden is None:  # after prefill or a plain step: this step computes it
            return rows.token.expand(-1, k)
        x = rows.model.norm(rows.hidden)  # [N,1,dim]
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
                f"the draft's vocabulary is not the target's: token {id} differs, give a draft of the same one"
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
        raise ValueError(f"speculate_k {k!r} is not a number: give one of at least 1, or auto")
    if names and path:
        raise ValueError("--draft and --draft_checkpoint_path are both given: give one")
    if not (names or path):
        if k is not None:
            raise ValueError("--speculate_k is for a draft: add --draft or --draft_checkpoint_path")
        return None
    draft: Draft
    if path:
        checkpoint = read_checkpoint(locate(path))
        check_vocabulary(checkpoint, target)
        weights = sum(weight_sizes(checkpoint, *place).values())
        token_bytes = checkpoint.args.kv_values_per_token * place[1].itemsize
        draft = ModelDraft(checkpoint.args, partial(load_model, checkpoint), weights, token_bytes)
    elif kind == "layers" and len(names) == 1 and count.isdecimal() and 1 <= int(count) < target.args.n_layer:
        draft = LayersDraft(int(count))
    elif kind == "medusa" and len(names) == 2:
        draft = MedusaDraft(Path(names[1]), target.args)
    elif list(names) == ["prompt"]:
        draft = PromptDraft()
    else:
        most = target.args.n_layer - 1
        raise ValueError(f"--draft {' '.join(names)}: give prompt, layers:K with K from 1 to {most}, or medusa PATH")
    return Speculation(draft, None if k == "auto" else min(DEFAULT_K, draft.longest) if k is None else int(k))
