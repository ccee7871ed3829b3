"""Command line: flags, checks, one run, a batch or a chat.

    python generate.py --prompt "Once upon a time" -n 16 --top 4

Samples go to stdout, everything else to stderr.
"""

from cli.system import INTERRUPTED, begin, cache_folder, finish, print_error, start
from layers.notices import showing

if __name__ == "__main__":
    start()

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

from cli.options import changed, check_inputs_stay, check_outputs, read_options, read_piped, read_prompt, request_of

if __name__ == "__main__":
    begin(read_options().quiet)  # --help and invalid flags do not wait for the imports below

import torch

from cli.console import (
    Console,
    Stopwatch,
    describe,
    largest_difference,
    measure,
    note_names,
    print_report,
    profiled,
    settings_of,
    summary,
)
from cli.jobs import (
    Job,
    Output,
    Progress,
    ResumeState,
    end_output,
    fingerprint,
    open_output,
    output_lines,
    read_begun,
    set_up_job,
)
from cli.jobs import summary as summarise
from cli.prompts import Record, Spool, records_of
from cli.ranks import Listener, Ranks, join, lost_rank, restarted
from cli.repl import Repl
from engine.chat import ChatEncoder, choose_chat
from engine.engine import Engine
from engine.plan import (
    Plan,
    available_memory,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    longest_context,
    out_of_memory,
    peak_memory,
    plan_run,
    sum_weight_sizes,
)
from engine.request import Request, new_seed
from engine.samples import Sample, not_finite
from engine.scheduler import BatchStats, workload
from engine.speculate import Speculation, choose_draft
from loading.checkpoint import Checkpoint, load_joined, read_checkpoint, weight_sizes
from loading.files import counted, files_of, write_file
from loading.hub import locate
from loading.tokenizer import load_tokenizer
from sampling import RULE
from tp import Shard


@dataclass(frozen=True)
class Session:
    """A validated command line and everything resolved from it. options: with the seed and dtype that were chosen.
    tokens: the encoded prompt; empty in --interactive without one. request: what this replica draws. room: the most
    tokens that a conversation can hold."""

    options: argparse.Namespace
    ranks: Ranks
    checkpoint: Checkpoint
    dialogue: ChatEncoder
    text: str | None
    tokens: list[int]
    request: Request
    plan: Plan
    speculation: Speculation | None
    room: int
    job: Job | None

    @property
    def device(self) -> torch.device:
        return self.plan.space.device

    @property
    def dtype(self) -> torch.dtype:
        return self.plan.space.dtype


def decide(options: argparse.Namespace, several: bool) -> tuple[int, str, str | None, bytes | None, ResumeState]:
    """Read on one rank what all ranks need: the seed, the dtype, the prompt's text, the prompts that only one of
    several ranks can read from a pipe, and what an earlier run of them finished. Raises ValueError."""
    check_outputs(options)
    dtype = choose_dtype(options.dtype, choose_device(options.device))
    begun = ResumeState() if options.output is None else read_begun(options.output)
    text = read_prompt(options) if options.prompts is None else None
    seed, piped = options.seed, read_piped(options) if several else None
    if piped is not None and restarted():
        raise ValueError(
            f"--prompts {options.prompts} cannot be read again after a restart: save the prompts in a file"
        )
    if seed is None:
        seed = new_seed() if begun.header is None else begun.header["seed"]
    return seed, str(dtype).removeprefix("torch."), text, piped, begun


def set_up(
    options: argparse.Namespace,
    ranks: Ranks,
    text: str | None,
    records: Spool[Record] | None,
    begun: ResumeState,
    available: int,
) -> Session:
    """Check everything that can be checked before the weights are read. Raises ValueError or OSError."""
    mine = ranks.samples(options.num_samples) if records is None else range(options.num_samples)
    request = replace(request_of(options), num_samples=len(mine), first_index=mine.start)
    checkpoint = read_checkpoint(locate(options.checkpoint_path))  # last, since it may fetch a model
    draft = options.draft_checkpoint_path
    check_inputs_stay(options, [*files_of(checkpoint.folder), *(files_of(locate(draft)) if draft else [])])
    args = checkpoint.args
    tokenizer = load_tokenizer(checkpoint.folder)
    messages = any(not isinstance(record.said, str) for record in records or ())
    asked = True if messages and options.chat is None else options.chat
    chat = choose_chat(checkpoint.folder, tokenizer, asked, options.interactive)
    dialogue = ChatEncoder(tokenizer, args.vocab_size, chat, options.system)
    if not (options.quiet or options.chat) and (chat is None or records is not None):
        said = [text] if records is None else (record.said for record in records)
        note_names((each for each in said if isinstance(each, str)), tokenizer)
    ends = frozenset() if options.ignore_eos else checkpoint.eos_ids | dialogue.eos_ids
    request = replace(request, eos_ids=ends)
    job = None if records is None else set_up_job(options, ranks, records, begun, checkpoint, dialogue, request)
    tokens = [] if text is None else dialogue.encode_turn(text)
    length = options.synthetic_prompt or len(tokens)
    if options.interactive:  # each turn is limited to what is left
        request = replace(request, max_new_tokens=min(options.max_new_tokens, max(1, args.context_limit - length)))
    if length and not options.plan:
        request.check_length(args.context_limit, length)
    plan, speculation, room = arrange(options, checkpoint, request, length, ranks.shard, available, job)
    if options.synthetic_prompt and not options.plan:
        generator = torch.Generator().manual_seed(options.seed)
        tokens = torch.randint(args.vocab_size, (length,), generator=generator).tolist()
    return Session(options, ranks, checkpoint, dialogue, text, tokens, request, plan, speculation, room, job)


def arrange(
    options: argparse.Namespace,
    checkpoint: Checkpoint,
    request: Request,
    length: int,
    shard: Shard,
    available: int,
    job: Job | None,
) -> tuple[Plan, Speculation | None, int]:
    """Plan a prompt of `length` tokens; for --interactive with --plan, the longest conversation. Returns the plan, the
    draft, and the most tokens that a conversation can hold. Raises ValueError."""
    device, args = choose_device(options.device), checkpoint.args
    dtype = choose_dtype(options.dtype, device)
    local, work = shard.local(args), request.workload(length, options.num_runs)
    if job is not None:
        work = workload(job.prompts.asked or Counter([(1, request)]), request, device)
    sizes = weight_sizes(checkpoint, device, dtype, work.num_samples, shard)
    weights = sum_weight_sizes(sizes, args, shard.parts(args))
    drafting = options.draft, options.draft_checkpoint_path, options.speculate_k
    speculation = choose_draft(*drafting, checkpoint, (device, dtype, request.num_samples))
    if speculation is not None:
        if speculation.draft.weights > weights.total:
            print("warning: the draft is larger than the model: that saves no time", file=sys.stderr)
        work, weights = speculation.widen(work, args), speculation.heavier(weights)
    how = device, dtype, available, options.compile
    room = longest_context(local, weights, work, *how) if options.interactive else 0
    if options.interactive and options.plan:
        work = replace(work, context=max(length, room - work.max_new_tokens))
    return plan_run(local, weights, work, *how), speculation, room


def own_memory(options: argparse.Namespace, ranks: Ranks) -> int:
    return options.max_memory or available_memory(choose_device(options.device), ranks.local_world_size)


def fetch(options: argparse.Namespace) -> None:
    """Download the model and the draft into the hub's cache. Raises ValueError or OSError."""
    for path in (options.checkpoint_path, options.draft_checkpoint_path):
        if path is not None:
            locate(path)


def resolve(options: argparse.Namespace, ranks: Ranks) -> Session:
    """Set up the same run on all ranks. Raises ValueError or OSError."""
    seed, dtype, text, piped, begun = ranks.share(lambda: decide(options, ranks.control is not None))
    records = None
    if options.prompts is not None:
        records = ranks.agree(lambda: records_of(options, piped), patient=True)
    options = changed(options, seed=seed, dtype=dtype)
    available = min(ranks.all(ranks.agree(lambda: own_memory(options, ranks))))
    ranks.agree(lambda: fetch(options) if ranks.local == 0 else None, patient=True)  # once per machine
    session = ranks.agree(lambda: set_up(options, ranks, text, records, begun, available))
    if session.job is not None:
        ranks.check_equal(session.job.header["prompts"], f"--prompts {options.prompts} must be the same file")
    # Ranks of one network use the plan of their first: another type of CPU may plan differently.
    return replace(session, plan=ranks.all(session.plan)[ranks.rank - ranks.shard.rank])


def open_engine(session: Session) -> Engine:
    """Load a session's model and prepare it to run as planned."""
    options, plan, shard = session.options, session.plan, session.ranks.shard
    model = load_joined(session.checkpoint, session.device, session.dtype, plan.workload.num_samples, shard)
    compile = options.compile if session.ranks.control is None else plan.compiled
    engine = Engine(model, session.dialogue.tokenizer, compile, shard, plan, options.compile_prefill)
    if session.speculation is not None:
        engine.use(session.speculation, session.request.num_samples)
    engine.prepare(plan)
    return engine


def run_once(session: Session, engine: Engine) -> None:
    """Run one prompt --num_runs times, then print the samples, run the self-check and write the report."""
    options, plan, runs = session.options, session.plan, []
    samples: list[Sample] = []
    try:
        for run in range(1, options.num_runs + 1):
            with Console(options, plan, session.device, session.text, samples) as console:
                runs.append(console)
                if run < options.num_runs:
                    console.hold()
                if console.streams:
                    console.show_live(engine.stream(session.tokens, session.request, console, plan))
                    samples = console.finished
                else:
                    drawn = engine.generate(session.tokens, session.request, console, plan)
                    samples = [each for part in session.ranks.gather(drawn) for each in part]
    except (KeyboardInterrupt, OSError):  # OSError: stdout cannot be written
        if session.ranks.control is None:  # several ranks stop at different points
            finish_report(session, engine, runs, [each.sample for each in console.ranked])
        raise
    try:
        console.show(samples)
    finally:  # also if the reader closes stdout early
        finish_report(session, engine, runs, samples)


def finish_report(session: Session, engine: Engine, runs: Sequence[Stopwatch], samples: Sequence[Sample]) -> None:
    """Write the report of the runs to stderr and --report, with --selfcheck's difference over the printed samples."""
    options = session.options
    recipe = session.checkpoint.recipe
    session.ranks.wait()  # rank 0 may have waited for the reader of its samples
    report = settle(session) | describe(engine, session.request, session.plan, None if recipe is None else recipe.mode)
    report |= measure(runs, session.plan, session.device, options.compile_prefill)
    report |= session.ranks.describe(report)
    report |= {} if session.speculation is None else session.speculation.report()
    if options.selfcheck and not report["interrupted"]:
        report["selfcheck_max_difference"] = largest_difference(options, engine, session.tokens, samples)
    emit_report(options, report, summary(report, session.plan))


def emit_report(options: argparse.Namespace, report: dict[str, object], lines: str) -> None:
    """Print the whole report (--verbose) or `lines` to stderr, and write the report to --report."""
    if options.verbose:
        print_report(report)
    elif not options.quiet:
        print(lines, file=sys.stderr)
    if options.report:
        text = json.dumps(report, indent=2) + "\n"
        write_file(options.report, lambda path: path.write_text(text, "utf-8"))


def run_batch(session: Session, engine: Engine, output: Output | None) -> None:
    """Run --prompts: write the lines of each prompt when its last sample finishes."""
    options, ranks, job, tally = session.options, session.ranks, session.job, BatchStats()
    assert job is not None
    progress = Progress(options.quiet, len(job.prompts), tally, ranks)
    try:
        for outcome, fields in job.outcomes(engine, session.request, session.plan, tally, ranks):
            block = output_lines(outcome, fields, options)
            if output is None:
                print(block, end="", flush=True)
            elif ranks.shard.rank == 0:
                output.append(block.encode())
            if options.selfcheck and outcome.samples:
                progress.check(largest_difference(options, engine, outcome.prompt.tokens, outcome.samples))
            progress.show(outcome)
    except (KeyboardInterrupt, OSError):
        if ranks.control is None:  # several ranks stop at different points
            finish_batch(session, progress, True)
        if output is not None:
            output.close()
        if output is not None and not options.quiet:
            told = f"stopped: {options.output} holds what is finished: the same command with --resume continues"
            print(told, file=sys.stderr)
        raise
    finally:
        progress.bar.clear()
    if output is not None:
        end_output(output, ranks)
    finish_batch(session, progress, False)


def finish_batch(session: Session, progress: Progress, interrupted: bool) -> None:
    """Write the report of a batch to stderr and --report."""
    assert session.job is not None
    replicas = session.ranks.gather((progress.tally, progress.errors, progress.difference))
    decided = {
        "interrupted": interrupted,
        "num_samples": session.request.num_samples,
        "prompts_done_before": len(session.job.begun.done),
        "replicas": session.ranks.replicas,
        "compiled": session.plan.compiled,
        "compile_reason": session.plan.compile_reason,
        "packed_weights": session.plan.packed,
        "device": session.device.type,
        "torch": torch.__version__,
    }
    drafted = {} if session.speculation is None else session.speculation.report()
    report = decided | settle(session) | progress.report(replicas) | drafted
    report["peak_memory_bytes"], report["mapped_file_bytes"] = peak_memory(session.device)
    progress.bar.clear()
    emit_report(session.options, report, summarise(report))


def settle(session: Session) -> dict[str, object]:
    """Return the report's fields that determine the samples: model, seed, draw, flags."""
    model = {"model": fingerprint(session.checkpoint), "seed": session.request.seed, "draw": RULE}
    return model | settings_of(session.options)


def interact(session: Session, engine: Engine) -> None:
    """Run --interactive."""
    talk = Repl(session.options, session.ranks, session.dialogue, engine, session.request, session.plan, session.room)
    talk.run(session.text)


def run(options: argparse.Namespace) -> None:
    """Run the command from parsed flags to its end. Raises ValueError or OSError."""
    if restarted() and options.output is not None:
        options = changed(options, resume=True)
    ranks = join(options.tp, choose_device(options.device))
    if ranks.control is not None:
        sys.stdout = Listener(sys.stdout)
    if not ranks.leads:  # does the same work and prints nothing
        options = changed(options, quiet=True, verbose=False, report=None, profile=None)
        sys.stdout = open(os.devnull, "w")
    session = resolve(options, ranks)
    plan = session.plan
    if options.plan:
        args = session.checkpoint.args
        stretched = f", max_position_embeddings {args.max_positions} stretched" if args.max_positions else ""
        print(f"{plan}\nthe model's context limit   {args.context_limit:>10}  tokens of prompt and new ones{stretched}")
        return
    job, path = session.job, options.output
    output = None if job is None or path is None else open_output(path, job.begun, job.header, ranks)
    if session.job is not None and not session.job.prompts:
        if output is not None:
            end_output(output, ranks)
        if not options.quiet:
            print(f"every prompt is done: {options.output} has its samples, nothing is left to draw", file=sys.stderr)
        return
    if session.job is None and plan.rows_at_once < plan.workload.num_samples and not options.quiet:
        rows = counted(plan.rows_at_once, "sample")
        print(f"running {rows} at a time: not all fit into memory", file=sys.stderr)
    if plan.compiled and not options.quiet:
        print("the first step compiles, up to minutes; later runs find it in a cache", file=sys.stderr)
    if plan.compiled:
        keep_freed_memory()
    with showing("loading"):
        engine = ranks.agree(lambda: open_engine(session))
    go = interact if options.interactive else run_once
    if session.job is not None:
        go = partial(run_batch, output=output)
    try:
        with profiled(options.profile) if options.profile else nullcontext():
            go(session, engine)
    except FloatingPointError as error:
        raise not_finite(session.checkpoint.weights[0], session.dtype, error) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 2 for invalid input, 130 if the user interrupted it."""
    options = read_options(arguments)
    cache = cache_folder() / "bifurcated" / "inductor"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))  # survives a reboot, unlike the default in /tmp
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler logs to stderr
    try:
        run(options)
    except BrokenPipeError:
        return 0  # the reader closed the pipe: no error
    except (ValueError, OSError) as error:
        return print_error(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    except (RuntimeError, MemoryError) as error:
        if (told := out_of_memory(error) or lost_rank(error)) is None:
            raise
        return print_error(told)
    return 0


if __name__ == "__main__":
    finish(main)
