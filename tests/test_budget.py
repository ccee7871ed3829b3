"""The core stays small enough to read in an evening, and its imports run downward. Oracles: Python's own tokenizer and
parser; README.md's list of files."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = (  # what a decode step is made of
    "model.py", "cache.py", "bifurcated_attention.py", "sampling.py", "tp.py", "rotary.py", "experts.py", "engine.py",
    "batch.py",
)  # fmt: skip
BUDGET, COMMAND_LINE, LONGEST = 1720, 350, 60
BLANK = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def code_lines(source: str) -> int:
    """Lines that carry code: without comments, docstrings and blank lines."""
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            docstrings |= set(range(body[0].lineno, body[0].end_lineno + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in BLANK:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_counter_counts_code_alone():
    source = (
        '"""Doc\n\nstring."""\n\n# why\nx = (\n    1,  # one\n)\n\n\ndef f():\n    """Doc."""\n    return """a\nb"""\n'
    )
    assert code_lines(source) == 6


def test_core_is_within_its_budget():
    counts = {name: code_lines((ROOT / name).read_text("utf-8")) for name in CORE}
    assert sum(counts.values()) <= BUDGET, counts


def test_the_command_line_is_within_its_budget():
    assert code_lines((ROOT / "generate.py").read_text("utf-8")) <= COMMAND_LINE


def test_the_example_is_within_its_budget():
    assert code_lines((ROOT / "examples" / "transformers_shared.py").read_text("utf-8")) <= 220


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Every function and its lines, from its first decorator to its end."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, node.end_lineno - first + 1


def test_functions_are_counted_with_all_their_lines():
    source = "@a\n@b\ndef f():\n    x = 1\n\n    def g():\n        pass\n\n\nclass C:\n    async def h(self): pass\n"
    assert dict(functions(source)) == {"f": 7, "g": 2, "h": 1}


def test_no_function_is_long():
    paths = [path for folder in ("", "scripts", "examples") for path in (ROOT / folder).glob("*.py")]
    found = [(path.name, *function) for path in paths for function in functions(path.read_text("utf-8"))]
    assert len(paths) > 15 and not [each for each in found if each[2] > LONGEST]


def imported(source: str) -> set[str]:
    """The modules that a file imports anywhere, under TYPE_CHECKING and in functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            names.add(node.module.partition(".")[0])
    return names


def upward(order: list[str], sources: dict[str, str]) -> list[str]:
    """What is wrong with the order: files that it misses, and imports of what does not stand below."""
    wrong = [f"{name} is not listed" for name in sorted(sources.keys() - set(order))]
    for place, name in enumerate(order):
        for other in imported(sources[name]) & sources.keys():
            if other not in order[place + 1 :]:
                wrong.append(f"{name} imports {other}")
    return wrong


def test_what_runs_upward_is_found():
    sources = {"a": "import b.x", "b": "if TYPE_CHECKING:\n    from a import y", "c": "def f():\n    import c, torch"}
    assert upward(["a", "b"], sources) == ["c is not listed", "b imports a"]
    assert upward(["b", "a", "c"], sources) == ["a imports b", "c imports c"]


def rooms() -> list[str]:
    """The root's files in README's order, from the roof down: lines of `name.py   words`, several names by commas."""
    section = (ROOT / "README.md").read_text("utf-8").partition("## The files\n")[2].partition("\n## ")[0]
    heads = re.findall(r"^(\w+\.py(?:, \w+\.py)*) ", section, re.MULTILINE)
    return [name.removesuffix(".py") for head in heads for name in head.split(", ")]


def test_imports_run_downward_in_the_order_of_the_readme():
    sources = {path.stem: path.read_text("utf-8") for path in ROOT.glob("*.py")}
    order = rooms()
    assert len(order) == len(set(order)) and set(order) <= sources.keys(), order
    assert not upward(order, sources)


def test_quantising_is_within_its_own():
    assert code_lines((ROOT / "quantize.py").read_text("utf-8")) <= 250


def test_speculation_is_within_its_own():
    """The rows and their pace; the four drafts, and the flags that name them."""
    assert all(code_lines((ROOT / name).read_text("utf-8")) <= 210 for name in ("speculate.py", "drafts.py"))
