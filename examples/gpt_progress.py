"""How far a training is: a bar on a terminal, and elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 10.0


class StepProgress:
    """The steps of one training, from ``completed`` to ``total``."""

    def __init__(self, console: Console, label: str, total: int, completed: int) -> None:
        self.console = console
        self.label = label
        self.total = total
        self.first = completed
        self.started = time.perf_counter()
        self.last_line = -LINE_EVERY_S
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[status]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(label, total=total, completed=completed, status="")

    def __enter__(self) -> StepProgress:
        self.bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.__exit__(kind, error, trace)

    def update(self, step: int, status: str) -> None:
        """Show that ``step`` steps are done."""
        self.bar.update(self.task, completed=step, status=status)
        elapsed = time.perf_counter() - self.started
        if self.console.is_terminal:
            return
        if elapsed - self.last_line < LINE_EVERY_S and step < self.total:
            return
        self.last_line = elapsed
        left = elapsed / max(1, step - self.first) * (self.total - step)
        self.print(f"{self.label}: step {step} of {self.total}, {left:.0f} s left  {status}")

    def print(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)
