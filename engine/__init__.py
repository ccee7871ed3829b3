"""From prompts to samples: `from engine import Engine, Request, rank`.

Names are imported on first access: a command reads its flags before it imports PyTorch, which takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.engine import Engine as Engine
    from engine.request import Request as Request
    from engine.request import Sampling as Sampling
    from engine.samples import rank as rank

HOMES = {"Engine": "engine.engine", "Request": "engine.request", "Sampling": "engine.request", "rank": "engine.samples"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(HOMES[name]), name)
