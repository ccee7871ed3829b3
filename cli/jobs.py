"""Batch jobs: prompts from a file, samples to a file, resuming a killed run.

The output is JSON lines. The first is a header with everything that determines the samples. The lines of each prompt
are appended at once when it finishes, so a killed run leaves at most one partial prompt, which is found by its missing
line numbers and drawn again. A file has one writer: each replica writes its own. The first replica merges them into the
output at the end, or the next run with --resume does.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from cli.console import Bar, placed, sample_fields, settings_of
from cli.prompts import BadLines, Line, Prompts, Record, Spool, encode, parse_json
from cli.ranks import Ranks
from cli.system import replica_file, replica_files
from engine.chat import ChatEncoder
from engine.engine import Engine
from engine.plan import Plan, human
from engine.request import Request
from engine.samples import Sample, rank
from engine.scheduler import BatchStats, Outcome
from loading.checkpoint import Checkpoint
from loading.files import companions, counted, write_file
from sampling import RULE

CONFIGS = ("config.json", "generation_config.json")  # hashed as parsed, not as bytes
# Fingerprint of a model: bytes per block, and blocks over all its files.
BLOCK, BLOCKS = 1 << 12, 1 << 12


def fingerprint(checkpoint: Checkpoint) -> str:
    """Hash what identifies a model: its shape, recipe and end tokens, and the sizes and blocks of its weights and
    tokenizer files, from beginning to end."""
    digest = hashlib.sha256(repr((checkpoint.args, checkpoint.recipe, sorted(checkpoint.eos_ids))).encode())
    tokenizer = [path for path in companions(checkpoint.folder) if path.name not in CONFIGS]
    paths = [*sorted(checkpoint.weights), *tokenizer]
    blocks = max(64, BLOCKS // len(paths))
    for path in paths:
        with path.open("rb", buffering=0) as file:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}".encode())
            if size <= blocks * BLOCK:
                digest.update(file.read())
                continue
            for at in range(blocks):
                file.seek(at * (size - BLOCK) // (blocks - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


def digest_of(prompts: Iterable[tuple[Any, ...]]) -> str:
    """Hash prompts, given as plain values."""
    digest = hashlib.sha256()
    for each in prompts:
        digest.update(json.dumps(each).encode())
    return digest.hexdigest()[:16]


@dataclass
class ResumeState:
    """State of an output to resume. done: ids, as JSON, of the finished prompts. torn: whether a file has more than
    those."""

    header: dict[str, Any] | None = None
    done: set[str] = field(default_factory=set)
    torn: bool = False


class Place(NamedTuple):
    """Place of a line in an output: the prompt's id as JSON, the line's number within the prompt, and their total."""

    id: str
    number: int
    total: int


def place_of(value: object) -> Place | None:
    """Read the place of a line of --prompts or eval.py --samples. Returns None for any other line."""
    if not isinstance(value, dict):
        return None
    id, number, total = value.get("id", value.get("task_id")), value.get("rank", value.get("sample")), value.get("of")
    if isinstance(id, str | int) and isinstance(number, int) and isinstance(total, int):
        return Place(json.dumps(id), number, total)
    return None


def lines_of(path: Path) -> Iterator[tuple[bytes, Place | None]]:
    """Yield each line of an output file, except a header line, with its place; None: it was cut off."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            try:
                value = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                value = None
            if number or not isinstance(value, dict) or value.keys() != {"header"}:
                yield line, place_of(value)


def whole_lines(path: Path, done: set[str]) -> Iterator[bytes]:
    """Yield the lines of an output file that belong to the prompts in `done`."""
    return (line for line, place in lines_of(path) if place is not None and place.id in done)


def read_file(path: Path) -> ResumeState:
    """Read the state of one file. Raises ValueError if no job started it."""
    if not path.exists():
        return ResumeState()
    with path.open("rb") as file:
        first = file.readline()
    if not first.endswith(b"\n") and b'{"header": '.startswith(first[:11]):
        return ResumeState(torn=bool(first))  # killed before the header was written
    try:
        header = parse_json(first.decode("utf-8"))["header"]
        seed = header["seed"]
    except (ValueError, KeyError, TypeError):
        seed = None
    if not isinstance(seed, int):
        raise ValueError(f"{path} has no header of a batch: choose another --output")
    seen: dict[str, set[int]] = {}
    totals: dict[str, int] = {}
    torn = False
    for _, place in lines_of(path):
        if place is None:
            torn = True
            continue
        seen.setdefault(place.id, set()).add(place.number)
        totals[place.id] = place.total
    done = {id for id, numbers in seen.items() if len(numbers) == totals[id]}
    return ResumeState(header, done, torn or len(done) < len(seen))


def read_begun(path: Path) -> ResumeState:
    """Read the state of an output and its replicas' files. Raises ValueError unless one job started them all."""
    begun = read_file(path)
    for each in replica_files(path):
        other = read_file(each)
        if begun.header is not None and other.header is not None:
            check_header(each, other, begun.header)
        begun = ResumeState(begun.header or other.header, begun.done | other.done, begun.torn)
    return begun


def check_header(path: Path, begun: ResumeState, header: dict[str, Any]) -> None:
    """Raise ValueError if another command started the file."""
    if begun.header is None:
        return
    for name, value in header.items():
        if begun.header.get(name) != value:
            old = json.dumps(begun.header.get(name))
            raise ValueError(
                f"{path} was begun with {name} {old}, not {json.dumps(value)}: repeat it, or choose another file"
            )


@dataclass(frozen=True)
class Job:
    """A batch. prompts: those that are left, for all replicas. begun: what an earlier run finished."""

    prompts: Prompts
    header: dict[str, Any]
    begun: ResumeState

    def outcomes(
        self, engine: Engine, request: Request, plan: Plan, stats: BatchStats, ranks: Ranks
    ) -> Iterator[tuple[Outcome, dict[str, Any]]]:
        """Yield the prompts that this replica takes as they finish, with the fields that are copied to their output."""
        begun = 0
        for window in self.prompts.windows():
            queue = ranks.queue(f"prompts from {begun}", begun + len(window) < len(self.prompts))
            begun += len(window)
            prompts = [line.prompt for line in window]
            fields = {json.dumps(line.prompt.id): line.fields for line in window}
            for outcome in engine.generate_many(prompts, request, stats=stats, plan=plan, queue=queue):
                yield outcome, fields[json.dumps(outcome.prompt.id)]
            del window, prompts, fields  # before the next is read


def make_header(
    checkpoint: Checkpoint, seed: int, ends: Iterable[int], prompts: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """Build the header: all that determines the samples. prompts: their digest. settings: flags but the model path."""
    known = {"model": fingerprint(checkpoint), "seed": seed, "draw": RULE, "ends": sorted(ends), "prompts": prompts}
    return known | {name: value for name, value in settings.items() if name != "checkpoint_path"}


def set_up_job(
    options: argparse.Namespace,
    ranks: Ranks,
    records: Spool[Record],
    begun: ResumeState,
    checkpoint: Checkpoint,
    dialogue: ChatEncoder,
    request: Request,
) -> Job:
    """Encode the remaining prompts. Raises ValueError if a line is invalid or another command started the output."""
    if ranks.replicas > 1 and options.output is None:
        raise ValueError(f"{ranks.replicas} replicas write to one file: pass --output")
    ends = [] if options.ignore_eos else dialogue.eos_ids
    digest = digest_of(each.plain() for each in records)
    how = {name: getattr(options, name) for name in ("num_samples", "top", "rank", "chat", "system")}
    header = make_header(checkpoint, options.seed, ends, digest, how | settings_of(options))
    if options.output is not None:
        check_header(options.output, begun, header)
    plain = dialogue if options.chat else ChatEncoder(dialogue.tokenizer, dialogue.vocab_size, None, None)
    prompts, bad, args = Prompts(), BadLines(options), ranks.shard.local(checkpoint.args)
    for record in records:
        if json.dumps(record.id) not in begun.done:
            try:
                prompt = encode(record, dialogue, plain, request)
            except ValueError as error:
                bad.add(f"line {record.number}: {error}")
            else:
                prompts.append(Line(prompt, record.fields), args, request)
    bad.check()
    if not prompts and not begun.done:
        raise ValueError(f"--prompts {options.prompts} has no prompt: pass a file with at least one")
    return Job(prompts, header, begun)


class Output:
    """The file that a job appends to, as its only writer.

    apart: the header is a line by itself. Otherwise it is a field of the first line, for readers that expect no header.
    """

    def __init__(self, path: Path, apart: bool = True) -> None:
        self.path, self.apart = Path(os.path.realpath(path)), apart  # a symlink stays one
        self.held = ExitStack()
        self.file: BinaryIO | None = None
        self.header: dict[str, Any] | None = None  # not yet written to the file

    def begin(self, begun: ResumeState, header: dict[str, Any]) -> None:
        """Lock the file for this run, write its header, drop partial prompts and merge the files of replicas. Raises
        ValueError if another run holds one of the files or has changed them."""
        others = replica_files(self.path)
        with ExitStack() as stack:
            self.file, *_ = [stack.enter_context(hold(path)) for path in (self.path, *others)]
            if read_begun(self.path) != begun:
                raise ValueError(f"another run has written to {self.path} meanwhile: run the same command again")
            own = read_file(self.path)
            if own.header is None or own.torn:
                self.rewrite(own.done, header)
                self.file = stack.enter_context(hold(self.path))  # rewriting replaced the file
            self.merge(others, own.done)
            self.held = stack.pop_all()

    def rewrite(self, done: set[str], header: dict[str, Any]) -> None:
        """Rewrite the file with its header and only the lines of the prompts in `done`."""
        lines = whole_lines(self.path, done)
        if self.apart:
            lines = chain([json.dumps({"header": header}).encode() + b"\n"], lines)
        elif done:
            lines = with_header(lines, header)
        else:
            self.header = header

        def write(path: Path) -> None:
            with path.open("wb") as file:
                file.writelines(lines)

        write_file(self.path, write)

    def append(self, block: bytes) -> None:
        """Append the lines of a prompt in one write. Raises OSError."""
        assert self.file is not None, "an output is begun first"
        if self.header is not None:
            block, self.header = b"".join(with_header(block.splitlines(True), self.header)), None
        try:
            while block:
                block = block[self.file.write(block) :]
        except OSError as error:
            why = f"{self.path} cannot be written ({error.strerror}): make room, then continue with --resume"
            raise OSError(why) from error

    def merge(self, others: Iterable[Path], done: set[str]) -> None:
        """Append the prompts that replicas have finished, except `done`, and remove their files. Raises OSError."""
        for path in others:
            if not path.exists():
                raise OSError(f"{path} is gone: --output must be in a folder that all machines share")
            for line in whole_lines(path, read_file(path).done - done):
                self.append(line)
            assert self.file is not None
            os.fsync(self.file.fileno())
            path.unlink()

    def close(self) -> None:
        if self.file is not None:
            os.fsync(self.file.fileno())
        self.held.close()


@contextmanager
def hold(path: Path) -> Iterator[BinaryIO]:
    """Open a file for appending, locked against other processes. Raises ValueError if one holds it."""
    with path.open("ab", buffering=0) as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # missing on some systems, where nothing is locked
            pass
        except BlockingIOError:
            raise ValueError(f"another run writes to {path}: wait for it, or choose another --output") from None
        yield file  # type: ignore[misc]


def with_header(lines: Iterable[bytes], header: dict[str, Any]) -> Iterator[bytes]:
    """Yield lines of JSON objects, with the header added to the first."""
    for number, line in enumerate(lines):
        yield line if number else json.dumps({"header": header} | json.loads(line), ensure_ascii=False).encode() + b"\n"


def open_output(path: Path, begun: ResumeState, header: dict[str, Any], ranks: Ranks, apart: bool = True) -> Output:
    """Open the file that this rank writes to: the output on the first replica, a file of its own on the others. Raises
    ValueError if it cannot be started."""
    output = Output(path, apart)
    ranks.agree(lambda: output.begin(begun, header) if ranks.leads else None, patient=True)
    own = Output(replica_file(path, ranks.replica)) if ranks.replica else output
    writes = ranks.replica and ranks.shard.rank == 0
    ranks.agree(lambda: own.begin(ResumeState(), header) if writes else None)
    return own


def end_output(output: Output, ranks: Ranks) -> None:
    """Merge the files of all replicas into the output. Raises OSError."""
    if not ranks.leads:
        output.close()
    ranks.wait()
    if ranks.leads:
        output.merge((replica_file(output.path, each) for each in range(1, ranks.replicas)), set())
        output.close()


class Progress:
    """Progress bar of a batch while it runs, and its report at the end."""

    def __init__(self, quiet: bool, total: int, tally: BatchStats, ranks: Ranks) -> None:
        self.bar, self.total, self.tally, self.ranks = Bar(quiet), total, tally, ranks
        self.bar.show(0.0, f"0/{total} prompts")
        self.begin, self.done, self.errors = time.perf_counter(), 0, 0
        self.difference: float | None = None  # of a log-probability, by --selfcheck

    def show(self, outcome: Outcome) -> None:
        self.errors += outcome.error is not None
        several = self.ranks.replicas > 1
        self.done = (self.ranks.count("done", self.ranks.shard.rank == 0) if several else self.done) + 1
        seconds = time.perf_counter() - self.begin
        note = f"{self.done}/{self.total} prompts, {self.tally.drawn / seconds:.0f} tokens/s"
        self.bar.show(self.done / self.total, note)

    def check(self, difference: float) -> None:
        """Note the largest difference that --selfcheck has found."""
        self.difference = max(difference, self.difference or 0.0)

    def report(self, replicas: Sequence[tuple[BatchStats, int, float | None]]) -> dict[str, Any]:
        """Build the report. replicas: statistics of each, how many of its prompts were refused, and the difference that
        --selfcheck found."""
        tally, seconds = BatchStats(), time.perf_counter() - self.begin
        for each, *_ in replicas:
            tally.add(each)
        checked = [difference for *_, difference in replicas if difference is not None]
        return {
            "rows": tally.rows,
            "prompts": tally.prompts,
            "prompts_refused": sum(errors for _, errors, _ in replicas),
            "seconds": seconds,
            "tokens": tally.drawn,
            "tokens_per_s": tally.drawn / seconds,
            "steps": tally.steps,
            "rows_busy": tally.busy / max(1, tally.capacity),
            "context_tokens": tally.asked,
            "context_tokens_read": tally.read,
            "kv_spared_bytes": tally.kv_bytes_saved,
            "of_replicas": [asdict(each) for each, *_ in replicas],
        } | ({"selfcheck_max_difference": max(checked)} if checked else {})


def summary(report: dict[str, Any]) -> str:
    """Return three lines: what ran, how fast, what sharing saved."""
    refused, before = report["prompts_refused"], report["prompts_done_before"]
    notes = f", {refused} could not be run" * bool(refused) + f", {before} done before" * bool(before)
    how = "compiled" if report["compiled"] else "eager"
    samples = counted(report["num_samples"], "sample")
    return (
        f"{counted(report['prompts'], 'prompt')}, {samples} of each, seed {report['seed']}{notes}: {how}, "
        f"{report['dtype']} on {report['device']}\n"
        f"{counted(report['tokens'], 'token')} in {report['seconds']:.3g} s, {report['tokens_per_s']:.0f} tokens/s; "
        f"{counted(report['rows'], 'row')} at once, {report['rows_busy']:.0%} of them busy\n"
        f"{counted(report['context_tokens_read'], 'token')} of context read, not {report['context_tokens']}; "
        f"{human(report['kv_spared_bytes'])} of keys and values saved; "
        f"peak {human(report['peak_memory_bytes'])}"
    )


def output_lines(outcome: Outcome, fields: dict[str, Any], options: argparse.Namespace) -> str:
    """Return the lines of a prompt: its best samples, or its error."""
    begin = {"id": outcome.prompt.id, **fields}
    if outcome.error is not None:
        return json.dumps(begin | {"rank": 1, "of": 1, "error": outcome.error}, ensure_ascii=False) + "\n"
    if options.unranked:
        return "".join(sample_line(begin, sample, len(outcome.samples)) for sample in outcome.samples)
    ranked = rank(outcome.samples, options.rank)[: options.top]
    lines = (begin | sample_fields(placed(each) | {"of": len(ranked)}, each.sample, {}) for each in ranked)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def sample_line(begin: dict[str, Any], sample: Sample, of: int) -> str:
    """Return the line of a sample without a rank. begin: its first fields. of: samples of its prompt."""
    line = begin | sample_fields({"sample": sample.index, "of": of}, sample, {})
    return json.dumps(line, ensure_ascii=False) + "\n"
