"""Flags of a command, refused in one line. PyTorch is not needed."""

import argparse
import os
from typing import Any, NoReturn

from system import complain, finish


class OneLineParser(argparse.ArgumentParser):
    """Refuses in one line, without the usage. Its flags stand in sections, and tell their defaults."""

    def section(self, title: str) -> None:
        """What the flags that follow are about."""
        self.group = self.add_argument_group(title)

    def flag(self, name: str, help: str, *aliases: str, **settings: Any) -> None:
        default = settings.get("default")
        shown = f" (default: {default})" if isinstance(default, int | float | str) else ""
        self.group.add_argument(name, *aliases, help=help + shown, **settings)

    def print_help(self, file: Any = None) -> NoReturn:
        finish(lambda: print(self.format_help(), end="", file=file))

    def error(self, message: str) -> NoReturn:
        told = os.environ.get("RANK", "0") == "0"  # under torchrun, once
        if told:
            complain(f"{message}; see --help")
        self.exit(2)
