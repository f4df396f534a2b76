"""How far a run is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.report import say

Item = TypeVar("Item")
LOG_SECONDS = 30.0  # between two lines of one block


class Log:
    """`track` as rich's Progress has it, for where there is no terminal: a line on stdout when a
    block has ended, and one every half a minute before."""

    def track(self, items: Sequence[Item], description: str) -> Iterator[Item]:
        start = said = time.monotonic()
        for done, item in enumerate(items):
            if time.monotonic() - said > LOG_SECONDS:
                said = time.monotonic()
                self._say(description, done, items, said - start)
            yield item
        self._say(description, len(items), items, time.monotonic() - start)

    def _say(self, description: str, done: int, items: Sequence[Item], seconds: float) -> None:
        say(f"{description}: {done} of {len(items)} in {seconds:.0f} s")


@contextmanager
def progress_bar() -> Iterator[Progress | Log]:
    """A bar on stderr that is redrawn between rounds only: a thread that redraws it would take
    the interpreter lock in the middle of a timed step. Without a terminal, lines on stdout."""
    if not sys.stderr.isatty():
        yield Log()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    terminal = Console(stderr=True)
    with Progress(*columns, TimeElapsedColumn(), console=terminal, auto_refresh=False) as progress:
        yield progress
