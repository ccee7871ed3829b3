"""Model runner: a network ready to prefill and to decode, with its memory budget and compiled steps.

Nothing is printed here. Shapes: C rows, S positions, T context length, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from cache import KVCache, Prefill
from engine.graphs import RecordedStep, Step, StepInput, compiled
from engine.plan import Plan, WeightSizes, available_memory, choose_chunk, plan_run, weigh
from engine.request import Request, Workload, new_seed
from engine.samples import Row, Sample
from layers import kernels
from layers.linear import hold_linears
from layers.moe import can_capture_graph
from loading.tokenizer import Tokenizer
from model import ModelArgs, Transformer
from sampling import Filters, RowFilters, UniformBlocks, draw, uniform
from tp import WHOLE, Shard

# Decode steps between syncs to the host, each of which waits for the device.
SYNC_EVERY = {"cpu": 1, "cuda": 8}


class Monitor:
    """Callbacks for a run; override the ones you need."""

    def prefilling(self, tokens: int, total: int) -> None:
        """Called after each prefill chunk: `tokens` of the prompt's `total` are prefilled."""

    def prefilled(self) -> None:
        """Called when prompts are prefilled."""

    def started(self, row: Row) -> None:
        """Called when a sample has its first token."""

    def stepped(self, steps: int, tokens: int) -> None:
        """Called after `steps` more decode steps, which sampled `tokens` tokens for unfinished samples. steps is 0 for
        first tokens, which are sampled from the prompt's logits."""

    def done(self, sample: Sample) -> None:
        """Called when a sample is finished."""


SILENT = Monitor()


class ModelRunner:
    """A model ready to run, with its tokenizer, end tokens, memory budget and compiled steps.

    compile: whether to compile the decode step; None: if a request's plan expects it to pay off. shard: the part of the
    network that `model` holds. plan: source of the weight sizes and of the available memory, weights included; None:
    measure both. compile_prefill: also compile the forward pass that prefills. available: free bytes; None: measured.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        compile: bool | None = None,
        shard: Shard = WHOLE,
        plan: Plan | None = None,
        compile_prefill: bool = False,
        available: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.compile, self.shard = model, tokenizer, compile, shard
        weight = model.norm.weight
        self.args, self.device, self.dtype = shard.local(model.args), weight.device, weight.dtype
        # A model trained on texts that only BOS separates ends a text by generating BOS.
        ends = [] if tokenizer is None else [*tokenizer.eos_ids, tokenizer.bos_id]
        self.eos_ids = frozenset(id for id in ends if id is not None)
        hold_linears(model)
        self.weighed = plan is not None
        self.weights = weigh(model, shard.parts(model.args)) if plan is None else plan.weights
        free = available_memory(self.device) if available is None else available
        self.available = free + self.weights.total if plan is None else plan.available
        self.packed = False
        self.hidden = torch.compile(model.hidden, dynamic=True) if compile_prefill else model.hidden
        self.draw = partial(draw, numbers=kernels.token_uniforms)
        self.compiled: dict[bool, Step] = {}  # by whether the logits are a rank's own
        self.decoder: DecoderFactory | None = None  # None: plain decoding

    def seeded(self, request: Request) -> Request:
        """Return the request with a random seed if it has none; the seed is the same on all ranks of the network."""
        if request.seed is not None:
            return request
        return replace(request, seed=int(self.shard.broadcast(torch.tensor([new_seed()], device=self.device))))

    def use(self, decoder: "DecoderFactory", rows: int) -> None:
        """Decode with a draft from now on, in steps of `rows` rows."""
        decoder.place(self, rows)
        self.decoder = decoder
        if not self.weighed:
            self.weights = decoder.heavier(self.weights)

    def plan(self, context: int, request: Request, runs: int = 1) -> Plan:
        """Plan a request for a prompt of `context` tokens. runs: how often it will run, to decide whether compiling and
        packing pay off. Raises ValueError if not even one sample fits into memory."""
        return self.plan_workload(request.workload(context, runs))

    def plan_workload(self, work: Workload) -> Plan:
        """Plan a workload of any number of rows and runs."""
        work = work if self.decoder is None else self.decoder.widen(work, self.args)
        return plan_run(self.args, self.weights, work, self.device, self.dtype, self.available, self.compile)

    def prepare(self, plan: Plan) -> None:
        """Pack the weights and compile the decode step, if the plan says so and it is not done yet."""
        if plan.packed and not self.packed:
            hold_linears(self.model, pack=True, tied_output=plan.packed_tied > 0)
            self.packed, self.weights = True, self.weights.with_packed(plan.packed_tied)
        if plan.compiled and not self.compiled:
            self.compiled = {own: compiled(partial(decode, self.model, uniform, own=own)) for own in (False, True)}

    def step(
        self, plan: Plan, filters: Callable[[], Filters | RowFilters], samplings: Sequence[Filters] | None = None
    ) -> Step:
        """Return a decode step, sampling included: (inputs, cache) -> tokens [C], log-probabilities [C], the same on
        all ranks. filters: called at each step for the sampling parameters of the present rows. samplings: those that
        occur, which decide what the ranks gather; None: one, the plan's."""
        on_cuda = self.device.type == "cuda"
        most = self.shard.deciding(samplings or [plan.workload.sampling], self.model.args)
        eager = partial(decode, self.model, uniform if on_cuda else UniformBlocks(), own=most is not None)
        network = self.compiled[most is not None] if plan.compiled and self.compiled else eager

        def step(inputs: StepInput, cache: KVCache) -> tuple[Tensor, Tensor]:
            logits, numbers = network(inputs, cache)
            if most is None:
                return self.shard.agreed(self.draw(logits, numbers, filters(), inputs.seen))
            logits, names, total = self.shard.candidates(logits, most)
            return self.shard.agreed(self.draw(logits, numbers, filters(), names=names, total=total))

        return RecordedStep(step) if on_cuda and can_capture_graph(self.model) else step

    def chunk(self, asked: int | None) -> int:
        """Return the prompt tokens per prefill step. asked: as Request.prefill_chunk."""
        return choose_chunk(asked, self.args, self.device, self.dtype)

    def empty_cache(self, slots: int) -> KVCache:
        """Allocate a one-row cache of `slots` positions."""
        return KVCache.empty(self.args.kv_shape, 1, slots, self.model.norm.weight)

    @torch.no_grad()
    def prefill(self, cache: KVCache, tokens: Sequence[int], chunk: int | None, monitor: Monitor = SILENT) -> Tensor:
        """Prefill `tokens` into the last len(tokens) slots of a one-row cache, `chunk` at a time (as Request's) -> the
        last layer's output at the last token [1,dim]."""
        chunk, scaling = self.chunk(chunk), self.args.rope_scaling
        if scaling is not None and scaling.by_length:
            chunk = len(tokens)  # the rotation depends on the length of the whole prompt
        begin = cache.slots - len(tokens)
        for first in range(0, len(tokens), chunk):
            part = torch.tensor([tokens[first : first + chunk]], device=self.device)  # [1,S]
            slots = begin + first + torch.arange(part.shape[1], device=self.device)
            hidden = self.hidden(part, cache.start[:, None] + slots, Prefill(cache, begin + first, part.shape[1]))
            monitor.prefilling(first + part.shape[1], len(tokens))
        return hidden[:, -1]


def decode(
    model: Transformer, numbers: Callable[..., Tensor], inputs: StepInput, cache: KVCache, own: bool = False
) -> tuple[Tensor, Tensor]:
    """Run a decode step up to its logits [C,V]; also return each row's random number [C]. numbers: as `uniform`. own:
    as of Transformer.logits."""
    logits = model.logits(model.hidden(inputs.tokens, inputs.input_pos, cache), own)[:, -1]
    return logits, numbers(inputs.seed, inputs.samples, inputs.input_pos[:, -1] + 1)


def bucket(slots: int) -> int:
    """Round `slots` up, by at most 63 or a quarter, so that steps see few different lengths."""
    size = 1 << max(6, (slots - 1).bit_length() - 3)
    return -(-slots // size) * size


class DecoderFactory(Protocol):
    """Source of a batch's decoder. `place`: load it for a runner, for steps of `rows` rows. `widen`, `heavier`: add to
    a workload, and to the weights, what it needs beyond plain decoding. `widen` raises ValueError if it cannot decode
    for a network of these args."""

    width: int

    def place(self, runner: ModelRunner, rows: int) -> None: ...

    def heavier(self, weights: WeightSizes) -> WeightSizes: ...

    def __call__(self, *given: Any) -> Any: ...

    def widen(self, work: Workload, args: ModelArgs) -> Workload: ...


def rows_to_keep(live: Sequence[bool]) -> list[int]:
    """Return the rows to keep: all until half have finished, then the live ones, padded to a power of two.

    Never one of several, for which a compiled step would be compiled again. Empty if none is live.
    """
    alive = sum(live)
    size = max(2, 1 << (alive - 1).bit_length())
    if alive == 0:
        return []
    if 2 * alive > len(live) or size >= len(live):
        return list(range(len(live)))
    finished = [row for row, is_live in enumerate(live) if not is_live]
    return sorted([row for row, is_live in enumerate(live) if is_live] + finished[: size - alive])
