"""hub.py, scripts/download.py and prepare.sh. Oracle: a small hub on this machine, which counts what is asked of it.

The hub speaks the few calls that huggingface_hub makes, so that its errors are those of the library, not of a stub.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote, urlsplit

import pytest
from conftest import ROOT, interruptible

import download
from loading.hub import UNFINISHED, choose, fetch, is_complete, locate

COMPANIONS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
INDEX = "model.safetensors.index.json"
BIN_INDEX = "pytorch_model.bin.index.json"


def shards(stem: str, count: int, suffix: str) -> list[str]:
    return [f"{stem}-{number:05}-of-{count:05}{suffix}" for number in range(1, count + 1)]


LLAMA = [
    ".gitattributes", "LICENSE", "README.md", "USE_POLICY.md", *COMPANIONS, *shards("model", 4, ".safetensors"), INDEX,
    "original/consolidated.00.pth", "original/params.json", "original/tokenizer.model", "special_tokens_map.json",
]  # fmt: skip
MISTRAL = [
    ".gitattributes", "README.md", *COMPANIONS, "consolidated.safetensors", *shards("model", 3, ".safetensors"), INDEX,
    "params.json", "special_tokens_map.json", "tokenizer.model", "tokenizer.model.v3",
]  # fmt: skip
SHARDS = shards("model.safetensors", 2, ".safetensors")  # as some name them
BINS = shards("pytorch_model", 2, ".bin")
BIN_ONLY = ["README.md", *COMPANIONS, *BINS, BIN_INDEX, "tokenizer.model", "training_args.bin", "optimizer.pt"]
BOTH = ["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx", "tokenizer.model"]
TINYLLAMAS = ["README.md", "stories15M.bin", "stories15M.pt", "stories42M.pt", "stories260K/stories260K.pt"]
GGUF = ["README.md", "config.json", *(f"llama.Q{bits}_K_M.gguf" for bits in (2, 3, 4, 5, 6))]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"]


@pytest.mark.parametrize(
    "names,files,expected",
    [
        (LLAMA, [], [*COMPANIONS, "special_tokens_map.json", INDEX, *shards("model", 4, ".safetensors")]),
        (MISTRAL, [], [
            *COMPANIONS[:2], "tokenizer.model", *COMPANIONS[2:], "special_tokens_map.json", INDEX,
            *shards("model", 3, ".safetensors"),
        ]),
        (BIN_ONLY, [], [*COMPANIONS[:2], "tokenizer.model", *COMPANIONS[2:], BIN_INDEX, *BINS]),
        (BOTH, [], ["config.json", "tokenizer.model", "model.safetensors"]),
        ([*BOTH, "additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"], [], [
            "config.json", "tokenizer.model", "additional_chat_templates/tool_use.jinja", "model.safetensors"
        ]),
        ([*BOTH, *shards("model", 2, ".safetensors"), INDEX], [], [
            "config.json", "tokenizer.model", "model.safetensors"
        ]),
        (["config.json", "pytorch_model.bin"], [], ["config.json", "pytorch_model.bin"]),
        (["config.json", "llama-7b.safetensors", "adapter_model.safetensors", "x/y.safetensors"], [], [
            "config.json", "llama-7b.safetensors"
        ]),
        (TINYLLAMAS, ["stories15M.pt"], ["stories15M.pt"]),
        (TINYLLAMAS, ["stories260K/stories260K.pt", "stories15M.pt"], ["stories260K/stories260K.pt", "stories15M.pt"]),
        (["config.json", "optimizer.safetensors", *SHARDS, INDEX], [], ["config.json", INDEX, *SHARDS]),
        (["config.json", "other.safetensors", *SHARDS], [], ["config.json", *SHARDS]),
        (BOTH, ["pytorch_model.bin", "config.json"], ["config.json", "tokenizer.model", "pytorch_model.bin"]),
    ],
    ids=[
        "llama", "mistral", "bin", "both", "templates", "file and shards", "one bin", "own name", "file", "files",
        "suffix first", "stray file", "file of both",
    ],
)  # fmt: skip
def test_one_set_of_weights_is_chosen(names, files, expected):
    assert sorted(choose(names, files)) == sorted(expected)
    assert len(set(expected)) == len(expected)


@pytest.mark.parametrize(
    "names,files,message",
    [
        (GGUF, [], "it has llama.Q2_K_M.gguf, llama.Q3_K_M.gguf, llama.Q4_K_M.gguf and 2 more"),
        (TINYLLAMAS, [], "it has stories15M.bin, stories15M.pt, stories260K/stories260K.pt and 1 more"),
        (ADAPTER, [], "a LoRA adapter (adapter_config.json), which is not supported"),
        ([*BOTH, "adapter_config.json"], [], "a LoRA adapter (adapter_config.json), which is not supported"),
        (
            ["config.json", *shards("model", 3, ".safetensors")[1:]],
            [],
            "only 2 of 3 weight shards (model-00001-of-00003.safetensors is missing)",
        ),
        (["original/model.safetensors", "config.json"], [], "it has original/model.safetensors: "),
        (["consolidated.safetensors", "config.json"], [], "it has consolidated.safetensors: "),
        (["README.md"], [], "it has no weight files"),
        (["model.safetensors"], [], "no config.json"),
        (TINYLLAMAS, ["stories15m.pt"], "no file stories15m.pt; it has stories15M.bin, "),
    ],
)
def test_a_repository_without_weights_for_the_engine_is_refused(names, files, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        choose(names, files)


class Hub(ThreadingHTTPServer):
    """Repositories with their files; `fetched` lists the files that were sent, `listed` overrides a listed size."""

    daemon_threads = True
    sha = "5e" * 20

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.environment = {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}"}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.listed: dict[str, int | None] = {}
        self.fetched: list[str] = []
        self.paused = threading.Event()  # while set, files of this ending stop halfway
        self.paused_at = ".safetensors"

    def run(self, *arguments, **environment) -> subprocess.CompletedProcess:
        return run(command_of(*arguments), **self.environment, **environment)

    def locate(self, name: str, store: Path, **environment) -> subprocess.CompletedProcess:
        return run(locate_of(name, store), **(self.environment | environment))


class HubHandler(BaseHTTPRequestHandler):
    def log_message(self, *arguments) -> None:
        pass

    def do_GET(self) -> None:
        api, _, rest = unquote(urlsplit(self.path).path).removeprefix("/").partition("models/")
        if self.headers["Authorization"] not in (None, "Bearer hf_right"):
            self.answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif api == "api/":
            repo, _, revision = rest.partition("/revision/")
            self.listing(repo, revision or "main")
        else:
            repo, _, rest = unquote(self.path)[1:].partition("/resolve/")
            self.file(repo, *rest.partition("/")[::2])

    do_HEAD = do_GET

    def listing(self, repo: str, revision: str) -> None:
        if repo == "own/broken":
            return self.answer(500, {})
        if repo not in self.server.repos:
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", "v1.0", self.server.sha):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        sizes = {name: len(body) for name, body in self.server.repos[repo].items()} | self.server.listed
        with_size = "blobs=" in self.path
        siblings = [{"rfilename": name, "size": sizes[name] if with_size else None} for name in sizes]
        self.answer(200, {}, json.dumps({"id": repo, "sha": self.server.sha, "siblings": siblings}).encode())

    def file(self, repo: str, revision: str, name: str) -> None:
        if repo == "own/gated":
            return self.answer(401, {"X-Error-Code": "GatedRepo"})
        if repo == "own/forbidden":
            return self.answer(403, {})
        if name not in self.server.repos.get(repo, {}) or revision != self.server.sha:
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = self.server.repos[repo][name]
        if self.command == "GET":
            self.server.fetched.append(name)
        self.answer(200, {"X-Repo-Commit": self.server.sha, "ETag": hashlib.sha1(body).hexdigest()}, body)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(body) // 2
        self.wfile.write(body[:half])
        while self.server.paused.is_set() and self.path.endswith(self.server.paused_at):
            time.sleep(0.05)
        self.wfile.write(body[half:])


@pytest.fixture
def hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        server.repos["own/model"] = {name: name.encode() * 9 for name in [*BOTH, "README.md"]}
        yield server
        server.paused.clear()
        server.shutdown()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path_factory):
    """No token, cache or setting of whoever runs the tests."""
    for name in os.environ:
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "3")


def command_of(*arguments) -> list[str]:
    return [sys.executable, str(ROOT / "scripts" / "download.py"), *map(str, arguments)]


LOCATE = """
import sys
from pathlib import Path
from loading.hub import locate
try:
    print(locate(sys.argv[1], Path(sys.argv[2])))
except (ValueError, OSError) as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
"""


def locate_of(name: str, store: Path) -> list[str]:
    return [sys.executable, "-c", LOCATE, name, str(store)]


def run(command: list[str], **environment) -> subprocess.CompletedProcess:
    environment = os.environ | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment, cwd=ROOT)


def interrupt(hub: Hub, command: list[str], name: str) -> subprocess.CompletedProcess:
    """Ctrl-C while the file `name` stands halfway; the program must end although it still does."""
    hub.paused.set()
    pipe, environment = subprocess.PIPE, os.environ | hub.environment
    streams = {"stdout": pipe, "stderr": pipe, "text": True, "preexec_fn": interruptible}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **streams) as process:
        limit = time.monotonic() + 20
        while name not in hub.fetched:
            time.sleep(0.02)
            assert time.monotonic() < limit
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=5)
    hub.paused.clear()
    hub.fetched.clear()
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def assert_refused(result: subprocess.CompletedProcess, message: str) -> None:
    lines = [line for line in result.stderr.splitlines() if not line.startswith("downloading ")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr
    assert result.returncode == 2 and result.stdout == ""


CHOSEN = ["config.json", "model.safetensors", "tokenizer.model"]


def test_what_is_needed_is_fetched_once(hub, tmp_path):
    out = tmp_path / "a" / "model"
    first, second = (hub.run("own/model", "--revision", "v1.0", "--out", out) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout == f"{out}\n"
    assert "downloading 3 files of own/model, 0.0 MB\n" in first.stderr and f"already in {out}" in second.stderr
    assert sorted(path.name for path in out.iterdir() if path.is_file()) == CHOSEN == sorted(hub.fetched)
    assert all((out / name).read_bytes() == hub.repos["own/model"][name] for name in CHOSEN)


def test_the_default_folder_is_below_the_repository(monkeypatch, capsys):
    """The folder is asked of the command line, in this process; nothing is fetched."""
    monkeypatch.setattr(sys, "argv", ["download.py", "own/model"])
    monkeypatch.setattr("loading.hub.download", lambda repo, revision, out, files: out)
    assert download.main() == 0
    assert capsys.readouterr().out == f"{ROOT / 'checkpoints' / 'own' / 'model'}\n"


def test_single_files_are_fetched_by_name(hub, tmp_path):
    hub.repos["own/tinyllamas"] = {name: name.encode() for name in TINYLLAMAS}
    names = ["stories15M.pt", "stories260K/stories260K.pt"]
    result = hub.run("own/tinyllamas", "--out", tmp_path, "--file", names[0], "--file", names[1])
    assert result.returncode == 0, result.stderr
    assert hub.fetched == names and all((tmp_path / name).read_bytes() == name.encode() for name in names)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["model"], "'model' is not a repository name: use OWNER/NAME"),
        (["https://huggingface.co/own/model"], "'https://huggingface.co/own/model' is not a repository name"),
        (["../model"], "'../model' is not a repository name"),
        ([], "the following arguments are required: REPO"),
        (["own/modle"], "/own/modle not found: check the name; if it is private, set HF_TOKEN"),
        (["own/gated"], "own/gated needs a token: accept the licence on http://127.0.0.1"),
        (["own/forbidden"], "own/forbidden needs a token: accept the licence on http://127.0.0.1"),
        (["own/model", "--revision", "v2.0"], "own/model has no revision 'v2.0': pass one of its branches"),
        (["own/gguf"], "own/gguf has no *.safetensors or pytorch_model*.bin in its top folder"),
        (["own/broken"], "/own/broken cannot be downloaded (Server error '500"),
    ],
    ids=["no owner", "address", "path", "nothing", "unknown", "gated", "forbidden", "revision", "gguf", "server"],
)
def test_bad_input_gets_one_line(hub, tmp_path, arguments, message):
    names = {"own/gated": BOTH, "own/forbidden": BOTH, "own/gguf": GGUF}
    hub.repos |= {repo: dict.fromkeys(names[repo], b"x") for repo in names}
    assert_refused(hub.run(*arguments, "--out", tmp_path / "out"), message)
    assert hub.fetched == []


def test_a_token_is_taken_from_the_environment(hub, tmp_path):
    assert hub.run("own/model", "--out", tmp_path / "right", HF_TOKEN="hf_right").returncode == 0
    result = hub.run("own/model", "--out", tmp_path / "wrong", HF_TOKEN="hf_wrong")
    assert_refused(result, "the hub rejected the token for own/model: set HF_TOKEN to a valid one")


@pytest.mark.parametrize(
    "environment,message",
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "cannot be downloaded ([Errno 111] Connection refused): check"),
        ({"HF_HUB_OFFLINE": "1"}, "own/model cannot be downloaded while HF_HUB_OFFLINE is set: unset it"),
    ],
    ids=["refused", "offline"],
)
def test_without_a_network_it_ends_at_once(tmp_path, environment, message):
    begin = time.monotonic()
    assert_refused(run(command_of("own/model", "--out", tmp_path), **environment), message)
    assert time.monotonic() - begin < 10


def test_a_disk_without_room_is_refused_before_the_download(hub, tmp_path):
    hub.listed["model.safetensors"] = 10**18
    result = hub.run("own/model", "--out", tmp_path / "out")
    assert_refused(result, "the download needs 1000000000.0 GB, but the disk of")
    assert hub.fetched == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize("free,fits", [(10, True), (9, False)])
def test_what_is_already_there_needs_no_room(monkeypatch, tmp_path, free, fits):
    """The weights lie there, the 10 bytes of config.json do not; the hub and the disk are stubs."""
    sizes = {"config.json": 10, "model.safetensors": 1000}
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    siblings = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    info = SimpleNamespace(sha=Hub.sha, siblings=siblings)
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=lambda *_, **__: info))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda repo, name, *, revision, local_dir: (local_dir / name).write_bytes(bytes(sizes[name])),
    )
    if fits:
        assert fetch("own/model", None, tmp_path) == tmp_path
    else:
        with pytest.raises(ValueError, match="the download needs 0.0 MB, but the disk of"):
            fetch("own/model", None, tmp_path)


def test_a_file_of_another_size_than_listed_is_named(hub, tmp_path):
    hub.listed["model.safetensors"] = 7
    result = hub.run("own/model", "--out", tmp_path, HF_HUB_DISABLE_PROGRESS_BARS="1")
    assert_refused(result, f"{tmp_path / 'model.safetensors'} does not have its 7 bytes: delete it")


def test_sizes_may_be_unknown(hub, tmp_path):
    hub.listed |= dict.fromkeys(BOTH)
    result = hub.run("own/model", "--out", tmp_path)
    assert result.returncode == 0 and sorted(hub.fetched) == CHOSEN


def test_a_folder_that_cannot_be_used_is_named(hub, tmp_path):
    (tmp_path / "file").touch()
    result = hub.run("own/model", "--out", tmp_path / "file" / "out")
    assert_refused(result, "cannot be used (Not a directory): choose another folder")
    assert str(tmp_path / "file" / "out") in result.stderr


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O error: No space left on device (os error 28)")]
)
def test_a_disk_that_fills_up_is_named(monkeypatch, capsys, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(sys, "argv", ["download.py", "own/model", "--out", "somewhere"])
    monkeypatch.setattr("loading.hub.download", full)
    assert download.main() == 2
    assert capsys.readouterr().err.startswith("error: the disk of somewhere is full: ")


def test_an_interrupt_keeps_whole_files(hub, tmp_path):
    result = interrupt(hub, command_of("own/model", "--out", tmp_path), "model.safetensors")
    assert result.returncode == 130 and result.stdout == "" and "Traceback" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("interrupted: completed files are kept")
    assert not (tmp_path / "model.safetensors").exists() and (tmp_path / "config.json").exists()
    assert hub.run("own/model", "--out", tmp_path).returncode == 0
    assert hub.fetched == ["model.safetensors"]


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """Whoever asks the hub gets an ImportError. Relative paths are below `tmp_path`."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    monkeypatch.chdir(tmp_path)


def test_a_name_is_fetched_once_and_then_used_offline(hub, tmp_path, no_hub):
    result, folder = hub.locate("own/model", tmp_path / "store"), tmp_path / "store" / "own" / "model"
    assert result.returncode == 0 and result.stdout == f"{folder}\n", result.stderr
    assert "downloading 3 files of own/model, 0.0 MB\n" in result.stderr and sorted(hub.fetched) == CHOSEN
    assert locate("own/model", tmp_path / "store") == locate(Path("own/model"), tmp_path / "store") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(ImportError):
        locate("own/model", tmp_path / "store")


def test_a_name_goes_on_where_its_download_was_interrupted(hub, tmp_path):
    """No index says here that the first shard is not all."""
    names = shards("model", 2, ".safetensors")
    hub.repos["own/model"] = {name: name.encode() for name in ["config.json", *names]}
    hub.paused_at, folder = names[1], tmp_path / "own" / "model"
    assert interrupt(hub, locate_of("own/model", tmp_path), names[1]).stdout == ""
    assert (folder / names[0]).exists() and not (folder / names[1]).exists()
    result = hub.locate("own/model", tmp_path)
    assert result.returncode == 0 and hub.fetched == names[1:], result.stderr
    assert is_complete(folder) and sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "config.json", *names
    ]  # fmt: skip


@pytest.mark.parametrize("missing", [None, "config.json", INDEX, "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("stopped", [False, True])
def test_a_folder_is_whole_with_all_that_it_names(tmp_path, missing, stopped):
    """Without its index a folder holds the shards that are there, as read_checkpoint has it."""
    names = ["config.json", *shards("model", 3, ".safetensors")]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": dict(zip("abc", names[1:], strict=True))}))
    if stopped:
        (tmp_path / UNFINISHED).touch()
    if missing:
        (tmp_path / missing).unlink()
    assert is_complete(tmp_path) == (missing in (None, INDEX) and not stopped)


def test_a_path_that_is_there_is_not_looked_up(tmp_path, no_hub):
    (tmp_path / "own" / "model").mkdir(parents=True)
    (tmp_path / "model.pth").touch()
    for path in ("own/model", tmp_path / "own" / "model", "model.pth"):
        assert locate(path, tmp_path / "store") == Path(path)


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "../model", "./own/model", "/own", "own/", "own/a model", "öwn/model", "own/model.pth"]
)
def test_what_is_neither_path_nor_name_is_refused(tmp_path, no_hub, name):
    (tmp_path / "store" / "model").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=rf"^checkpoint {re.escape(name)} not found: .* OWNER/NAME of the Hugging Face Hub$"
    ):
        locate(name, tmp_path / "store" / "hub")


@pytest.mark.parametrize(
    "name,environment,message",
    [
        ("own/modle", {}, "own/modle is not a local folder, and http://127.0.0.1"),
        ("own/a..b", {}, "own/a..b is not a local folder, and 'own/a..b' is not a repository name"),
        ("own/model", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "/own/model cannot be downloaded ([Errno 111] Connection"),
    ],
    ids=["unknown", "bad", "refused"],
)
def test_a_name_that_cannot_be_fetched_gets_one_line(hub, tmp_path, name, environment, message):
    assert_refused(hub.locate(name, tmp_path, **environment), message)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_room_loads_no_library():
    code = "import sys, loading.hub; print([name for name in ('huggingface_hub', 'torch') if name in sys.modules])"
    assert run([sys.executable, "-c", code]).stdout == "[]\n"


STUB = """#!/usr/bin/env bash
if [[ $1 == -c ]]; then exec "$REAL" "$@"; fi
(IFS='|'; printf '%s\\n' "$*" >>"$LOG")
case $1 in
    */download.py) echo "/models/of $2"; exit "${DOWNLOAD_STATUS:-0}" ;;
esac
"""


@pytest.fixture
def prepare(tmp_path):
    """Runs a copy of prepare.sh, whose Python writes down what it is asked to run, and returns that as lines."""
    root = tmp_path / "a repository"
    (root / "scripts").mkdir(parents=True)
    (root / "scripts" / "prepare.sh").write_bytes((ROOT / "scripts" / "prepare.sh").read_bytes())
    (tmp_path / "python").write_text(STUB)
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "log").touch()

    def run(*arguments, **given):
        environment = os.environ | {"PYTHON": str(tmp_path / "python"), "LOG": str(tmp_path / "log")}
        environment |= {"REAL": sys.executable} | given
        result = subprocess.run(
            ["bash", str(root / "scripts" / "prepare.sh"), *arguments],
            capture_output=True, text=True, timeout=30, env=environment, cwd=tmp_path,
        )  # fmt: skip
        return result, (tmp_path / "log").read_text().replace(str(root), "ROOT").splitlines()

    return run


FETCHED = ["ROOT/scripts/download.py|o/m"]
QUANTISED = "ROOT/quantize.py|--checkpoint_path|/models/of o/m|--mode|"
USAGE = "usage: scripts/prepare.sh OWNER/NAME [int8|int4|int4-gptq CALIBRATION_TEXT]\n"


def test_prepare_fetches_what_is_then_run(prepare):
    """One copy of the weights, for which the download has found room."""
    result, asked = prepare("o/m")
    assert result.returncode == 0, result.stderr
    assert asked == FETCHED and result.stdout == "/models/of o/m\n"


def test_prepare_takes_the_python_of_the_repository(prepare, tmp_path):
    """No environment is activated. One without the libraries is refused in a line."""
    folder = tmp_path / "a repository" / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(tmp_path / "python")
    result, asked = prepare("o/m", PYTHON="", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert (result.returncode, asked) == (0, FETCHED), result.stderr
    bare = tmp_path / "bare"
    bare.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} -I -S "$@"\n')  # no site-packages
    bare.chmod(0o755)
    result, asked = prepare("o/m", PYTHON=str(bare))
    assert (result.returncode, asked) == (2, FETCHED)
    assert result.stderr.startswith(f"error: '{bare}' lacks packages of requirements.txt")
    assert result.stderr.count("\n") == 1 and result.stdout == ""


def test_prepare_quantises_where_asked(prepare):
    result, asked = prepare("o/m", "int4")
    assert result.returncode == 0, result.stderr
    assert asked == [*FETCHED, QUANTISED + "int4"]


def test_prepare_hands_a_calibration_text_on(prepare, tmp_path):
    (tmp_path / "a text").touch()
    result, asked = prepare("o/m", "int4-gptq", "a text")
    assert result.returncode == 0, result.stderr
    assert asked == [*FETCHED, QUANTISED + "int4-gptq|--calibration_file|a text"]


def test_prepare_stops_where_the_download_does(prepare):
    result, asked = prepare("o/m", DOWNLOAD_STATUS="130")
    assert result.returncode == 130 and asked == FETCHED


@pytest.mark.parametrize(
    "arguments,environment,message",
    [
        ([], {}, USAGE),
        (["--help"], {}, USAGE),
        (["o/m", "int4-gptq", "text", "more"], {}, USAGE),
        (["o/m", "int2"], {}, "error: unknown mode 'int2': pass int8, int4, int4-gptq or no mode\n"),
        (["o/m", "int4-gptq"], {}, "error: calibration text '' not found: pass a text file"),
        (["o/m", "int4-gptq", "none"], {}, "error: calibration text 'none' not found"),
        (["o/m", "int8", "text"], {}, "error: mode 'int8' uses no calibration text: remove text\n"),
        (["o/m"], {"PYTHON": "no-such-python"}, "error: 'no-such-python' not found: set PYTHON to"),
    ],
    ids=["nothing", "help", "four", "mode", "no text", "text not there", "text", "python"],
)
def test_prepare_refuses_before_anything_is_fetched(prepare, arguments, environment, message):
    result, asked = prepare(*arguments, **environment)
    assert result.returncode == 2 and result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert asked == [] and result.stdout == ""


def test_prepare_is_executable():
    assert os.access(ROOT / "scripts" / "prepare.sh", os.X_OK)
