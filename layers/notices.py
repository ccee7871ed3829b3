"""Notices and a status line for command-line users. Outside a command, a notice is a plain warning."""

import sys
from contextlib import AbstractContextManager, nullcontext


class Notice(UserWarning):
    """Warning that a command prints as one line: it continues, but not as requested."""


def showing(status: str) -> AbstractContextManager[None]:
    """Show a status line during the block, if stderr is a command's (cli/system.py)."""
    show = getattr(sys.stderr, "showing", None)
    return nullcontext() if show is None else show(status)
