"""The road from a prompt to samples: prefill -> fork -> decode -> retire.

    engine = Engine.open("checkpoints/tiny")
    samples = engine.generate(engine.encode("Once upon a time"), Request(num_samples=8))

The prompt is read once, at one row, into a key/value cache; that cache is forked into N rows, which hold only what they
decode; every decode step reads the prompt's keys and values once for all rows. Nothing is printed here.
Shapes: N rows, S positions, k tokens that a step may give a row, T context length, L slots, V vocabulary.
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
from engine.samples import Ending, Piece, Row, Sample
from engine.scoring import Scored, Scorer
from layers import kernels
from layers.linear import pack_linears, stream_linears
from layers.moe import is_recordable
from loading.checkpoint import load_model, read_checkpoint
from loading.hub import locate
from loading.tokenizer import Tokenizer, load_tokenizer
from model import ModelArgs, Transformer
from sampling import UniformBlocks, add, draw, seen_in, uniform
from tp import WHOLE, Shard

# Steps from one look at the tokens to the next: the host waits for the device.
LOOK_EVERY = {"cpu": 1, "cuda": 8}

# What a step gives: tokens [N,k], their log-probabilities [N,k], and how many of them, from the first, count [N].
StepOutput = tuple[Tensor, Tensor, Tensor]


class Monitor:
    """Hears of a run's events; override what is to be known."""

    def prefilling(self, tokens: int, total: int) -> None:
        """So many of the prompt's tokens have been read."""

    def prefilled(self) -> None:
        """The prompt has been read."""

    def wave(self, rows: Sequence[Row]) -> None:
        """A wave's cache is ready to decode, for these rows."""

    def stepped(self, steps: int, tokens: int) -> None:
        """`steps` more decode steps have run, which drew `tokens` tokens for unfinished samples; steps is 0 for a
        wave's first tokens, which are drawn from the prompt's logits."""

    def done(self, sample: Sample) -> None:
        """A sample is finished."""


SILENT = Monitor()


class Engine:
    """A model that is ready to draw, with what travels with it: tokenizer, end tokens, memory, compiled steps.

    compile: the decode step; None: where a request's plan expects it to pay. shard: the part of the network that
    `model` is. plan: where the caller has weighed the model and the memory, its weights and bytes available for
    everything are taken; None: they are measured. compile_prefill: also the step that reads prompts.
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
        # A model trained on texts that BOS alone separates ends one by beginning the next.
        ends = [] if tokenizer is None else [*tokenizer.eos_ids, tokenizer.bos_id]
        self.eos_ids = frozenset(id for id in ends if id is not None)
        stream_linears(model)
        self.weighed = plan is not None
        self.weights = weigh(model) if plan is None else plan.weights
        self.available = available_memory(self.device) + self.weights.total if plan is None else plan.available
        self.packed = False
        self.hidden = torch.compile(model.hidden, dynamic=True) if compile_prefill else model.hidden
        self.draw = partial(draw, numbers=kernels.of_tokens)
        self.compiled: Step | None = None
        self.decoder: Decoder | None = None  # None: plain decoding

    @classmethod
    def open(cls, path: Path | str, device: str = "auto", dtype: str = "auto", compile: bool | None = None) -> Self:
        """The model of a checkpoint (a folder, the model.pth in one, or OWNER/NAME of the hub) and its tokenizer, with
        device and dtype chosen as by the command line's flags.

        Raises FileNotFoundError or ValueError where they cannot be read (checkpoint.py, tokenizer.py).
        """
        checkpoint, place = read_checkpoint(locate(path)), choose_device(device)
        model = load_model(checkpoint, place, choose_dtype(dtype, place))
        engine = cls(model, load_tokenizer(checkpoint.folder), compile)
        engine.eos_ids |= checkpoint.eos_ids
        return engine

    def encode(self, text: str) -> list[int]:
        """The tokens of a text at the beginning of a context."""
        assert self.tokenizer is not None, "text needs a tokenizer"
        bos = self.tokenizer.bos_id
        return ([] if bos is None else [bos]) + self.tokenizer.encode(text)

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """The tokens of a prompt, which may be a text. Raises ValueError where it is neither."""
        return self.encode(prompt) if isinstance(prompt, str) else as_tokens(prompt)

    def seeded(self, request: Request) -> Request:
        """Give the request a seed where it has none, the same on all ranks that hold the network."""
        if request.seed is not None:
            return request
        return replace(request, seed=int(self.shard.broadcast(torch.tensor([new_seed()], device=self.device))))

    def use(self, decoder: "Decoder", rows: int) -> None:
        """Decode by a draft from now on, in steps of `rows` rows."""
        decoder.place(self, rows)
        self.decoder = decoder
        if not self.weighed:
            self.weights = decoder.heavier(self.weights)

    def plan(self, context: int, request: Request, runs: int = 1) -> Plan:
        """How a request for a prompt of so many tokens will run. runs: how often it will come, for what compiling and
        packing may cost. Raises ValueError where not one sample fits."""
        work = request.workload(context, runs)
        work = work if self.decoder is None else self.decoder.widen(work, self.args)
        return self.plan_workload(work)

    def plan_workload(self, work: Workload) -> Plan:
        """`plan` for a workload of any rows and runs."""
        return plan_run(self.args, self.weights, work, self.device, self.dtype, self.available, self.compile)

    def prepare(self, plan: Plan) -> None:
        """Packs the weights and compiles the step, where the plan has it so and it has not been done."""
        if plan.packed and not self.packed:
            pack_linears(self.model, plan.packed_tied > 0)
            self.packed, self.weights = True, self.weights.with_packed(plan.packed_tied)
        if plan.compiled and self.compiled is None:
            self.compiled = compiled(partial(decode, self.model, uniform))

    def step(self, sampling: Sampling, plan: Plan) -> Step:
        """A decode step with its draw: inputs, cache -> tokens [N], log-probabilities [N]."""
        on_cuda = self.device.type == "cuda"
        eager = partial(decode, self.model, uniform if on_cuda else UniformBlocks())
        network = self.compiled if plan.compiled and self.compiled is not None else eager

        def step(inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
            return self.draw(*network(inputs, cache), sampling, inputs.seen)

        return RecordedStep(step) if on_cuda and is_recordable(self.model) else step

    @torch.no_grad()
    def prefill(self, cache: KVCache, tokens: Sequence[int], chunk: int, monitor: Monitor) -> Tensor:
        """Reads `tokens` into the last len(tokens) slots of a cache of one row, `chunk` at a time -> logits [1,V]."""
        scaling = self.args.rope_scaling
        if scaling is not None and scaling.by_length:
            chunk = len(tokens)  # it rotates by the length of the whole prompt
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
        """Draws request.num_samples continuations of the prompt, a text or tokens, in order of their index; `rank` puts
        the best first. plan: of `Engine.plan`, where it is made already. Raises ValueError, before any kernel runs,
        where the request does not fit the model or the memory."""
        run = Run(self, request, self.tokens(prompt), monitor, plan=plan)
        deque(run.pieces(), maxlen=0)
        return run.samples

    def stream(
        self, prompt: str | Sequence[int], request: Request, monitor: Monitor = SILENT, plan: Plan | None = None
    ) -> Generator[Piece]:
        """`generate`, piece by piece as the text comes. What may turn out to begin a stop string is held back."""
        return Run(self, request, self.tokens(prompt), monitor, plan=plan).pieces(live=True)

    def score(self, context: str | Sequence[int], continuations: Sequence[Sequence[int]]) -> list[Scored]:
        """Log-probabilities of the tokens of each continuation. The context, a text or tokens, is read once. Raises
        ValueError where it or a continuation is empty, or a token is not of the model."""
        begun = self.tokens(context)
        return Scorer(self.model, args=self.args).score([(begun, as_tokens(each)) for each in continuations])


def decode(
    model: Transformer, numbers: Callable[..., Tensor], inputs: StepInput, cache: KVCache
) -> tuple[Tensor, Tensor]:
    """A decode step up to its logits [N,V], and the random number of each row's draw [N], by `uniform` or its like."""
    logits = model(inputs.tokens, inputs.input_pos, cache)[:, -1]
    return logits, numbers(inputs.seed, inputs.samples, inputs.input_pos[:, -1] + 1)


def bucket(slots: int) -> int:
    """The slots that a step reads where `slots` are needed: few lengths, at most a quarter and 63 more than needed."""
    size = 1 << max(6, (slots - 1).bit_length() - 3)
    return -(-slots // size) * size


class PlainDecoder:
    """How rows move on: plain decoding, one token for each row and step. `width` is the most that a step gives, k. What
    is drawn is the same on all ranks that hold a part of the network."""

    width = 1

    def __init__(self, run: "Run", cache: KVCache, samples: Tensor) -> None:
        """samples [N]: the index of each row's sample."""
        self.cache, self.samples, self.sampling = cache, samples, run.request.sampling
        self.shard = run.engine.shard
        self.seed, self.one = torch.tensor(run.request.seed, device=samples.device), torch.ones_like(samples)
        self.seen = seen_in(run.history, samples, self.sampling.repetition_penalty, run.engine.args.vocab_size)
        self.engine, self.step = run.engine, run.engine.step(self.sampling, run.plan)

    def first(self, logits: Tensor, position: int) -> StepOutput:
        """Draws the token at `position` for every row from the logits [1,V] before it."""
        numbers = uniform(self.seed, self.samples, torch.full_like(self.samples, position))
        token, logprob = self.engine.draw(logits.expand(len(self.samples), -1), numbers, self.sampling, self.seen)
        return self.shard.broadcast(token)[:, None], logprob[:, None], self.one

    def next(self, token: Tensor, input_pos: Tensor) -> StepOutput:
        """token [N,1], the last one of each row, not yet run, at input_pos [N,1]."""
        inputs = StepInput(token, input_pos, self.samples, self.seed, add(self.seen, token))
        drawn, logprob = self.step(inputs, self.cache)
        return self.shard.broadcast(drawn)[:, None], logprob[:, None], self.one

    def move(self, cache: KVCache) -> None:
        """Go on in another cache of the same rows."""
        self.cache = cache

    def keep(self, rows: Sequence[int]) -> None:
        """Drops all rows but the given ones."""
        self.cache.keep(rows)
        self.samples, self.one, self.seen = self.samples[rows], self.one[rows], self.seen[rows]


class Decoder(Protocol):
    """Makes the Decoding of each wave. `place`: load it for an engine, and steps of so many rows. `widen`, `heavier`: a
    workload and weights with what it needs beyond plain decoding. Raises ValueError where it cannot decode for such a
    network."""

    width: int

    def place(self, engine: Engine, rows: int) -> None: ...

    def heavier(self, weights: WeightSizes) -> WeightSizes: ...

    def __call__(self, run: "Run", cache: KVCache, samples: Tensor) -> PlainDecoder: ...

    def widen(self, work: Workload, args: ModelArgs) -> Workload: ...


class Run:
    """The samples of one request, which continue one context, in waves of rows that decode together."""

    def __init__(
        self,
        engine: Engine,
        request: Request,
        history: Sequence[int],
        monitor: Monitor = SILENT,
        alone: bool = False,
        plan: Plan | None = None,
    ) -> None:
        """history: the tokens of the context. alone: a sample's text is decoded, and searched for stop strings, by
        itself and not as it reads after the history. plan: None: the engine makes one. Raises ValueError as
        `generate`."""
        request.check_length(engine.args.context_limit, len(history))
        self.ending = Ending.of(request, engine.eos_ids, engine.tokenizer)
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
        self.begin = len(history)  # the position of the first token drawn
        self.live = False
        self.kept: dict[int, KVCache] | None = None
        self.samples: list[Sample] = []

    def pieces(self, live: bool = False) -> Generator[Piece]:
        """Reads the prompt, then `draw`."""
        engine, reserve = self.engine, self.begin + self.own_slots if self.extends else 0
        context = KVCache.empty(engine.args.kv_shape, 1, self.begin, engine.model.norm.weight, reserve)
        logits = engine.prefill(context, self.history, self.request.prefill_chunk, self.monitor)
        yield from self.draw(context, logits, live)

    @torch.no_grad()
    def draw(
        self, context: KVCache, logits: Tensor, live: bool = False, kept: dict[int, KVCache] | None = None
    ) -> Iterator[Piece]:
        """logits [1,V] at the context's last token. live: yield pieces of text. kept: takes the keys and values of each
        finished sample, by its index. The samples are then in `samples`."""
        self.live, self.kept = live, kept
        context = Int8Context(context) if self.request.kv_dtype == "int8" else context
        while len(self.samples) < self.request.num_samples:  # each wave when its turn comes: they may be many
            last = min(self.request.num_samples, len(self.samples) + self.rows_at_once)
            first = self.request.first_index
            rows = [
                Row(number, self.ending, self.engine.tokenizer, self.text_after, self.live, self.request.seed)
                for number in range(first + len(self.samples), first + last)
            ]
            yield from self.decode(context, logits, rows)
            self.samples += [row.sample for row in rows]

    def decode(self, context: KVCache, logits: Tensor, rows: list[Row]) -> Iterator[Piece]:
        """Decodes one wave until every row is done. logits [1,V]."""
        device, limit = logits.device, self.request.max_new_tokens
        # 1. A cache at its planned length, of which a step reads a bucket.
        cache = context if self.extends else LAYOUTS[self.request.attention](context, len(rows), 0, self.own_slots)
        base = self.begin - int(cache.start[0])  # slots before the first that is drawn
        samples = torch.tensor([row.sample.index for row in rows], device=device)
        decoding = self.decoder(self, cache, samples)
        # 2. The first token of every row, from the prompt's logits.
        self.monitor.wave(rows)
        pending = [decoding.first(logits, self.begin)]
        token = pending[0][0]
        input_pos = torch.full((len(rows), 1), self.begin, device=device)
        steps, ahead = 0, 1  # `ahead`: the most tokens that a row may have by now
        while True:
            # 3. What was drawn reaches the host; rows that are done are retired, and leave when half are. The first
            # step is looked at alone, since it may compile.
            crosses = self.crosses(self.begin + ahead - 1)
            if crosses or len(pending) == LOOK_EVERY[device.type] or steps < 2 or ahead >= limit:
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
                    cache = self.read_anew(rows, ahead)
                    decoding.move(cache)
            # 4. A step over the slots that it may write, and those before them.
            cache.resize(base + min(self.own_slots, bucket(ahead - 1 + decoding.width)))
            # A row that is done may be further than those in view.
            pending.append(decoding.next(token, input_pos.clamp_max(self.begin + ahead - 1)))
            steps, ahead = steps + 1, ahead + decoding.width
            # 5. Each row moves by its own count.
            tokens, _, count = pending[-1]
            token, input_pos = tokens.gather(1, count[:, None] - 1), input_pos + count[:, None]

    def crosses(self, position: int) -> bool:
        """Whether the step at that position turns all others otherwise than before."""
        scaling = self.engine.args.rope_scaling
        return scaling is not None and scaling.crosses(position, position + 1)

    def read_anew(self, rows: Sequence[Row], own: int) -> KVCache:
        """The cache of rows that have drawn `own` tokens, or are done, read anew at the length that they have now. The
        context is read with the tokens of one row, which make it so long, and then serves all."""
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
        """Brings the tokens of the last steps to the host and ends the rows that are done."""
        # [N][steps][k] twice, and [N][steps].
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
    """The rows that go on decoding: all, until half are done; then the live ones, filled up to a power of two.

    Never fewer than two of several, since the compiled step for many rows does not serve one. Empty when none is live.
    """
    alive = sum(live)
    size = max(2, 1 << (alive - 1).bit_length())
    if alive == 0:
        return []
    if 2 * alive > len(live) or size >= len(live):
        return list(range(len(live)))
    finished = [row for row, is_live in enumerate(live) if not is_live]
    return sorted([row for row, is_live in enumerate(live) if is_live] + finished[: size - alive])
