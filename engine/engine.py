"""Generation engine: prefill the prompt once, fork its KV cache into N rows, decode, retire finished rows.

    engine = Engine.open("checkpoints/tiny")
    samples = engine.generate(engine.encode("Once upon a time"), Request(num_samples=8))

The prompt is prefilled as one row. Each forked row stores only the keys and values that it decodes, and every decode
step reads the prompt's keys and values once for all rows. Nothing is printed here.
Shapes: N rows, S positions, k tokens per row and step (at most), T context length, L slots, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor

from cache import KVCache, Prefill
from engine.graphs import RecordedStep, Step, StepInput, compiled
from engine.layouts import LAYOUTS, Int8Context
from engine.plan import (
    Plan,
    WeightSizes,
    available_memory,
    choose_device,
    choose_dtype,
    extends_context,
    plan_run,
    weigh,
)
from engine.request import Request, Sampling, Workload, as_tokens, check_tokens, new_seed
from engine.samples import Piece, Row, Sample, StopConditions
from engine.scoring import Scored, Scorer
from layers import kernels
from layers.linear import hold_linears
from layers.moe import can_capture_graph
from loading.checkpoint import load_model, read_checkpoint
from loading.hub import locate
from loading.tokenizer import Tokenizer, load_tokenizer
from model import ModelArgs, Transformer
from sampling import UniformBlocks, add, draw, seen_in, uniform
from tp import WHOLE, Shard

# Decode steps between syncs to the host, each of which waits for the device.
SYNC_EVERY = {"cpu": 1, "cuda": 8}

# Output of one decode step: tokens [N,k], log-probabilities [N,k], number of valid leading tokens [N].
StepOutput = tuple[Tensor, Tensor, Tensor]


class Monitor:
    """Callbacks for a run; override the ones you need."""

    def prefilling(self, tokens: int, total: int) -> None:
        """Called after each prefill chunk: `tokens` of the prompt's `total` are prefilled."""

    def prefilled(self) -> None:
        """Called when the whole prompt is prefilled."""

    def wave(self, rows: Sequence[Row]) -> None:
        """Called when the cache of a wave of `rows` is ready to decode."""

    def stepped(self, steps: int, tokens: int) -> None:
        """Called after `steps` more decode steps, which sampled `tokens` tokens for unfinished samples. steps is 0 for
        a wave's first tokens, which are sampled from the prompt's logits."""

    def done(self, sample: Sample) -> None:
        """Called when a sample is finished."""


SILENT = Monitor()


class Engine:
    """A model ready to generate, with its tokenizer, end tokens, memory budget and compiled steps.

    compile: whether to compile the decode step; None: if a request's plan expects it to pay off. shard: the part of the
    network that `model` holds. plan: source of the weight sizes and of the available memory, weights included; None:
    measure both. compile_prefill: also compile the forward pass that prefills.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        compile: bool | None = None,
        shard: Shard = WHOLE,
        plan: Plan | None = None,
        compile_prefill: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.compile, self.shard = model, tokenizer, compile, shard
        weight = model.norm.weight
        self.args, self.device, self.dtype = shard.local(model.args), weight.device, weight.dtype
        # A model trained on texts that only BOS separates ends a text by generating BOS.
        ends = [] if tokenizer is None else [*tokenizer.eos_ids, tokenizer.bos_id]
        self.eos_ids = frozenset(id for id in ends if id is not None)
        hold_linears(model)
        self.weighed = plan is not None
        self.weights = weigh(model) if plan is None else plan.weights
        self.available = available_memory(self.device) + self.weights.total if plan is None else plan.available
        self.packed = False
        self.hidden = torch.compile(model.hidden, dynamic=True) if compile_prefill else model.hidden
        self.draw = partial(draw, numbers=kernels.token_uniforms)
        self.compiled: Step | None = None
        self.decoder: Decoder | None = None  # None: plain decoding

    @classmethod
    def open(cls, path: Path | str, device: str = "auto", dtype: str = "auto", compile: bool | None = None) -> Self:
        """Load a checkpoint (a folder, the model.pth in one, or OWNER/NAME on the Hugging Face Hub) and its tokenizer.
        device, dtype: as the command-line flags.

        Raises FileNotFoundError or ValueError if they cannot be read (loading/checkpoint.py, loading/tokenizer.py).
        """
        checkpoint, place = read_checkpoint(locate(path)), choose_device(device)
        model = load_model(checkpoint, place, choose_dtype(dtype, place))
        engine = cls(model, load_tokenizer(checkpoint.folder), compile)
        engine.eos_ids |= checkpoint.eos_ids
        return engine

    def encode(self, text: str) -> list[int]:
        """Encode a text that starts a context: with BOS, if the tokenizer has one."""
        assert self.tokenizer is not None, "text needs a tokenizer"
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Return a prompt, a text or token ids, as token ids. Raises ValueError if it is neither."""
        return self.encode(prompt) if isinstance(prompt, str) else as_tokens(prompt)

    def seeded(self, request: Request) -> Request:
        """Return the request with a random seed if it has none; the seed is the same on all ranks of the network."""
        if request.seed is not None:
            return request
        return replace(request, seed=int(self.shard.broadcast(torch.tensor([new_seed()], device=self.device))))

    def use(self, decoder: "Decoder", rows: int) -> None:
        """Decode with a draft from now on, in steps of `rows` rows."""
        decoder.place(self, rows)
        self.decoder = decoder
        if not self.weighed:
            self.weights = decoder.heavier(self.weights)

    def plan(self, context: int, request: Request, runs: int = 1) -> Plan:
        """Plan a request for a prompt of `context` tokens. runs: how often it will run, to decide whether compiling and
        packing pay off. Raises ValueError if not even one sample fits into memory."""
        work = request.workload(context, runs)
        work = work if self.decoder is None else self.decoder.widen(work, self.args)
        return self.plan_workload(work)

    def plan_workload(self, work: Workload) -> Plan:
        """Plan a workload of any number of rows and runs."""
        return plan_run(self.args, self.weights, work, self.device, self.dtype, self.available, self.compile)

    def prepare(self, plan: Plan) -> None:
        """Pack the weights and compile the decode step, if the plan says so and it is not done yet."""
        if plan.packed and not self.packed:
            hold_linears(self.model, pack=True, tied_output=plan.packed_tied > 0)
            self.packed, self.weights = True, self.weights.with_packed(plan.packed_tied)
        if plan.compiled and self.compiled is None:
            self.compiled = compiled(partial(decode, self.model, uniform))

    def step(self, sampling: Sampling, plan: Plan) -> Step:
        """Return a decode step, sampling included: (inputs, cache) -> tokens [N], log-probabilities [N]."""
        on_cuda = self.device.type == "cuda"
        eager = partial(decode, self.model, uniform if on_cuda else UniformBlocks())
        network = self.compiled if plan.compiled and self.compiled is not None else eager

        def step(inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
            return self.draw(*network(inputs, cache), sampling, inputs.seen)

        return RecordedStep(step) if on_cuda and can_capture_graph(self.model) else step

    @torch.no_grad()
    def prefill(self, cache: KVCache, tokens: Sequence[int], chunk: int, monitor: Monitor) -> Tensor:
        """Prefill `tokens` into the last len(tokens) slots of a one-row cache, `chunk` at a time -> logits [1,V]."""
        scaling = self.args.rope_scaling
        if scaling is not None and scaling.by_length:
            chunk = len(tokens)  # the rotation depends on the length of the whole prompt
        begin = cache.slots - len(tokens)
        for first in range(0, len(tokens), chunk):
            part = torch.tensor([tokens[first : first + chunk]], device=self.device)  # [1,S]
            slots = begin + first + torch.arange(part.shape[1], device=self.device)
            hidden = self.hidden(part, cache.start[:, None] + slots, Prefill(cache, begin + first, part.shape[1]))
            monitor.prefilling(first + part.shape[1], len(tokens))
        logits = self.model.logits(hidden[:, -1:])[:, -1]
        monitor.prefilled()
        return logits

    def generate(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> list[Sample]:
        """Generate request.num_samples continuations of the prompt, a text or token ids, ordered by index; `rank` sorts
        them best first. plan: from `Engine.plan`, if already made. Raises ValueError, before any kernel runs, if the
        request does not fit the model or the memory."""
        run = Run(self, request, self.tokens(prompt), monitor, plan=plan)
        deque(run.pieces(), maxlen=0)
        return run.samples

    def stream(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> Generator[Piece]:
        """Like `generate`, but yield the text in pieces as it comes. Text that may begin a stop string is held back."""
        return Run(self, request, self.tokens(prompt), monitor, plan=plan).pieces(live=True)

    def score(self, context: str | Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Compute the log-probabilities of each continuation's tokens. The context, a text or token ids, is prefilled
        once. Raises ValueError if it or a continuation is empty, or a token is not in the vocabulary."""
        begun = self.tokens(context)
        return Scorer(self.model, args=self.args).score([(begun, as_tokens(each)) for each in continuations])


def decode(
    model: Transformer, numbers: Callable[..., Tensor], inputs: StepInput, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """Run a decode step up to its logits [N,V]; also return each row's random number [N]. numbers: as `uniform`."""
    logits = model(inputs.tokens, inputs.input_pos, cache)[:, -1]
    return logits, numbers(inputs.seed, inputs.samples, inputs.input_pos[:, -1] + 1)


def bucket(slots: int) -> int:
    """Round `slots` up, by at most 63 or a quarter, so that steps see few different lengths."""
    size = 1 << max(6, (slots - 1).bit_length() - 3)
    return -(-slots // size) * size


class PlainDecoder:
    """Autoregressive decoding: one token per row per step. width: the most tokens per row that a step yields, k. All
    ranks of a sharded network get the same tokens."""

    width = 1

    def __init__(self, run: "Run", cache: KVCache, samples: Tensor) -> None:
        """samples [N]: the sample index of each row."""
        self.cache, self.samples, self.sampling = cache, samples, run.request.sampling
        self.shard = run.engine.shard
        self.seed, self.one = torch.tensor(run.request.seed, device=samples.device), torch.ones_like(samples)
        self.seen = seen_in(run.history, samples, self.sampling.repetition_penalty, run.engine.args.vocab_size)
        self.engine, self.step = run.engine, run.engine.step(self.sampling, run.plan)

    def first(self, logits: Tensor, position: int) -> StepOutput:
        """Sample the token at `position` for every row, from the logits [1,V] of the position before it."""
        numbers = uniform(self.seed, self.samples, torch.full_like(self.samples, position))
        token, logprob = self.engine.draw(logits.expand(len(self.samples), -1), numbers, self.sampling, self.seen)
        return self.shard.broadcast(token)[:, None], logprob[:, None], self.one

    def next(self, token: Tensor, input_pos: Tensor) -> StepOutput:
        """Run one decode step. token [N,1]: the last one of each row, not yet run, at input_pos [N,1]."""
        inputs = StepInput(token, input_pos, self.samples, self.seed, add(self.seen, token))
        drawn, logprob = self.step(inputs, self.cache)
        return self.shard.broadcast(drawn)[:, None], logprob[:, None], self.one

    def move(self, cache: KVCache) -> None:
        """Continue in another cache of the same rows."""
        self.cache = cache

    def keep(self, rows: Sequence[int]) -> None:
        """Compact to the given rows."""
        self.cache.keep(rows)
        self.samples, self.one, self.seen = self.samples[rows], self.one[rows], self.seen[rows]


class Decoder(Protocol):
    """Factory of each wave's decoder. `place`: load it for an engine, for steps of `rows` rows. `widen`, `heavier`: add
    to a workload, and to the weights, what it needs beyond plain decoding. `widen` raises ValueError if it cannot
    decode for a network of these args."""

    width: int

    def place(self, engine: Engine, rows: int) -> None: ...

    def heavier(self, weights: WeightSizes) -> WeightSizes: ...

    def __call__(self, run: "Run", cache: KVCache, samples: Tensor) -> PlainDecoder: ...

    def widen(self, work: Workload, args: ModelArgs) -> Workload: ...


class Run:
    """Generation of one request's samples from one context, in waves of rows that decode together."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        history: Sequence[int],
        monitor: Monitor = SILENT,
        alone: bool = False,
        plan: Plan | None = None,
    ) -> None:
        """history: the tokens of the context. alone: detokenise a sample, and search it for stop strings, by itself
        instead of as a continuation of the history. plan: None: the engine makes one. Raises ValueError as
        `Engine.generate`."""
        request.check_length(engine.args.context_limit, len(history))
        self.ending = StopConditions.of(request, engine.eos_ids, engine.tokenizer)
        self.engine, self.request = engine, engine.seeded(request)
        self.history, self.monitor = history, monitor
        self.text_after = () if alone else history
        check_tokens(history, engine.args.vocab_size)
        self.plan = engine.plan(len(history), request) if plan is None else plan
        engine.prepare(self.plan)
        self.rows_at_once = min(request.num_samples, request.rows_at_once or self.plan.rows_at_once)
        self.extends = extends_context(engine.args, self.plan.workload, engine.device, engine.dtype, self.rows_at_once)
        self.decoder = engine.decoder or PlainDecoder
        self.own_slots = request.max_new_tokens + self.decoder.width - 1
        self.begin = len(history)  # position of the first generated token
        self.live = False
        self.kept: dict[int, KVCache] | None = None
        self.samples: list[Sample] = []

    def pieces(self, live: bool = False) -> Generator[Piece]:
        """Prefill the prompt, then `draw`."""
        engine, reserve = self.engine, self.begin + self.own_slots if self.extends else 0
        context = KVCache.empty(engine.args.kv_shape, 1, self.begin, engine.model.norm.weight, reserve)
        logits = engine.prefill(context, self.history, self.request.prefill_chunk, self.monitor)
        yield from self.draw(context, logits, live)

    @torch.no_grad()
    def draw(
        self, context: KVCache, logits: Tensor, live: bool = False, kept: dict[int, KVCache] | None = None
    ) -> Iterator[Piece]:
        """Generate all samples into `samples`, wave by wave. logits [1,V]: at the context's last token. live: yield
        pieces of text. kept: filled with the keys and values of each finished sample, by its index."""
        self.live, self.kept = live, kept
        context = Int8Context(context) if self.request.kv_dtype == "int8" else context
        while len(self.samples) < self.request.num_samples:  # rows are made wave by wave: there may be many
            last = min(self.request.num_samples, len(self.samples) + self.rows_at_once)
            first = self.request.first_index
            rows = [
                Row(number, self.ending, self.engine.tokenizer, self.text_after, self.live, self.request.seed)
                for number in range(first + len(self.samples), first + last)
            ]
            yield from self.decode(context, logits, rows)
            self.samples += [row.sample for row in rows]

    def decode(self, context: KVCache, logits: Tensor, rows: list[Row]) -> Iterator[Piece]:
        """Decode one wave until every row is finished. logits [1,V]: at the context's last token."""
        device, limit = logits.device, self.request.max_new_tokens
        # 1. Allocate the cache at its planned length; a step reads a bucket of it.
        cache = context if self.extends else LAYOUTS[self.request.attention](context, len(rows), 0, self.own_slots)
        base = self.begin - int(cache.start[0])  # slots before the first generated token
        samples = torch.tensor([row.sample.index for row in rows], device=device)
        decoding = self.decoder(self, cache, samples)
        # 2. Sample the first token of every row from the prompt's logits.
        self.monitor.wave(rows)
        pending = [decoding.first(logits, self.begin)]
        token = pending[0][0]
        input_pos = torch.full((len(rows), 1), self.begin, device=device)
        steps, ahead = 0, 1  # `ahead`: upper bound of a row's tokens
        while True:
            # 3. Sync to the host; retire finished rows, and compact once half have finished. The first step is synced
            # alone, since it may compile.
            crosses = self.crosses(self.begin + ahead - 1)
            if crosses or len(pending) == SYNC_EVERY[device.type] or steps < 2 or ahead >= limit:
                yield from self.collect(rows, pending, cache, steps > 0)
                pending = []
                kept = rows_to_keep([row.sample.finish_reason is None for row in rows])
                if not kept:
                    break
                if len(kept) < len(rows):
                    rows = [rows[row] for row in kept]
                    decoding.keep(kept)
                    token, input_pos = token[kept], input_pos[kept]
                ahead = max(len(row.sample.tokens) for row in rows)
                if crosses:
                    cache = self.recompute_cache(rows, ahead)
                    decoding.move(cache)
            # 4. Run a step over the slots that it may write and those before them.
            cache.resize(base + min(self.own_slots, bucket(ahead - 1 + decoding.width)))
            # Clamp: a finished row may already be past the visible slots.
            pending.append(decoding.next(token, input_pos.clamp_max(self.begin + ahead - 1)))
            steps, ahead = steps + 1, ahead + decoding.width
            # 5. Advance each row by its number of valid tokens.
            tokens, _, count = pending[-1]
            token, input_pos = tokens.gather(1, count[:, None] - 1), input_pos + count[:, None]

    def crosses(self, position: int) -> bool:
        """Return whether the step at `position` changes the rotation of all earlier keys (RopeScaling.crosses)."""
        scaling = self.engine.args.rope_scaling
        return scaling is not None and scaling.crosses(position, position + 1)

    def recompute_cache(self, rows: Sequence[Row], own: int) -> KVCache:
        """Recompute the cache of rows that have generated `own` tokens, or are finished, at their present length. The
        context is prefilled together with one row's tokens, to reach that length, and then serves all rows."""
        engine, chunk = self.engine, self.request.prefill_chunk
        live = [(index, row.sample.tokens) for index, row in enumerate(rows) if row.sample.finish_reason is None]
        reserve = self.begin + self.own_slots if self.extends else 0
        context = KVCache.empty(engine.args.kv_shape, 1, self.begin + own, engine.model.norm.weight, reserve)
        engine.prefill(context, [*self.history, *live[0][1]], chunk, SILENT)
        if self.extends:
            return context
        context.resize(self.begin)
        context = Int8Context(context) if self.request.kv_dtype == "int8" else context
        cache = LAYOUTS[self.request.attention](context, len(rows), own, self.own_slots)
        for index, tokens in live:
            one = KVCache.fork(context, 1, own)
            engine.prefill(one, tokens, chunk, SILENT)
            for mine, theirs in zip(cache.tensors, one.tensors, strict=True):
                mine[index, :, -own:] = theirs[0]
        return cache

    def collect(
        self, rows: Sequence[Row], pending: Sequence[StepOutput], cache: KVCache, stepped: bool
    ) -> Iterator[Piece]:
        """Sync recent tokens to the host; finish rows at EOS, a stop string or the maximum length."""
        # Tokens and logprobs [N][steps][k], counts [N][steps].
        parts = [torch.stack(part, 1).tolist() for part in zip(*pending, strict=True)]
        count_before = sum(len(row.sample.tokens) for row in rows)
        for index, (row, *new) in enumerate(zip(rows, *parts, strict=True)):
            before = len(row.sample.tokens)
            if row.sample.finish_reason is not None:
                continue
            for tokens, logprobs, count in zip(*new, strict=True):
                for token, logprob in zip(tokens[:count], logprobs[:count], strict=True):
                    if row.sample.finish_reason is None:
                        row.record(token, logprob)
            if row.sample.finish_reason is not None:
                if self.kept is not None:
                    self.kept[row.sample.index] = cache.row(index, self.begin, len(row.sample.tokens) - 1)
                self.monitor.done(row.sample)
            if self.live:
                yield row.piece(before)
        drawn = sum(len(row.sample.tokens) for row in rows) - count_before
        self.monitor.stepped(len(pending) if stepped else 0, drawn)


def rows_to_keep(live: Sequence[bool]) -> list[int]:
    """Return the rows to keep: all until half have finished, then the live ones, padded to a power of two.

    Never fewer than two of several, since the compiled step for many rows does not run one. Empty if none is live.
    """
    alive = sum(live)
    size = max(2, 1 << (alive - 1).bit_length())
    if alive == 0:
        return []
    if 2 * alive > len(live) or size >= len(live):
        return list(range(len(live)))
    finished = [row for row, is_live in enumerate(live) if not is_live]
    return sorted([row for row, is_live in enumerate(live) if is_live] + finished[: size - alive])
