"""Command-line flags with their defaults, and the checks that need nothing else, not even PyTorch."""

import argparse
import difflib
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from cli.system import check_new, check_writable, finish, print_error, read_bytes, without_newline
from engine.request import LAYOUT_NAMES, Request, Sampling
from loading.files import decode_text, identity


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser that prints one-line errors without usage, groups flags in sections and shows their defaults."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.synonyms: dict[str, str] = {}

    def section(self, title: str) -> None:
        """Start a section for the flags that follow."""
        self.group = self.add_argument_group(title)

    def flag(self, name: str, help: str, *aliases: str, elsewhere: str = "", **settings: Any) -> None:
        """Add a flag. elsewhere: its names in other programs, separated by spaces."""
        self.synonyms |= dict.fromkeys(elsewhere.split(), name)
        default = settings.get("default")
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        self.group.add_argument(name, *aliases, help=help + shown, **settings)

    def print_help(self, file: Any = None) -> NoReturn:
        finish(lambda: print(self.format_help(), end="", file=file))

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"(?<= )--[\w-]+", message.partition("unrecognized arguments:")[2])
        meant = dict.fromkeys(known for name in unknown if (known := self.closest(name)))
        self.refuse(f"{message}; did you mean {', '.join(meant)}?" if meant else f"{message}; see --help")

    def closest(self, name: str) -> str | None:
        """Return the flag that a mistyped one, or one of another program, may stand for."""
        name = name[2:].replace("-", "_")
        known = [each[2:] for each in self._option_string_actions if each.startswith("--")]
        close = [f"--{each}" for each in difflib.get_close_matches(name, known, 1, 0.7)]
        return self.synonyms.get(f"--{name}") or next(iter(close), None)

    def refuse(self, error: object) -> NoReturn:
        """Exit with status 2 and a one-line error; under torchrun only rank 0 prints it."""
        if os.environ.get("RANK", "0") == "0":
            print_error(error)
        self.exit(2)


ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "checkpoints" / "tiny" / "model.pth"
STORY = "Once upon a time"


def size(text: str) -> int:
    """Parse bytes such as "4GB", "512MiB", "1.5e9". Raises argparse.ArgumentTypeError if it is not a size."""
    units = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.rstrip("KMGTIBkmgtib ")
    try:
        size = int(float(number) * units[text[len(number) :].strip().upper()])
    except (ValueError, KeyError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: use, for example, 4GB or 512MiB") from None
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be above 0")
    return size


def unescaped(text: str) -> str:
    r"""Replace the escapes \n, \t, \r and \\ by their characters."""
    return re.sub(r"\\([ntr\\])", lambda match: {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}[match[1]], text)


def as_number(value: object) -> float:
    """Convert to float, from text too: YAML reads 1e-3 as text. Raises TypeError or ValueError, as the next
    three."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise TypeError(value)
    return float(value)


def as_whole(value: object, least: int = -1) -> int:
    found = as_number(value)
    if not found.is_integer() or found < least:
        raise ValueError(value)
    return int(found)


def as_switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(value)
    return value


def as_texts(value: object) -> tuple[str, ...]:
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list | tuple) or not all(isinstance(text, str) for text in found):
        raise TypeError(value)
    return tuple(filter(None, found))


def add_batch(flag: Callable[..., None]) -> None:
    """Add the flags of --prompts."""
    lines = "JSON-lines file of prompts, each a text or {id, prompt or messages, temperature ...}; -: stdin"
    flag("--prompts", help=lines, metavar="FILE")
    flag(
        "--prompt_separator", help="separator of the prompts if the file is plain text", metavar="TEXT", type=unescaped
    )
    flag("--skip_bad", help="skip invalid lines; default: stop at the first", action="store_true")
    flag("--output", help="file to append each prompt's samples to; default: stdout", type=Path)
    flag("--resume", help="continue the interrupted run that wrote --output", action="store_true")


def build_parser() -> OneLineParser:
    """Build the parser with all flags and defaults of the command line."""
    parser = OneLineParser(description="Generate N samples of one prompt, whose key/value cache is read once per step.")
    flag = parser.flag
    parser.section("model")
    where = "model.pth, a model folder, or OWNER/NAME on the Hugging Face Hub"
    flag("--checkpoint_path", where, default=str(TINY), elsewhere="--model --model_path --model_id")
    flag("--device", "device: cpu, cuda or cuda:1; auto: cuda if there is a GPU", default="auto")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    flag("--dtype", "data type; auto: bfloat16 if the hardware has it, else float32", choices=dtypes, default="auto")
    parser.section("prompt")
    flag("--prompt", f"text of the prompt; default: stdin if it is piped, otherwise {STORY!r}")
    flag("--prompt_file", "UTF-8 file with the prompt, used to its last byte; -: stdin")
    flag("--keep_newline", "keep the last newline of stdin; default: remove it", action="store_true")
    flag("--synthetic_prompt", "use T random tokens as the prompt", type=int, metavar="T")
    flag("--interactive", "chat over several turns, each continuing the reply that you keep", action="store_true")
    chat = "send the prompt as a message in the model's chat template; default: only in --interactive, if there is one"
    flag("--chat", chat, action=argparse.BooleanOptionalAction)
    flag("--system", "system message of a chat", metavar="TEXT", elsewhere="--system_prompt")
    flag("--pick", "in --interactive, choose the reply to keep by its number", action="store_true")
    parser.section("many prompts")
    add_batch(flag)
    parser.section("sampling")
    drawn, others = Request(), "--num_return_sequences --num_sequences"
    names = "--num_samples", "--parallel_samples"
    flag("-n", "number of samples drawn in parallel", *names, type=int, default=drawn.num_samples, elsewhere=others)
    flag("--top", "number of samples to print, best first; default: all", type=int)
    others = "--max_tokens --max_length --n_predict"
    flag("--max_new_tokens", "limit of new tokens per sample", type=int, default=drawn.max_new_tokens, elsewhere=others)
    ranks = "order of the samples; ended: those cut by length last, then as mean; mean: by mean log-probability"
    flag("--rank", ranks, choices=("ended", "mean"), default="ended")
    flag("--temperature", "sampling temperature; 0: most likely token", type=float, default=drawn.sampling.temperature)
    flag("--top_k", "draw from the k most likely tokens; 0: off", type=int, default=drawn.sampling.top_k)
    flag("--top_p", "draw from the fewest tokens whose probabilities sum to this; default: off", type=float)
    flag("--min_p", "draw from tokens at least this likely relative to the most likely one; default: off", type=float)
    penalty = "penalty on tokens that the prompt or the sample already has; above 1: less likely, 1: off"
    flag("--repetition_penalty", penalty, type=float, default=drawn.sampling.repetition_penalty)
    flag("--seed", "seed of the random numbers; default: a new one, printed on stderr", type=int)
    stop = r"end a sample before this text; \n, \t and \\ are escapes; may be repeated"
    flag("--stop", stop, action="append", default=[], metavar="TEXT", type=unescaped, elsewhere="--stop_strings")
    flag("--ignore_eos", "continue after end-of-text tokens, up to --max_new_tokens", action="store_true")
    parser.section("execution")
    layouts = "layout of the context; bifurcated: shared by all samples; contiguous, expanded: a copy for each"
    flag("--attention", layouts, choices=LAYOUT_NAMES, default=drawn.attention)
    cached = "data type of the context's keys and values; auto: same as --dtype"
    flag("--kv_dtype", cached, choices=("auto", "int8"), default="auto")
    flag("--compile", "compile the decode step; default: if it pays", action=argparse.BooleanOptionalAction)
    flag("--compile_prefill", "compile the prefill as well; pays for many prompts in one process", action="store_true")
    kinds = "draft for speculative decoding: prompt, layers:K or medusa PATH"
    flag("--draft", kinds, nargs="+", default=[], metavar=("KIND", "PATH"))
    flag("--draft_checkpoint_path", "draft model for speculative decoding, of the same vocabulary", metavar="PATH")
    flag("--speculate_k", "number of tokens that a draft proposes per step, or auto; default: 4")
    flag("--prefill_chunk", "number of prompt tokens read at a time; default: 512, on CUDA up to 4096", type=int)
    flag("--max_memory", "memory limit of each process, such as 4GB; default: what is free", type=size)
    parts = "under torchrun, number of processes that hold one network together; default: those of a machine"
    flag("--tp", parts, type=int, elsewhere="--tensor_parallel_size")
    flag("--plan", "print the memory plan and run nothing", action="store_true")
    parser.section("output")
    output_flags(flag)
    return parser


def output_flags(flag: Callable[..., None]) -> None:
    """Add the flags of the section "output"."""
    form = "jsonl: one JSON object per line, best first; default: text, with --prompts jsonl"
    flag("--format", form, choices=("text", "jsonl"))
    flag("--unranked", "with --format jsonl, print each sample as soon as it is finished", action="store_true")
    flag("--echo", "print the prompt before each sample", action="store_true")
    flag("--report", "JSON file to write the report to", type=Path)
    flag("--verbose", "print the whole report on stderr instead of three lines", action="store_true")
    flag("--num_runs", "number of timed repetitions with the same samples", type=int, default=1)
    flag("--profile", "file to write a Chrome trace of the run to", type=Path)
    again = "score the printed samples again in one pass and report the largest difference"
    flag("--selfcheck", again, action="store_true")
    flag("--quiet", "print no progress and no report on stderr", action="store_true")


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and run every check that needs nothing else. On an error the process exits with one line
    and status 2."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    try:
        check_options(options)
    except ValueError as error:
        parser.refuse(error)
    return options


def changed(options: argparse.Namespace, **values: object) -> argparse.Namespace:
    """Copy the flags with other values: nothing writes to parsed flags."""
    return argparse.Namespace(**vars(options) | values)


def request_of(options: argparse.Namespace) -> Request:
    """Build the Request from the flags. Raises ValueError."""
    filters = options.top_k or None, options.top_p, options.min_p
    return Request(
        options.num_samples,
        options.max_new_tokens,
        Sampling(options.temperature, *filters, options.repetition_penalty),
        options.seed,
        options.attention,
        stop=tuple(options.stop),
        prefill_chunk=options.prefill_chunk,
        kv_dtype=options.kv_dtype,
    )


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError if a value is out of range or flags conflict."""
    request_of(options)
    for name in ("num_runs", "top", "synthetic_prompt", "tp"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    if options.interactive and (options.report or options.selfcheck or options.num_runs > 1):
        raise ValueError("--report, --selfcheck and --num_runs cannot be combined with --interactive: remove them")
    if options.kv_dtype == "int8" and options.interactive:
        raise ValueError("--kv_dtype int8 cannot be combined with --interactive: remove it")
    if options.pick and not options.interactive:
        raise ValueError("--pick needs --interactive")
    if options.echo and (options.interactive or options.chat or options.format == "jsonl" or options.synthetic_prompt):
        raise ValueError("--echo cannot be combined with --interactive, --chat, --format jsonl or --synthetic_prompt")
    if options.unranked and (options.format != "jsonl" and options.prompts is None or options.top or options.pick):
        raise ValueError("--unranked needs --format jsonl, and cannot be combined with --top or --pick")
    if options.interactive and options.verbose:
        raise ValueError("--verbose cannot be combined with --interactive: remove it")
    if options.synthetic_prompt and (options.chat or options.interactive):
        raise ValueError("--synthetic_prompt cannot be combined with --chat or --interactive")
    given = [
        name for name in ("prompt", "prompt_file", "prompts", "synthetic_prompt") if getattr(options, name) is not None
    ]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} cannot be combined: pass one of them")
    if options.keep_newline and (options.interactive or (given and options.prompt_file != "-")):
        raise ValueError("--keep_newline applies only to a prompt from stdin: remove it")
    check_batch(options)


def check_batch(options: argparse.Namespace) -> None:
    """Raise ValueError if flags conflict with --prompts or require it."""
    alone = {
        "interactive": False, "echo": False, "num_runs": 1,
    }  # fmt: skip
    many = {"prompt_separator": None, "skip_bad": False, "output": None, "resume": False}
    for name, default in alone.items() if options.prompts is not None else many.items():
        if getattr(options, name) != default:
            way = "cannot be combined with" if name in alone else "needs"
            raise ValueError(f"--{name} {way} --prompts")
    if options.prompts is not None and options.format == "text":
        raise ValueError("--format text cannot be combined with --prompts, which writes jsonl: remove it")
    if options.prompt_separator == "":
        raise ValueError("--prompt_separator is empty: pass the text that separates two prompts")
    if options.resume and options.output is None:
        raise ValueError("--resume needs --output, the file to continue")


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ValueError if --report, --profile or --output cannot be written."""
    if options.output is not None and not options.resume:
        check_new(options.output)
    outputs = [path for path in (options.report, options.profile, options.output) if path is not None]
    for path in outputs:
        check_writable(path)
    names = [identity(path) or path.resolve() for path in outputs]
    for path, name in zip(outputs, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"two of --report, --profile and --output are {path}: choose different files")


def check_inputs_stay(options: argparse.Namespace, models: Sequence[Path]) -> None:
    """Raise ValueError if an output would overwrite the prompts, the heads of a draft or a file of a model, under
    whatever name."""
    read = [options.prompt_file, options.prompts, *options.draft[1:], *models]
    files = {identity(Path(path)) for path in read if path is not None}
    for path in (options.report, options.profile, options.output):
        if path is not None and (found := identity(path)) is not None and found in files:
            raise ValueError(f"{path} is an input and would be overwritten: choose another output file")


@contextmanager
def reading_prompts(options: argparse.Namespace) -> Iterator[None]:
    """Raise ValueError instead of an OSError if --prompts cannot be read."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"--prompts {options.prompts} cannot be read ({error.strerror}): pass a text file") from error


def read_piped(options: argparse.Namespace) -> bytes | None:
    """Read the prompts from stdin or a pipe, which only one rank can; None: they are in a file. Raises ValueError."""
    name = options.prompts
    if name is None or name != "-" and os.path.isfile(name):
        return None
    with reading_prompts(options):
        return read_bytes(None if name == "-" else Path(name))


def open_prompts(options: argparse.Namespace, piped: bytes | None) -> BinaryIO:
    """Open the file or stdin that --prompts names. piped: what `read_piped` has read of it. Raises ValueError."""
    if piped is not None:
        return io.BytesIO(piped)
    with reading_prompts(options):
        return sys.stdin.buffer if options.prompts == "-" else open(options.prompts, "rb")


def read_prompt(options: argparse.Namespace) -> str | None:
    """Read the prompt's text; None for a synthetic one, and in --interactive without one. Raises ValueError if it is
    empty or not UTF-8."""
    text, name = options.prompt, options.prompt_file
    if name is None and (text is not None or options.synthetic_prompt or options.interactive):
        if text == "":
            raise ValueError("the prompt is empty: pass some text")
        return text
    if name is None and sys.stdin.isatty():
        return STORY
    try:
        piped = name in (None, "-")
        data = read_bytes(None if piped else Path(name or ""))
    except OSError as error:
        raise ValueError(f"--prompt_file {name} cannot be read ({error.strerror}): pass a text file") from error
    try:
        text = decode_text(without_newline(data) if piped and not options.keep_newline else data)
    except ValueError as error:
        raise ValueError(f"the prompt in {'stdin' if piped else name} is {error}") from error
    if text == "" and name is not None:
        raise ValueError("the prompt is empty: pass some text")
    return text or STORY
