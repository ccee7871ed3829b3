"""The command line of generate.py: every flag, every default, and what can be said of them before anything is read.

A room of its own because it is a table, which nothing else needs to be read with.
"""

import argparse
import os
import sys
from pathlib import Path

from model import LAYOUTS
from plan import parse_size


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, without the usage."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Every flag and every default of the command line."""

    parser = OneLineParser(
        description="Draw N samples of one prompt. The prompt's key/value cache is held once and read once per step.",
    )

    def flag(name: str, help: str, *aliases: str, **settings: object) -> None:
        default = settings.get("default")
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        group.add_argument(name, *aliases, help=help + shown, **settings)

    group = parser.add_argument_group("model")
    tiny = Path(__file__).resolve().parent / "checkpoints" / "tiny" / "model.pth"
    flag("--checkpoint_path", "model.pth, or a model's folder; default: checkpoints/tiny", type=Path, default=tiny)
    flag("--device", "cpu, cuda, cuda:1; auto is cuda where there is one", default="auto")
    dtypes = ("auto", "bfloat16", "float16", "float32")
    flag(
        "--dtype",
        "auto is bfloat16 where the device has instructions for it, else float32",
        choices=dtypes,
        default="auto",
    )
    group = parser.add_argument_group("prompt")
    flag("--prompt", "text; an integer makes a synthetic prompt of so many tokens")
    flag("--prompt_file", "read the prompt from a UTF-8 file; - is stdin")
    flag("--interactive", "several turns; the context grows by what you keep", action="store_true")
    chat = "send texts as messages, in the model's chat template; default: in --interactive where it has one"
    flag("--chat", chat, action=argparse.BooleanOptionalAction)
    flag("--system", "in a chat, what precedes the first message", metavar="TEXT")
    flag("--pick", "in --interactive, choose the reply to keep by its number", action="store_true")
    group = parser.add_argument_group("sampling")
    flag("-n", "samples drawn in parallel", "--num_samples", "--parallel_samples", type=int, default=1)
    flag("--top", "print the so many best; default: all", type=int)
    flag("--max_new_tokens", "per sample", type=int, default=200)
    flag("--temperature", "0 takes the most likely token", type=float, default=0.8)
    flag("--top_k", "draw from the k most likely tokens; 0 is off", type=int, default=200)
    flag("--top_p", "draw from the fewest tokens that hold this mass", type=float)
    flag("--min_p", "draw from tokens at least this likely, relative to the likeliest", type=float)
    flag("--seed", "same seed, same samples; default: a new one, which the report names", type=int)
    flag("--stop", "end a sample before this text; repeatable", action="append", default=[], metavar="TEXT")
    flag("--ignore_eos", "go on past the end of text, to max_new_tokens", action="store_true")
    group = parser.add_argument_group("execution")
    flag("--attention", "how the samples hold the context", choices=("auto", *LAYOUTS), default="auto")
    flag("--kv_dtype", "of the context's keys and values; auto: --dtype", choices=("auto", "int8"), default="auto")
    flag("--compile", "the decode step; default: where it pays", action=argparse.BooleanOptionalAction)
    flag("--compile_prefill", "pays for many prompts in one process", action="store_true")
    flag("--prefill_chunk", "tokens of the prompt read at a time", type=int, default=512)
    flag("--max_memory", "such as 4GB; default: what is free", type=parse_size)
    flag("--plan", "print the memory plan and run nothing", action="store_true")
    group = parser.add_argument_group("output")
    flag("--format", "jsonl is one object a line, best first", choices=("text", "jsonl"), default="text")
    flag("--report", "write the report as JSON to this file", type=Path)
    flag("--num_runs", "timed repetitions, with the same samples", type=int, default=1)
    flag("--profile", "write a chrome trace of the run to this file", type=Path)
    flag("--selfcheck", "score the printed samples again without a cache", action="store_true")
    flag("--quiet", "no progress and no report on stderr", action="store_true")
    return parser


def read_prompt(options: argparse.Namespace) -> str | None:
    """The prompt's text; None in --interactive without one. Raises ValueError where it is missing or not UTF-8."""
    if options.prompt is not None and options.prompt_file is not None:
        raise ValueError("--prompt and --prompt_file are both given: give one")
    text = options.prompt
    if options.prompt_file is not None:
        name = "stdin" if options.prompt_file == "-" else options.prompt_file
        try:
            data = sys.stdin.buffer.read() if name == "stdin" else Path(name).read_bytes()
            text = data.decode("utf-8").removesuffix("\n")  # which echo and editors add
        except OSError as error:
            raise ValueError(f"--prompt_file {name} cannot be read ({error.strerror}): give a text file") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"the prompt in {name} is not UTF-8 (byte {error.start}): convert it") from error
    if text is None and not options.interactive:
        raise ValueError("no prompt: give --prompt TEXT, --prompt_file PATH or --interactive")
    if text == "":
        raise ValueError("the prompt is empty: give some text")
    return text


def prompt_length(options: argparse.Namespace) -> int | None:
    """The tokens of a synthetic prompt, which an integer as --prompt asks for; None for a text, as in a chat."""
    text = (options.prompt or "").strip()
    return int(text) if text.isascii() and text.isdecimal() and not options.chat else None


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError where flags do not go together, or a file could not be written in the end."""
    for name in ("num_runs", "top"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} {getattr(options, name)} must be at least 1")
    if options.interactive and (options.report or options.selfcheck or options.num_runs > 1):
        raise ValueError("--report, --selfcheck and --num_runs are for one prompt: leave them out of --interactive")
    if options.kv_dtype == "int8" and (options.interactive or options.attention not in ("auto", "bifurcated")):
        raise ValueError("--kv_dtype int8 goes with --attention bifurcated and without --interactive: leave one out")
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise ValueError(f"seed {options.seed} must be at least 0 and below 2^63")
    if options.pick and not options.interactive:
        raise ValueError("--pick chooses between the replies of a turn: add --interactive")
    check_outputs(options)


def check_outputs(options: argparse.Namespace) -> None:
    """Raises ValueError where --report or --profile cannot be written, or would replace what the run reads."""
    outputs = [path for path in (options.report, options.profile) if path is not None]
    model, prompt = options.checkpoint_path.resolve(), options.prompt_file
    folder = model if model.is_dir() else model.parent
    for path in outputs:
        if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ValueError(f"{path} cannot be written: give a file in a folder that exists")
        full = path.resolve()
        if (full.exists() and full.parent == folder) or (prompt is not None and full == Path(prompt).resolve()):
            raise ValueError(f"{path} is the prompt, or lies with the model: it would be replaced, give another file")
    if len({path.resolve() for path in outputs}) < len(outputs):
        raise ValueError(f"--report and --profile are both {outputs[0]}: give two files")
