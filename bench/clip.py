"""Time of clipping gradients outside of an optimizer: the drop-ins against torch.nn.utils.

    python -m bench clip [--quick] [--workload 1000x64x64] [--dtype float32] ...

`clip_grad_norm_` of fusedopt, of torch with foreach and of torch's loop take turns in one process
on the same gradients, whose norm is above the limit, so that each is read, and written. The floor
is an in-place pass: two reads and a write of each gradient at its bandwidth. Results, all samples
included, go to runs/clip-cpu.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import torch
from rich.table import Table

from bench import cli
from bench.goals import Row
from bench.machine import cache_bytes, describe_run
from bench.measure import FLOOR_BYTES, InPlacePass, Lane, Runner, interleave, quartiles
from bench.progress import progress_bar
from bench.report import console, optional, print_head, print_written, rows_of, write_results
from bench.workloads import MAX_NORM, InputSet, dtypes_of, sets_to_defeat_cache, step_workloads

WORKLOADS = step_workloads()
PASSES = 3  # reads for the norm, reads and writes to scale


def clippers() -> dict[str, Callable[..., Any]]:
    """The functions by the name of a contestant."""
    import fusedopt  # the other commands run without it

    return {
        "fusedopt": fusedopt.clip_grad_norm_,
        "torch-foreach": partial(torch.nn.utils.clip_grad_norm_, foreach=True),
        "torch-for-loop": partial(torch.nn.utils.clip_grad_norm_, foreach=False),
    }


def build_lanes(name: str, dtype: str, quick: bool) -> list[Lane]:
    """A lane for each function; all clip the same input sets in turn."""
    workload = step_workloads(quick)[name]
    count = sets_to_defeat_cache(workload, "adamw", dtype, cache_bytes(), len(clippers()) + 1)
    sets = [InputSet(workload, dtype, seed) for seed in range(min(count, 2) if quick else count)]
    lanes = []
    for contestant, function in clippers().items():
        key = {
            "workload": name,
            "dtype": dtype,
            "contestant": contestant,
            "tensors": len(workload.shapes),
            "numel": workload.numel,
            "bytes_per_param": PASSES * dtypes_of(dtype)[0].itemsize,
        }
        runners = [
            Runner(partial(function, inputs.params, MAX_NORM), after=inputs.restore_grads)
            for inputs in sets
        ]
        lanes.append(Lane(key, runners))
    return lanes


def print_rows(rows: list[Row]) -> None:
    """One table: a line for each workload, dtype and function."""
    columns = ("workload", "dtype", "function", "median ms", "q1, q3", "of floor", "foreach / it")
    table = Table(*columns, title="clip_grad_norm_")
    for row in rows:
        table.add_row(
            row["workload"],
            row["dtype"],
            row["contestant"],
            f"{row['median_s'] * 1e3:.3f}",
            f"{row['q1_s'] * 1e3:.3f}, {row['q3_s'] * 1e3:.3f}",
            f"{row['floor_fraction']:.0%}",
            optional(row["ratio_vs_torch_foreach"], "{:.2f}"),
        )
    console.print(table)


def main(
    quick: cli.Quick = False,
    workload: Annotated[cli.Names, cli.choice("--workload", WORKLOADS)] = None,
    dtype: cli.Dtypes = None,
    repeats: cli.Repeats = None,
    threads: cli.Threads = None,
    output: cli.Output = None,
) -> None:
    """Time of clip_grad_norm_ on the CPU: fusedopt against torch.nn.utils."""
    assert workload is not None  # the callbacks of the options fill these in
    assert dtype is not None
    path = cli.prepare("clip-cpu", output, threads, quick)
    repeats, warmup = cli.rounds_of(quick, repeats, default=21)
    run = describe_run({"quick": quick, "repeats": repeats, "warmup_rounds": warmup})
    print_head(run, [])
    rows: list[Row] = []
    in_place = InPlacePass()
    with progress_bar() as progress:
        for name in workload:
            for dtype_name in dtype:
                lanes, floor = build_lanes(name, dtype_name, quick), in_place.lane()
                label = f"{name} {dtype_name}"
                rounds = progress.track(range(warmup + repeats), description=label)
                interleave([floor, *lanes], rounds, warmup=warmup)
                bandwidth = FLOOR_BYTES / quartiles(floor.samples)[1]
                for row in rows_of(lanes, (), "torch-foreach", "ratio_vs_torch_foreach"):
                    moved = row["bytes_per_param"] * row["numel"]
                    row["gb_per_s"] = moved / row["median_s"] / 1e9
                    row["floor_fraction"] = moved / bandwidth / row["median_s"]
                    rows.append(row)
                del lanes  # its gigabytes, before the next workload takes its own
    write_results(path, {**run, "rows": rows})
    print_rows(rows)
    print_written(path)
    sys.exit(0)
