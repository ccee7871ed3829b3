"""Program that renders chat templates in jinja2's sandbox, within limits of CPU time and memory.

    python templates.py SECONDS BYTES CHARACTERS

A template comes with a model and is untrusted code, so chat.py runs it in this child process. Each stdin line is JSON,
[template, values]; each is answered by one line on stdout, {"text": ...} or {"error": ...}. SECONDS and CHARACTERS
apply to each text. Without Python's `resource` (Windows), memory is not limited, and time only by the parent.
"""

import json
import sys
import time
from contextlib import suppress
from datetime import datetime
from functools import lru_cache, partial
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """Jinja tag {% generation %}, which marks assistant text for training: rendered as its content alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


@lru_cache(maxsize=8)
def compile_template(template: str) -> jinja2.Template:
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)


def limit(name: str, value: int) -> None:
    """Lower a resource limit of this process, if the system has it and it is not lower already."""
    with suppress(ImportError, ValueError):
        import resource

        which = getattr(resource, name)
        resource.setrlimit(which, (value, resource.getrlimit(which)[1]))


def answer(line: str, memory: int, characters: int) -> dict[str, str]:
    try:
        template, values = json.loads(line)
        text = compile_template(template).render(values)
    except MemoryError:
        return {"error": f"it needs more than {memory >> 20} MB of memory"}
    except Exception as error:  # a template is a program: it raises jinja2's errors and Python's own
        return {"error": str(error)}
    if len(text) > len(line) + characters:
        return {"error": f"its output is longer than {characters} characters"}
    return {"text": text}


def main(arguments: list[Any]) -> None:
    seconds, memory, characters = map(int, arguments)
    limit("RLIMIT_CORE", 0)
    limit("RLIMIT_AS", memory)
    for line in sys.stdin:
        limit("RLIMIT_CPU", int(time.process_time()) + 1 + seconds)  # counted from process start
        print(json.dumps(answer(line, memory, characters)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
