"""Notices and a status line for whoever runs a command. Without a command a notice is a plain warning."""

import sys
from contextlib import AbstractContextManager, nullcontext


class Notice(UserWarning):
    """A warning that a command shows, in one line: it goes on, but not as was asked."""


def showing(status: str) -> AbstractContextManager[None]:
    """Show a status line inside the block, where stderr is a command's (cli/system.py)."""
    show = getattr(sys.stderr, "showing", None)
    return nullcontext() if show is None else show(status)
