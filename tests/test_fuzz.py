"""Nothing surprises the commands: flags, config fields, damaged files, prompts and streams at random, each case through
`main` in a fork. Oracle: the rule. Whatever goes wrong is one line on stderr and status 2, with nothing on stdout but
samples, no file changed and no hang; what is printed can be read.

`make test` draws the same cases every time, `make fuzz` others for an hour. A fault that was found is an @example.
"""

import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers import models as models_of

import eval as evaluation
import generate
import quantize
from cli.system import finish, start
from engine.engine import Engine
from engine.request import Request, Sampling
from engine.scheduler import Prompt, seed_of
from loading.families import FAMILIES

HANG = 120  # seconds, of a case that takes a tenth of one
COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("test", derandomize=True, max_examples=8, **COMMON)
settings.register_profile("fuzz", max_examples=int(os.environ.get("FUZZ_EXAMPLES", "2000")), print_blob=True, **COMMON)
PROFILE = os.environ.get("FUZZ_PROFILE", "test")
settings.load_profile(PROFILE)

Main = Callable[[list[str]], int]


@dataclass(frozen=True)
class Result:
    """What a command left: its status (minus a signal's number, where that ended it), and what it wrote."""

    status: int
    stdout: str
    stderr: str


def stdin_of(stdin: bytes | None) -> int:
    """None: closed from the start."""
    reader, writer = os.pipe()
    if stdin is not None:
        assert len(stdin) < 1 << 16, "more than a pipe holds"
        os.write(writer, stdin)
    os.close(writer)
    return reader


def child(main: Main, arguments: list[str], folder: Path, stdin: bytes | None, files: list[int]) -> int:
    """In the fork: as a process of its own that was started with these streams, and starts and ends as commands do."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(HANG)
    warnings.simplefilter("ignore")
    os.chdir(folder)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for number, file in enumerate(files):
        os.dup2(file, number)
    sys.stdin = None if stdin is None else open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    try:
        start()
        finish(lambda: main(arguments))
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    return status


def run(main: Main, arguments: list[str], folder: Path, stdin: bytes | None = b"", stdout: int | None = None) -> Result:
    """A command in a fork. stdout: a file to write to, in place of one that is read here."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        files = [stdin_of(stdin), out.fileno() if stdout is None else stdout, err.fileno()]
        sys.stdout.flush()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                status = child(main, arguments, folder, stdin, files)
            finally:
                os._exit(status)
        os.close(files[0])
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = []
        for file in (out, err):
            file.seek(0)
            told.append(file.read().decode("utf-8", "replace"))
    return Result(status, *told)


NOTES = re.compile(
    r"(note: .* is text here|warning: (the draft is larger|.*: skipped$)|running \d+ samples? at a time|"
    r"kept in 16 bits|seed \d+$|rounded to nearest)"
)

# What an exception says that nobody has put into words: it names no value, and no remedy.
PYTHONS_OWN = re.compile(r"object (of type|is not|has no)|unsupported operand|not supported between|unhashable|unpack")


def check(result: Result, told: str) -> None:
    """The rule. told: what the case was."""
    lines = [line for line in result.stderr.splitlines() if not NOTES.match(line)]
    assert result.status in (0, 2), f"status {result.status} of {told}:\n{result.stderr[-2000:]}"
    assert "Traceback" not in result.stderr, f"{told}:\n{result.stderr[-2000:]}"
    assert not PYTHONS_OWN.search(result.stderr), f"{told}: {lines}"
    if result.status == 2:
        assert result.stdout == "", f"{told}: stdout {result.stdout[:200]!r}"
        assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) > 15, f"{told}: {lines}"


def strictly(line: str) -> dict:
    """What a line of JSON says. NaN is none."""

    def refuse(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)


def samples_of(text: str) -> list[dict]:
    rows = [strictly(line) for line in text.split("\n") if line]
    assert all({"sample", "seed", "text", "tokens", "finish_reason", "mean_logprob"} <= row.keys() for row in rows)
    return rows


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@contextmanager
def workplace(source: Path | None = None, **files: bytes) -> Iterator[Path]:
    """A folder with these files and, in "model", a model whose large file is a link; what was there must stay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for path, content in files.items():
            (folder / path).write_bytes(content)
        if source is not None:
            (folder / "model").mkdir()
            for path in source.iterdir():
                if path.suffix in (".pth", ".safetensors"):
                    (folder / "model" / path.name).symlink_to(path)
                elif path.is_file():
                    shutil.copyfile(path, folder / "model" / path.name)
        yield folder


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    before = contents(folder)
    yield
    after = contents(folder)
    assert {name: after.get(name) for name in before} == before, "a file was changed"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """The shipped model in two shards, with all that may lie beside a model."""
    folder = tmp_path_factory.mktemp("parts")
    state = torch.load(TINY / "model.pth")
    config = json.loads((TINY / "config.json").read_text())
    names = {ours: ours.replace("layers", "model.layers") for ours in state}
    back = {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
        "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    top = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    theirs = {}
    for name, tensor in state.items():
        new = top.get(name, names[name])
        for ours, hf in back.items():
            new = new.replace(f".{ours}.", f".{hf}.")
        theirs[new] = tensor.contiguous()
    where = {name: f"model-{1 + number % 2}.safetensors" for number, name in enumerate(theirs)}
    for file in set(where.values()):
        save_file({name: theirs[name] for name in theirs if where[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    (folder / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    shutil.copyfile(TINY / "tokenizer.model", folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def models(parts, tmp_path_factory) -> dict[str, Path]:
    """The shipped model; in parts; with a tokenizer.json; quantised."""
    spelled, quantised = tmp_path_factory.mktemp("spelled"), tmp_path_factory.mktemp("quantised")
    for folder in (spelled, quantised):
        shutil.copyfile(TINY / "config.json", folder / "config.json")
    (spelled / "model.pth").symlink_to(TINY / "model.pth")
    shutil.copyfile(TINY / "tokenizer.model", quantised / "tokenizer.model")
    backend, level = Tokenizer(models_of.BPE()), pre_tokenizers.ByteLevel
    backend.pre_tokenizer, backend.decoder = level(add_prefix_space=False), decoders.ByteLevel()
    options = {"special_tokens": ["<unk>", "<s>", "</s>"], "initial_alphabet": level.alphabet(), "show_progress": False}
    backend.train_from_iterator(
        ["Once upon a time there was a cat."] * 9, trainers.BpeTrainer(vocab_size=290, **options)
    )
    begin = {"single": "<s> $A", "pair": "<s> $A $B", "special_tokens": [("<s>", 1)]}
    backend.post_processor = processors.TemplateProcessing(**begin)
    backend.save(str(spelled / "tokenizer.json"))
    arguments = ["--checkpoint_path", str(TINY), "--mode", "int8", "--output", str(quantised / "model.pth")]
    assert run(quantize.main, arguments, quantised).status == 0
    return {"shipped": TINY, "parts": parts, "spelled": spelled, "quantised": quantised}


@contextmanager
def deeper() -> Iterator[None]:
    """What nests is written and read in a few thousand calls."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(10_000)
    yield
    sys.setrecursionlimit(limit)


NUMBERS = [
    *("0", "1", "2", "3", "7") * 4,
    "-1",
    "1.5",
    "nan",
    "inf",
    "-inf",
    "1e-39",
    "1e400",
    "x",
    "",
    "٣",
    "1_0",
    "0x10",
    " 2 ",
]
TEXTS = ["", "a", "Once upon a time", "\n", "\\n", "\u0000", "é\u0301", "\U0001f600", "<s>", "-", "--", "a" * 500]
PATHS = ["model", "model/model.pth", "model/config.json", "missing", "", ".", "/", "a/b", "text", "/dev/null"]
FLAGS: dict[str, list[list[str]]] = {
    **{f"--{name}": [[value] for value in NUMBERS] for name in (
        "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "top", "max_new_tokens", "num_samples",
        "prefill_chunk", "synthetic_prompt", "speculate_k", "tp",
    )},
    "--max_memory": [[value] for value in ("1", "10MB", "1TB", "0", "-1", "nan", "inf", "4 bananas", "1e400GB")],
    "--num_runs": [["1"], ["2"], ["0"], ["x"]],
    **{f"--{name}": [[value] for value in TEXTS] for name in ("prompt", "system", "stop")},
    **{f"--{name}": [[value] for value in PATHS] for name in (
        "prompt_file", "checkpoint_path", "draft_checkpoint_path",
    )},
    **{f"--{name}": [[]] for name in (
        "ignore_eos", "echo", "verbose", "quiet", "selfcheck", "plan", "pick", "interactive", "chat", "no-chat",
        "no-compile", "unranked", "keep_newline", "nonsense",
    )},
    "--rank": [["mean"], ["ended"], ["x"]],
    "--format": [["jsonl"], ["jsonl"], ["text"], ["xml"]],
    "--attention": [["contiguous"], ["expanded"], ["bifurcated"], ["x"]],
    "--kv_dtype": [["int8"], ["auto"], ["int4"]],
    "--dtype": [["float32"], ["bfloat16"], ["float16"], ["float64"]],
    "--device": [["cpu"], ["cuda"], ["cuda:99"], ["cpu:1"], ["meta"], [""], ["cuda:-1"], ["x:y:z"]],
    "--draft": [[value] for value in ("prompt", "layers:2", "layers:0", "layers:99", "layers:", "medusa", "x", "")],
    "--report": [["r.json"], ["missing/r.json"], ["."], [""]],
    "--profile": [["p.json"], ["p.json.gz"], ["."]],
}  # fmt: skip


def flags_of(table: dict[str, list[list[str]]]) -> st.SearchStrategy[list[str]]:
    one = st.sampled_from(sorted(table)).flatmap(
        lambda name: st.sampled_from(table[name]).map(lambda values: [name, *values])
    )
    return st.lists(one, max_size=5).map(lambda found: [word for flag in found for word in flag])


BASE = ["--checkpoint_path", "model", "--max_new_tokens", "4", "--no-compile"]


@given(flags=flags_of(FLAGS), stdin=st.sampled_from([b"", b"Once upon a time\n", b"\xff\xfe", b"hello\nyou\n1\n"]))
def test_flags(flags, stdin):
    with workplace(TINY, text=b"Once upon a time there was a cat.") as folder, untouched(folder):
        result = run(generate.main, [*BASE, *flags], folder, stdin)
        check(result, f"{flags} with {stdin!r}")
        if result.status == 0 and "jsonl" in flags[-1:] and "--plan" not in flags:
            samples_of(result.stdout)


WORDS = st.text(st.characters(exclude_categories=("Cs",)), max_size=4)
LARGE = st.sampled_from([1 << 20, 1 << 40, 1 << 70, 10**400, -(1 << 33), 1e30, 1e308, math.inf, math.nan])
SMALL = st.none() | st.booleans() | st.integers(-2, 130) | st.floats(-9, 300, allow_nan=False) | LARGE | WORDS
DEEP = st.builds("{} deep in {}".format, st.sampled_from([100, 900, 990, 1000, 100_000]), st.sampled_from(["[]", "{}"]))
VALUES = SMALL | DEEP | st.lists(SMALL | DEEP, max_size=5) | st.dictionaries(WORDS, SMALL | DEEP, max_size=3)


def as_json(value: object) -> str:
    """JSON; of DEEP lists or objects, each in the one before, which Python would not write."""

    def nest(match: re.Match[str]) -> str:
        depth, (left, right) = int(match[1]), match[2]
        return left * depth + right * depth if left == "[" else '{"a":' * depth + "1" + "}" * depth

    return re.sub(r'"(\d+) deep in (..)"', nest, json.dumps(value))


ROPE = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["default", "linear", "dynamic", "llama3", "yarn", "longrope", "su", "x"])},
    optional={
        name: st.sampled_from([1.0, 2, 8.0, 0, -1, "4", None, 64]) | SMALL | st.lists(st.floats(0, 9), max_size=16)
        for name in (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings", "beta_fast",
            "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "short_factor", "long_factor", "rope_theta",
            "partial_rotary_factor", "truncate",
        )
    },
)  # fmt: skip
NAMES = """
    attn_logit_softcapping final_logit_softcapping hidden_act query_pre_attn_scalar sliding_window max_window_layers
    use_sliding_window head_dim hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads vocab_size max_position_embeddings rms_norm_eps rope_theta tie_word_embeddings
    attention_bias mlp_bias eos_token_id no_rope_layers no_rope_layer_interval sliding_window_pattern
    residual_multiplier embedding_multiplier qkv_bias attention_multiplier logits_scaling num_experts
    num_local_experts num_experts_per_tok norm_topk_prob mlp_only_layers moe_intermediate_size
    shared_expert_intermediate_size decoder_sparse_step partial_rotary_factor rope_local_base_freq
    original_max_position_embeddings hidden_activation architectures torch_dtype
""".split()
KINDS = st.lists(st.sampled_from(["full_attention", "sliding_attention", "x"]), min_size=4, max_size=6)
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1}
NESTED = st.fixed_dictionaries({"full_attention": ROPE | VALUES, "sliding_attention": ROPE | VALUES})
FIELD = st.one_of(
    st.tuples(st.sampled_from(NAMES), VALUES),
    st.tuples(st.sampled_from(["rope_scaling", "rope_parameters"]), ROPE | NESTED | VALUES),
    st.tuples(st.just("layer_types"), KINDS | VALUES),
)
FIELDS = st.builds(
    lambda name, fields: (
        {"architectures": [name]} | (MIXTURE if re.search("Mo[eE]|Mixtral", name) else {}) | dict(fields)
    ),
    st.sampled_from(sorted(FAMILIES)),
    st.lists(FIELD, max_size=3),
)
DROPPED = st.lists(st.sampled_from(sorted(json.loads((TINY / "config.json").read_text()))), max_size=1)


@given(fields=FIELDS, dropped=DROPPED)
@example(fields={"architectures": ["Gemma2ForCausalLM"], "layer_types": False}, dropped=[])
def test_fields_of_a_config(fields, dropped):
    with workplace(TINY) as folder:
        path = folder / "model" / "config.json"
        config = {name: value for name, value in json.loads(path.read_text()).items() if name not in dropped}
        path.write_text(as_json(config | fields))
        with untouched(folder):
            result = run(generate.main, [*BASE, "--format", "jsonl", "-n", "2", "--quiet"], folder)
            check(result, f"{fields} without {dropped}")
            samples_of(result.stdout)
            check(run(generate.main, [*BASE, "--plan"], folder), f"--plan of {fields} without {dropped}")


EDGE = 1500  # of a file of weights the head and the end are where its structure lies
DAMAGED = {
    "shipped": ["model.pth", "config.json", "tokenizer.model"],
    "parts": [
        "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json", "config.json",
        "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model",
    ],
    "spelled": ["tokenizer.json"],
}  # fmt: skip
DAMAGES = st.one_of(
    st.tuples(st.just("cut"), st.integers(0, EDGE)),
    st.tuples(st.just("cut at the end"), st.integers(1, EDGE)),
    st.tuples(st.just("written"), st.integers(0, EDGE), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("written at the end"), st.integers(1, EDGE), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("written within"), st.integers(1, 1 << 20), st.just(b"\xff" * 8)),  # nan in most dtypes
    st.tuples(st.just("replaced"), st.binary(max_size=20)),
    st.tuples(st.just("replaced"), VALUES.map(lambda value: as_json(value).encode())),
    st.tuples(st.just("removed")),
)


def damage(path: Path, how: tuple) -> None:
    """Gives `path` a damaged copy of what it held, or removes it."""
    data, kind = bytearray(path.read_bytes()), how[0]
    if kind.startswith("cut"):
        data = data[: how[1]] if kind == "cut" else data[: -how[1]]
    elif kind.startswith("written"):
        begin = max(0, len(data) - how[1]) if kind == "written at the end" else how[1]
        data[begin : begin + len(how[2])] = how[2]
    else:
        data = bytearray(how[1] if kind == "replaced" else b"")
    path.unlink()
    if kind != "removed":
        path.write_bytes(data)


def read_it(folder: Path, chat: bool, told: str) -> None:
    """A run of the model in the folder, greedy and in fp32, whose text is read."""
    flags = ["--format", "jsonl", "--temperature", "0", "--dtype", "float32", "--prompt", "a", *["--chat"] * chat]
    with untouched(folder):
        result = run(generate.main, [*BASE, *flags], folder)
        check(result, told)
        samples_of(result.stdout)


FILES_OF = [(source, name) for source, names in DAMAGED.items() for name in names]


@given(file=st.sampled_from(FILES_OF), how=DAMAGES, chat=st.booleans())
@example(file=("shipped", "model.pth"), how=("written at the end", 23, b"\x01"), chat=False)
def test_damaged_files(models, file, how, chat):
    source, name = file
    with workplace(models[source]) as folder:
        damage(folder / "model" / name, how)
        read_it(folder, chat, f"{name} {how}")


JSON = {
    "parts": ["model.safetensors.index.json", "generation_config.json", "tokenizer_config.json", "config.json"],
    "spelled": ["tokenizer.json"],
    "quantised": ["model.pth"],
}
WHERE = st.lists(st.integers(0, 999), min_size=1, max_size=5)
PATTERN = st.sampled_from([{"String": ""}, {"Regex": ""}, {"Regex": "("}, {"Regex": "(a+)+$"}, {"String": "a"}])
COUNT = st.sampled_from([0, 1, 2, 99])
SPLIT = {"type": st.just("Split"), "pattern": PATTERN, "behavior": st.sampled_from(["Isolated", "MergedWithNext"])}
PARTS = {
    "normalizer": st.one_of(
        st.fixed_dictionaries({"type": st.just("Precompiled"), "precompiled_charsmap": st.sampled_from(["", "AAAA"])}),
        st.fixed_dictionaries({"type": st.just("Prepend"), "prepend": WORDS}),
        st.fixed_dictionaries({"type": st.just("Replace"), "pattern": PATTERN, "content": WORDS}),
    ),
    "pre_tokenizer": st.one_of(
        st.fixed_dictionaries(SPLIT | {"invert": st.booleans()}),
        st.fixed_dictionaries({"type": st.just("FixedLength"), "length": COUNT}),
        st.fixed_dictionaries({"type": st.just("Metaspace"), "replacement": WORDS, "prepend_scheme": st.just("first")}),
    ),
    "decoder": st.one_of(
        st.fixed_dictionaries({"type": st.just("Strip"), "content": st.just("a"), "start": COUNT, "stop": COUNT}),
        st.fixed_dictionaries({"type": st.just("Replace"), "pattern": PATTERN, "content": WORDS}),
        st.fixed_dictionaries({"type": st.sampled_from(["ByteFallback", "Fuse", "BPEDecoder", "WordPiece"])}),
    ),
    "post_processor": st.builds(
        lambda ends, id: {"type": "BertProcessing", "sep": [ends, id], "cls": [ends, id]}, WORDS, SMALL
    ),
    "model": st.builds(
        lambda unknown, id: {"type": "Unigram", "unk_id": id, "vocab": [["a", -1.0], [unknown, -2]]}, WORDS, SMALL
    ),
}  # fmt: skip
PART = st.one_of(*(st.tuples(st.just(name), each) for name, each in PARTS.items()))


def change(value: object, where: list[int], new: object) -> None:
    """Puts something else into a list or an object, some levels down: each number chooses one of what is there."""
    while isinstance(value, dict | list):
        places = sorted(value) if isinstance(value, dict) else list(range(len(value)))
        place = places[where[0] % len(places)]
        if not where[1:] or not isinstance(value[place], dict | list) or not value[place]:
            value[place] = new
            return
        value, where = value[place], where[1:]


SAYING = [(source, name) for source, names in JSON.items() for name in names]
SPELLED = ("spelled", "tokenizer.json")


@given(
    file=st.sampled_from([*SAYING, *[SPELLED] * 3]), where=WHERE, new=VALUES, part=st.none() | PART, chat=st.booleans()
)
@example(file=("quantised", "model.pth"), where=[7], new=None, part=None, chat=False)
@example(file=SPELLED, where=[0], new=0, part=("pre_tokenizer", {"type": "FixedLength", "length": 0}), chat=False)
def test_what_files_say(models, file, where, new, part, chat):
    """Files that can be read, of a model, its tokenizer or the recipe of a quantised one, in which a value is another
    or, of a tokenizer, a part."""
    (source, name), part = file, part if file == SPELLED else None
    with workplace(models[source]) as folder:
        path = folder / "model" / name
        if source == "quantised":
            assume("100000 deep" not in str(new))  # which pickle does not write
            with deeper():
                found = torch.load(path)
                change(found["recipe"], where, json.loads(as_json(new)))
                path.unlink()
                torch.save(found, path)
        else:
            content = json.loads(path.read_text("utf-8"))
            change(content, where, new) if part is None else content.update([part])
            path.write_text(as_json(content))
        read_it(folder, chat, f"{name} with {part or new} at {where}")


PROMPTS = st.text(max_size=60) | st.text("ab \n\u00e9\u65e5\U0001f600<s>", max_size=60)


# Of samples: past the ends of buckets, which `make fuzz` does more often.
LENGTHS = st.sampled_from([12, 66, 130, 257] if PROFILE == "fuzz" else [*[12] * 9, 66])


@given(
    prompt=PROMPTS, stops=st.lists(st.text("aeo .\n\u00e9", max_size=3), max_size=2), seed=st.integers(0, 2**64),
    length=LENGTHS,
)  # fmt: skip
def test_a_streamed_text_is_the_whole_one(prompt, stops, seed, length):
    """Any text as the prompt of a file, to its last byte; an empty stop string and a seed too large are refused."""
    with workplace(TINY, prompt=prompt.encode("utf-8", "surrogatepass")) as folder, untouched(folder):
        base = [*BASE, "--prompt_file", "prompt", "--max_new_tokens", str(length), "--seed", str(seed)]
        flags = [*base, "--temperature", "2", *(f"--stop={stop}" for stop in stops), "--quiet"]
        whole = run(generate.main, [*flags, "--format", "jsonl"], folder)
        streamed = run(generate.main, flags, folder)
        for result in (whole, streamed):
            check(result, f"{prompt!r} until {stops}, seed {seed}")
        assert whole.status == streamed.status
        if whole.status == 0:
            (row,) = samples_of(whole.stdout)
            assert streamed.stdout == row["text"] + "\n"


@given(
    stdin=st.none() | st.binary(max_size=60), reader=st.sampled_from(["reads", "has left"]), n=st.integers(1, 3),
    talk=st.sampled_from([[], ["--interactive"], ["--interactive", "--pick"], ["--interactive", "--format", "jsonl"]]),
)  # fmt: skip
def test_streams(stdin, reader, n, talk):
    """Any bytes said, or nothing; a reader that has left is no error. In a conversation a turn may be refused."""
    with workplace(TINY) as folder, untouched(folder):
        ends = os.pipe()
        os.close(ends[0])
        stdout = ends[1] if reader == "has left" else None
        result = run(generate.main, [*BASE, "-n", str(n), *talk], folder, stdin, stdout)
        os.close(ends[1])
        told = f"{stdin!r}, whose reader {reader}, {n}, {talk}: {result}"
        if talk:
            assert result.status in (0, 2) and "Traceback" not in result.stderr, told
        else:
            check(result, told)


def lines_of(**fields: st.SearchStrategy) -> st.SearchStrategy[bytes]:
    """A file of JSON lines with such fields, some of which are of another kind, and of other lines."""
    known = {name: each | VALUES for name, each in fields.items()}
    line = st.fixed_dictionaries({}, optional=known) | st.fixed_dictionaries(fields, optional={"x": VALUES}) | VALUES
    return st.lists(line.map(lambda value: as_json(value).encode()) | st.binary(max_size=20), max_size=4).map(
        b"\n".join
    )


SOME = st.sampled_from(["Once", "A cat sat", "", "é</s>", "a" * 2000])
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "x"]), "content": SOME}))
BATCH: dict[str, list[list[str]]] = {
    "--output": [["out"], ["out"], ["text"], ["missing/out"], ["."], [""]],
    "--prompt_separator": [["\\n"], ["a"], [""], ["\u0000"]],
    "--format": [["jsonl"], ["text"]],
    "--max_memory": [["10MB"], ["1"], ["1TB"]],
    "--stop": [["a"], [""]],
    "--top": [["1"], ["0"]],
    "--system": [["x"]],
    "--report": [["r.json"], ["prompts"]],
    "--num_samples": [["2"], ["0"]],
    **{f"--{name}": [[]] for name in ("skip_bad", "resume", "chat", "no-chat", "plan", "quiet", "verbose")},
}  # fmt: skip


@given(content=st.one_of(lines_of(prompt=SOME, id=SMALL), lines_of(messages=MESSAGES)), flags=flags_of(BATCH))
@example(content=b'{"prompt": "Once", "x": NaN}', flags=[])
@example(content=b'{"prompt": "Once", "x": ' + b"[" * 900 + b"]" * 900 + b"}", flags=[])
def test_many_prompts(parts, content, flags):
    """Of a model with a chat template."""
    with workplace(parts, prompts=content, text=b"Once") as folder, untouched(folder):
        result = run(generate.main, [*BASE, "--prompts", "prompts", *flags], folder)
        check(result, f"{flags} of {content!r}")
        if result.status == 0 and "--plan" not in flags:
            output = folder / "out"
            lines = (output.read_text("utf-8") if output.exists() else result.stdout).split("\n")[output.exists() : -1]
            assert all({"id", "rank", "of"} <= strictly(line).keys() for line in lines)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.open(TINY, "cpu", "float32", compile=False)


@given(
    texts=st.lists(st.sampled_from(["Once", "Once upon", "A cat", "The dog"]), min_size=1, max_size=3),
    n=st.integers(1, 3), length=LENGTHS, seed=st.integers(0, 2**40),
    rows=st.none() | st.integers(1, 5),
)  # fmt: skip
def test_prompts_that_are_drawn_together_are_each_alone(engine, texts, n, length, seed, rows):
    """Samples of any length, by fewer rows than there are samples. fp32. Oracle: the prompt alone."""
    prompts = [Prompt(number, engine.encode(text)) for number, text in enumerate(texts)]
    asked = Request(n, length, Sampling(1.2), seed, eos_ids=frozenset(), rows_at_once=rows)
    for outcome in engine.generate_many(prompts, asked):
        alone = replace(asked, seed=seed_of(seed, outcome.prompt.id))
        expected = engine.generate(outcome.prompt.tokens, alone)
        assert [each.tokens for each in outcome.samples] == [each.tokens for each in expected]


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> bytes:
    """What a batch has written."""
    folder = tmp_path_factory.mktemp("begun")
    (folder / "prompts").write_bytes(PROMPTS_OF_BATCH)
    flags = ["--checkpoint_path", str(TINY), "--prompts", "prompts", "--max_new_tokens", "4", "--no-compile", "-n", "2"]
    assert run(generate.main, [*flags, "--output", "out"], folder).status == 0
    return (folder / "out").read_bytes()


PROMPTS_OF_BATCH = b'{"id": "a", "prompt": "Once", "level": 3}\n"A cat"\n"The dog"\n'


@given(number=st.integers(0, 9), how=DAMAGES | st.tuples(WHERE, VALUES))
@example(number=5, how=([91], []))
def test_going_on(begun, number, how):
    """With an output that is damaged, or in which a line, whose number is given, says something else."""
    with workplace(TINY, prompts=PROMPTS_OF_BATCH, out=begun) as folder:
        if isinstance(how[0], list):
            lines = begun.splitlines()
            value = json.loads(lines[number % len(lines)])
            change(value, *how)
            lines[number % len(lines)] = as_json(value).encode()
            (folder / "out").write_bytes(b"\n".join(lines) + b"\n")
        else:
            damage(folder / "out", how)
        before = contents(folder)
        result = run(generate.main, [*BASE, "--prompts", "prompts", "-n", "2", "--output", "out", "--resume"], folder)
        check(result, f"line {number}, {how}")
        assert result.stdout == "" and (result.status == 0 or contents(folder) == before)


QUANTIZE: dict[str, list[list[str]]] = {
    "--mode": [["int8"], ["int4"], ["int4-gptq"], ["int2"]],
    "--groupsize": [["32"], ["64"], ["128"], ["0"], ["x"]],
    "--output": [["out.pth"], ["out"], ["missing/out.pth"], ["model/model.pth"], ["model/x.pth"], ["."], [""]],
    "--calibration_file": [["text"], ["empty"], ["bytes"], ["missing"], ["."], [""]],
    "--calibration_seq_length": [["8"], ["1"], ["0"], ["-1"], ["9999"], ["x"]],
    "--calibration_sequences": [["1"], ["2"], ["0"], ["-1"], ["x"]],
    "--act_order": [[]],
    "--checkpoint_path": [[value] for value in PATHS],
}
FILES = {"text": b"Once upon a time there was a cat. " * 20, "empty": b"", "bytes": b"\xff\xfe\x00"}


@given(flags=flags_of(QUANTIZE))
def test_quantising(flags):
    with workplace(TINY, **FILES) as folder, untouched(folder):
        base = ["--checkpoint_path", "model", "--mode", "int8"]
        result = run(quantize.main, [*base, *flags], folder)
        check(result, f"quantize.py {flags}")
        assert result.status or Path(folder, result.stdout.strip()).is_file()


NUMBER = [[value] for value in ("0", "1", "2", "-1", "1.5", "nan", "x", "")]
EVAL: dict[str, list[list[str]]] = {
    "--perplexity": [["text"], ["empty"], ["bytes"], ["missing"], ["."]],
    "--samples": [["problems"], ["text"], ["scored"], ["empty"], ["missing"]],
    "--scored": [["scored"], ["text"], ["problems"], ["empty"], ["missing"]],
    "--pass_at": [["1"], ["1,2"], ["0"], ["x"], [""], ["9"]],
    "--output": [["out.json"], ["text"], ["missing/out"], ["."], [""]],
    "--stop": [["a"], [""], ["\\n"]],
    **{f"--{name}": NUMBER for name in (
        "stride", "limit", "num_fewshot", "batch_tokens", "num_samples", "temperature", "top_k", "top_p", "seed",
        "max_new_tokens", "repetition_penalty",
    )},
    "--checkpoint_path": [[value] for value in PATHS],
    "--quiet": [[]],
    "--resume": [[]],
}  # fmt: skip
LINES = {
    "problems": b'{"task_id": "A", "prompt": "Once"}\n{"task_id": 2, "prompt": ""}\n',
    "scored": b'{"task_id": "A", "completion": "x", "mean_logprob": -1, "passed": true, "count": 2}\n',
}


ASKED = [["--perplexity", "text"], ["--samples", "problems"], ["--pass_at", "1", "--scored", "scored"], []]


PROBLEMS = lines_of(task_id=SMALL, prompt=SOME)
SCORED = lines_of(task_id=SMALL, completion=SOME, mean_logprob=SMALL, passed=st.booleans(), count=SMALL)


@given(
    asked=st.sampled_from(ASKED), flags=flags_of(EVAL), problems=st.just(LINES["problems"]) | PROBLEMS,
    scored=st.just(LINES["scored"]) | SCORED,
)  # fmt: skip
def test_evaluating(asked, flags, problems, scored):
    assume("--perplexity" in asked or "text" not in flags)  # an output that is not read may be replaced
    base = ["--checkpoint_path", "model", "--max_new_tokens", "3", "--num_samples", "2", "--no-compile"]
    with workplace(TINY, **FILES, problems=problems, scored=scored) as folder, untouched(folder):
        result = run(evaluation.main, [*base, *asked, *flags], folder)
        check(result, f"eval.py {asked} {flags} of {problems!r}, {scored!r}")


def test_the_rule_is_not_one_that_nothing_breaks(tmp_path):
    """Commands that break it, each in its way."""

    def refused(arguments: list[str]) -> int:
        print("error: a value is not right, give another", file=sys.stderr)
        return 2

    def raises(arguments: list[str]) -> int:
        raise RuntimeError(str(arguments))

    def says(arguments: list[str]) -> int:
        print("sample")
        return refused(arguments)

    def twice(arguments: list[str]) -> int:
        return refused(arguments) and refused(arguments)

    def dies(arguments: list[str]) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 0

    check(run(refused, [], tmp_path), "refused")
    for main in (raises, says, twice, dies):
        with pytest.raises(AssertionError):
            check(run(main, [], tmp_path), "case")
    (tmp_path / "file").write_text("precious")
    with pytest.raises(AssertionError, match="a file was changed"), untouched(tmp_path):
        (tmp_path / "file").write_text("lost")
    with pytest.raises(ValueError, match="NaN is no JSON"):
        samples_of('{"mean_logprob": NaN}')
