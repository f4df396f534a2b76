"""What a results file says about where it came from. No host names and no paths."""

import importlib
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"  # those that the documents quote; git tracks them
RUNS = ROOT / "runs"  # whatever anyone measures; git ignores it


def read(path: str) -> str:
    """Text of a file of /proc or /sys, empty where there is none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cache_bytes() -> int:
    """Size of the last-level cache; 32 MiB where the system does not tell."""
    sizes = [read(f"/sys/devices/system/cpu/cpu0/cache/index{i}/size").strip() for i in range(5)]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 << 20)


def available_bytes() -> int:
    """Memory that can be had without swapping; unlimited where the system does not say."""
    available = re.search(r"MemAvailable:\s*(\d+) kB", read("/proc/meminfo"))
    return int(available[1]) * 1024 if available else sys.maxsize


def describe_machine() -> dict[str, Any]:
    """CPU model, cores, threads of torch, memory (GiB), last-level cache (MiB), huge pages,
    and the load average of the minute before the run: above a few tenths, somebody else ran."""
    info = read("/proc/cpuinfo")
    model = re.search(r"model name\s*:\s*(.+)", info)
    memory = re.search(r"MemTotal:\s*(\d+) kB", read("/proc/meminfo"))
    huge_pages = re.search(r"\[(\w+)\]", read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return {
        "cpu": model[1].strip() if model else platform.processor(),
        "architecture": platform.machine(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "cores": len(re.findall(r"^processor", info, re.MULTILINE)) or None,
        "threads": torch.get_num_threads(),
        "memory_gib": round(int(memory[1]) / (1 << 20), 1) if memory else None,
        "last_level_cache_mib": round(cache_bytes() / (1 << 20), 1),
        "transparent_huge_pages": huge_pages[1] if huge_pages else None,
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 2),
    }


def describe_versions() -> dict[str, Any]:
    """Versions of Python, of torch and its compiler, of fusedopt and what it says of its native
    part (compiler, instruction set); None where it is not known."""
    torch_compiler = re.search(r"(GCC|Clang|MSVC) [\d.]+", torch.__config__.show())
    versions: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_compiler": torch_compiler[0] if torch_compiler else None,
        "fusedopt": None,
        "fusedopt_build": None,
    }
    try:
        versions["fusedopt"] = getattr(importlib.import_module("fusedopt"), "__version__", None)
        versions["fusedopt_build"] = dict(importlib.import_module("fusedopt._C").build_info())
    except (ImportError, AttributeError):
        pass  # listed as absent, or without its native part
    return versions


def git(*arguments: str) -> str | None:
    """Output of a git command in this repository; None without git or without a repository."""
    command = ["git", "-C", str(ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def describe_commit() -> dict[str, Any]:
    """{commit, dirty}: dirty when anything but the results differs from the commit. A copy of the
    files without .git is told its commit by FUSEDOPT_COMMIT; whether it is dirty is not known."""
    status = git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {
        "commit": git("rev-parse", "HEAD") or os.environ.get("FUSEDOPT_COMMIT"),
        "dirty": None if status is None else bool(status),
    }


def describe_run(options: dict[str, Any]) -> dict[str, Any]:
    """The head of a results file. Call it after the number of threads is set."""
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "git": describe_commit(),
        "options": options,
    }
