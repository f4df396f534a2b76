"""Time of one optimizer step on the CPU: fusedopt against torch.optim, with and without clipping.

    python -m bench step [--quick] [--workload 16x4096x1024] [--dtype float32] ...

All contestants of a workload take turns in one process, on the same params, grads and moments. In
each round an in-place pass over 268 MB is timed too: its bandwidth is the floor that a step is
measured against. Results, all samples included, go to runs/step-cpu.json.
"""

import gc
import itertools
import resource
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import torch
from rich.table import Table

from bench import cli
from bench.contestants import (
    Contestant,
    admit,
    eligible,
    present_and_absent,
    widen_state,
)
from bench.goals import Row, evaluate
from bench.machine import available_bytes, cache_bytes, describe_run
from bench.measure import (
    FLOOR_BYTES,
    InPlacePass,
    Lane,
    Runner,
    interleave,
    nothing,
    operators_of,
    quartiles,
)
from bench.progress import progress_bar
from bench.report import (
    console,
    mark,
    optional,
    print_absent,
    print_goals,
    print_head,
    print_skipped,
    print_written,
    print_wrong,
    rows_of,
    write_results,
)
from bench.workloads import (
    SUITES,
    InputSet,
    Workload,
    bytes_per_param,
    memory_bytes,
    sets_to_defeat_cache,
    step_workloads,
)

ALL_WORKLOADS = {**step_workloads(), **SUITES["models"], **SUITES["sweep"]}

SharedState = dict[tuple[torch.Tensor, str], torch.Tensor]


def share_state(optimizer: torch.optim.Optimizer, shared: SharedState) -> None:
    """Let the optimizer use the moments of the first one that was built on the same params.

    So a contestant costs no memory of its own (1 GB for AdamW on 67M params), and none is slower
    for the physical pages that its moments happen to lie in.
    """
    for param, state in optimizer.state.items():
        for name, value in state.items():
            if name != "step" and torch.is_tensor(value):
                state[name] = shared.setdefault((param, name), value)


def lane_key(
    workload: Workload, dtype: str, optimizer: str, entry: tuple[Contestant, bool, float]
) -> dict[str, Any]:
    """The columns that name the row of one (contestant, clip, step_error)."""
    contestant, clip, error = entry
    return {
        "workload": workload.name,
        "dtype": dtype,
        "optimizer": optimizer,
        "contestant": contestant.name,
        "clip": clip,
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "bytes_per_param": bytes_per_param(optimizer, dtype, contestant.clip_kind(clip)),
        "floor_bytes_per_param": bytes_per_param(optimizer, dtype, "fused" if clip else "none"),
        "step_error": error,
    }


def build_lanes(
    workload: Workload,
    optimizer: str,
    dtype: str,
    entries: list[tuple[Contestant, bool, float]],
    most_sets: int | None,
    in_place: InPlacePass,
) -> list[Lane]:
    """A lane for each (contestant, clip, step_error); all step the same input sets in turn."""
    turns = len(entries) + 1
    count = sets_to_defeat_cache(workload, optimizer, dtype, cache_bytes(), turns)
    count = min(count, most_sets or count)
    sets = [InputSet(workload, dtype, seed) for seed in range(count)]
    shared: SharedState = {}
    lanes = []
    for entry in entries:
        contestant, clip, _ = entry
        # A compiled step is a graph for each set: it has one; the pass drives that from the caches.
        one_of_many = contestant.compiled and count > 1
        runners = []
        for inputs in sets[:1] if one_of_many else sets:
            instance, step = contestant.build(optimizer, inputs.param_groups(), clip)
            step()  # makes the state
            inputs.restore_grads()
            widen_state(instance, dtype)
            share_state(instance, shared)
            # Also for those that do not write grads, so that all find the caches alike.
            before = in_place.run if one_of_many else nothing
            runners.append(Runner(step, before, inputs.restore_grads))
        if contestant.compiled:
            runners[0].step()  # compiled again for the shared moments
        key = lane_key(workload, dtype, optimizer, entry)
        key |= {"input_sets": len(runners), "operators": operators_of(runners[0].step)}
        runners[0].after()
        lanes.append(Lane(key, runners))
    return lanes


def add_bandwidth(row: Row, floor_bandwidth: float) -> None:
    """Add GB/s by the contestant's own least bytes, the floor's seconds, and floor through time.

    floor_bandwidth: bytes a second of the in-place pass (on a GPU: the copy) of the same rounds.
    The floor is that of an optimizer that clips in its step, for every contestant.
    """
    row["gb_per_s"] = row["bytes_per_param"] * row["numel"] / row["median_s"] / 1e9
    row["floor_s"] = row["floor_bytes_per_param"] * row["numel"] / floor_bandwidth
    row["floor_fraction"] = row["floor_s"] / row["median_s"]


def measure(
    lanes: list[Lane], in_place: InPlacePass, rounds: Iterable[int], warmup: int
) -> tuple[list[Row], dict[str, Any]]:
    """(rows, the in-place pass of the same rounds) of one workload, dtype and optimizer."""
    floor = in_place.lane()
    interleave([floor, *lanes], rounds, warmup=warmup)
    q1, median, q3 = quartiles(floor.samples)
    bandwidth = FLOOR_BYTES / median
    rows = rows_of(lanes, same=("clip",))
    for row in rows:
        add_bandwidth(row, bandwidth)
    return rows, {
        **{column: lanes[0].key[column] for column in ("workload", "dtype", "optimizer")},
        "bytes": FLOOR_BYTES,
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "gb_per_s": bandwidth / 1e9,
        "samples_s": floor.samples,
    }


def print_rows(rows: list[Row], floors: list[dict[str, Any]]) -> None:
    """The table of all rows, a section for each workload, dtype and optimizer."""
    columns = ("contestant", "clip", "median ms", "q1, q3", "GB/s", "of floor", "torch fused / it",
               "error", "operators")  # fmt: skip
    for floor in floors:
        block = ("workload", "dtype", "optimizer")
        members = [row for row in rows if all(row[column] == floor[column] for column in block)]
        name = " ".join(floor[column] for column in block)
        size = f"{members[0]['numel'] / 1e6:.1f}M params"
        title = f"{name}, {size}, in-place floor {floor['gb_per_s']:.1f} GB/s"
        table = Table(*columns, title=title)
        for row in members:
            table.add_row(
                row["contestant"] + mark(row),
                "yes" if row["clip"] else "no",
                f"{row['median_s'] * 1e3:.2f}",
                f"[{row['q1_s'] * 1e3:.2f}, {row['q3_s'] * 1e3:.2f}]".replace("[", r"\["),
                f"{row['gb_per_s']:.1f}",
                f"{row['floor_fraction']:.0%}",
                optional(row["ratio_vs_torch_fused"], "{:.2f}"),
                f"{row['step_error']:.1f}",
                str(row["operators"]),
            )
        console.print(table)


def main(
    quick: cli.Quick = False,
    workload: Annotated[
        cli.Names,
        cli.choice("--workload", [*SUITES, *ALL_WORKLOADS], default=list(step_workloads())),
    ] = None,
    dtype: cli.MixedDtypes = None,
    optimizer: cli.Optimizers = None,
    contestant: cli.Contestants = None,
    repeats: cli.Repeats = None,
    threads: cli.Threads = None,
    output: cli.Output = None,
) -> None:
    """Time of one optimizer step on the CPU: fusedopt against torch.optim."""
    path = cli.prepare("step-cpu", output, threads, quick)
    repeats, warmup = cli.rounds_of(quick, repeats, default=21)
    workload = [name for given in workload for name in SUITES.get(given, [given])]
    present, missing = present_and_absent(contestant, optimizer, quick=quick)
    options = {"quick": quick, "repeats": repeats, "warmup_rounds": warmup, "workload": workload}
    options |= {"dtype": dtype, "optimizer": optimizer, "contestant": contestant}
    run = describe_run(options)
    print_head(run, missing)
    absent = [*missing]
    in_place = InPlacePass()
    rows: list[Row] = []
    floors: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    with progress_bar() as progress:
        for dtype_name, optimizer_name in itertools.product(dtype, optimizer):
            entries, refused = admit(present, optimizer_name, dtype_name)
            torch.compiler.reset()
            absent += refused
            for name in workload if entries else ():
                size = {**ALL_WORKLOADS, **step_workloads(quick)}[name]
                needed = memory_bytes(size, dtype_name)
                if needed > available_bytes():
                    reason = f"needs {needed / (1 << 30):.0f} GiB of memory in {dtype_name}"
                    skipped.append({"workload": name, "reason": reason})
                    continue
                # A quick run is not for figures, and shows no cold caches.
                most = 1 if quick else None
                taken, left = eligible(entries, size)
                absent += left
                if not taken:
                    continue
                lanes = build_lanes(size, optimizer_name, dtype_name, taken, most, in_place)
                label = f"{name} {dtype_name} {optimizer_name}"
                rounds = progress.track(range(warmup + repeats), description=label)
                new_rows, floor = measure(lanes, in_place, rounds, warmup)
                rows += new_rows
                floors.append(floor)
                del lanes  # its gigabytes, before the next workload takes its own
                gc.collect()
                torch.compiler.reset()  # a function has at most 8 graphs
    goals = evaluate(rows)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    tables = {"absent": absent, "skipped": skipped, "floors": floors, "rows": rows, "goals": goals}
    write_results(path, {**run, "peak_memory_gib": round(peak, 2), **tables})
    print_rows(rows, floors)
    print_wrong(rows)
    print_absent(absent[len(missing) :])
    print_skipped(skipped)
    print_goals(goals)
    print_written(path)
    sys.exit(0 if rows else 1)
