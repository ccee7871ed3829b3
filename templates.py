"""A model's chat template, in jinja2's sandbox. It may be anybody's program: its time is bounded, and what +, * and **
make; not what filters make."""

import itertools
import json
import sys
import time
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_RENDERING, LARGEST_VALUE = 5.0, 10**7  # seconds; characters, items or bits


class Generation(Extension):
    """{% generation %} marks what the assistant says, for training; to be rendered, it is only its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def extent(value: object) -> int:
    """Bits of an integer, items or characters of what has any."""
    return value.bit_length() if isinstance(value, int) else len(value) if isinstance(value, Sized) else 0


class Sandbox(ImmutableSandboxedEnvironment):
    """Refuses single operations that could take all memory or time."""

    intercepted_binops = frozenset({"**", "*", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        result = extent(left) + extent(right)
        if operator == "**" and isinstance(right, int):
            result = extent(left) * abs(right)
        elif operator == "*" and isinstance(left, int) != isinstance(right, int):  # a text, so many times
            count, value = (left, right) if isinstance(left, int) else (right, left)
            result = abs(count) * extent(value)
        if result > LARGEST_VALUE:
            raise jinja2.TemplateError(f"the result of {operator} is too big")
        return super().call_binop(context, operator, left, right)


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TemplateError where a template has run for LONGEST_RENDERING seconds of this thread's time: a template is
    a program, and need not end."""
    limit, before, steps = time.thread_time() + LONGEST_RENDERING, sys.gettrace(), itertools.count()

    def trace(*_: object) -> Any:
        if next(steps) % 64 == 0 and time.thread_time() > limit:
            raise jinja2.TemplateError(f"it has run for {LONGEST_RENDERING} seconds")
        return trace

    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def render(template: str, values: dict[str, Any]) -> str:
    """Raises what jinja2 raises, or Python: a template is a program."""
    compiled = compile_template(template)
    with bounded():
        return compiled.render(values)
