"""Chooses block size and warps by measuring them, once for a device and rule.

The result is kept in the user's cache folder (FUSEDOPT_CACHE, else $XDG_CACHE_HOME/fusedopt, else
~/.cache/fusedopt) with the times that it was chosen by. FUSEDOPT_AUTOTUNE=0 switches measuring off:
launch.DEFAULT serves.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from fusedopt.triton_kernels.launch import DEFAULT, INTERPRETED, Config

# Eight elements a thread, and for float32 alone four, with more or fewer programs.
CANDIDATES = (DEFAULT, Config(1024, 4), Config(4096, 16), Config(1024, 8))
ROUNDS = 5

# Milliseconds of a step with each of the candidates.
Measure = Callable[[torch.device, tuple[Config, ...]], dict[Config, float]]


def config_for(rule: str, device: torch.device, measure: Measure) -> Config:
    """The fastest of CANDIDATES: from the cache, or measured now."""
    if INTERPRETED or os.environ.get("FUSEDOPT_AUTOTUNE", "1").lower() in (
        "0",
        "false",
        "no",
        "off",
    ):
        return DEFAULT
    path = cache_file(device)
    known = _read(path)
    found = _config_in(known.get(rule))
    if found is not None:
        return found
    try:
        times = measure(device, CANDIDATES)
    except torch.cuda.OutOfMemoryError:
        return DEFAULT  # not kept: the next process may have the memory
    best = min(times, key=times.__getitem__)
    known[rule] = {
        "block": best.block,
        "warps": best.warps,
        "milliseconds": {f"{c.block}x{c.warps}": t for c, t in times.items()},
    }
    _write(path, known)
    return best


def cache_file(device: torch.device) -> Path:
    """One for each model of device and version of Triton."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("FUSEDOPT_CACHE") or Path(base) / "fusedopt")
    name = torch.get_device_module(device.type).get_device_name(device)
    return folder / f"triton-{triton.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # none yet, or damaged: measured anew
    return content if isinstance(content, dict) else {}


def _config_in(entry: Any) -> Config | None:
    """What a cache entry holds, if it is one of the candidates."""
    for candidate in CANDIDATES:
        if isinstance(entry, dict) and (entry.get("block"), entry.get("warps")) == (
            candidate.block,
            candidate.warps,
        ):
            return candidate
    return None


def _write(path: Path, content: dict[str, Any]) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(path)
    except OSError as error:
        warnings.warn(f"fusedopt cannot keep its Triton tuning in {path}: {error}", stacklevel=2)


def median_times(
    steps: dict[Config, Callable[[], None]], device: torch.device
) -> dict[Config, float]:
    """Milliseconds of each step: medians over rounds in which all of them take turns."""
    module = torch.get_device_module(device.type)
    times: dict[Config, list[float]] = {config: [] for config in steps}
    for step in steps.values():
        step()  # compiles
    for _ in range(ROUNDS):
        for config, step in steps.items():
            start, end = (module.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                step()
            end.record()
            end.synchronize()
            times[config].append(start.elapsed_time(end) / 5)
    return {config: statistics.median(t) for config, t in times.items()}
