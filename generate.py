"""N samples of one prompt: encode -> prefill -> fork -> decode -> rank -> text, and the command line over it.

The prompt is read once, at one row, into a key/value cache; that cache is forked into N rows, which hold only what they
decode; every decode step reads the prompt's keys and values once for all rows (bifurcated_attention.py).

    samples = generate(model, prompt_tokens, request, tokenizer)

prints nothing and reads no globals. Shapes: N rows, S positions, T context length, L slots, V vocabulary.
"""

import argparse
import contextlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from chat import Dialogue, choose_chat
from checkpoint import Checkpoint, load_model, read_checkpoint
from cuda_graph import RecordedStep
from int8_context import Int8Context
from model import LAYOUTS, KVCache, ModelArgs, NoCache, Prefill, Step, Transformer
from options import build_parser, check_options, prompt_length, read_prompt
from packed import pack_linears
from plan import Execution, choose_device, choose_dtype, choose_execution, keep_freed_memory
from report import Console, Monitor, Ranked, describe, measure, print_report, rank
from tokenizer import TextStream, Tokenizer, continuation_text, load_tokenizer

DECODE_SLOTS = 128  # slots by which the decoded part of a cache grows
# Logits worked on at a time: what stays in a CPU's cache; on a GPU, what bounds memory.
SAMPLE_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 26}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. temperature 0: the most likely one. None: that filter is off. All given filters apply, in
    the order top_k (exactly the k most likely), top_p (the fewest that hold mass p, of what is left), min_p (those at
    least min_p times as likely as the most likely)."""

    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-6 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be 0 (the most likely token) or at least 1e-6")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} must be at least 1, or on the command line 0, which is off")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} must be from 0 to 1")


@dataclass(frozen=True)
class Request:
    """What to draw. attention: a key of LAYOUTS. prefill_chunk: tokens of the prompt read at a time.
    rows_at_once: larger num_samples run in waves of so many; None: all together. kv_dtype: of the context's keys and
    values while samples decode from it: auto, the network's, or int8."""

    num_samples: int
    max_new_tokens: int
    sampling: Sampling
    seed: int
    attention: str = "bifurcated"
    eos_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    prefill_chunk: int = 512
    rows_at_once: int | None = None
    kv_dtype: str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens", "prefill_chunk"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.kv_dtype != "auto" and (self.kv_dtype != "int8" or self.attention != "bifurcated"):
            raise ValueError(f"kv_dtype {self.kv_dtype!r} with {self.attention}: give auto, or int8 with bifurcated")
        if "" in self.stop:
            raise ValueError("a stop string is empty: it would end every sample at once")

    def check_length(self, args: ModelArgs, context: int) -> None:
        """Raises ValueError where `context` tokens and the new ones do not fit the model."""
        total = context + self.max_new_tokens
        if context < 1:
            raise ValueError("the prompt is empty: give at least one token")
        if total > args.context_limit:
            raise ValueError(
                f"prompt of {context} tokens + max_new_tokens {self.max_new_tokens} = {total} is over the model's "
                f"context limit of {args.context_limit}: shorten one of them"
            )


@dataclass
class Sample:
    """One continuation. logprobs: of each token under the untempered model. finish_reason: eos, stop or length.
    text: None where there is no tokenizer."""

    index: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str | None = None
    finish_reason: str | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(self.logprobs) / max(1, len(self.logprobs))


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The distribution to draw from: probs [N,K] and the token ids [N,K] they belong to, in ascending order of id.

    ids None: K is V and column i is token i. logits [N,V] fp32. Without top_k, top_p has to sort the whole vocabulary.
    """
    ids = None
    if sampling.top_k is not None or sampling.top_p is not None:
        k = min(sampling.top_k or logits.shape[-1], logits.shape[-1])
        logits, ids = logits.topk(k)  # descending [N,K]
    probs = (logits / sampling.temperature).softmax(-1)
    if sampling.top_p is not None:
        mass = probs.cumsum(-1, dtype=torch.float64)  # a token is kept while the likelier ones hold less than top_p
        probs = probs.masked_fill(mass - probs >= sampling.top_p * mass[:, -1:], 0)
    if sampling.min_p is not None:
        probs = probs.masked_fill(probs < sampling.min_p * probs.amax(-1, keepdim=True), 0)
    if ids is not None:
        # By id, so that rounding which swaps two near-equal logits cannot move every boundary between tokens.
        ids, order = ids.sort(-1)
        probs = probs.gather(-1, order)
    return probs, ids


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """draw_tokens, so many rows at a time that their fp32 logits stay within SAMPLE_LOGITS."""
    rows = max(1, SAMPLE_LOGITS[logits.device.type] // logits.shape[-1])
    parts = zip(logits.split(rows), uniform.split(rows), strict=True)
    tokens, logprobs = zip(*(draw_tokens(*part, sampling) for part in parts), strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def draw_tokens(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draws a token per row. logits [N,V], uniform [N] in [0,1) -> tokens [N], log-probabilities [N].

    The inverse of the cumulative distribution, in fp64, at one number per row: it costs one pass over the vocabulary,
    where noise on every logit costs a random number for each. The number belongs to (seed, sample, step), so a sample
    does not depend on which rows decode beside it. The log-probability is that of the untempered, unfiltered model.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        token = logits.argmax(-1, keepdim=True)  # [N,1]
    else:
        probs, ids = candidates(logits, sampling)
        cdf = probs.cumsum(-1, dtype=torch.float64)  # [N,K]
        # 1 - uniform is in (0,1], so the first entry that reaches the target has a probability above 0.
        token = torch.searchsorted(cdf, (1 - uniform[:, None]) * cdf[:, -1:])  # [N,1]
        token = token if ids is None else ids.gather(-1, token)
    return token[:, 0], (logits.gather(-1, token) - logits.logsumexp(-1, keepdim=True))[:, 0]


@dataclass(frozen=True)
class Steps:
    """The two callables of a run. prefill: tokens [1,S], input_pos [1,S], cache -> hidden [1,S,dim].
    decode: tokens [N,1], input_pos [N,1], cache -> logits [N,V]."""

    prefill: Callable[[Tensor, Tensor, Prefill], Tensor]
    decode: Step


def make_steps(model: Transformer, compile_decode: bool = False, compile_prefill: bool = False) -> Steps:
    """The model's steps, each compiled or eager. One compiled decode step serves every N >= 2, context and capacity.
    On CUDA the decode step is recorded as a graph."""

    def decode(tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        return model(tokens, input_pos, cache)[:, -1]

    step = compiled(decode) if compile_decode else decode  # without torch.compile, whose import alone takes a second
    on_cuda = model.norm.weight.device.type == "cuda"
    prefill = torch.compile(model.hidden, dynamic=True) if compile_prefill else model.hidden
    return Steps(prefill, RecordedStep(step) if on_cuda else step)


def compiled(step: Step) -> Step:
    """A decode step as one graph, compiled at its first call."""
    # Only what is marked varies: a second model in the process must not turn its other sizes into variables.
    graph = torch.compile(step, fullgraph=True, dynamic=False)

    def decode(tokens: Tensor, input_pos: Tensor, cache: KVCache) -> Tensor:
        mark_dynamic(tokens, input_pos, cache)
        return graph(tokens, input_pos, cache)

    return decode


def mark_dynamic(tokens: Tensor, input_pos: Tensor, cache: KVCache) -> None:
    """Marks the rows and slots of a step's arguments as sizes that vary, so that no new value of them recompiles.

    A size of 1 cannot be marked: torch.compile always specialises on it.
    """
    marks = [(tokens, 0), (input_pos, 0)]
    link: KVCache | None = cache
    while link is not None:
        marks += [(tensor, dim) for tensor in link.tensors for dim in (0, 2)] + [(link.start, 0)]
        link = link.parent
    for tensor, dim in marks:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)


def prefill(steps: Steps, model: Transformer, cache: KVCache, tokens: Sequence[int], chunk: int) -> Tensor:
    """Reads `tokens` into the last len(tokens) slots of a cache of one row, `chunk` at a time -> logits [1,V]."""
    device, scaling = cache.start.device, model.args.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        chunk = len(tokens)  # it rotates by the length of the whole prompt
    begin = cache.slots - len(tokens)
    for first in range(0, len(tokens), chunk):
        part = torch.tensor([tokens[first : first + chunk]], device=device)  # [1,S]
        input_pos = begin + first + torch.arange(part.shape[1], device=device)[None]  # [1,S]
        hidden = steps.prefill(part, input_pos, Prefill(cache, begin + first, part.shape[1]))
    return model.logits(hidden[:, -1:])[:, -1]


class Decoder:
    """Draws samples that continue one context, in waves of rows that decode together."""

    def __init__(
        self, steps: Steps, request: Request, tokenizer: Tokenizer | None = None, monitor: Monitor | None = None
    ) -> None:
        if request.stop and tokenizer is None:
            raise ValueError(f"stop strings {request.stop} need a tokenizer")
        self.steps, self.request, self.tokenizer = steps, request, tokenizer
        self.monitor = monitor or Monitor()
        self.streams: dict[int, TextStream] = {}
        self.history: Sequence[int] = ()
        self.begin = 0  # the position of the first token drawn

    def draw(self, context: KVCache, logits: Tensor, history: Sequence[int]) -> list[Sample]:
        """logits [1,V] at the context's last token, history: the context's tokens. Returns the samples by index."""
        request = self.request
        self.history, self.begin = history, context.slots
        # One number per (sample, step), drawn on the host: the same for every layout, wave and device.
        generator = torch.Generator().manual_seed(request.seed)
        samples: list[Sample] = []
        while len(samples) < request.num_samples:  # each wave when its turn comes: they may be many
            last = min(request.num_samples, len(samples) + (request.rows_at_once or request.num_samples))
            wave = [Sample(index, text=self.tokenizer and "") for index in range(len(samples), last)]
            if self.tokenizer and (request.stop or self.monitor.streams):
                self.streams = {sample.index: TextStream(self.tokenizer, history) for sample in wave}
            uniforms = torch.rand((len(wave), request.max_new_tokens), generator=generator, dtype=torch.float64)
            self.decode(context, logits, wave, uniforms.to(logits.device))
            samples += wave
        return samples

    def decode(self, context: KVCache, logits: Tensor, rows: list[Sample], uniforms: Tensor) -> None:
        """Decodes until every row is done. logits [1,V], uniforms [N,max_new_tokens]."""
        limit = self.request.max_new_tokens
        free = min(limit, DECODE_SLOTS)  # slots not yet written
        cache = LAYOUTS[self.request.attention](context, len(rows), free)
        # Reading tokens on the host waits for the device, so an accelerator is asked only every few steps.
        stride = 1 if logits.device.type == "cpu" else 8
        self.monitor.wave()
        token, logprob = sample(logits.expand(len(rows), -1), uniforms[:, 0], self.request.sampling)
        input_pos = torch.full((len(rows), 1), context.slots, device=logits.device)
        pending = [(token, logprob)]
        for step in range(1, limit + 1):
            if len(pending) == stride or step in (1, 2, limit):  # the first step alone: it may compile
                self.collect(rows, pending, cache, step > 1)
                pending = []
                kept = rows_to_keep([row.finish_reason is None for row in rows])
                if not kept:
                    return
                if len(kept) < len(rows):
                    rows = [rows[row] for row in kept]
                    index = torch.tensor(kept, device=logits.device)
                    cache.keep(index)
                    token, input_pos, uniforms = token[index], input_pos[index], uniforms[index]
            if free == 0:
                free = min(DECODE_SLOTS, limit - step)
                cache.reserve(cache.slots + free)
            # The logits get no name: it would keep them alive through the next step.
            token, logprob = sample(
                self.steps.decode(token[:, None], input_pos, cache), uniforms[:, step], self.request.sampling
            )
            pending.append((token, logprob))
            input_pos = input_pos + 1
            free -= 1

    def collect(self, rows: list[Sample], pending: list[tuple[Tensor, Tensor]], cache: KVCache, stepped: bool) -> None:
        """Brings the tokens of the last steps to the host and ends the rows that are done."""
        tokens = torch.stack([token for token, _ in pending], 1).tolist()  # [N][steps]
        logprobs = torch.stack([logprob for _, logprob in pending], 1).tolist()
        drawn = 0
        for index, row in enumerate(rows):
            for token, logprob in zip(tokens[index], logprobs[index], strict=True):
                if row.finish_reason is None:
                    drawn += 1
                    self.record(row, token, logprob)
                    if row.finish_reason is not None:
                        self.monitor.done(row, cache, index, self.begin)
        self.monitor.stepped(len(pending) if stepped else 0, drawn)

    def record(self, row: Sample, token: int, logprob: float) -> None:
        """Adds a token to an unfinished sample and finishes it where its end is reached."""
        row.tokens.append(token)
        row.logprobs.append(logprob)
        if token in self.request.eos_ids:
            row.finish_reason = "eos"
        elif len(row.tokens) == self.request.max_new_tokens:
            row.finish_reason = "length"
        stream = self.streams.get(row.index)
        if stream is None:
            if self.tokenizer and row.finish_reason is not None:
                row.text = continuation_text(self.tokenizer, self.history, without_eos(row))
            return
        piece = "" if row.finish_reason == "eos" else stream.push([token])
        if row.finish_reason is not None:
            piece += stream.flush()
        # A stop string may begin in text that came before this piece.
        overlap = len(row.text) - max(map(len, self.request.stop), default=1) + 1
        row.text += piece
        ends = [at for stop in self.request.stop if (at := row.text.find(stop, max(0, overlap))) >= 0]
        if ends:
            row.text, row.finish_reason = row.text[: min(ends)], "stop"
        self.monitor.text(row)


def without_eos(sample: Sample) -> list[int]:
    """The tokens that are text."""
    return sample.tokens[:-1] if sample.finish_reason == "eos" else sample.tokens


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


@torch.no_grad()
def generate(
    model: Transformer,
    prompt_tokens: Sequence[int],
    request: Request,
    tokenizer: Tokenizer | None = None,
    steps: Steps | None = None,
    monitor: Monitor | None = None,
) -> list[Sample]:
    """Draws request.num_samples continuations of prompt_tokens, in order of their index; `rank` puts the best first.

    Without a tokenizer the samples carry tokens and no text. steps: what make_steps returned (default: eager). monitor:
    hears of prefill, steps and finished samples. Raises ValueError, before any kernel runs, where the request does not
    fit the model.
    """
    request.check_length(model.args, len(prompt_tokens))
    steps, monitor = steps or make_steps(model), monitor or Monitor()
    decoder = Decoder(steps, request, tokenizer, monitor)
    context = KVCache.empty(model.args, 1, len(prompt_tokens), model.norm.weight)
    logits = prefill(steps, model, context, prompt_tokens, request.prefill_chunk)
    context = Int8Context(context) if request.kv_dtype == "int8" else context
    monitor.prefilled()
    return decoder.draw(context, logits, prompt_tokens)


@torch.no_grad()
def rescore(model: Transformer, context: Sequence[int], tokens: Sequence[int]) -> list[float]:
    """Log-probability of each token after `context`, from one plain forward pass over the whole without any cache."""
    device = model.norm.weight.device
    whole = torch.tensor([[*context, *tokens]], device=device)  # [1,S]
    hidden = model.hidden(whole, torch.arange(whole.shape[1], device=device)[None], NoCache())
    logits = model.logits(hidden[:, len(context) - 1 : -1]).float()  # [1,tokens,V]
    return logits.log_softmax(-1).gather(-1, whole[:, len(context) :, None])[0, :, 0].tolist()


@dataclass(frozen=True)
class Session:
    """A command line that was found good: what it asks for, and how it will run."""

    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint
    dialogue: Dialogue
    prompt_text: str | None
    prompt_tokens: list[int]
    request: Request
    execution: Execution


def set_up(options: argparse.Namespace) -> Session:
    """Checks everything that can be checked before the weights are read. Raises ValueError or OSError."""
    check_options(options)
    seed = secrets.randbelow(2**31) if options.seed is None else options.seed
    request = Request(
        options.num_samples,
        options.max_new_tokens,
        Sampling(options.temperature, options.top_k or None, options.top_p, options.min_p),
        seed,
        stop=tuple(options.stop),
        prefill_chunk=options.prefill_chunk,
        kv_dtype=options.kv_dtype,
    )
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    text = read_prompt(options)
    checkpoint = read_checkpoint(options.checkpoint_path)
    args = checkpoint.args
    tokenizer = load_tokenizer(checkpoint.folder)
    chat = choose_chat(checkpoint.folder, tokenizer, options.chat, options.interactive)
    dialogue = Dialogue(tokenizer, args.vocab_size, chat, options.system)
    length, tokens = prompt_length(options), []
    if length is None and text is not None:
        tokens = dialogue.say(text)
        length = len(tokens)
    if length is not None and not options.plan:
        request.check_length(args, length)
        generator = torch.Generator().manual_seed(seed)
        tokens = tokens or torch.randint(args.vocab_size, (length,), generator=generator).tolist()
    execution = choose_execution(options, args, device, dtype, length or 0)
    ends = frozenset() if options.ignore_eos else checkpoint.eos_ids | dialogue.eos_ids
    request = replace(request, attention=execution.attention, eos_ids=ends, rows_at_once=execution.memory.rows_at_once)
    known_text = text if tokens else None
    return Session(options, device, dtype, checkpoint, dialogue, known_text, tokens, request, execution)


def run_once(session: Session, model: Transformer, steps: Steps) -> None:
    """--num_runs runs of one prompt, then the samples, the self-check and the report."""
    options, monitors = session.options, []
    samples: Sequence[Sample] = ()
    for run in range(1, options.num_runs + 1):
        with Console(session, samples) as console:
            console.streams &= run == options.num_runs
            prompt, tokenizer = session.prompt_tokens, session.dialogue.tokenizer
            samples = generate(model, prompt, session.request, tokenizer, steps, console)
        monitors.append(console)
    ranked = rank(samples)[: options.top]
    try:
        console.show(ranked)
    finally:  # also where nobody reads the samples to their end
        finish_report(session, model, monitors, ranked)


def finish_report(session: Session, model: Transformer, monitors: Sequence[Monitor], ranked: Sequence[Ranked]) -> None:
    """The report of the runs, on stderr and at --report, with --selfcheck's difference over the printed samples."""
    options, prompt = session.options, session.prompt_tokens
    report = describe(session) | measure(
        monitors, session.execution, len(prompt), session.device, options.compile_prefill
    )
    if options.selfcheck:
        report["selfcheck_max_difference"] = max(
            abs(decoded - scored)
            for sample in (each.sample for each in ranked)
            for decoded, scored in zip(sample.logprobs, rescore(model, prompt, sample.tokens), strict=True)
        )
    if not options.quiet:
        print_report(report)
    if options.report:
        options.report.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


class Conversation:
    """A context that grows by what the user says and the reply that is kept. Nothing is computed twice."""

    def __init__(self, request: Request, tokenizer: Tokenizer, model: Transformer, steps: Steps) -> None:
        self.request, self.tokenizer, self.model, self.steps = request, tokenizer, model, steps
        self.context = KVCache.empty(model.args, 1, 0, model.norm.weight)
        self.history: list[int] = []  # the tokens of the context, then the pending ones
        self.pending: list[int] = []  # kept, but not yet in the context

    @torch.no_grad()
    def turn(self, tokens: Sequence[int], monitor: Monitor) -> list[Sample]:
        """Reads the user's tokens and draws replies. Raises ValueError, with nothing changed, where they do not fit."""
        self.request.check_length(self.model.args, len(self.history) + len(tokens))
        new = [*self.pending, *tokens]
        self.context.reserve(self.context.slots + len(new))
        logits = prefill(self.steps, self.model, self.context, new, self.request.prefill_chunk)
        monitor.prefilled()
        self.history += tokens
        self.pending = []
        request = replace(self.request, seed=self.request.seed + len(self.history))  # new numbers for every turn
        return Decoder(self.steps, request, self.tokenizer, monitor).draw(self.context, logits, self.history)

    def keep(self, reply: Sample, cache: KVCache) -> None:
        """Goes on from this reply: its keys and values move into the context. cache: the reply's, from Monitor.done."""
        tokens = without_eos(reply)
        while reply.finish_reason == "stop" and tokens:  # only what was shown: no part of the stop string
            if len(continuation_text(self.tokenizer, self.history, tokens)) <= len(reply.text):
                break
            tokens = tokens[:-1]
        cached = tokens[: len(reply.tokens) - 1]  # the last token drawn was never run
        self.context.append(cache, len(cached))
        self.pending = tokens[len(cached) :]
        self.history += tokens


def interact(session: Session, model: Transformer, steps: Steps) -> None:
    """--interactive: a turn for --prompt, if given, then one per line of stdin, until it ends."""
    options, dialogue = session.options, session.dialogue
    conversation = Conversation(session.request, dialogue.tokenizer, model, steps)
    line, tokens = session.prompt_text or "", session.prompt_tokens
    while tokens or (line := ask("> ")) is not None:
        if not (tokens or line):
            continue
        try:
            tokens = tokens or dialogue.say(line)
            with Console(session) as console:
                samples = conversation.turn(tokens, console)
        except ValueError as error:
            held = len(conversation.history)
            hint = f"; the conversation holds {held} tokens, begin a new one to go on" if held else ""
            print(f"error: {error}{hint}", file=sys.stderr)
        else:
            ranked = rank(samples)[: options.top]
            console.show(ranked)
            reply = pick(ranked) if options.pick else ranked[0].sample
            conversation.keep(reply, console.caches[reply.index])
            dialogue.keep(line, reply.text)
        tokens = []


def ask(question: str) -> str | None:
    """A line of stdin, None at its end. The question goes to stderr, since stdout is for samples."""
    print(question, end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.rstrip("\n") if line else None


def pick(ranked: Sequence[Ranked]) -> Sample:
    """Asks which reply to keep, until a number answers; an empty answer keeps the best."""
    while not (answer := ask(f"keep [1-{len(ranked)}]: ") or "1").isdecimal() or not 1 <= int(answer) <= len(ranked):
        print(f"{answer!r} is not a number from 1 to {len(ranked)}", file=sys.stderr)
    return ranked[int(answer) - 1].sample


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for input that cannot be run, 130 where the user stopped it."""
    options = build_parser().parse_args(arguments)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "bifurcated", "inductor")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # outlives a reboot, unlike the default in /tmp
    # Started without one of them (">&-"), Python has None there.
    sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")
    try:
        session = set_up(options)
        execution = session.execution
        if options.plan:
            limit = session.checkpoint.args.context_limit
            print(f"{execution.memory}\nthe model's context limit   {limit:>10}  tokens of prompt and new ones")
            return 0
        if execution.memory.waves > 1 and not options.quiet:
            print(f"running in {execution.memory.waves} waves: memory does not hold all at once", file=sys.stderr)
        if execution.compiled and not options.quiet:
            print("the first step compiles, up to minutes; later runs find it in a cache", file=sys.stderr)
        model = load_model(session.checkpoint, session.device, session.dtype)
        if execution.packed:
            pack_linears(model)
        steps = make_steps(model, execution.compiled, options.compile_prefill)
        if execution.compiled:
            keep_freed_memory()
        with torch.profiler.profile() if options.profile else contextlib.nullcontext() as profile:
            (interact if options.interactive else run_once)(session, model, steps)
        if options.profile:
            profile.export_chrome_trace(str(options.profile))
    except BrokenPipeError:
        # The reader has left. What Python still holds for stdout would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
