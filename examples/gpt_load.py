"""What else the machine did during a run: timings on a machine with other work say little."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


def _busy_s() -> float | None:
    """Seconds that all cores together were busy or taken away since the start of the machine."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _wait, irq, soft_irq, stolen = map(
        int, _STAT.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + irq + soft_irq + stolen) / os.sysconf("SC_CLK_TCK")


class Load:
    """Measures from its construction on."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.own_s = time.process_time()
        self.busy_s = _busy_s()
        self.average = os.getloadavg() if hasattr(os, "getloadavg") else None

    def figures(self) -> dict:
        """``load_average_before``: of the minute before. ``cores_busy``: how many cores this
        process and ``cores_busy_elsewhere`` others kept busy on average; None where unknown."""
        elapsed = time.perf_counter() - self.started
        own, busy = time.process_time() - self.own_s, _busy_s()
        others = None if busy is None or self.busy_s is None else busy - self.busy_s - own
        return {
            "load_average_before": self.average and self.average[0],
            "cores_busy": own / elapsed,
            "cores_busy_elsewhere": others if others is None else max(0.0, others) / elapsed,
        }
