"""The command line: flags, their checks, one run or a conversation.

    python generate.py --prompt "Once upon a time" -n 16 --top 4

Samples go to stdout, everything else to stderr.
"""

import argparse
import json
import os
import secrets
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

if __name__ == "__main__" and not sys.warnoptions:
    warnings.simplefilter("ignore")  # before torch is imported, which warns where NumPy is not installed

import torch

from chat import Conversation, Dialogue, choose_chat
from checkpoint import Checkpoint, load_model, read_checkpoint, weight_sizes
from drafts import Speculation, choose_draft
from engine import Engine
from hub import locate
from options import build_parser, check_inputs_stay, check_options, read_prompt
from plan import (
    Plan,
    available_memory,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    plan_run,
    weigh_sizes,
)
from ranks import Listener, Ranks, join, lost_rank
from report import Console, Stopwatch, describe, measure, print_report, summary
from samples import Ranked, Request, Sample, rank
from sampling import Sampling
from tokenizer import load_tokenizer


@dataclass(frozen=True)
class Session:
    """A validated command line and what it resolved to. prompt_tokens: empty in --interactive without a prompt.
    request: what this replica draws."""

    options: argparse.Namespace
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint
    dialogue: Dialogue
    prompt_text: str | None
    prompt_tokens: list[int]
    request: Request
    available: int
    plan: Plan
    speculation: Speculation | None


def decide(options: argparse.Namespace) -> tuple[str | None, int, torch.dtype]:
    """What one rank decides for all: the prompt's text, the seed, the dtype. Raises ValueError."""
    check_options(options)
    dtype = choose_dtype(options.dtype, choose_device(options.device))
    return read_prompt(options), secrets.randbelow(2**31) if options.seed is None else options.seed, dtype


def set_up(
    options: argparse.Namespace, ranks: Ranks, text: str | None, seed: int, dtype: torch.dtype, available: int
) -> Session:
    """Checks everything that can be checked before the weights are read. Raises ValueError or OSError."""
    device, mine = choose_device(options.device), ranks.samples(options.num_samples)
    request = Request(
        len(mine),
        options.max_new_tokens,
        Sampling(options.temperature, options.top_k or None, options.top_p, options.min_p, options.repetition_penalty),
        seed,
        options.attention,
        stop=tuple(options.stop),
        prefill_chunk=options.prefill_chunk,
        kv_dtype=options.kv_dtype,
        first_index=mine.start,
    )
    checkpoint = read_checkpoint(locate(options.checkpoint_path))  # last, since it may fetch a model
    check_inputs_stay(options, checkpoint.folder)
    args, shard = checkpoint.args, ranks.shard
    local = shard.local(args)
    tokenizer = load_tokenizer(checkpoint.folder)
    chat = choose_chat(checkpoint.folder, tokenizer, options.chat, options.interactive)
    dialogue = Dialogue(tokenizer, args.vocab_size, chat, options.system)
    ends = frozenset() if options.ignore_eos else checkpoint.eos_ids | dialogue.eos_ids
    request = replace(request, eos_ids=ends)
    tokens = [] if text is None else dialogue.encode_turn(text)
    length = options.synthetic_prompt or len(tokens)
    if length and not options.plan:
        request.check_length(args, length)
    weights = weigh_sizes(weight_sizes(checkpoint, device, dtype, len(mine), shard), args)
    work = request.workload(length, options.num_runs)
    drafting = options.draft, options.draft_checkpoint_path, options.speculate_k
    speculation = choose_draft(*drafting, checkpoint, (device, dtype, len(mine)))
    if speculation is not None:
        if speculation.draft.weights > weights.total:
            print("warning: the draft is larger than the model: that saves no time", file=sys.stderr)
        work, weights = speculation.widen(work, args), speculation.heavier(weights)
    plan = plan_run(local, weights, work, device, dtype, available, options.compile)
    if options.synthetic_prompt and not options.plan:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(args.vocab_size, (length,), generator=generator).tolist()
    return Session(
        options, ranks, device, dtype, checkpoint, dialogue, text, tokens, request, available, plan, speculation
    )


def own_memory(options: argparse.Namespace, ranks: Ranks) -> int:
    return options.max_memory or available_memory(choose_device(options.device), ranks.neighbours)


def resolve(options: argparse.Namespace, ranks: Ranks) -> Session:
    """What all ranks run. Raises ValueError or OSError."""
    text, seed, dtype = ranks.share(lambda: decide(options))
    options.seed = seed  # which is told with the samples
    available = min(ranks.all(ranks.agree(lambda: own_memory(options, ranks))))
    ranks.agree(lambda: locate(options.checkpoint_path) if ranks.local == 0 else None)  # one fetches for its machine
    session = ranks.agree(lambda: set_up(options, ranks, text, seed, dtype, available))
    return replace(session, plan=ranks.share(lambda: session.plan))


def open_engine(session: Session) -> Engine:
    """The model of a session, which will run as it was planned."""
    options = session.options
    shard = session.ranks.shard
    model = load_model(session.checkpoint, session.device, session.dtype, session.request.num_samples, shard)
    compile = options.compile if session.ranks.control is None else session.plan.compiled
    engine = Engine(model, session.dialogue.tokenizer, compile, shard)
    if session.speculation is not None:
        session.speculation.place(engine, session.request.num_samples)
    engine.weights, engine.available, engine.runs = session.plan.weights, session.available, options.num_runs
    engine.prepare(session.plan)
    if options.compile_prefill:
        engine.hidden = torch.compile(model.hidden, dynamic=True)
    return engine


def run_once(session: Session, engine: Engine) -> None:
    """--num_runs runs of one prompt, then the samples, the self-check and the report."""
    options, runs = session.options, []
    samples: list[Sample] = []
    for run in range(1, options.num_runs + 1):
        with Console(options, session.plan, session.device, session.prompt_text, samples) as console:
            if run < options.num_runs:
                console.hold()
            if console.streams:
                console.show_live(engine.stream(session.prompt_tokens, session.request, console))
                samples = console.finished
            else:
                drawn = engine.generate(session.prompt_tokens, session.request, console)
                samples = session.ranks.gather(drawn)
        runs.append(console)
    try:
        console.show(samples)
    finally:  # also where nobody reads the samples to their end
        finish_report(session, engine, runs, samples)


def finish_report(session: Session, engine: Engine, runs: Sequence[Stopwatch], samples: Sequence[Sample]) -> None:
    """The report of the runs, on stderr and at --report, with --selfcheck's difference over the printed samples."""
    options = session.options
    recipe = session.checkpoint.recipe
    report = describe(engine, session.request, session.plan, None if recipe is None else recipe.mode)
    report |= measure(runs, session.plan, session.device, options.compile_prefill)
    report |= session.ranks.describe(report)
    report |= {} if session.speculation is None else session.speculation.report()
    if options.selfcheck:
        drawn = [each.sample for each in rank(samples, options.rank)[: options.top]]
        scores = engine.score(session.prompt_tokens, [sample.tokens for sample in drawn])
        report["selfcheck_max_difference"] = max(
            abs(decoded - scored)
            for sample, score in zip(drawn, scores, strict=True)
            for decoded, scored in zip(sample.logprobs, score.logprobs, strict=True)
        )
    if options.verbose:
        print_report(report)
    elif not options.quiet:
        print(summary(report, session.plan), file=sys.stderr)
    if options.report:
        options.report.write_text(json.dumps(report, indent=2) + "\n", "utf-8")


def interact(session: Session, engine: Engine) -> None:
    """--interactive: a turn for the prompt, if given, then one per line of stdin, until it ends."""
    options, dialogue, ranks = session.options, session.dialogue, session.ranks
    conversation = Conversation(engine, session.request)
    if not options.quiet:
        print(f"seed {session.request.seed}", file=sys.stderr)
    line: str | None = session.prompt_text
    tokens, turn = session.prompt_tokens, 1
    while tokens or (line := ranks.ask(partial(ask, "> "))) is not None:
        line = line or ""
        if not (tokens or line):
            continue
        try:
            tokens = tokens or dialogue.encode_turn(line)
            with Console(options, session.plan, session.device, None, turn=turn) as console:
                if console.streams:
                    console.show_live(conversation.stream(tokens, console))
                else:
                    conversation.turn(tokens, console)
        except ValueError as error:
            held = len(conversation.history)
            hint = f"; the conversation holds {held} tokens, begin a new one to go on" if held else ""
            print(f"error: {error}{hint}", file=sys.stderr)
        else:
            ranked = console.show(ranks.gather(console.finished))
            reply = ranks.ask(partial(pick, ranked)) if options.pick else ranked[0].sample
            conversation.keep(reply)
            dialogue.keep(line, reply.text or "")
            turn += 1
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


def run(options: argparse.Namespace) -> None:
    """Everything between the parsed flags and the exit status. Raises ValueError or OSError."""
    ranks = join(options.tp, choose_device(options.device))
    if ranks.control is not None:
        sys.stdout = Listener(sys.stdout)
    if not ranks.leads:  # runs the same, and says nothing
        options.quiet, options.verbose, options.report, options.profile = True, False, None, None
        sys.stdout = open(os.devnull, "w")
    session = resolve(options, ranks)
    plan = session.plan
    if options.plan:
        limit = session.checkpoint.args.context_limit
        print(f"{plan}\nthe model's context limit   {limit:>10}  tokens of prompt and new ones")
        return
    if plan.waves > 1 and not options.quiet:
        print(f"running in {plan.waves} waves: memory does not hold all at once", file=sys.stderr)
    if plan.compiled and not options.quiet:
        print("the first step compiles, up to minutes; later runs find it in a cache", file=sys.stderr)
    if plan.compiled:
        keep_freed_memory()
    engine = ranks.agree(lambda: open_engine(session))
    go = interact if options.interactive else run_once
    if options.profile:
        with torch.profiler.profile() as profile:
            go(session, engine)
        profile.export_chrome_trace(str(options.profile))
    else:
        go(session, engine)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit status: 0, 2 for input that cannot be run, 130 where the user stopped it."""
    options = build_parser().parse_args(arguments)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "bifurcated", "inductor")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # outlives a reboot, unlike the default in /tmp
    # Started without one of them (">&-"), Python has None there.
    sys.stdin, sys.stdout = sys.stdin or open(os.devnull), sys.stdout or open(os.devnull, "w")
    try:
        run(options)
    except BrokenPipeError:
        # The reader has left. What Python still holds for stdout would raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {str(error).splitlines()[0]}: give a lower --max_memory, or fewer samples", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if (lost := lost_rank(error)) is None:
            raise
        print(f"error: {lost}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
