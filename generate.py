"""The command line: flags, their checks, one run or a conversation.

    python generate.py --prompt "Once upon a time" -n 16 --top 4

Samples go to stdout, everything else to stderr.
"""

import argparse
import json
import os
import re
import secrets
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if __name__ == "__main__" and not sys.warnoptions:
    warnings.simplefilter("ignore")  # before torch is imported, which warns where NumPy is not installed

import torch

from cache import LAYOUTS
from chat import Conversation, Dialogue, choose_chat
from checkpoint import Checkpoint, load_model, read_checkpoint, weight_sizes
from engine import Engine, Request
from hub import locate
from plan import (
    Plan,
    available_memory,
    choose_device,
    choose_dtype,
    keep_freed_memory,
    parse_size,
    plan_run,
    weigh_sizes,
)
from report import Console, OneLineParser, Stopwatch, describe, measure, print_report, summary
from samples import Ranked, Sample, rank
from sampling import Sampling
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent
STORY = "Once upon a time"


def size(text: str) -> int:
    """parse_size, its refusal in argparse's form."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def unescaped(text: str) -> str:
    r"""The text with \n, \t, \r and \\ as the characters that they stand for."""
    return re.sub(r"\\([ntr\\])", lambda match: {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[match[1]], text)


def build_parser() -> argparse.ArgumentParser:
    """Every flag and every default of the command line."""

    parser = OneLineParser(
        description="Draw N samples of one prompt. The prompt's key/value cache is held once and read once per step.",
    )

    def flag(name: str, help: str, *aliases: str, **settings: Any) -> None:
        default = settings.get("default")
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        group.add_argument(name, *aliases, help=help + shown, **settings)

    group = parser.add_argument_group("model")
    tiny = ROOT / "checkpoints" / "tiny" / "model.pth"
    where = "model.pth, a model's folder, or OWNER/NAME of the Hugging Face Hub; default: checkpoints/tiny"
    flag("--checkpoint_path", where, default=str(tiny))
    flag("--device", "cpu, cuda, cuda:1; auto is cuda where there is one", default="auto")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    precision = "auto is bfloat16 where the device has instructions for it, else float32"
    flag("--dtype", precision, choices=dtypes, default="auto")
    group = parser.add_argument_group("prompt")
    flag("--prompt", f"text; default: what is piped in, or {STORY!r}")
    flag("--prompt_file", "read the prompt from a UTF-8 file; - is stdin")
    flag("--synthetic_prompt", "a prompt of so many random tokens", type=int, metavar="T")
    flag("--interactive", "several turns; the context grows by what you keep", action="store_true")
    chat = "send texts as messages, in the model's chat template; default: in --interactive where it has one"
    flag("--chat", chat, action=argparse.BooleanOptionalAction)
    flag("--system", "in a chat, what precedes the first message", metavar="TEXT")
    flag("--pick", "in --interactive, choose the reply to keep by its number", action="store_true")
    group = parser.add_argument_group("sampling")
    drawn = Request()
    flag("-n", "samples drawn in parallel", "--num_samples", "--parallel_samples", type=int, default=drawn.num_samples)
    flag("--top", "print the so many best; default: all", type=int)
    flag("--max_new_tokens", "per sample", type=int, default=drawn.max_new_tokens)
    flag("--temperature", "0 takes the most likely token", type=float, default=drawn.sampling.temperature)
    flag("--top_k", "draw from the k most likely tokens; 0 is off", type=int, default=drawn.sampling.top_k)
    flag("--top_p", "draw from the fewest tokens that hold this mass", type=float)
    flag("--min_p", "draw from tokens at least this likely, relative to the likeliest", type=float)
    flag("--seed", "same seed, same samples; default: a new one, which stderr names", type=int)
    stop = r"end a sample before this text; \n, \t and \\ are read as escapes; repeatable"
    flag("--stop", stop, action="append", default=[], metavar="TEXT", type=unescaped)
    flag("--ignore_eos", "go on past the end of text, to max_new_tokens", action="store_true")
    group = parser.add_argument_group("execution")
    flag("--attention", "how the samples hold the context", choices=tuple(LAYOUTS), default=drawn.attention)
    flag("--kv_dtype", "of the context's keys and values; auto: --dtype", choices=("auto", "int8"), default="auto")
    flag("--compile", "the decode step; default: where it pays", action=argparse.BooleanOptionalAction)
    flag("--compile_prefill", "pays for many prompts in one process", action="store_true")
    flag("--prefill_chunk", "tokens of the prompt read at a time", type=int, default=drawn.prefill_chunk)
    flag("--max_memory", "such as 4GB; default: what is free", type=size)
    flag("--plan", "print the memory plan and run nothing", action="store_true")
    group = parser.add_argument_group("output")
    flag("--format", "jsonl is one object a line, best first", choices=("text", "jsonl"), default="text")
    flag("--echo", "print the prompt before each sample", action="store_true")
    flag("--report", "write the report as JSON to this file", type=Path)
    flag("--verbose", "the whole report on stderr, not three lines of it", action="store_true")
    flag("--num_runs", "timed repetitions, with the same samples", type=int, default=1)
    flag("--profile", "write a chrome trace of the run to this file", type=Path)
    flag("--selfcheck", "score the printed samples again, all their tokens in one pass", action="store_true")
    flag("--quiet", "no progress and no report on stderr", action="store_true")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError where flags do not go together, or a file could not be written in the end."""
    for name in ("num_runs", "top", "synthetic_prompt"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    if options.interactive and (options.report or options.selfcheck or options.num_runs > 1):
        raise ValueError("--report, --selfcheck and --num_runs are for one prompt: leave them out of --interactive")
    if options.kv_dtype == "int8" and options.interactive:
        raise ValueError("--kv_dtype int8 is for one prompt: leave it out of --interactive")
    if options.pick and not options.interactive:
        raise ValueError("--pick chooses between the replies of a turn: add --interactive")
    if options.echo and (options.interactive or options.chat or options.format == "jsonl" or options.synthetic_prompt):
        raise ValueError("--echo is for a plain text: leave out --interactive, --chat, --format or --synthetic_prompt")
    if options.interactive and options.verbose:
        raise ValueError("--verbose shows the report of one prompt: leave it out of --interactive")
    if options.synthetic_prompt and (options.chat or options.interactive):
        raise ValueError("--synthetic_prompt is no message: leave out --chat or --interactive")
    given = [name for name in ("prompt", "prompt_file", "synthetic_prompt") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} are both given: give one")
    check_outputs(options)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises ValueError where --report or --profile cannot be written."""
    outputs = [path for path in (options.report, options.profile) if path is not None]
    for path in outputs:
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: give a file in a folder that exists")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"--report and --profile are both {outputs[0]}: give two files")


def check_inputs_stay(options: argparse.Namespace, folder: Path) -> None:
    """Raises ValueError where --report or --profile would replace the prompt, or what lies with the model."""
    prompt = Path(options.prompt_file or "").resolve()
    for path in (options.report, options.profile):
        full = path and path.resolve()
        if full and (full == prompt or (full.exists() and full.parent == folder.resolve())):
            raise ValueError(f"{path} is the prompt, or lies with the model: it would be replaced, give another file")


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt's text; None for a synthetic one, and in --interactive without one. Raises ValueError where it is
    empty or not UTF-8."""
    text, name = options.prompt, options.prompt_file
    if name is None and (text is not None or options.synthetic_prompt or options.interactive):
        if text == "":
            raise ValueError("the prompt is empty: give some text")
        return text
    if name is None and sys.stdin.isatty():
        return STORY
    try:
        data = sys.stdin.buffer.read() if name in (None, "-") else Path(name).read_bytes()
        text = data.decode("utf-8").removesuffix("\n")  # which echo and editors add
    except OSError as error:
        raise ValueError(f"--prompt_file {name} cannot be read ({error.strerror}): give a text file") from error
    except UnicodeDecodeError as error:
        source = "stdin" if name in (None, "-") else name
        raise ValueError(f"the prompt in {source} is not UTF-8 (byte {error.start}): convert it") from error
    if text == "" and name is not None:
        raise ValueError("the prompt is empty: give some text")
    return text or STORY


@dataclass(frozen=True)
class Session:
    """A validated command line and what it resolved to. prompt_tokens: empty in --interactive without a prompt."""

    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    checkpoint: Checkpoint
    dialogue: Dialogue
    prompt_text: str | None
    prompt_tokens: list[int]
    request: Request
    available: int
    plan: Plan


def set_up(options: argparse.Namespace) -> Session:
    """Checks everything that can be checked before the weights are read. Raises ValueError or OSError."""
    check_options(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    request = Request(
        options.num_samples,
        options.max_new_tokens,
        Sampling(options.temperature, options.top_k or None, options.top_p, options.min_p),
        secrets.randbelow(2**31) if options.seed is None else options.seed,
        options.attention,
        stop=tuple(options.stop),
        prefill_chunk=options.prefill_chunk,
        kv_dtype=options.kv_dtype,
    )
    text = read_prompt(options)
    checkpoint = read_checkpoint(locate(options.checkpoint_path))  # last, since it may fetch a model
    check_inputs_stay(options, checkpoint.folder)
    args = checkpoint.args
    tokenizer = load_tokenizer(checkpoint.folder)
    chat = choose_chat(checkpoint.folder, tokenizer, options.chat, options.interactive)
    dialogue = Dialogue(tokenizer, args.vocab_size, chat, options.system)
    ends = frozenset() if options.ignore_eos else checkpoint.eos_ids | dialogue.eos_ids
    request = replace(request, eos_ids=ends)
    tokens = [] if text is None else dialogue.encode_turn(text)
    length = options.synthetic_prompt or len(tokens)
    if length and not options.plan:
        request.check_length(args, length)
    available = available_memory(device) if options.max_memory is None else options.max_memory
    weights = weigh_sizes(weight_sizes(checkpoint, device, dtype, request.num_samples), args)
    work = request.workload(length, options.num_runs)
    plan = plan_run(args, weights, work, device, dtype, available, options.compile)
    if options.synthetic_prompt and not options.plan:
        generator = torch.Generator().manual_seed(request.seed)
        tokens = torch.randint(args.vocab_size, (length,), generator=generator).tolist()
    return Session(options, device, dtype, checkpoint, dialogue, text, tokens, request, available, plan)


def open_engine(session: Session) -> Engine:
    """The model of a session, which will run as it was planned."""
    options = session.options
    model = load_model(session.checkpoint, session.device, session.dtype, options.num_samples)
    engine = Engine(model, session.dialogue.tokenizer, options.compile)
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
            console.streams &= run == options.num_runs
            if console.streams:
                console.show_live(engine.stream(session.prompt_tokens, session.request, console))
                samples = console.finished
            else:
                samples = engine.generate(session.prompt_tokens, session.request, console)
        runs.append(console)
    ranked = rank(samples)[: options.top]
    try:
        console.show(ranked)
    finally:  # also where nobody reads the samples to their end
        finish_report(session, engine, runs, ranked)


def finish_report(session: Session, engine: Engine, runs: Sequence[Stopwatch], ranked: Sequence[Ranked]) -> None:
    """The report of the runs, on stderr and at --report, with --selfcheck's difference over the printed samples."""
    options = session.options
    recipe = session.checkpoint.recipe
    report = describe(engine, session.request, session.plan, None if recipe is None else recipe.mode)
    report |= measure(runs, session.plan, session.device, options.compile_prefill)
    if options.selfcheck:
        drawn = [each.sample for each in ranked]
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
    options, dialogue = session.options, session.dialogue
    conversation = Conversation(engine, session.request)
    if not options.quiet:
        print(f"seed {session.request.seed}", file=sys.stderr)
    line: str | None = session.prompt_text
    tokens = session.prompt_tokens
    while tokens or (line := ask("> ")) is not None:
        line = line or ""
        if not (tokens or line):
            continue
        try:
            tokens = tokens or dialogue.encode_turn(line)
            with Console(options, session.plan, session.device, None) as console:
                if console.streams:
                    console.show_live(conversation.stream(tokens, console))
                else:
                    conversation.turn(tokens, console)
        except ValueError as error:
            held = len(conversation.history)
            hint = f"; the conversation holds {held} tokens, begin a new one to go on" if held else ""
            print(f"error: {error}{hint}", file=sys.stderr)
        else:
            ranked = rank(console.finished)[: options.top]
            console.show(ranked)
            reply = pick(ranked) if options.pick else ranked[0].sample
            conversation.keep(reply)
            dialogue.keep(line, reply.text or "")
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
    session = set_up(options)
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
    engine = open_engine(session)
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
