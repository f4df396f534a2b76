"""Memory of a step: what it needs beside params, gradients and state, at its peak.

    python -m bench memory [--quick] [--contestant fusedopt] ...

On a CPU the peak of the process's resident memory is reset through /proc before a step and read
after it (Linux alone has that); pages that were touched before are not seen again, so each
contestant steps in a process of its own. Results go to runs/memory-cpu.json.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
from rich.table import Table

from bench import cli
from bench.contestants import CONTESTANTS, present_and_absent, reason_of
from bench.goals import Row
from bench.machine import ROOT, describe_run
from bench.progress import progress_bar
from bench.report import console, print_absent, print_written, write_results
from bench.workloads import InputSet, Workload, dtypes_of

MIB = 1 << 20
STATUS = Path("/proc/self/status")


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (its peak since `reset_peak`) of this process, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def reset_peak() -> None:
    """Lets VmHWM start again from VmRSS."""
    Path("/proc/self/clear_refs").write_text("5")


def return_freed() -> None:
    """Gives the system back what was freed: pages that malloc keeps would serve the next step
    unseen. glibc alone can; elsewhere temporaries below its mmap threshold are missed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def workload(quick: bool) -> Workload:
    """Few large tensors: a copy of one would show."""
    count = 4 if quick else 16
    return Workload(f"{count}x4096x1024", ((4096, 1024),) * count)


def extra_bytes(contestant: str, optimizer: str, dtype: str, clip: bool, quick: bool) -> int:
    """Peak of the second step over what was resident before it."""
    size = workload(quick)
    inputs = InputSet(size, dtype, seed=0)
    inputs.pristine.clear()
    _, step = CONTESTANTS[contestant].build(optimizer, inputs.param_groups(), clip)
    step()  # makes the state
    return_freed()
    before = resident("VmRSS")
    reset_peak()
    step()
    return max(0, resident("VmHWM") - before)


def measured_apart(contestant: str, optimizer: str, dtype: str, clip: bool, quick: bool) -> int:
    """`extra_bytes` in a new process; RuntimeError with what it said where it fails."""
    arguments = [contestant, optimizer, dtype, clip, quick]
    code = f"from bench import memory; print(memory.extra_bytes(*{arguments!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def print_rows(rows: list[Row]) -> None:
    """One table: MiB beside the tensors of the step, and in per cent of the params."""
    columns = ("dtype", "optimizer", "contestant", "clip", "extra MiB", "of params")
    table = Table(*columns, title="Peak memory of a step beside params, gradients and state")
    for row in rows:
        table.add_row(
            row["dtype"],
            row["optimizer"],
            row["contestant"],
            "yes" if row["clip"] else "no",
            f"{row['extra_bytes'] / MIB:.1f}",
            f"{row['extra_bytes'] / row['param_bytes']:.1%}",
        )
    console.print(table)


def main(
    quick: cli.Quick = False,
    dtype: cli.Dtypes = None,
    optimizer: cli.Optimizers = None,
    contestant: cli.Contestants = None,
    output: cli.Output = None,
) -> None:
    """Peak memory of one optimizer step on the CPU."""
    assert dtype is not None  # the callbacks of the options fill these in
    assert optimizer is not None
    assert contestant is not None
    if not Path("/proc/self/clear_refs").exists():
        raise typer.BadParameter("needs Linux, whose /proc tells the peak of a process's memory")
    path = cli.prepare("memory-cpu", output, None, quick)
    present, absent = present_and_absent(contestant, optimizer, quick=quick)
    if quick:  # a process for each case takes its time
        dtype, optimizer = dtype[:1], optimizer[:1]
    run = describe_run({"quick": quick, "dtype": dtype, "optimizer": optimizer})
    size = workload(quick)
    cases = [
        (c.name, o, d, clip)
        for d in dtype
        for o in optimizer
        for clip in ((True,) if quick else (False, True))
        for c in present
        if o in c.classes
    ]
    rows: list[Row] = []
    with progress_bar() as progress:
        for name, rule, kind, clip in progress.track(cases, description="memory"):
            try:
                extra = measured_apart(name, rule, kind, clip, quick)
            except RuntimeError as error:
                absent.append({"contestant": name, "reason": f"{rule} {kind}: {reason_of(error)}"})
                continue
            itemsize = dtypes_of(kind)[0].itemsize
            key: dict[str, Any] = {"workload": size.name, "dtype": kind, "optimizer": rule}
            key |= {"contestant": name, "clip": clip, "numel": size.numel}
            rows.append({**key, "param_bytes": itemsize * size.numel, "extra_bytes": extra})
    write_results(path, {**run, "absent": absent, "rows": rows})
    print_rows(rows)
    print_absent(absent)
    print_written(path)
    sys.exit(0 if rows else 1)
