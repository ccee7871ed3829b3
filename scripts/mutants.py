"""Mutation testing of the core: one small change at a time, each run against the tests of its file.

python scripts/mutants.py                     all mutants: hours; an interrupted run resumes from its record
python scripts/mutants.py --sample 300        that many, at random
python scripts/mutants.py --room cache.py

Operators and positions are cosmic-ray's. Of the replacements for an operator only the one hardest to detect is used
(`<=` for `<`, `-` for `+`), and numbers are incremented by one. Excluded is what tests should not see: annotations,
error messages, and guards of our own invariants (assert, `strict=`, `frozen=`). mutmut 3 wraps every function in
another, which torch.compile does not support.

A fork that has imported the libraries, but nothing of the core, writes the change into a copy of the repository and
runs the nearest tests, then wider ones. The first failure kills the mutant, as do CPU_SECONDS of CPU time. Tests that
compile or start many commands are left out, so the rate is a lower bound. Delete the record after editing the core. A
mutant that cannot be imported is broken and not counted; those of tests/mutants.txt are equivalent: no test can
distinguish them from the code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cli.system import finish, print_error, start

if __name__ == "__main__":
    start()

import argparse
import ast
import importlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from difflib import SequenceMatcher
from functools import cache

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]
EQUIVALENT = ROOT / "tests" / "mutants.txt"
CPU_SECONDS, BROKEN, NOTHING = 200, 99, "nothing"

SWAPS = {
    "Binary": "Add_Sub Sub_Add Mul_Add Div_Mul FloorDiv_Mul Mod_Mul Pow_Mul LShift_RShift RShift_LShift BitAnd_BitOr "
    "BitOr_BitAnd BitXor_BitOr",
    "Comparison": "Lt_LtE LtE_Lt Gt_GtE GtE_Gt Eq_NotEq NotEq_Eq Is_IsNot IsNot_Is",
    "Unary": "Delete_Not Delete_USub Delete_Invert",
}
OPERATORS = [f"Replace{kind}Operator_{swap}" for kind, swaps in SWAPS.items() for swap in swaps.split()] + (
    "NumberReplacer AddNot ReplaceAndWithOr ReplaceOrWithAnd ReplaceTrueWithFalse ReplaceFalseWithTrue "
    "ZeroIterationForLoop ReplaceBreakWithContinue ReplaceContinueWithBreak ExceptionReplacer RemoveDecorator"
).split()

# Imported once, before forking.
LIBRARIES = (
    "numpy torch torch._dynamo pytest hypothesis sentencepiece tiktoken tokenizers safetensors.torch transformers "
    "transformers.models.llama.modeling_llama"
).split()

# The tests of each core file, in turns, nearest first; tests that match SLOW run only if named with "::".
TESTS = {
    "model.py": ("model", "engine", "plan families cache cuda moe quantize"),
    "cache.py": ("cache", "cuda engine speculate chat moe scheduler"),
    "bifurcated_attention.py": ("bifurcated_attention", "cuda cache transformers_shared engine"),
    "layers/rope.py": ("model families", "engine"),
    "layers/moe.py": ("moe", "engine families"),
    "engine/runner.py": ("engine", "speculate repetition cuda memory graphs scheduler"),
    "engine/contexts.py": ("scheduler", "engine cache speculate", "moe families"),
    "engine/decoding.py": ("scheduler", "engine speculate repetition", "graphs"),
    "engine/scheduler.py": ("scheduler", "engine", "jobs chat"),
    "sampling.py": ("sampling", "engine repetition speculate cuda"),
    "loading/tokenizer.py": ("tokenizer", "chat checkpoint engine"),
    "tp.py": ("tp", "moe engine", "tp::test_ranks_draw_what_one_process_draws[2]"),
}
SLOW = (
    "compile or million or stories or 4096 or ranks or replicas or machines or held_by_all or death or cannot_be_run "
    "or without_torchrun"
)


@dataclass(frozen=True)
class Mutant:
    room: str
    operator: str
    occurrence: int
    line: int

    def code(self) -> str:
        if self.operator == NOTHING:
            return source(self.room)
        return mutate_code(source(self.room), get_operator(f"core/{self.operator}")(), self.occurrence)

    def change(self) -> str:
        """Return what differs, before and after."""
        if self.operator == NOTHING:
            return "the file as it is"
        before, after = ([line.strip() for line in code.splitlines()] for code in (source(self.room), self.code()))
        steps = SequenceMatcher(None, before, after, False).get_opcodes()
        parts = [(before[a:b], after[c:d]) for kind, a, b, c, d in steps if kind != "equal"]
        old, new = (
            " ".join(" ".join(line.split()) for part in side for line in part) for side in zip(*parts, strict=True)
        )
        return f"{self.room}: {old} => {new}".strip()


@cache
def source(room: str) -> str:
    return (ROOT / room).read_text("utf-8")


def unseen(room: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Return begin and end, as (line, column), of code that is not mutated; of a negative number, its sign."""
    spans = []
    for node in ast.walk(ast.parse(source(room))):
        own: list[ast.expr | ast.stmt | None] = []
        if isinstance(node, ast.Assert):
            own = [node]
        elif isinstance(node, ast.Raise):
            own = [node.exc]
        elif isinstance(node, ast.FunctionDef):
            own = [node.returns]
        elif isinstance(node, ast.arg | ast.AnnAssign):
            own = [node.annotation]
        elif isinstance(node, ast.keyword) and node.arg in ("strict", "frozen"):
            own = [node.value]
        elif isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
            spans.append(((node.lineno, node.col_offset), (node.operand.lineno, node.operand.col_offset)))
        spans += [((n.lineno, n.col_offset), (n.end_lineno or 0, n.end_col_offset or 0)) for n in own if n]
    return spans


def mutants(room: str) -> Iterator[Mutant]:
    spans = unseen(room)
    nodes = list(ast_nodes(get_ast(source(room))))
    for name in OPERATORS:
        operator = get_operator(f"core/{name}")()
        places = [place for node in nodes for place, _ in operator.mutation_positions(node)]
        for occurrence, place in enumerate(places):
            less = name == "NumberReplacer" and occurrence % 2  # it yields a number plus one, then minus one
            if not less and not any(begin <= place < end for begin, end in spans):
                yield Mutant(room, name, occurrence, place[0])


class Killer:
    """Pytest plugin that records the test that failed."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.file.write_text(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(folder: Path, room: str, turn: str) -> int:
    """Run one turn of tests in a copy of the repository, in a fork. Returns pytest's exit status."""
    import pytest

    signal.alarm(30 * CPU_SECONDS)  # a deadlock uses no CPU time
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 9))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(null, stream)
    os.chdir(folder)
    sys.path[:] = [str(folder), *(path for path in sys.path if not path.startswith(str(ROOT / "scripts")))]
    try:
        importlib.import_module(room.removesuffix(".py").replace("/", "."))
    except Exception:
        return BROKEN
    tests = [f"tests/test_{name.replace('::', '.py::')}" + ".py" * ("::" not in name) for name in turn.split()]
    chosen = [] if "::" in turn else ["-k", f"not ({SLOW})"]
    flags = ["-x", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", "--tb=no"]
    return pytest.main([*flags, *chosen, *tests], plugins=[Killer(folder / "killer")])


def fate(folder: Path, room: str, turns: int) -> tuple[str, str]:
    """Return the outcome of the mutant in the copy, and the test that killed it."""
    for turn in TESTS[room][:turns]:
        (folder / "killer").write_text("")
        if (child := os.fork()) == 0:
            status = 1
            try:
                status = int(run_tests(folder, room, turn))
            finally:
                os._exit(status)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if ended == BROKEN:
            return "broken", ""
        if ended:
            return "killed", (folder / "killer").read_text() or f"{turn}: status {ended}"
    return "survived", ""


def recorded(record: Path) -> dict[Mutant, dict]:
    """Read the known outcomes, by mutant."""
    lines = map(json.loads, record.read_text("utf-8").splitlines() if record.exists() else [])
    return {Mutant(*(line[each.name] for each in fields(Mutant))): line for line in lines}


def try_all(todo: Sequence[Mutant], record: Path, turns: int) -> None:
    """Try each mutant in a copy of the repository, and append a line for each to `record`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "repository"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "charts"))
        shared = ROOT.parent / "shared"
        if shared.exists():
            (Path(place) / "shared").symlink_to(shared)
        for mutant in todo:
            if mutant in recorded(record):  # tried by another run
                continue
            (folder / mutant.room).write_text(mutant.code(), "utf-8")
            for stale in (folder / mutant.room).parent.glob(f"__pycache__/{Path(mutant.room).stem}.*"):
                stale.unlink()
            outcome, killer = fate(folder, mutant.room, turns)
            (folder / mutant.room).write_text(source(mutant.room), "utf-8")
            line = asdict(mutant) | {"change": mutant.change(), "outcome": outcome, "by": killer}
            with record.open("a") as file:
                file.write(json.dumps(line) + "\n")


def equivalents() -> set[str]:
    """Read the changes that no test can see: lines of tests/mutants.txt that are neither empty nor comments (#)."""
    lines = EQUIVALENT.read_text("utf-8").splitlines() if EQUIVALENT.exists() else []
    return {line for line in lines if line and not line.startswith("#")}


def report(lines: Sequence[dict]) -> None:
    """Print the kill rate of each file and of all, and every survivor. Raises ValueError if unchanged code fails."""
    red = [line["by"] for line in lines if line["operator"] == NOTHING and line["outcome"] != "survived"]
    if red:
        raise ValueError(f"{red[0]} fails where nothing was changed: mend that, and delete the record")
    lines = [line for line in lines if line["operator"] != NOTHING]
    same = equivalents()
    for line in lines:
        if line["outcome"] == "survived" and line["change"] not in same:
            room, _, change = line["change"].partition(": ")
            print(f"{room}:{line['line']}: {change}")
    for room in [*dict.fromkeys(line["room"] for line in lines), "all"]:
        own = [line for line in lines if room in (line["room"], "all")]
        count = Counter("equivalent" if each["change"] in same else each["outcome"] for each in own)
        counted = count["killed"] + count["survived"]
        print(
            f"{room}: {count['killed']} of {counted} killed ({count['killed'] / max(1, counted):.1%}); "
            f"{count['equivalent']} equivalent, {count['broken']} broken"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--room", nargs="+", choices=TESTS, default=list(TESTS), help="files of the core")
    parser.add_argument("--sample", type=int, help="how many of all, at random")
    parser.add_argument("--seed", type=int, default=0, help="of their order")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="tried at a time")
    parser.add_argument("--record", type=Path, default=Path("mutants.jsonl"), help="what became of each, a line each")
    parser.add_argument("--turns", type=int, default=9, help="of tests, nearest first: 1 is a quick look")
    parser.add_argument("--again", action="store_true", help="forget those that survived, and try them once more")
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    for library in LIBRARIES:
        importlib.import_module(library)
    chosen = [mutant for room in args.room for mutant in mutants(room)]
    random.Random(args.seed).shuffle(chosen)
    chosen = [Mutant(room, NOTHING, 0, 0) for room in args.room] + chosen[: args.sample]
    if args.again:
        lines = [json.dumps(line) for line in recorded(args.record).values() if line["outcome"] != "survived"]
        args.record.write_text("".join(f"{line}\n" for line in lines))
    done = recorded(args.record)
    todo = [mutant for mutant in chosen if mutant not in done]
    workers = []
    for worker in range(args.workers):
        if (child := os.fork()) == 0:
            try_all(todo[worker :: args.workers], args.record, args.turns)
            os._exit(0)
        workers.append(child)
    if any([os.waitpid(child, 0)[1] for child in workers]):
        return print_error(f"a worker has failed: see whether {args.record} can be written, and start it again")
    done = recorded(args.record)
    try:
        report([done[mutant] for mutant in chosen if mutant in done])
    except ValueError as error:
        return print_error(error)
    return 0


if __name__ == "__main__":
    finish(main)
