"""The core stays small enough to read in an evening. Oracle: Python's own tokenizer and parser."""

import ast
import io
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CORE = ("model.py", "bifurcated_attention.py", "generate.py", "tokenizer.py", "tp.py")
BUDGET = 1000
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
    counts = {name: code_lines((ROOT / name).read_text("utf-8")) for name in CORE if (ROOT / name).exists()}
    assert sum(counts.values()) <= BUDGET, counts


def test_quantising_is_within_its_own():
    assert code_lines((ROOT / "quantize.py").read_text("utf-8")) <= 250
