"""Where a warning points to."""

from __future__ import annotations

import sys


def callers_level() -> int:
    """The stacklevel of the code that called into fusedopt, for a warning of this one's caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    return level


def _is_inside(module: str) -> bool:
    return module.startswith(("fusedopt.", "torch.optim.", "torch.utils._contextlib"))
