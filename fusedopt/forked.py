"""Steps in a forked child run on one thread.

A fork copies OpenMP's record of its pool, and of all threads only the one that forked: the first
parallel loop of the child waits for the others for ever, in the kernels here as in torch's own ops.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from fusedopt._native import _C

_P = ParamSpec("_P")
_R = TypeVar("_R")

_in_child = False


def _after_fork() -> None:
    global _in_child
    _in_child = True
    if _C is not None:
        _C.limit_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def on_one_thread(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """In a forked child, torch's ops inside of the function stay on the calling thread, too."""

    @functools.wraps(function)
    def guarded(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        threads = torch.get_num_threads() if _in_child else 1
        if threads == 1:
            return function(*args, **kwargs)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)

    return guarded
