"""Text files and stdin, whoever wrote them: byte order marks, UTF-16, line ends of two characters, what never ends.

Oracle: what the text says, in bytes."""

import io
import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, TINY, interruptible
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import llama_reference

from cli import prompts, system
from cli.options import STORY, build_parser, open_prompts, read_prompt
from cli.prompts import BadLines, Record, read_records
from cli.system import read_bytes, without_newline
from engine.chat import read_chat
from eval import main as evaluate
from eval import read_lines
from loading.files import decode_text, read_json, read_text
from loading.tokenizer import interruptible as interrupt
from loading.tokenizer import load_tokenizer, read_metadata

MARK = b"\xef\xbb\xbf"
WIDE = ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def records_in(data: bytes, separator: str | None = None) -> tuple[list[Record], str]:
    """The prompts of a file, and the first error of its lines."""
    bad = BadLines(build_parser().parse_args(["--prompts", "p"]))
    return list(read_records(io.BytesIO(data), separator, bad)), bad.first


SAID = "Once upon a time, naïve 日本 🙂\r\n\tПривет"


def piped(monkeypatch, data: bytes) -> None:
    stdin = SimpleNamespace(buffer=io.BytesIO(data), isatty=lambda: False)
    monkeypatch.setattr(sys, "stdin", stdin)


def test_a_mark_at_the_beginning_is_no_text():
    assert decode_text(MARK + SAID.encode()) == SAID == decode_text(SAID.encode())
    assert decode_text(MARK) == decode_text(b"") == ""
    assert decode_text(b"a" + MARK) == "a\ufeff"  # only there


@pytest.mark.parametrize("encoding", WIDE)
@pytest.mark.parametrize("said", [SAID, "a\n", "Привет мир", "日本 "])
def test_other_encodings_are_refused(encoding, said):
    """The last two are well-formed UTF-8 in some of them: only the NUL of a space tells."""
    with pytest.raises(ValueError, match="UTF-(8|16).*convert it"):
        decode_text(said.encode(encoding))


def test_what_is_no_utf8_is_named_with_its_place(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin is not UTF-8 \(invalid at byte 3\): convert it"):
        read_text(tmp_path / "latin")


@pytest.mark.parametrize("mark", [b"", MARK])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\n\n", b"\r\n\r\n", b"\r"])
def test_a_prompt_is_its_file_to_the_last_byte_and_of_stdin_to_the_line_end(tmp_path, monkeypatch, mark, end):
    path = tmp_path / "p.txt"
    path.write_bytes(mark + SAID.encode() + end)
    whole = SAID + end.decode()
    of_stdin = SAID + {b"\n": b"", b"\r\n": b"", b"\n\n": b"\n", b"\r\n\r\n": b"\r\n"}.get(end, end).decode()
    for flags, said in (
        (["--prompt_file", str(path)], whole), (["--prompt_file", "-"], of_stdin), ([], of_stdin),
        (["--prompt_file", "-", "--keep_newline"], whole),
    ):  # fmt: skip
        piped(monkeypatch, path.read_bytes())
        assert read_prompt(build_parser().parse_args(flags)) == said


def test_a_mark_alone_is_an_empty_prompt(tmp_path, monkeypatch):
    (tmp_path / "p.txt").write_bytes(MARK)
    with pytest.raises(ValueError, match="the prompt is empty"):
        read_prompt(build_parser().parse_args(["--prompt_file", str(tmp_path / "p.txt")]))
    piped(monkeypatch, MARK + b"\r\n")
    assert read_prompt(build_parser().parse_args([])) == STORY


@pytest.mark.parametrize("name", ["p.txt", "-"])
def test_a_prompt_in_utf16_is_refused_with_its_name(tmp_path, monkeypatch, name):
    path = tmp_path / "p.txt" if name != "-" else "-"
    (tmp_path / "p.txt").write_bytes("a cat".encode("utf-16-le"))
    piped(monkeypatch, "a cat".encode("utf-16-le"))
    with pytest.raises(ValueError, match=r"the prompt in (.*p.txt|stdin) is not UTF-8 \(NUL at byte 1"):
        read_prompt(build_parser().parse_args(["--prompt_file", str(path)]))


@pytest.mark.parametrize("separator", ["\n---\n", "\n\n", "---", "\n", "\r\n---\r\n", ".|"])
def test_texts_between_separators(separator):
    for mark, end, line in itertools.product(
        [b"", MARK], ["nothing", "a line end", "a separator", "a separator without its line end"], ["\n", "\r\n"]
    ):
        between = separator.replace("\r\n", "\n").replace("\n", line)
        ends = {"nothing": "", "a line end": line, "a separator": between}
        last = ends.get(end, between.removesuffix(line))
        for texts in (["a"], ["a", "b"], ["a", "b c", "日", "d" * 130]):
            records, wrong = records_in(mark + (between.join(texts) + last).encode(), separator)
            assert not wrong and [record.said for record in records] == texts


def test_lines_within_a_text_stay_as_they_are():
    (first, second), _ = records_in(b"a\r\nb\r\n\r\nc\nd\r\n", "\n\n")
    assert (first.said, second.said) == ("a\r\nb", "c\nd")


@pytest.mark.parametrize("line", [b"\n", b"\r\n"])
def test_json_lines_may_begin_with_a_mark(tmp_path, line):
    data = MARK + line.join([b'"a"', b'{"id": "x", "prompt": "b"}', b""])
    records, wrong = records_in(data)
    assert not wrong and [(record.id, record.said) for record in records] == [(1, "a"), ("x", "b")]
    (tmp_path / "p.jsonl").write_bytes(data)
    with open_prompts(build_parser().parse_args(["--prompts", str(tmp_path / "p.jsonl")]), None) as file:
        assert file.read() == data
    (tmp_path / "o.jsonl").write_bytes(MARK + b'{"task_id": 1}' + line)
    assert read_lines(tmp_path / "o.jsonl", {"task_id": int}) == [{"task_id": 1}]


def test_json_lines_in_utf16_are_told_so():
    for encoding in ("utf-16", "utf-16-le"):
        records, wrong = records_in('"a"\n"b"\n'.encode(encoding))
        assert not records and wrong.startswith("line 1: ") and "UTF-16" in wrong


def test_the_files_of_a_model_may_begin_with_a_mark(tmp_path):
    shutil.copy(TINY / "tokenizer.model", tmp_path)
    config = {"eos_token": "</s>", "chat_template": "a", "added_tokens_decoder": {"2048": {"content": "<t>"}}}
    (tmp_path / "tokenizer_config.json").write_bytes(MARK + json.dumps(config).encode())
    (tmp_path / "added_tokens.json").write_bytes(MARK + b'{"<u>": 2049}')
    (tmp_path / "chat_template.jinja").write_bytes(MARK + b"{{ messages[0].content }}")
    (tmp_path / "config.json").write_bytes(MARK + b'{"a": 1}')
    assert load_tokenizer(tmp_path).encode("<t>") == [2048] and read_json(tmp_path / "config.json") == {"a": 1}
    assert read_metadata(tmp_path)["added"].keys() == {"<t>", "<u>"}
    llama_reference(TINY / "tokenizer.model").save_pretrained(tmp_path / "json")
    spelled = tmp_path / "json" / "tokenizer.json"
    spelled.write_bytes(MARK + spelled.read_bytes())
    assert load_tokenizer(tmp_path / "json").encode("a cat") == load_tokenizer(TINY).encode("a cat")
    assert read_chat(tmp_path).template == "{{ messages[0].content }}"
    (tmp_path / "config.json").write_bytes('{"a": 1}'.encode("utf-16"))
    with pytest.raises(ValueError, match="config.json is not valid JSON: .*UTF-16"):
        read_json(tmp_path / "config.json")


def test_perplexity_reads_no_mark(tmp_path, capsys):
    found = []
    for mark in (b"", MARK):
        (tmp_path / "text").write_bytes(mark + b"Once upon a time, there was a cat.\r\n")
        common = ["--dtype", "float32", "--no-compile", "--quiet", "--output", str(tmp_path / "o.json")]
        assert evaluate(["--perplexity", str(tmp_path / "text"), *common]) in (0, None)
        report = json.loads((tmp_path / "o.json").read_text())
        found.append({name: value for name, value in report.items() if name != "engine"})
    capsys.readouterr()
    assert found[0] == found[1] and found[0]["bytes"] == 36


class Endless(io.RawIOBase):
    """A stdin that does not end, which after so many reads has used up the memory."""

    def __init__(self, reads: int | None = None) -> None:
        self.reads = reads

    def read(self, size: int = -1) -> bytes:
        if self.reads is not None:
            self.reads -= 1
            if self.reads < 0:
                raise MemoryError
        return b"y\n" * (size // 2)


@given(
    data=st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n", b"\r\n", b"--"]), max_size=30).map(b"".join),
    separator=st.sampled_from(["\n", "\n\n", "a", "\n--\n", "b\n"]),
    size=st.integers(1, 7),
)
def test_prompts_are_divided_alike_whatever_is_read_at_once(data, separator, size):
    """Oracle: the whole file divided at once. Empty parts count only for the numbers of the others."""
    between = re.escape(separator.encode()).replace(b"\\\n", b"\r?\n")
    *parts, last = re.split(between, data if data.endswith(b"\n") else data + b"\n")

    def numbered(parts: Iterable[bytes]) -> list[tuple[int, bytes]]:
        return [(number, part) for number, part in enumerate(parts) if part.strip()]

    with mock.patch.object(prompts, "BLOCK", size):
        file = io.BytesIO(data)
        assert numbered(prompts.parts_of(file, separator)) == numbered([*parts, without_newline(last)])
        file.seek(0)
        assert numbered(prompts.parts_of(file, None)) == numbered(data.split(b"\n"))


@pytest.mark.parametrize("reads", [None, 2])
def test_what_does_not_end_is_told_to_be_shorter(monkeypatch, reads):
    monkeypatch.setattr(system, "LONGEST_INPUT", 5 << 20)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=Endless(reads), isatty=lambda: False))
    with pytest.raises(ValueError, match=r"stdin is longer than \d+ bytes: pass a shorter prompt"):
        read_prompt(build_parser().parse_args([]))


@pytest.mark.parametrize("separator", ["y", "z"])
def test_prompts_that_do_not_end_are_told_so(monkeypatch, separator):
    """Of a pipe as a whole; of a file, where a prompt does not end."""
    monkeypatch.setattr(prompts, "LONGEST_INPUT", 1 << 16)
    monkeypatch.setattr(prompts, "BLOCK", 1 << 12)
    monkeypatch.setattr(prompts, "has_end", lambda file: separator == "z")
    told = {
        "y": "the piped prompts are longer than 65536 bytes: save them in a file",
        "z": "a prompt is longer than 65536",
    }
    with pytest.raises(ValueError, match=told[separator]):
        list(prompts.parts_of(Endless(), separator))


def test_a_file_that_does_not_end_is_named(monkeypatch):
    monkeypatch.setattr(system, "LONGEST_INPUT", 5 << 20)
    with pytest.raises(ValueError, match=r"/dev/zero is longer than \d+ bytes"):
        read_bytes(Path("/dev/zero"))


ENCODE = """
import sys
import time
sys.path.insert(0, sys.argv[1])
from cli.system import INTERRUPTED, finish, start
start()
from pathlib import Path
from loading.tokenizer import interruptible as interrupt
from loading.tokenizer import load_tokenizer
def main():
    tokenizer, text = load_tokenizer(Path(sys.argv[2])), "Once upon a time there was a cat. " * 620_000
    print("go", flush=True)
    try:
        tokenizer.encode(text)
    except KeyboardInterrupt:
        return INTERRUPTED
finish(main)
"""


@pytest.mark.parametrize("kind", ["sentencepiece", "json"])
def test_ctrl_c_ends_the_reading_of_a_long_text_at_once(tmp_path, kind):
    """21 MB, which take seconds."""
    folder = TINY
    if kind == "json":
        folder = tmp_path
        llama_reference(TINY / "tokenizer.model").save_pretrained(folder)
    command = [sys.executable, "-c", ENCODE, str(ROOT), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=interruptible) as child:
        assert child.stdout.readline() == b"go\n"
        time.sleep(1.5)  # the library has begun
        begin = time.perf_counter()
        child.send_signal(signal.SIGINT)
        assert child.wait() == system.INTERRUPTED and child.stderr.read() == b""
    assert time.perf_counter() - begin < 2


def test_a_long_text_has_the_same_tokens_and_errors(monkeypatch):
    tokenizer = load_tokenizer(TINY)
    text = "Once upon a time, there was a cat.\n" * 130
    expected = tokenizer.encode(text)
    monkeypatch.setattr("loading.tokenizer.LONG_CALL", 1000)
    assert tokenizer.encode(text) == expected
    with pytest.raises(ZeroDivisionError):
        interrupt(lambda text: 1 // 0, text)
