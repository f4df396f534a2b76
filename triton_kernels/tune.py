"""Chooses block size and warps by measuring them, once for a device and rule.

The result is kept in the user's cache folder (FUSEDOPT_CACHE, else $XDG_CACHE_HOME/fusedopt, else
~/.cache/fusedopt) with the times that it was chosen by. FUSEDOPT_AUTOTUNE=0 switches measuring off:
launch.DEFAULT serves.

The choice decides in which order squares are summed, so the last bits of a norm depend on it: all
ranks of a job must choose alike. Those of one machine do by its cache, in which the first one
writes while the others wait; ranks on several machines take launch.DEFAULT.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import statistics
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from fusedopt.triton_kernels.launch import DEFAULT, INTERPRETED, Config, on_device

# Eight elements a thread, and for float32 alone four, with more or fewer programs.
CANDIDATES = (DEFAULT, Config(1024, 4), Config(4096, 16), Config(1024, 8))
ROUNDS = 5
PATIENCE = 120.0  # seconds that a process waits for another one to measure

# Milliseconds of a step with each of the candidates that work.
Measure = Callable[[torch.device, tuple[Config, ...]], dict[Config, float]]


def config_for(rule: str, device: torch.device, measure: Measure) -> Config:
    """The fastest of CANDIDATES: from the cache, or measured now. DEFAULT where it cannot be
    measured, with a warning unless memory is short, or may not be (see above)."""
    off = os.environ.get("FUSEDOPT_AUTOTUNE", "1").lower() in ("0", "false", "no", "off")
    ranks = _ranks()
    if INTERPRETED or off or (ranks > 1 and os.environ.get("LOCAL_WORLD_SIZE") != str(ranks)):
        return DEFAULT
    path = cache_file(device)
    found = _config_in(_read(path).get(rule), ranks)
    if found is not None:
        return found
    # What this process has started may wait for another rank, which may wait for the lock.
    module = torch.get_device_module(device.type)
    if module.is_initialized():
        module.synchronize(device)
    with _lock(path) as locked:
        found = _config_in(_read(path).get(rule), ranks)  # by the process that held the lock
        if found is not None:
            return found
        if ranks > 1 and not locked:
            _warn(f"cannot lock {path.parent}, by which ranks agree on a tuning: {DEFAULT} serves")
            return DEFAULT
        best, entry = _measured(device, measure)
        if ranks > 1 or "milliseconds" in entry:
            _write(path, {**_read(path), rule: entry})
    return best


def cache_file(device: torch.device) -> Path:
    """One for each model of device and version of Triton."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    folder = Path(os.environ.get("FUSEDOPT_CACHE") or Path(base) / "fusedopt")
    name = torch.get_device_module(device.type).get_device_name(device)
    return folder / f"triton-{triton.__version__}-{re.sub(r'[^A-Za-z0-9]+', '-', name)}.json"


def median_times(
    steps: dict[Config, Callable[[], None]], device: torch.device
) -> dict[Config, float]:
    """Milliseconds of each step: medians over rounds in which all of them take turns. Steps that
    fail are left out, with a warning.

    Raises:
        torch.cuda.OutOfMemoryError: in any of them.
        RuntimeError: all of them failed.
    """
    times: dict[Config, list[float]] = {config: [] for config in steps}
    with on_device(device):
        for turn in range(1 + ROUNDS):
            for config in list(times):
                try:
                    if turn == 0:
                        steps[config]()  # compiles
                    else:
                        times[config].append(_milliseconds(steps[config], device))
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:
                    _warn(f"leaves out {config}, which fails: {type(error).__name__}: {error}")
                    del times[config]
    if not times:
        raise RuntimeError("none of the configurations works")
    return {config: statistics.median(t) for config, t in times.items()}


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one of five steps, on the current device."""
    module = torch.get_device_module(device.type)
    start, end = (module.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(5):
        step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 5


def _ranks() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if distributed else 1


def _measured(device: torch.device, measure: Measure) -> tuple[Config, dict[str, Any]]:
    """The choice, and its entry in the cache."""
    try:
        times = measure(device, CANDIDATES)
        best = min(times, key=times.__getitem__)
        reason = {"milliseconds": {f"{c.block}x{c.warps}": t for c, t in times.items()}}
    except torch.cuda.OutOfMemoryError:
        best, reason = DEFAULT, {"unmeasured": "out of memory"}
    except Exception as error:
        best, reason = DEFAULT, {"unmeasured": f"{type(error).__name__}: {error}"}
        _warn(f"cannot measure its Triton kernels ({reason['unmeasured']}): {DEFAULT} serves")
    return best, {"block": best.block, "warps": best.warps, **reason}


def _config_in(entry: Any, ranks: int) -> Config | None:
    """What a cache entry holds, if it is one of the candidates, and was measured. Several ranks
    agree on one that was not; the next process may have the memory."""
    if not isinstance(entry, dict) or (ranks == 1 and "unmeasured" in entry):
        return None
    for candidate in CANDIDATES:
        if (entry.get("block"), entry.get("warps")) == (candidate.block, candidate.warps):
            return candidate
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}  # none yet, or damaged: measured anew
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    """At once: who reads it meanwhile sees the old or the new one."""
    aside = path.with_suffix(f".{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(json.dumps(content, indent=2) + "\n")
        aside.replace(path)
    except OSError as error:
        _warn(f"cannot keep its Triton tuning in {path}: {error}")


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[bool]:
    """Only one process at a time gets past, and True; others False, where the folder cannot be
    written, or after PATIENCE. A process that dies leaves the file, but not the lock."""
    file = path.with_suffix(".lock")
    descriptor = None
    end = time.monotonic() + PATIENCE
    while descriptor is None and time.monotonic() < end:
        try:
            descriptor = _take(file)
        except OSError:
            break  # the folder cannot be written, or knows no locks
        if descriptor is None:
            time.sleep(0.02)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _take(file: Path) -> int | None:
    """The lock as an open file; None while another process has it.

    Raises:
        OSError: the file cannot be made or locked.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(file)):
            return descriptor
    except (BlockingIOError, FileNotFoundError):
        pass  # another process has it, or had it and has removed the file
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _warn(what: str) -> None:
    warnings.warn(f"fusedopt {what}", stacklevel=3)
