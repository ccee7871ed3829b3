"""Argument parser with sections and one-line errors, without PyTorch."""

import argparse
import difflib
import os
import re
from typing import Any, NoReturn

from cli.system import finish, print_error


class OneLineParser(argparse.ArgumentParser):
    """ArgumentParser that prints one-line errors without usage, groups flags in sections and shows their defaults."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.synonyms: dict[str, str] = {}

    def section(self, title: str) -> None:
        """Start a section for the flags that follow."""
        self.group = self.add_argument_group(title)

    def flag(self, name: str, help: str, *aliases: str, elsewhere: str = "", **settings: Any) -> None:
        """Add a flag. elsewhere: its names in other programs, separated by spaces."""
        self.synonyms |= dict.fromkeys(elsewhere.split(), name)
        default = settings.get("default")
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        self.group.add_argument(name, *aliases, help=help + shown, **settings)

    def print_help(self, file: Any = None) -> NoReturn:
        finish(lambda: print(self.format_help(), end="", file=file))

    def error(self, message: str) -> NoReturn:
        unknown = re.findall(r"(?<= )--[\w-]+", message.partition("unrecognized arguments:")[2])
        meant = dict.fromkeys(known for name in unknown if (known := self.closest(name)))
        self.refuse(f"{message}; did you mean {', '.join(meant)}?" if meant else f"{message}; see --help")

    def closest(self, name: str) -> str | None:
        """Return the flag that a mistyped one, or one of another program, may stand for."""
        name = name[2:].replace("-", "_")
        known = [each[2:] for each in self._option_string_actions if each.startswith("--")]
        close = [f"--{each}" for each in difflib.get_close_matches(name, known, 1, 0.7)]
        return self.synonyms.get(f"--{name}") or next(iter(close), None)

    def refuse(self, error: object) -> NoReturn:
        """Exit with status 2 and a one-line error; under torchrun only rank 0 prints it."""
        if os.environ.get("RANK", "0") == "0":
            print_error(error)
        self.exit(2)
