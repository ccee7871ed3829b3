"""A batch as a job. Oracles: the run of each prompt alone, an uninterrupted run, the file cut at every byte."""

import errno
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import GQA, ROOT, TINY
from test_cli import ENVIRONMENT, lines_of, run
from test_texts import records_in

from cli import jobs
from cli import prompts as windowed
from cli.jobs import Output, ResumeState, fingerprint, output_lines, read_begun
from cli.options import build_parser
from cli.prompts import encode
from cli.system import check_new, replica_file, replica_files
from engine.chat import Chat, ChatEncoder
from engine.engine import Engine
from engine.request import Request
from engine.samples import Sample
from engine.scheduler import Outcome, Prompt
from loading.checkpoint import Checkpoint
from loading.tokenizer import load_tokenizer

TEXTS = ["Once upon a time", "The cat sat", "Once upon a time there was a dog", "Tom"]
FLAGS = ["--max_new_tokens", 12, "--seed", 5, "--dtype", "float32", "--quiet"]


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": f"p{at}", "prompt": text}) + "\n" for at, text in enumerate(TEXTS)))
    return path


def batch(prompts: Path, *flags, **settings) -> subprocess.CompletedProcess:
    return run("--prompts", prompts, *FLAGS, *flags, **settings)


def written(path: Path) -> list[dict]:
    header, *lines = path.read_text("utf-8").splitlines()
    assert json.loads(header).keys() == {"header"}
    return [json.loads(line) for line in lines]


def written_ids(path: Path) -> set:
    return {line["id"] for line in written(path)}


def samples_of(lines: list[dict]) -> dict[tuple, list[float]]:
    """What a sample is, and its log-probabilities, which depend on what decodes beside it by rounding."""
    found = {
        (line["id"], line["sample"], line["count"], line["of"], line["text"], *line["tokens"]): line["logprobs"]
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def assert_same(one: list[dict], other: list[dict]) -> None:
    one, other = samples_of(one), samples_of(other)
    assert one.keys() == other.keys()
    for key, logprobs in one.items():
        assert logprobs == pytest.approx(other[key], abs=1e-4)


def test_lines_are_those_of_each_prompt_alone(prompts, tmp_path):
    """In groups by prompt, ranked, the best two of three; the line names the seed that draws the same alone."""
    output = tmp_path / "out.jsonl"
    assert batch(prompts, "-n", 3, "--top", 2, "--temperature", 1.5, "--output", output).returncode == 0
    lines = written(output)
    blocks = {line["id"]: [each for each in lines if each["id"] == line["id"]] for line in lines}
    assert [line["id"] for line in lines] == [line["id"] for block in blocks.values() for line in block]
    assert blocks.keys() == {f"p{at}" for at in range(len(TEXTS))}
    for id, block in blocks.items():
        assert [(line["rank"], line["of"]) for line in block] == [(1, 2), (2, 2)]
        flags = ["-n", 3, "--top", 2, "--temperature", 1.5, "--format", "jsonl", *FLAGS, "--seed", block[0]["seed"]]
        alone = lines_of(run("--prompt", TEXTS[int(id[1:])], *flags))
        assert_same(block, [line | {"id": id, "of": 2} for line in alone])
        assert alone[0].keys() - {"settings"} | {"id", "of", "seed"} == block[0].keys()


@pytest.mark.parametrize("most,tokens", [(1, 1 << 20), (3, 1 << 20), (1 << 20, 12)])
def test_windows_of_prompts_are_drawn_as_one(prompts, tmp_path, monkeypatch, most, tokens):
    """With lines that ask for more samples and tokens than the flags, in any window. Oracle: all in one window."""
    lines = [
        json.dumps({"id": f"q{at}", "prompt": text, "n": 1 + at, "max_new_tokens": 70}) for at, text in enumerate(TEXTS)
    ]
    prompts.write_text(prompts.read_text() + "\n".join(lines) + "\n")
    whole = lines_of(batch(prompts, "-n", 3))
    monkeypatch.setattr(windowed, "WINDOW", most)
    monkeypatch.setattr(windowed, "WINDOW_TOKENS", tokens)
    output = tmp_path / "o.jsonl"
    result = run("--prompts", prompts, *FLAGS[:-1], "-n", 3, "--output", output)
    assert result.returncode == 0 and "8 prompts, 3 samples of each" in result.stderr, result.stderr
    assert_same(written(output), whole)


def test_memory_does_not_grow_with_the_prompts(tmp_path, monkeypatch):
    """From the file to what the scheduler gets, with a window of 50 prompts: at most 64 bytes for each further one."""
    for name, value in {"WINDOW": 50, "BLOCK": 1 << 12, "SPOOL": 1 << 12}.items():
        monkeypatch.setattr(windowed, name, value)
    tokenizer = load_tokenizer(TINY)
    plain, peaks = ChatEncoder(tokenizer, 2048, None, None), []
    options = build_parser().parse_args(["--prompts", str(tmp_path / "p.jsonl")])
    for count in (100, 1500):
        line = json.dumps({"prompt": "Once upon a time " * 20, "more": "kept " * 20})
        (tmp_path / "p.jsonl").write_text(f"{line}\n" * count)
        tracemalloc.start()
        made = windowed.Prompts()
        for record in windowed.records_of(options, None):
            made.append(windowed.Line(encode(record, plain, plain, Request()), record.fields), GQA, Request())
        assert [len(window) for window in made.windows()] == [50] * (count // 50)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 64 * 1400, peaks


@pytest.mark.parametrize("flags", [[], ["--skip_bad"]])
@pytest.mark.parametrize("full", [0, 7, 8])
def test_a_full_temporary_folder_is_no_bad_line(prompts, tmp_path, monkeypatch, flags, full):
    """While the prompts are read, or once they are encoded; four are read and then written a second time."""
    written, output = itertools.count(), tmp_path / "o"
    dump = pickle.dump

    def dumped(*given):
        if next(written) == full:
            raise OSError(errno.ENOSPC, "No space left on device")
        dump(*given)

    monkeypatch.setattr(windowed.pickle, "dump", dumped)
    result = run("--prompts", prompts, *FLAGS, *flags, "--output", output)
    if full < 8:
        told = "the prompts do not fit into the temporary folder (No space left on device): set TMPDIR to another one"
        assert (result.returncode, result.stderr) == (2, f"error: {told}\n")
    else:
        assert result.returncode == 0 and len(written_ids(output)) == 4


def test_a_line_may_have_settings_of_its_own(tmp_path):
    """Which replace the flags for that prompt, beside others in one batch, with a draft and an int8 context. Oracle:
    each prompt alone with those flags."""
    lines = [
        ({}, []),
        ({"temperature": 0, "n": 1, "max_new_tokens": 30}, ["--temperature", 0, "-n", 1, "--max_new_tokens", 30]),
        ({"top_k": 5, "top_p": 0.9, "n": 5}, ["--top_k", 5, "--top_p", 0.9, "-n", 5]),
        ({"repetition_penalty": 1.5, "stop": "."}, ["--repetition_penalty", 1.5, "--stop", "."]),
    ]
    path = tmp_path / "p.jsonl"
    path.write_text(
        "".join(json.dumps({"id": at, "prompt": TEXTS[at]} | own) + "\n" for at, (own, _) in enumerate(lines))
    )
    for more in (["-n", 3], ["-n", 2, "--draft", "prompt"], ["-n", 2, "--kv_dtype", "int8"]):
        found = lines_of(batch(path, *more))
        for at, (own, flags) in enumerate(lines):
            block = [line for line in found if line["id"] == at]
            assert all(line[name] == value for line in block for name, value in own.items())
            seed = ["--format", "jsonl", *FLAGS, "--seed", block[0]["seed"]]
            alone = lines_of(run("--prompt", TEXTS[at], *seed, *more, *flags))
            assert_same(block, [line | {"id": at, "of": len(alone)} for line in alone])


@pytest.mark.parametrize(
    "own,told",
    [
        ({"temperature": "warm"}, "temperature 'warm' is not a number"),
        ({"temperature": -1}, "temperature -1.0 must be 0"),
        ({"n": 0}, "n 0 is not a whole number from 1 on"),
        ({"stop": 3}, "stop 3 is not a text or a list of texts"),
        ({"presence_penalty": 1}, "the setting presence_penalty is not known"),
        ({"seed": 3}, "the field seed is reserved"),
    ],
)
def test_settings_of_a_line_that_cannot_be_are_refused(tmp_path, own, told):
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "a"} | own) + '\n"b"\n')
    refused = batch(path)
    assert (refused.returncode, refused.stdout) == (2, "") and "line 1: " in refused.stderr and told in refused.stderr
    assert {line["id"] for line in lines_of(batch(path, "--skip_bad"))} == {2}


def test_without_an_output_lines_go_to_stdout(prompts):
    lines = lines_of(batch(prompts, "-n", 2, "--temperature", 1.5))
    assert len(lines) == 2 * len(TEXTS) and all(line["id"] for line in lines)


def test_plain_texts_stdin_and_a_report(tmp_path):
    """Numbers are ids; empty texts are none; the same text twice is two draws."""
    text = "Once upon a time\n---\n\n---\nThe cat\n---\nThe cat\n---\n"
    flags = ["--prompt_separator", r"\n---\n", "-n", 2, "--report", tmp_path / "r.json"]
    lines = lines_of(batch("-", *flags, input=text))
    assert {line["id"] for line in lines} == {1, 3, 4} and len(samples_of(lines)) == 6
    texts = {id: {line["text"] for line in lines if line["id"] == id} for id in (3, 4)}
    assert texts[3] != texts[4]
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["prompts"] == 3 and report["tokens"] == sum(len(line["tokens"]) for line in lines)


def test_other_fields_are_carried_over_and_one_prompt_too_long_is_said(tmp_path):
    path, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    path.write_text(
        '{"id": "long", "prompt": "%s", "level": [1]}\n\n{"prompt": "A bird", "level": "é"}\n"A cat"\n'
        % ("word " * 320)
    )
    result = run("--prompts", path, *FLAGS[:-1], "--output", output)
    assert result.returncode == 0 and "1 could not be run" in result.stderr, result.stderr
    lines = {line["id"]: line for line in written(output)}
    assert lines.keys() == {"long", 3, 4} and lines["long"]["level"] == [1] and lines[3]["level"] == "é"
    assert "context limit of 320" in lines["long"]["error"] and "level" not in lines[4]
    assert run("--prompts", path, *FLAGS, "--output", output, "--resume").returncode == 0
    assert len(written(output)) == 3


@pytest.mark.parametrize("content", ["", "\n", "x"])
def test_a_file_without_a_prompt_is_refused(tmp_path, content):
    path, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    path.write_text(content)
    result = batch(path, "--output", output, "--skip_bad")
    assert (result.returncode, result.stdout, output.exists()) == (2, "", False)
    assert result.stderr == f"error: --prompts {path} has no prompt: pass a file with at least one\n"


BAD = [
    (b'{"prompt": "a"', "not JSON"), (b"[1]", "a whole array"), (b'{"text": "a"}', "neither a text"),
    (b'{"prompt": 3}', "the prompt is not a text"), (b'{"messages": "a"}', "messages must be a list"),
    (b'{"messages": [{"role": "user"}]}', "message 1 (user) has no content"),
    (b'{"messages": [{"role": "user", "content": "a"}], "tools": "f"}', "the tools beside messages must be a list"),
    (b'""', "the prompt is empty"), (b'{"messages": []}', "the prompt is empty"),
    (b'{"prompt": "a", "messages": []}', "with one of prompt and messages"),
    (b'{"id": 1.5, "prompt": "a"}', "id 1.5 is neither"), (b'{"id": true, "prompt": "a"}', "id true is neither"),
    (b'{"id": 1, "prompt": "a"}', "id 1 is also that of line 1"), (b'{"prompt": "a", "rank": 1}', "the field rank"),
    (b'"\xff"', "not UTF-8"), (b'"\\ud800"', "not UTF-8"), (b'{"prompt": "a", "x": NaN}', "not JSON (Out of range"),
    (b'{"prompt": "a", "x": ' + b"[" * 100 + b"]" * 100 + b"}", "it nests more than 100 levels deep"),
    (b"[" * 100_000, "it nests more than 100 levels deep"),
]  # fmt: skip


@pytest.mark.parametrize("line,words", BAD, ids=[str(line) for line, _ in BAD])
def test_a_bad_line_is_named(line, words):
    records, bad = records_in(b'"first"\n' + line + b'\n"third"')
    assert [record.number for record in records] == [1, 3]
    assert bad.startswith("line 2: ") and words in bad


def test_bad_lines_are_refused_before_loading_or_skipped(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('"A cat"\n{"prompt": 3}\nx\n')
    result = batch(path, "--checkpoint_path", "nowhere")
    assert (result.returncode, result.stdout) == (2, "")
    assert "p.jsonl, line 2: the prompt is not a text (and 1 more)" in result.stderr
    result = run("--prompts", path, *FLAGS[:-1], "--skip_bad")
    assert [line["id"] for line in lines_of(result)] == [1]
    assert result.stderr.count("skipped") == 2


def test_messages_are_put_into_the_chat_template():
    tokenizer = load_tokenizer(TINY)
    chat = Chat("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    spoken, plain = (ChatEncoder(tokenizer, 2048, each, None) for each in (chat, None))
    data = b'{"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]}\n"hello"'
    records, _ = records_in(data)
    first, second = (encode(each, spoken, plain, Request()) for each in records)
    assert tokenizer.decode(first.tokens).strip() == "user: hello\nassistant: yes"
    assert second.tokens == plain.encode_turn("hello")
    with pytest.raises(ValueError, match="^messages need a chat template"):
        encode(records[0], plain, plain, Request())


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--resume"], "--resume needs --output"),
        (["--echo"], "--echo cannot be combined with --prompts"),
        (["--num_runs", 2], "--num_runs cannot be combined"),
        (["--prompt", "a"], "--prompt and --prompts cannot be combined"),
        (["--prompt_separator", ""], "--prompt_separator is empty"),
        (["--format", "text"], "--format text cannot be combined"),
        (["--output", ROOT / "README.md"], "already exists: pass --resume"),
        (["--output", ROOT / "README.md", "--resume"], "no header of a batch"),
        (["--output", ROOT / "none" / "o.jsonl"], "cannot be written"),
    ],
)
def test_flags_that_do_not_go_together(prompts, flags, words):
    result = batch(prompts, *flags)
    assert (result.returncode, result.stdout) == (2, "") and words in result.stderr


@pytest.mark.parametrize(
    "content,told",
    [
        (
            "Once upon a time\nThe cat\n",
            "for plain text pass --prompt_separator, such as '\\n' (and 1 more): fix",
        ),
        ('["a", "b"]\n', "line 1: a whole array; write each part of the array on its own line: fix"),
        (
            '[\n"a",\n"b"]\n',
            "line 1: not JSON (Expecting value: line 1 column 2 (char 1)); write each part of the array",
        ),
        (
            '"a"\n{"prompt":\n"b"}\n',
            "line 2: not JSON (Expecting value: line 1 column 11 (char 10)); write each object",
        ),
    ],
)
def test_a_file_of_another_form_is_told_what_it_lacks(tmp_path, content, told):
    (tmp_path / "prompts").write_text(content)
    result = batch(tmp_path / "prompts")
    assert (result.returncode, result.stdout) == (2, "") and told in result.stderr


def test_flags_of_a_batch_ask_for_one(tmp_path):
    for flags in (["--output", tmp_path / "o"], ["--skip_bad"], ["--resume"], ["--prompt_separator", "x"]):
        result = run("--prompt", "a", *flags)
        assert result.returncode == 2 and "needs --prompts" in result.stderr


def test_another_command_is_refused(prompts, tmp_path):
    output = tmp_path / "o.jsonl"
    assert batch(prompts, "--output", output).returncode == 0
    before = output.read_bytes()
    more = tmp_path / "more.jsonl"
    more.write_bytes(prompts.read_bytes() + b'"more"\n')
    for path, flags, word in (
        (prompts, ["--temperature", 0.5], "temperature 0.8, not 0.5"),
        (prompts, ["--seed", 6], "seed 5, not 6"),
        (prompts, ["--stop", "a"], "stop"),
        (more, [], "prompts"),
    ):
        result = batch(path, "--output", output, "--resume", *flags)
        assert result.returncode == 2 and f"was begun with {word}" in result.stderr
    older = tmp_path / "older.jsonl"  # by another rule of the draw
    header, _, lines = before.partition(b"\n")
    kept = {name: value for name, value in json.loads(header)["header"].items() if name != "draw"}
    older.write_bytes(json.dumps({"header": kept}).encode() + b"\n" + lines)
    result = batch(prompts, "--output", older, "--resume")
    assert result.returncode == 2 and "was begun with draw null" in result.stderr
    assert output.read_bytes() == before
    assert run("--prompts", prompts, *FLAGS[:2], *FLAGS[4:], "--output", output, "--resume").returncode == 0  # its seed


def block(id: str) -> bytes:
    samples = [Sample(at, [1, at], [-1.0, -float(at)], f"text {at}", "length", 3) for at in range(2)]
    return output_lines(
        Outcome(Prompt(id, [1]), samples), {}, SimpleNamespace(rank="ended", top=None, unranked=False)
    ).encode()


def closed(output: Output) -> bytes:
    """What it wrote."""
    output.close()
    return output.path.read_bytes()


@pytest.mark.parametrize("apart", [True, False], ids=["header apart", "header in the first line"])
def test_a_file_cut_anywhere_holds_its_whole_prompts(tmp_path, monkeypatch, apart):
    """At every byte: what is whole is kept, what is not goes, and what is missing is appended. Also where another
    process has written after the cut: its lines stay, unless the first of them has become a part of the cut one."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which takes long, and is not what is asked
    path, header, ids = tmp_path / "o.jsonl", {"seed": 3}, ["a", "b"]
    output = Output(path, apart)
    output.begin(read_begun(path), header)
    for id in ids:
        output.append(block(id))
    whole, other = closed(output), block("other")
    assert (json.loads(whole.splitlines()[0]).keys() == {"header"}) == apart
    ends = [len(whole) - sum(len(block(id)) for id in ids[at:]) for at in range(3)]
    first = ends[0] if apart else whole.index(b"\n") + 1  # what holds the header
    for cut in range(0, len(whole), 1 if apart else 3):
        for after in (b"", other) if cut >= first and (cut % 5 == 0 or cut in ends) else (b"",):
            path.write_bytes(whole[:cut] + after)
            begun, output = read_begun(path), Output(path, apart)
            sound = {json.dumps(id) for id, end in zip(ids, ends[1:], strict=True) if cut >= end}
            if after and whole[cut - 1 : cut] == b"\n":
                sound.add('"other"')
            assert begun.done == sound and (begun.header == header) == (cut >= first)
            output.begin(begun, header)
            for id in [*ids, "other"]:
                if json.dumps(id) not in begun.done:
                    output.append(block(id))
            lines = closed(output).splitlines(keepends=True)
            assert json.loads(lines[0])["header"] == header
            values = [value for line in lines if (value := json.loads(line)).pop("header", None) != value and value]
            expected = [json.loads(line) for id in [*ids, "other"] for line in block(id).splitlines()]
            assert sorted(map(str, values)) == sorted(map(str, expected))


ODD_LINES = [
    b'{"id": "p1", "rank": [1], "of": 1}', b'{"id": ["p1"], "rank": 1, "of": 1}', b'{"id": "p1", "rank": 1, "of": {}}',
    b"[" * 100_000, b"3",
]  # fmt: skip


def test_lines_that_are_none_are_drawn_again(prompts, tmp_path):
    """Oracle: the whole file."""
    whole, output = tmp_path / "whole.jsonl", tmp_path / "o.jsonl"
    assert batch(prompts, "--output", whole).returncode == 0
    header, first, _, *others = whole.read_bytes().splitlines(keepends=True)
    output.write_bytes(header + first + b"".join(line + b"\n" for line in ODD_LINES) + b"".join(others))
    assert batch(prompts, "--output", output, "--resume").returncode == 0
    assert_same(written(output), written(whole))


@pytest.mark.parametrize(
    "header", ['{"header": 3}', '{"header": {"seed": "1"}}', '{"header": {"seed": 1e999}}', "[" * 10**5]
)
def test_a_header_that_is_none_is_named(prompts, tmp_path, header):
    output = tmp_path / "o.jsonl"
    output.write_text(header + "\n")
    result = batch(prompts, "--output", output, "--resume")
    assert (result.returncode, result.stdout) == (2, "") and "no header of a batch" in result.stderr
    assert output.read_text() == header + "\n"


def test_two_runs_do_not_write_to_one_file(prompts, tmp_path):
    output = tmp_path / "o.jsonl"
    other = Output(output)
    other.begin(read_begun(output), {})
    output.write_bytes(b"")  # killed before its header
    result = batch(prompts, "--output", output, "--resume")
    other.close()
    assert result.returncode == 2 and "another run writes to" in result.stderr
    output.unlink()
    part = Output(replica_file(output, 1))  # of a run whose first process died
    part.begin(ResumeState(), {"seed": 5})
    part.path.write_bytes(b"")
    result = batch(prompts, "--output", output, "--resume")
    assert result.returncode == 2 and f"another run writes to {part.path}" in result.stderr
    part.close()


def test_what_replicas_have_finished_is_taken_over_once(tmp_path):
    """Where a run was killed: whole prompts of each, one that is cut, and one that was taken over already. Oracle: the
    lines by hand."""
    path, header = tmp_path / "o.jsonl", {"seed": 3}
    for at, (ids, more) in enumerate([("ab", b""), ("bcd", block("e")[:-9]), ("fg", b'{"id": ')]):
        output = Output(replica_file(path, at) if at else path)
        output.begin(ResumeState(), header)
        for id in ids:
            output.append(block(id))
        output.append(more)
        output.close()
    with pytest.raises(ValueError, match=r"o.jsonl.replica-1 already exists: pass --resume"):
        path.rename(tmp_path / "other")
        check_new(path)
    (tmp_path / "other").rename(path)
    begun = read_begun(path)
    assert begun.done == {f'"{id}"' for id in "abcdfg"} and begun.header == header
    output = Output(path)
    output.begin(begun, header)
    output.append(block("e"))
    lines = closed(output).splitlines(keepends=True)[1:]
    assert sorted(lines) == sorted(line for id in "abcdefg" for line in block(id).splitlines(keepends=True))
    assert not replica_files(path) and read_begun(path).done == {f'"{id}"' for id in "abcdefg"}
    with pytest.raises(OSError, match="must be in a folder that all machines share"):
        output.merge([replica_file(path, 1)], set())
    replica_file(path, 1).write_text('{"header": {"seed": 4}}\n')
    with pytest.raises(ValueError, match="replica-1 was begun with seed 4, not 3"):
        read_begun(path)


def test_a_stopped_batch_says_how_it_goes_on(prompts, tmp_path):
    """Ctrl-C after the first prompt."""

    many = Engine.generate_many

    def stopped(*given, **named) -> Iterator[Outcome]:
        yield next(many(*given, **named))
        raise KeyboardInterrupt

    output = tmp_path / "o.jsonl"
    with mock.patch.object(Engine, "generate_many", stopped):
        result = run("--prompts", prompts, *FLAGS[:-1], "--output", output)
    assert result.returncode == 130
    assert f"stopped: {output} holds what is finished: the same command with --resume continues" in result.stderr
    assert len({line["id"] for line in written(output)}) == 1
    again = run("--prompts", prompts, *FLAGS[:-1], "--output", output, "--resume")
    assert again.returncode == 0 and "1 done before" in again.stderr


def test_a_run_where_nothing_is_left_says_so_before_it_reads_a_prompt(prompts, tmp_path):
    """And a prompt that has other words by now is refused."""
    output, flags = tmp_path / "o.jsonl", ["--prompts", prompts, *FLAGS[:-1], "--output", tmp_path / "o.jsonl"]
    assert run(*flags).returncode == 0
    with mock.patch.object(ChatEncoder, "encode_turn", side_effect=AssertionError):
        result = run(*flags, "--resume")
    assert (result.returncode, result.stdout) == (0, "")
    assert result.stderr == f"every prompt is done: {output} has its samples, nothing is left to draw\n"
    prompts.write_text(prompts.read_text().replace("cat", "dog"))
    result = run(*flags, "--resume")
    assert result.returncode == 2 and "was begun with prompts" in result.stderr


@pytest.mark.parametrize("size", [3000, 200_001])
def test_a_fingerprint_tells_weights_that_differ_anywhere(tmp_path, monkeypatch, size):
    """Of a file that is read whole, and of one that is sampled, where as many bytes as lie between two samples differ;
    and a tokenizer. Oracle: the model itself, copied elsewhere."""
    monkeypatch.setattr(jobs, "BLOCK", 64)
    monkeypatch.setattr(jobs, "BLOCKS", 64)
    generator = random.Random(0)
    weights, tokenizer = tmp_path / "model.pth", tmp_path / "tokenizer.json"
    data = generator.randbytes(size)
    tokenizer.write_text("{}")
    checkpoint = Checkpoint(tmp_path, (weights,), {}, GQA, frozenset([2]))

    def found(content: bytes) -> str:
        weights.write_bytes(content)
        return fingerprint(checkpoint)

    own, stride = found(data), 1 if size < 64 * 64 else size // 63 + 1
    assert found(data) == own
    for at in [0, size - stride, *(generator.randrange(size - stride) for _ in range(30))]:
        changed = bytes(byte ^ 1 for byte in data[at : at + stride])
        assert found(data[:at] + changed + data[at + stride :]) != own, at
    weights.write_bytes(data)
    tokenizer.write_text("[]")
    assert fingerprint(checkpoint) != own


def test_a_report_names_all_that_decides_the_samples(prompts, tmp_path):
    """Of a batch, and of one prompt, whose lines do so too. Oracle: the flags."""
    asked = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "stop": ["zz"], "max_new_tokens": 3}
    flags = [part for name, value in asked.items() for part in (f"--{name}", value[0] if name == "stop" else value)]
    flags = ["--seed", 5, "--dtype", "float32", "--quiet", "--report", tmp_path / "r", *flags]
    expected = asked | {"checkpoint_path": str(TINY / "model.pth"), "dtype": "float32", "repetition_penalty": 1.0}
    lines = lines_of(run("--prompt", "A cat", "--format", "jsonl", *flags))
    assert lines[0]["settings"].items() >= expected.items() and lines[0]["seed"] == 5
    first = json.loads((tmp_path / "r").read_text())
    assert run("--prompts", prompts, *flags, "--output", tmp_path / "o").returncode == 0
    second = json.loads((tmp_path / "r").read_text())
    for report in (first, second):
        assert report.items() >= (expected | {"seed": 5}).items()
    header = json.loads((tmp_path / "o").read_text().splitlines()[0])["header"]
    assert header.items() >= (asked | {"dtype": "float32", "seed": 5}).items() and "checkpoint_path" not in header
    assert first["model"] == second["model"] == header["model"] and first["draw"] == header["draw"]


def test_a_run_that_is_killed_ten_times_loses_and_repeats_nothing(tmp_path):
    """kill -9 at random moments and in the middle of writing. Oracle: the run that was not killed."""
    path, output = tmp_path / "p.jsonl", tmp_path / "o.jsonl"
    path.write_text("".join(json.dumps(f"{text} {at}") + "\n" for at in range(3) for text in TEXTS))
    flags = ["--prompts", path, "--output", output, "-n", 3, *FLAGS]
    command = [sys.executable, ROOT / "tests" / "job_worker.py", 10, 1, *flags]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    sizes = json.loads(result.stdout)
    assert len(sizes) == 10 and sizes[-1] > 0
    assert_same(written(output), written(tmp_path / "whole.jsonl"))
