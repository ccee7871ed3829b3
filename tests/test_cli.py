"""The command line. Oracle: exit status, stdout, one line on stderr, files. What asks for a terminal, a pipe, a signal
or a fresh process is run as a user runs it; the rest by `main`, with its own stdin, stdout and stderr."""

import argparse
import contextlib
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from unittest import mock

import pytest
import torch
from conftest import ROOT, TINY, interruptible, slow

import generate
from cli.options import STORY, build_parser, size
from engine.chat import ChatEncoder, choose_chat
from engine.engine import Engine
from engine.request import Request, Sampling
from loading.checkpoint import load_model, read_checkpoint
from loading.files import counted
from loading.tokenizer import load_tokenizer

PROMPT = ["--prompt", "Once upon a time", "--seed", "1"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run(*arguments, input: str = "", cwd=ROOT, kind=io.TextIOWrapper, **environment) -> subprocess.CompletedProcess:
    """generate.main in this process, as if started with these arguments and this stdin, which is no terminal."""
    out, err, stdin = io.StringIO(), io.StringIO(), kind(io.BytesIO(input.encode()), encoding="utf-8")
    with (
        mock.patch.object(sys, "stdin", stdin), mock.patch.dict(os.environ, environment), contextlib.chdir(cwd),
        contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings(),
    ):  # fmt: skip
        try:
            status = generate.main([os.fsdecode(each) if isinstance(each, bytes) else str(each) for each in arguments])
        except SystemExit as end:  # argparse
            status = end.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def start(*arguments, **options) -> subprocess.CompletedProcess:
    """The same as a process of its own."""
    command = [sys.executable, str(ROOT / "generate.py"), *map(str, arguments)]
    options = {"env": ENVIRONMENT, "stdin": subprocess.DEVNULL} | options
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def lines_of(result: subprocess.CompletedProcess) -> list[dict]:
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_jsonl_and_report_carry_what_the_readme_promises(tmp_path):
    report_path = tmp_path / "r.json"
    result = run(
        *PROMPT, "-n", 8, "--top", 3, "--max_new_tokens", 40, "--format", "jsonl", "--report", report_path,
        "--selfcheck", "--dtype", "float32",
    )  # fmt: skip
    rows = lines_of(result)
    assert [row["rank"] for row in rows] == [1, 2, 3]
    places = [(row["finish_reason"] == "length", -row["mean_logprob"]) for row in rows]
    assert places == sorted(places)
    for row in rows:
        assert row.keys() == {
            "rank", "sample", "count", "seed", "settings", "text", "tokens", "logprobs", "mean_logprob", "finish_reason"
        }  # fmt: skip
        assert row["seed"] == 1
        assert len(row["tokens"]) == len(row["logprobs"]) <= 40 and row["finish_reason"] in ("eos", "length")
    report = json.loads(report_path.read_text())
    assert report["num_samples"] == 8 and report["rows"] == 8 and report["attention"] == "bifurcated"
    assert report["kv_unshared_bytes"] > report["kv_context_bytes"] + report["kv_decoded_bytes"]
    assert report["compile_s"] is None and report["compiled"] is False
    assert report["selfcheck_max_difference"] < 1e-4
    for name in (
        "attention_path", "device", "dtype", "torch", "context_tokens", "prefill_s", "prefill_tokens_per_s",
        "first_token_s", "decode_ms_per_step", "tokens_per_s_per_sample", "tokens_per_s", "bytes_per_step",
        "bandwidth_gb_s", "peak_memory_bytes",
    ):  # fmt: skip
        assert report[name], name
    assert result.stderr.count("\n") == 3 and "seed 1" in result.stderr


def test_stdout_is_the_sample_and_nothing_else():
    rows = lines_of(run(*PROMPT, "--max_new_tokens", 20, "--format", "jsonl", "--quiet"))
    result = run(*PROMPT, "--max_new_tokens", 20, "--quiet")
    assert result.stdout == rows[0]["text"] + "\n" and result.stderr == ""


def test_a_report_of_one_token_has_no_decode_numbers(tmp_path):
    run(*PROMPT, "--max_new_tokens", 1, "--report", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["decode_ms_per_step"] is report["tokens_per_s"] is report["bandwidth_gb_s"] is None


def test_few_rows_and_layouts_draw_the_same_samples():
    base = [*PROMPT, "-n", 5, "--max_new_tokens", 15, "--format", "jsonl", "--dtype", "float32"]
    expected = [row["tokens"] for row in lines_of(run(*base))]
    few = run(*base, "--max_memory", "8.1MB", "--no-compile")
    assert re.search(r"running [1-4] samples? at a time: not all fit into memory", few.stderr), few.stderr
    for result in (few, run(*base, "--attention", "contiguous"), run(*base, "--attention", "expanded")):
        assert [row["tokens"] for row in lines_of(result)] == expected


def test_prompts_from_a_file_and_from_stdin(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("Once upon a time", "utf-8")
    base = ["--seed", 1, "--max_new_tokens", 10, "--quiet"]
    expected = run(*base, "--prompt", "Once upon a time").stdout
    assert run(*base, "--prompt_file", path).stdout == expected
    assert run(*base, "--prompt_file", "-", input="Once upon a time").stdout == expected


def test_a_plan_runs_nothing():
    result = run("--plan", "-n", 2048, "--synthetic_prompt", 200000, "--max_memory", "100GB")
    assert result.returncode == 0
    assert re.search(r"[1-9]\d* of 2048 samples at once", result.stdout) and "an unshared K/V cache" in result.stdout


def test_several_runs_and_a_profile(tmp_path):
    result = run(*PROMPT, "--num_runs", 3, "--max_new_tokens", 5, "--profile", tmp_path / "trace.json")
    assert result.returncode == 0 and len(result.stdout.splitlines()) == 1
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_help_is_grouped():
    result = run("--help")
    assert result.returncode == 0
    assert all(group in result.stdout for group in ("model:", "prompt:", "sampling:", "execution:", "output:"))


INTERACTIVE = ["--interactive", "-n", 3, "--max_new_tokens", 12, "--temperature", 3, "--seed", 1, "--format", "jsonl"]


def test_three_turns_with_a_choice():
    """The second turn depends on which reply was kept; an empty line is no turn, nor is a number out of range."""
    said = "Once upon a time\n{}\n\nThen the dog\n9\n1\nThe end\n\n"
    first, second = (run(*INTERACTIVE, "--pick", input=said.format(choice)) for choice in (1, 2))
    assert [row["rank"] for row in lines_of(second)] == [1, 2, 3] * 3
    assert "'9' is not a number from 1 to 3" in second.stderr
    assert lines_of(first)[:3] == lines_of(second)[:3] and lines_of(first)[3] != lines_of(second)[3]


def test_without_a_choice_the_best_is_kept():
    said = "Once upon a time\n{}Then the dog\n"
    best = run(*INTERACTIVE, input=said.format(""))
    assert lines_of(best)[3:] == lines_of(run(*INTERACTIVE, "--pick", input=said.format("1\n") + "1\n"))[3:]


def test_one_sample_per_turn_is_live_and_a_refused_turn_changes_nothing():
    arguments = ("--interactive", "--max_new_tokens", 12, "--seed", 1, "--quiet")
    expected = run(*arguments, input="Once upon a time\nThen\n")
    refused = run(*arguments, input="Once upon a time\n" + "word " * 400 + "\nThen\n")
    assert expected.returncode == refused.returncode == 0
    assert refused.stdout == expected.stdout and expected.stdout.count("\n") >= 2
    assert "error: prompt of" in refused.stderr and refused.stderr.count("error") == 1


def test_a_stop_string_is_not_printed():
    whole = run(*PROMPT, "--max_new_tokens", 60, "--quiet").stdout
    stop = whole[30:34]
    assert run(*PROMPT, "--max_new_tokens", 60, "--quiet", "--stop", stop).stdout == whole[: whole.index(stop)] + "\n"


def test_digits_are_text(tmp_path):
    """As a file and as --prompt, which draw the same; a prompt of so many tokens is another flag."""
    (tmp_path / "prompt.txt").write_text("42")
    base, context = ["--max_new_tokens", 3, "--seed", 1, "--report", tmp_path / "r.json"], []
    results = [run(*flags, *base) for flags in (["--prompt_file", tmp_path / "prompt.txt"], ["--prompt", "42"])]
    assert results[0].stdout == results[1].stdout and results[0].returncode == 0
    assert json.loads((tmp_path / "r.json").read_text())["context_tokens"] < 6
    for seed in (1, 1, 2):
        flags = ["--synthetic_prompt", 42, *base[:2], "--format", "jsonl", "--seed", seed, "--report", tmp_path / "r"]
        context += [lines_of(run(*flags))[0]["tokens"]]
        assert json.loads((tmp_path / "r").read_text())["context_tokens"] == 42
    assert context[0] == context[1] != context[2]


def test_nothing_at_all_tells_a_story():
    """Empty stdin, or a terminal, which is not waited for. Oracle: the prompt that it then has."""
    base = ["--seed", 3, "--max_new_tokens", 9, "--dtype", "float32"]
    expected = run(*base, "--prompt", STORY)
    assert expected.returncode == 0 and expected.stdout
    for typed in ("", "\n"):
        assert run(*base, input=typed).stdout == expected.stdout
    assert run(*base, input="never read", kind=Terminal).stdout == expected.stdout
    assert start(*base).stdout == expected.stdout


def test_piped_text_is_the_prompt():
    base = ["--seed", 3, "--max_new_tokens", 9, "--quiet"]
    expected = run(*base, "--prompt", "The dog 日本").stdout
    assert run(*base, input="The dog 日本\n").stdout == run(*base, input="The dog 日本").stdout == expected
    assert run(*base, *PROMPT[:2], input="unread").stdout == run(*base, *PROMPT[:2]).stdout != expected
    assert_refused(run(*base, "--prompt_file", "-"), "the prompt is empty")


def test_echo_prints_the_prompt_before_each_sample():
    for flags in ([], ["-n", 3]):
        base = [*PROMPT, *flags, "--max_new_tokens", 15, "--quiet"]
        plain, echoed = (run(*base, *more).stdout for more in ([], ["--echo"]))
        told = re.sub(r"(?m)^(?!\[|$)", "Once upon a time", plain) if flags else "Once upon a time" + plain
        assert echoed == told and echoed.count("Once upon a time") == max(1, echoed.count("mean log-probability"))


def test_one_of_a_thing_is_told_as_one(tmp_path):
    plural = r"\b1 (samples|tokens|prompts|rows|steps|times|processes)\b"
    one = run(*PROMPT, "-n", 1, "--max_new_tokens", 2, "--draft", "prompt")
    assert one.stderr.startswith("1 sample after ") and not re.search(plural, one.stderr)
    plan = run(*PROMPT, "-n", 1, "--plan")
    assert "1 sample at once" in plan.stdout and not re.search(plural, plan.stdout)
    (tmp_path / "prompts").write_text('"A cat"\n')
    batch = run("--prompts", tmp_path / "prompts", "-n", 1, "--max_new_tokens", 1, "--dtype", "float32")
    assert batch.stderr.startswith("1 prompt, 1 sample of each, seed ") and not re.search(plural, batch.stderr)
    assert [counted(count, "process") for count in (0, 1, 2)] == ["0 processes", "1 process", "2 processes"]


def test_three_lines_say_what_ran_and_verbose_says_all(tmp_path):
    """Without --seed the lines name one that draws the same again."""
    first = run("--prompt", "Once", "-n", 3, "--max_new_tokens", 9)
    assert first.stderr.count("\n") == 3
    (seed,) = re.findall(r"seed (\d+)", first.stderr)
    what, fast, held = first.stderr.splitlines()
    assert "bifurcated attention" in what and "tokens/s" in fast and "peak" in held
    verbose = run("--prompt", "Once", "-n", 3, "--max_new_tokens", 9, "--seed", seed, "--verbose", "--report",
        tmp_path / "r.json")  # fmt: skip
    assert verbose.stdout == first.stdout
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(re.findall(r"^ *(\w+)  ", verbose.stderr, re.MULTILINE)) == report.keys()
    other = run("--prompt", "Once", "-n", 3, "--max_new_tokens", 9)
    assert re.findall(r"seed (\d+)", other.stderr) != [seed], "a new seed"


@slow
def test_no_librarys_warning_reaches_the_user(tmp_path):
    """Where NumPy is not installed PyTorch warns of it. One row, several, a chat; also torch.compile's own import."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError('not here', name='numpy')")
    without = {"env": ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}}
    result = start(*PROMPT, "-n", 3, "--max_new_tokens", 5, **without)
    assert result.returncode == 0 and result.stderr.count("\n") == 3, result.stderr
    quiet = start("--interactive", "--max_new_tokens", 5, "--quiet", input="hi\nyou\n", stdin=None, **without)
    assert quiet.returncode == 0 and quiet.stderr.replace("> ", "") == "", quiet.stderr


def test_escapes_of_stop_strings():
    for given, meant in (
        (r"\n", "\n"),
        (r"a\tb\r", "a\tb\r"),
        (r"\\n", r"\n"),
        (r"\q", r"\q"),
        ("\n", "\n"),
        ("é", "é"),
    ):
        assert build_parser().parse_args(["--stop", given]).stop == [meant]
    base = ["--seed", 1, "--max_new_tokens", 200, "--quiet"]
    whole = run(*base).stdout
    assert whole.index("\n") < len(whole) - 1
    assert run(*base, "--stop", r"\n").stdout == whole[: whole.index("\n") + 1]


def test_without_a_compiler_compile_runs_eagerly_and_says_so():
    result = run(*PROMPT, "--max_new_tokens", "3", "--compile", "--verbose", CXX="no-such-compiler")
    assert result.returncode == 0 and "no C++ compiler" in result.stderr and result.stdout


def test_a_tokenizer_of_another_model_gets_one_line(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(run(*PROMPT, "--checkpoint_path", folder), "one of the model's 300: use the model's own tokenizer")


def test_one_sample_is_streamed_while_it_decodes():
    """Oracle: on a terminal the text arrives in several reads, and adds up to what is printed without one."""
    flags = [*PROMPT, "--max_new_tokens", "60", "--quiet", "--dtype", "float32"]
    expected = run(*flags).stdout
    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "generate.py"), *flags]
    with subprocess.Popen(command, stdout=slave, stderr=subprocess.DEVNULL, env=ENVIRONMENT):
        os.close(slave)
        pieces = []
        while True:
            try:
                piece = os.read(master, 4096)
            except OSError:
                break
            if not piece:
                break
            pieces.append(piece)
    os.close(master)
    assert len(pieces) > 3
    assert b"".join(pieces).decode().replace("\r\n", "\n") == expected


def test_a_closed_pipe_ends_quietly():
    command = f"{sys.executable} {ROOT / 'generate.py'} --prompt Once -n 99 --max_new_tokens 30 --quiet | head -c 10"
    result = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=120, env=ENVIRONMENT
    )
    assert result.returncode == 0 and result.stderr == "" and len(result.stdout) == 10


def test_a_stdout_that_is_closed_from_the_start_ends_quietly():
    command = f"{sys.executable} {ROOT / 'generate.py'} --prompt Once --max_new_tokens 5 --quiet >&-"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert result.returncode == 0 and result.stderr == ""


def test_an_interrupt_prints_what_is_finished_and_exits_130():
    """64 rows decode up to 300 tokens; those that reached their end by the time of the interrupt are printed."""
    command = [sys.executable, str(ROOT / "generate.py"), *PROMPT, "-n", "64", "--max_new_tokens", "300"]
    master, slave = pty.openpty()  # a terminal on stderr shows the progress that tells when to interrupt
    streams = {"stdout": subprocess.PIPE, "stderr": slave, "text": True, "preexec_fn": interruptible}
    with subprocess.Popen(command, env=ENVIRONMENT, **streams) as process:
        os.close(slave)
        seen, limit = "", time.monotonic() + 100
        while not re.search(r" [1-9]\d*/64 samples finished", seen):
            seen = seen[-200:] + os.read(master, 4096).decode()
            assert time.monotonic() < limit
        process.send_signal(signal.SIGINT)
        stdout = process.stdout.read()
    os.close(master)
    assert process.returncode == 130
    assert stdout.startswith("[1] mean log-probability") and ", eos" in stdout


def foreign(folder):
    torch.save({"some.weight": torch.ones(2)}, folder / "model.pth")


def truncated(folder):
    (folder / "model.pth").write_bytes((folder / "model.pth").read_bytes()[:5000])


def without_tokenizer(folder):
    (folder / "tokenizer.model").unlink()


@pytest.mark.parametrize(
    "damage,message",
    [
        (foreign, "the weights do not match config.json; 48 missing: layers.0.attention.wk.weight, "),
        (truncated, "is truncated or not a PyTorch checkpoint"),
        (without_tokenizer, "no tokenizer.model or tokenizer.json found in"),
        (shutil.rmtree, "not found: pass a folder with config.json"),
    ],
)
def test_a_damaged_checkpoint_gets_one_line(tmp_path, damage, message):
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    damage(folder)
    assert_refused(run(*PROMPT, "--checkpoint_path", folder), message)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file cannot be combined"),
        (["--prompt", "a", "--synthetic_prompt", "9"], "--prompt and --synthetic_prompt cannot be combined"),
        (["--prompt_file", "-", "--synthetic_prompt", "9"], "--prompt_file and --synthetic_prompt cannot be combined"),
        (
            ["--prompt_file", "no/such/file"],
            "--prompt_file no/such/file cannot be read (No such file or directory): pass",
        ),
        (
            ["--synthetic_prompt", "300"],
            "prompt of 300 tokens + max_new_tokens 200 = 500 exceeds the model's context limit of 320",
        ),
        (["--synthetic_prompt", "1000000000000"], "prompt of 1000000000000 tokens"),
        ([*PROMPT, "--pick"], "--pick needs --interactive"),
        (["--interactive", "--kv_dtype", "int8"], "--kv_dtype int8 cannot be combined with --interactive: remove it"),
        ([*PROMPT, "--kv_dtype", "int8", "--attention", "contiguous"], "use auto, or int8 with bifurcated"),
        ([*PROMPT, "--echo", "--format", "jsonl"], "--echo cannot be combined with --interactive"),
        (["--interactive", "--echo"], "--echo cannot be combined with --interactive"),
        (["--synthetic_prompt", "9", "--echo"], "--echo cannot be combined with --interactive"),
        (["--synthetic_prompt", "9", "--chat"], "--synthetic_prompt cannot be combined with --chat"),
        (["--synthetic_prompt", "9", "--interactive"], "--synthetic_prompt cannot be combined with --chat"),
        (["--synthetic_prompt", "0"], "synthetic_prompt 0 must be at least 1"),
        (["--synthetic_prompt", "x"], "invalid int value: 'x'"),
        ([*PROMPT, "--attention", "auto"], "invalid choice: 'auto'"),
        ([*PROMPT, "--prefill_chunk", "0"], "prefill_chunk 0 must be at least 1"),
        ([*PROMPT, "--max_memory", "0"], "'0' must be above 0"),
        ([*PROMPT, "--temperature", "1e-39"], "temperature 1e-39 must be 0"),
        (["--synthetic_prompt", "30000"], "prompt of 30000 tokens"),
        ([*PROMPT, "-n", "0"], "num_samples 0 must be at least 1"),
        ([*PROMPT, "-n", "-3"], "num_samples -3 must be at least 1"),
        ([*PROMPT, "--tp", "0"], "tp 0 must be at least 1"),
        ([*PROMPT, "-n", "three"], "invalid int value: 'three'"),
        ([*PROMPT, "--top", "0"], "top 0 must be at least 1"),
        ([*PROMPT, "--max_new_tokens", "0"], "max_new_tokens 0 must be at least 1"),
        ([*PROMPT, "--top_p", "0"], "top_p 0.0 must be above 0"),
        ([*PROMPT, "--top_p", "1.01"], "top_p 1.01 must be above 0 and at most 1"),
        ([*PROMPT, "--top_k", "-1"], "top_k -1 must be at least 1"),
        ([*PROMPT, "--temperature", "-1"], "temperature -1.0 must be 0"),
        ([*PROMPT, "--stop", ""], "a stop string is empty"),
        ([*PROMPT, "--device", "cuda:99"], "device 'cuda:99' not found"),
        ([*PROMPT, "--device", "gpu"], "unknown device 'gpu'"),
        ([*PROMPT, "--attention", "magic"], "invalid choice: 'magic'"),
        ([*PROMPT, "--max_memory", "4 bananas"], "'4 bananas' is not a size"),
        ([*PROMPT, "--max_memory", "1MB"], "one sample needs"),
        ([*PROMPT, "--report", "no/such/folder/r.json"], "cannot be written"),
        ([*PROMPT, "--num_runs", "0"], "num_runs 0 must be at least 1"),
        (["--interactive", "--selfcheck"], "cannot be combined with --interactive: remove them"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_gets_one_line(arguments, message):
    assert_refused(run(*arguments), message)


def test_a_prompt_file_that_is_not_utf8_gets_one_line(tmp_path):
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1") * 3)
    assert_refused(run("--prompt_file", tmp_path / "latin1.txt"), "latin1.txt is not UTF-8 (invalid at byte 0)")


def test_nothing_is_overwritten_by_a_refused_command(tmp_path):
    (tmp_path / "r.json").write_text("precious")
    assert_refused(run(*PROMPT, "-n", 0, "--report", tmp_path / "r.json"), "num_samples 0")
    model, prompt, both = tmp_path / "model", tmp_path / "prompt.txt", tmp_path / "both"
    shutil.copytree(TINY, model)
    prompt.write_text("Once")
    base = ["--checkpoint_path", model, "--prompt_file", prompt]
    assert_refused(run(*base, "--report", prompt), "prompt.txt is an input and would be overwritten")
    assert_refused(run(*base, "--profile", model / "model.pth"), "model.pth is an input and would be overwritten")
    assert_refused(run(*base, "--report", both, "--profile", both), "both: choose different files")
    assert prompt.read_text() == "Once" and (model / "model.pth").read_bytes() == (TINY / "model.pth").read_bytes()
    assert (tmp_path / "r.json").read_text() == "precious"


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert result.stdout == ""


TEMPLATE = (
    "{% for message in messages %}{{ '<s>' if loop.first else '' }}{{ message.role }}: {{ message.content }}\n"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def talker(tmp_path):
    """The shipped model, with a chat template beside it."""
    folder = tmp_path / "talker"
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_chat_sends_the_rendered_template(talker, tmp_path):
    """Oracle: the same text as a plain prompt, whose tokens are the same as no control token stands inside."""
    base = ["--checkpoint_path", talker, "-n", 3, "--max_new_tokens", 12, "--format", "jsonl", "--seed", 3]
    asked = lines_of(run(*base, "--chat", "--system", "Be kind.", "--prompt", "Tell me of Tim."))
    plain = lines_of(run(*base, "--prompt", "system: Be kind.\nuser: Tell me of Tim.\nassistant:"))
    assert [row["tokens"] for row in asked] == [row["tokens"] for row in plain]


def test_a_chat_of_three_turns_keeps_what_was_said(talker):
    """Oracle: each greedy reply again, drawn from the whole conversation so far as one prompt without a cache."""
    flags = ["--checkpoint_path", talker, "--max_new_tokens", 6, "--temperature", 0, "--quiet", "--dtype", "float32"]
    said = ["Hello.", "Who is Tim?", "And then?"]
    talk = run(*flags, "--interactive", "--format", "jsonl", input="\n".join(said) + "\n")
    model, tokenizer = load_model(read_checkpoint(talker), "cpu", torch.float32), load_tokenizer(talker)
    dialogue, context = (
        ChatEncoder(tokenizer, model.args.vocab_size, choose_chat(talker, tokenizer, True, False), None),
        [],
    )
    replies, engine = lines_of(talk), Engine(model, tokenizer)
    assert len(replies) == 3
    for text, reply in zip(said, replies, strict=True):
        context += dialogue.encode_turn(text)
        (sample,) = engine.generate(context, Request(1, 6, Sampling(0), eos_ids=dialogue.eos_ids))
        assert sample.tokens == reply["tokens"]
        context += [token for token in sample.tokens if token not in dialogue.eos_ids]
        dialogue.keep(text, reply["text"])
    assert tokenizer.decode(context).count("user:") == 3


@pytest.mark.parametrize(
    "flags,match",
    [
        (["--system", "Be kind."], "--system needs a chat: pass --chat"),
        (["--chat", "--checkpoint_path", "broken"], "the chat template failed on the messages user"),
        (["--chat", "--checkpoint_path", "none"], "no chat template found in .*none: remove --chat"),
    ],
)
def test_a_chat_that_cannot_be_is_one_line(talker, tmp_path, flags, match):
    shutil.copytree(talker, tmp_path / "broken")
    (tmp_path / "broken" / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    from tokenizers import Tokenizer, models

    shutil.copytree(TINY, tmp_path / "none", ignore=shutil.ignore_patterns("tokenizer.model"))
    Tokenizer(models.BPE({"a": 0}, [])).save(str(tmp_path / "none" / "tokenizer.json"))
    result = run(*PROMPT, *flags, cwd=tmp_path)
    assert result.returncode == 2 and result.stdout == ""
    assert re.match(f"error: {match}", result.stderr) and result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    "flags,match",
    [
        (["--prompt", b"caf\xe9"], r"the text is not UTF-8 \(invalid at character 3\): convert it"),
        (["--prompt", "x", "--seed", "-1"], "seed -1 must be at least 0"),
        (["--prompt", "x", "--seed", str(10**30)], "seed 10+ must be at least 0 and below"),
        (["--prompt", "x", "--device", "cuda:200"], "device 'cuda:200' not found"),
    ],
    ids=str,
)
def test_more_bad_input_is_one_line(flags, match):
    result = run(*flags)
    assert result.returncode == 2 and result.stdout == ""
    assert re.match(f"error: {match}", result.stderr) and result.stderr.count("\n") == 1, result.stderr


def test_a_number_is_a_message_in_a_chat(talker):
    base = ["--checkpoint_path", talker, "--max_new_tokens", 6, "--format", "jsonl", "--seed", 3, "--dtype", "float32"]
    (asked,) = lines_of(run(*base, "--chat", "--prompt", "17"))
    (plain,) = lines_of(run(*base, "--prompt", "user: 17\nassistant:"))
    assert asked["tokens"] == plain["tokens"]


def test_a_template_of_one_turn_serves_one_turn(talker):
    (talker / "chat_template.jinja").write_text(
        "{% if messages | length > 1 %}{{ raise_exception('one turn only') }}{% endif %}user: {{ messages[0].content }}"
    )
    flags = ["--checkpoint_path", talker, "--max_new_tokens", 6, "--quiet"]
    assert run(*flags, "--chat", "--prompt", "hi").returncode == 0
    talk = run(*flags, "--interactive", input="hi\nyou\n")
    assert talk.returncode == 0 and "one turn only" in talk.stderr and talk.stdout
    bare = run(*flags, "--interactive", "--no-chat", input="hi\nyou\n")
    assert bare.returncode == 0 and "error" not in bare.stderr


def test_a_report_is_written_though_nobody_reads_the_samples(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "generate.py"),
        *PROMPT,
        "-n",
        "17",
        "--max_new_tokens",
        "30",
        "--report",
        str(tmp_path / "r.json"),
    ]
    reader, writer = os.pipe()
    os.close(reader)
    subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120, env=ENVIRONMENT, check=True)
    os.close(writer)
    assert json.loads((tmp_path / "r.json").read_text())["seed"] == 1


def test_a_file_is_the_prompt_to_its_last_byte_and_stdin_without_one_newline(tmp_path):
    """Oracle: the tokens of --prompt. A file may have the name that stdin goes by elsewhere."""
    base = ["--max_new_tokens", 9, "--format", "jsonl", "--seed", 1, "--quiet"]
    bare, ended, twice = (run(*base, "--prompt", f"Once upon a time{end}").stdout for end in ("", "\n", "\n\n"))
    assert len({bare, ended, twice}) == 3
    (tmp_path / "stdin").write_text("Once upon a time\n")
    assert run(*base, "--prompt_file", "stdin", cwd=tmp_path, input="unread").stdout == ended
    for flags in ([], ["--prompt_file", "-"]):
        assert run(*base, *flags, input="Once upon a time\n").stdout == bare
        assert run(*base, *flags, input="Once upon a time\n\n").stdout == ended
        assert run(*base, *flags, "--keep_newline", input="Once upon a time\n").stdout == ended
    for flags in (["--prompt", "a"], ["--interactive"], ["--prompt_file", "stdin"]):
        assert_refused(run(*flags, "--keep_newline"), "--keep_newline applies only to a prompt from stdin")


def test_what_ended_by_itself_comes_before_what_was_cut():
    """Eight samples, some of which reach their end. --rank mean does not ask how they ended."""
    base = [*PROMPT, "--seed", 5, "-n", 8, "--max_new_tokens", 160, "--format", "jsonl", "--dtype", "float32"]
    ended, plain = (lines_of(run(*base, *flags)) for flags in ([], ["--rank", "mean"]))
    means = [row["mean_logprob"] for row in plain]
    assert means == sorted(means, reverse=True) and {row["sample"] for row in ended} == {*range(8)}
    own = [row["sample"] for row in plain if row["finish_reason"] == "eos"]
    cut = [row["sample"] for row in plain if row["finish_reason"] == "length"]
    assert own and cut and [row["sample"] for row in ended] == own + cut != [row["sample"] for row in plain]
    assert [row["sample"] for row in lines_of(run(*base, "--top", 2))] == (own + cut)[:2]


def test_samples_can_be_had_as_they_finish():
    """Shorter ones first; the last of several runs alone. Oracle: the ranked ones."""
    base = [*PROMPT, "--seed", 5, "-n", 8, "--max_new_tokens", 160, "--format", "jsonl", "--dtype", "float32"]
    rows, ranked = lines_of(run(*base, "--unranked", "--num_runs", 2)), lines_of(run(*base))
    sizes = [len(row["tokens"]) for row in rows]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert all(row.keys() == ranked[0].keys() - {"rank", "count"} for row in rows)
    expected = {row["sample"]: (row["tokens"], row["seed"]) for row in ranked}
    assert {row["sample"]: (row["tokens"], row["seed"]) for row in rows} == expected
    for flags in ([], ["--format", "jsonl", "--top", 3]):
        assert_refused(run(*PROMPT, "--unranked", *flags), "--unranked needs --format jsonl")


def test_the_lines_of_a_conversation_carry_their_turn():
    for flags in ([], ["--unranked"]):
        rows = lines_of(run(*INTERACTIVE, *flags, input="Once upon a time\n\nThen\n"))
        assert [(row["turn"], row["seed"]) for row in rows] == [(1, 1)] * 3 + [(2, 1)] * 3


def test_the_plan_names_the_context_limit():
    assert re.search(r"context limit +320  tokens", run("--plan", "--synthetic_prompt", 5000).stdout)


def test_the_plan_says_where_rope_scaling_reaches_beyond_max_position_embeddings(tmp_path):
    """Oracle: the factor times the original context, which no field names."""
    folder = shutil.copytree(TINY, tmp_path / "yarn")
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config |= {"max_position_embeddings": 66, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    told = run("--plan", "--checkpoint_path", folder, "--synthetic_prompt", 130).stdout
    assert "264  tokens of prompt and new ones, max_position_embeddings 66 stretched" in told


@slow
def test_drafts_change_no_sample_and_are_told_in_the_report(tmp_path):
    """Every kind, on a prompt that repeats; heads that another script made. Oracle: the same without a draft."""
    heads = tmp_path / "medusa_lm_head.pt"
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a cat. The cat sat on a red mat and saw a big dog. " * 40)
    train = [ROOT / "scripts" / "train_medusa.py", "--checkpoint_path", TINY, "--text", text, "--out", heads]
    made = subprocess.run(
        [sys.executable, *train, "--steps", "2", "--heads", "2", "--vocabulary", "99"], env=ENVIRONMENT
    )
    assert made.returncode == 0
    prompt = "The cat sat on the mat. The cat sat on the mat. The cat sat"
    base = ["--prompt", prompt, "--seed", 1, "-n", 3, "--max_new_tokens", 30, "--format", "jsonl", "--dtype", "float32"]
    expected = [row["tokens"] for row in lines_of(run(*base))]
    drafts = (
        ["--draft", "prompt"], ["--draft", "layers:4", "--speculate_k", "auto"], ["--draft", "medusa", heads],
        ["--draft_checkpoint_path", TINY, "--speculate_k", 2],
    )  # fmt: skip
    for flags in drafts:
        result = run(*base, *flags, "--report", tmp_path / "r.json")
        assert [row["tokens"] for row in lines_of(result)] == expected, flags
        report = json.loads((tmp_path / "r.json").read_text())
        assert len(report["accept_histogram"]) == {"--draft": 5}.get(flags[0], 3) or flags[-1] in ("auto", heads)
        assert report["drafted_steps"] + report["plain_steps"] >= 9 and report["draft_switched_off"] >= 0
        assert report["plain_ms_per_step"] > 0 and 0 < report["draft_share"] < 1 and report["speedup_over_plain"] > 0
        assert f"draft {report['draft']}" in result.stderr
        assert "draft" not in run(*base).stderr


def test_a_plan_has_the_draft(tmp_path):
    base = ["--plan", "-n", 8, "--synthetic_prompt", 99, "--max_memory", "1GB", "--dtype", "float32"]
    without, with_one = (run(*base, *more).stdout for more in ([], ["--draft_checkpoint_path", TINY]))
    weights = [float(re.search(r"weights +([\d.]+) MB", text)[1]) for text in (without, with_one)]
    assert weights[1] == pytest.approx(2 * weights[0], rel=0.01)


@pytest.mark.parametrize("flags", [["--draft", "sideways"], ["--draft", "prompt", "--speculate_k", "0"]])
def test_drafts_that_cannot_be_are_refused_in_one_line(flags):
    result = run(*PROMPT, *flags)
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_draft_larger_than_the_model_is_a_warning(tmp_path):
    """Two layers of the model, the whole as the draft."""
    folder = tmp_path / "small"
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    state = torch.load(folder / "model.pth")
    torch.save(
        {name: each for name, each in state.items() if not re.match(r"layers\.[234]\.", name)}, folder / "model.pth"
    )
    result = run(*PROMPT, "--checkpoint_path", folder, "--draft_checkpoint_path", TINY, "--max_new_tokens", 9)
    assert result.returncode == 0 and result.stderr.startswith("warning: the draft is larger than the model")


@pytest.mark.parametrize(
    "text,number", [("4GB", 4 * 10**9), ("512MiB", 512 * 2**20), ("1.5e3", 1500), ("2 kb", 2000), ("1TB", 10**12)]
)
def test_sizes(text, number):
    assert size(text) == number


@pytest.mark.parametrize("text", ["-1MB", "0", "0.2"])
def test_sizes_must_be_above_0(text):
    with pytest.raises(argparse.ArgumentTypeError, match="must be above 0"):
        size(text)


@pytest.mark.parametrize("text", ["", "GB", "4 GBB", "four", "4XB", "infGB"])
def test_sizes_that_are_none(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a size"):
        size(text)


WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None  # whoever imports it fails
sys.argv = ["generate.py", *{flags!r}]
runpy.run_path("generate.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    "flags,status,stream,told",
    [
        (["--help"], 0, "stdout", "--help"),
        (["--nonsense"], 2, "stderr", "--nonsense"),
        (["-n", "-3"], 2, "stderr", "num_samples -3 must be at least 1"),
        (["--echo", "--interactive"], 2, "stderr", "--echo cannot be combined with --interactive"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_what_is_mistyped_are_told_before_the_slow_imports(flags, status, stream, told):
    command = [sys.executable, "-c", WITHOUT_TORCH.format(flags=flags)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == status, result.stderr
    assert told in getattr(result, stream) and len(result.stdout + result.stderr) == len(getattr(result, stream))


@pytest.mark.parametrize(
    "typed,meant",
    [
        (["--temprature", "0.5"], "--temperature"),
        (["--max-new-tokens", "5"], "--max_new_tokens"),
        (["--max_tokens=5"], "--max_new_tokens"),
        (["--num_return_sequences", "3"], "-n"),
        (["--model", "gpt2", "--top_pp", "0.5"], "--checkpoint_path, --top_p"),
        (["--system_prompt", "Be kind."], "--system"),
        (["--no_compile"], "--no-compile"),
    ],
    ids=str,
)
def test_a_flag_that_is_none_is_told_which_may_be_meant(typed, meant):
    """One that is mistyped, or that other programs have. Oracle: the list."""
    told = f"error: unrecognized arguments: {' '.join(typed)}; did you mean {meant}?\n"
    assert run(*PROMPT, *typed).stderr == told
    assert_refused(run(*PROMPT, "--zzz", "5"), "unrecognized arguments: --zzz 5; see --help")


def test_one_is_not_told_as_several(tmp_path):
    """One sample, token and prompt, and three."""
    (tmp_path / "one").write_text('"a"\n')
    (tmp_path / "three").write_text('"a"\n"b"\n"c"\n')
    for n, file in ((1, "one"), (3, "three")):
        base = ["-n", n, "--max_new_tokens", 1]
        ends = "s" * (n > 1)
        assert re.match(f"{n} sample{ends} after {n} token{ends},", run("--synthetic_prompt", n, *base).stderr)
        told = run("--prompts", tmp_path / file, *base).stderr
        assert re.search(f"^{n} prompt{ends}, {n} sample{ends} of each, seed", told, re.MULTILINE), told
        assert re.search(rf" {n} sample{ends} at once$", run("--plan", "--synthetic_prompt", 9, *base).stdout, re.M)


def test_names_of_control_tokens_in_a_raw_prompt_are_told(tmp_path):
    """They are text, which a user of a model of code would not expect; in a chat that is what they must be."""
    for name in ("model.pth", "config.json", "tokenizer.model"):
        (tmp_path / name).symlink_to(TINY / name)
    names = ["<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>"]
    (tmp_path / "added_tokens.json").write_text(json.dumps({name: 2000 + at for at, name in enumerate(names)}))
    common = ["--checkpoint_path", tmp_path, "-n", "1", "--max_new_tokens", "1", "--no-compile", "--dtype", "float32"]
    note = "note: <fim_prefix>, <fim_suffix> in a prompt is text here, not a control token"
    asked = "<fim_prefix>a<fim_suffix>b"
    assert run(*common, "--prompt", asked).stderr.splitlines()[0].startswith(note)
    assert run(*common, input=asked).stderr.startswith(note)
    lines = [json.dumps(each) for each in ("a", "<fim_prefix>", "b <fim_suffix>", asked)]
    assert run(*common, "--prompts", "-", input="\n".join(lines)).stderr.startswith(note)
    assert "<fim_middle> and 1 more in a prompt" in run(*common, "--prompt", "".join(names)).stderr
    for flags in (["--prompt", asked, "--quiet"], ["--prompt", asked, "--chat"], ["--prompt", "fim_prefix"]):
        assert "note:" not in run(*common, *flags).stderr
