"""The core stays small enough to read in an evening, and imports run downward, a folder being a layer. Oracles:
Python's own tokenizer and parser."""

import ast
import io
import tokenize
from collections.abc import Iterator

from conftest import FOLDERS, ROOT, SOURCES

CORE = (  # what a decode step is made of
    "model.py", "cache.py", "bifurcated_attention.py", "sampling.py", "tp.py", "layers/rope.py", "layers/moe.py",
    "engine/runner.py", "engine/contexts.py", "engine/decoding.py", "engine/scheduler.py",
)  # fmt: skip
# From the roof down; a layer imports from itself and from those below it.
LAYERS = (
    {"generate", "eval", "quantize"}, {"cli"}, {"engine"}, {"loading"}, {"tp"}, {"model", "cache"}, {"layers"},
    {"bifurcated_attention", "sampling"},
)  # fmt: skip
BUDGET, COMMAND_LINE, LONGEST = 1800, 350, 60
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
    paths = [path for folder in ("", *FOLDERS, "scripts", "examples") for path in (ROOT / folder).glob("*.py")]
    found = [(path.name, *function) for path in paths for function in functions(path.read_text("utf-8"))]
    assert len(paths) > 15 and not [each for each in found if each[2] > LONGEST]


def imported(source: str) -> set[str]:
    """The modules that a file imports anywhere, under TYPE_CHECKING and in functions too: `from a import b` is both a
    and a.b, since b may be a module."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def layer(module: str) -> int:
    """The layer of a module by its folder, or its name at the top."""
    return next(at for at, names in enumerate(LAYERS) if module in names or module.partition(".")[0] in names)


def upward(sources: dict[str, str]) -> list[str]:
    """Imports that run upward, and those that run in a circle. sources: by the module's name."""
    below = {name: imported(source) & sources.keys() - {name} for name, source in sources.items()}
    wrong = [f"{name} imports {other}" for name in below for other in below[name] if layer(other) < layer(name)]
    done: set[str] = set()
    while ready := [name for name in below.keys() - done if below[name] <= done]:
        done |= set(ready)
    return sorted(wrong) + sorted(f"{name} is in a circle, or above one" for name in below.keys() - done)


def test_what_runs_upward_is_found():
    sources = {"tp": "import model", "model": "if TYPE_CHECKING:\n    from engine import plan", "engine.plan": ""}
    assert upward(sources) == ["model imports engine.plan"]
    circle = {"cache": "def f():\n    import model", "model": "from cache import KVCache", "sampling": "import torch"}
    assert upward(circle) == ["cache is in a circle, or above one", "model is in a circle, or above one"]


def test_imports_run_downward():
    """An __init__ stands above its folder: what it names, it imports when it is asked."""
    paths = [path for path in SOURCES if path.name != "__init__.py"]
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths}
    assert len(paths) > 25 and not upward({name: path.read_text("utf-8") for path, name in names.items()})


def stores(tree: ast.AST) -> Iterator[tuple[ast.expr, str]]:
    """Attributes that are assigned to, or by setattr, as (the object, the attribute's name)."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            yield node.value, node.attr
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
            yield node.args[0], node.args[1].value if isinstance(node.args[1], ast.Constant) else "any"


def attributes(source: str, name: str) -> set[str]:
    """Collect the attributes of self that the methods of a class assign."""
    (found,) = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef) and node.name == name]
    return {attribute for value, attribute in stores(found) if isinstance(value, ast.Name) and value.id == "self"}


def written(source: str, kept: dict[str, set[str]]) -> list[str]:
    """Writes to a Namespace, and to attributes of the classes `kept` outside their own or a subclass's methods."""
    tree, own = ast.parse(source), set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            named = {node.name, *(base.id for base in node.bases if isinstance(base, ast.Name))}
            if named & kept.keys():
                own |= {id(value) for value, _ in stores(node)}
    wrong = []
    for value, attribute in stores(tree):
        text = ast.unparse(value)
        if text in ("options", "args", "namespace"):
            wrong.append(f"{text}.{attribute}")
        elif text != "self" and id(value) not in own and any(attribute in names for names in kept.values()):
            wrong.append(f"{text}.{attribute}")
    return wrong


def test_what_writes_to_an_object_of_another_is_found():
    kept = {"KVCache": {"links", "k"}}
    source = "class KVCache:\n    def f(self):\n        other.links = 1\n"
    assert written(source, kept) == []
    source += "options.seed, cache.k = 1, 2\nsetattr(options, 'x', 3)\ncache.room = 4\n"
    assert sorted(written(source, kept)) == ["cache.k", "options.seed", "options.x"]


def test_flags_are_not_written_to_nor_engines_schedulers_and_caches_from_outside():
    """An attribute is taken for one of theirs by its name alone."""
    homes = {"ModelRunner": "engine/runner.py", "Scheduler": "engine/scheduler.py", "KVCache": "cache.py"}
    kept = {name: attributes((ROOT / path).read_text("utf-8"), name) for name, path in homes.items()}
    assert {"weights", "available"} <= kept["ModelRunner"] and {"links", "start"} <= kept["KVCache"]
    paths = [*SOURCES, *(ROOT / "scripts").glob("*.py")]
    found = {path.name: written(path.read_text("utf-8"), kept) for path in paths}
    assert not {name: wrong for name, wrong in found.items() if wrong}


def test_quantising_is_within_its_own():
    assert code_lines((ROOT / "quantize.py").read_text("utf-8")) <= 250


def test_speculation_is_within_its_own():
    """The rows and the controller; the four drafts, and the flags that name them."""
    assert code_lines((ROOT / "engine" / "speculate.py").read_text("utf-8")) <= 410
