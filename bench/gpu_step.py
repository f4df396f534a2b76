"""Time of one optimizer step on an NVIDIA GPU: fusedopt against torch.optim, with and without
clipping.

    python -m bench gpu [--quick] [--dry-run] [--workload 1b] [--dtype float32] ...

All contestants of a workload take turns in one process, on the same params, grads and moments. A
sample is several steps back to back between two CUDA events; the host's time in the same calls is
kept beside it. In each round a copy of 1 GiB is timed too: its bandwidth, reads plus writes, is
the floor that a step is measured against. The tensors of the small workloads stay in the L2 cache,
for all contestants: what those measure is the host and the launches.
Results, all samples included, go to runs/step-gpu.json.
"""

import gc
import itertools
import sys
from collections.abc import Iterable
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from bench import cli, gpu
from bench.contestants import (
    HYPERPARAMETERS,
    Contestant,
    admit,
    eligible,
    present_and_absent,
    state_dtypes,
    widen_state,
)
from bench.goals import GPU_GOALS, Row, evaluate
from bench.gpu import COPY_BYTES, DeviceCopy, DeviceRunner
from bench.machine import describe_run
from bench.measure import Lane, interleave, paired_ratio, quartiles
from bench.progress import progress_bar
from bench.report import (
    console,
    mark,
    optional,
    partner,
    print_absent,
    print_goals,
    print_written,
    print_wrong,
    rows_of,
    write_results,
)
from bench.step import SharedState, add_bandwidth, lane_key, share_state
from bench.workloads import (
    DTYPES,
    MIXED,
    InputSet,
    Workload,
    bytes_per_param,
    gpu_workloads,
    memory_bytes,
)

WORKLOADS = gpu_workloads()
# Workloads that take turns with each other, and their dtypes.
BLOCKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "1b": (("1b",), (*DTYPES, MIXED)),
    "1000x1024": (("1000x1024",), ("float32",)),
    "10000x64": (("10000x64",), ("float32",)),
    "groups": (("1860-tiny-1-groups", "1860-tiny-465-groups"), ("float32",)),
}
QUICK_CONTESTANTS = ("fusedopt", "torch-fused")
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.1, 0.02

Block = tuple[str, str, str]  # a key of BLOCKS, dtype, optimizer


def plan(workloads: list[str], dtypes: list[str], optimizers: list[str]) -> list[Block]:
    """What is measured, in order."""
    return [
        (block, dtype, optimizer)
        for block in workloads
        for dtype, optimizer in itertools.product(BLOCKS[block][1], optimizers)
        if dtype in dtypes
    ]


def fitting(workload: Workload, dtype: str, free: int) -> Workload:
    """The workload, or for 1b a quarter of it where `free` bytes of device memory are too few."""
    short = workload.name == "1b" and memory_bytes(workload, dtype) > free
    return WORKLOADS["250m"] if short else workload


def build_lanes(
    workload: Workload,
    dtype: str,
    optimizer: str,
    entries: list[tuple[Contestant, bool, float]],
    sample_seconds: float,
) -> list[Lane]:
    """A lane for each (contestant, clip, step_error); all step the same tensors in turn."""
    inputs = InputSet(workload, dtype, seed=0, device=gpu.DEVICE)
    shared: SharedState = {}
    lanes = []
    for entry in entries:
        contestant, clip, _ = entry
        instance, step = contestant.build(optimizer, inputs.param_groups(), clip)
        step()  # makes the state
        widen_state(instance, dtype)
        share_state(instance, shared)
        step()  # knows the state
        key = lane_key(workload, dtype, optimizer, entry)
        key |= {"groups": workload.groups, "backend": getattr(instance, "backend_in_use", None)}
        key |= {"extra_bytes": gpu.extra_memory(step), **gpu.launches_of(step)}
        count = gpu.steps_for(sample_seconds, step)
        key |= {"steps_a_sample": count, "state_dtypes": state_dtypes(instance)}
        inputs.restore_grads()
        lanes.append(Lane(key, [DeviceRunner(step, after=inputs.restore_grads, steps=count)]))
    return lanes


def rows_with_ratios(lanes: list[Lane], bandwidth: float) -> list[Row]:
    """Rows with host time, bandwidth, and the median ratios, round by round, to the same step
    without clipping and to the same tensors in one group."""
    rows = rows_of(lanes, same=("workload", "clip"))
    for row, lane in zip(rows, lanes, strict=True):
        add_bandwidth(row, bandwidth)
        runner = lane.runners[0]
        assert isinstance(runner, DeviceRunner)
        host = runner.host_samples[-len(lane.samples) :]  # without those of the warm-up
        row["host_q1_s"], row["host_median_s"], row["host_q3_s"] = quartiles(host)
        row["host_samples_s"] = host
        no_clip = partner(lanes, lane, ("workload", "contestant"), clip=False)
        if no_clip is not None:
            row["ratio_to_no_clip"] = paired_ratio(lane.samples, no_clip.samples)
        one_group = partner(lanes, lane, ("contestant", "clip", "numel"), groups=1)
        if one_group is not None:
            row["ratio_to_one_group"] = paired_ratio(lane.samples, one_group.samples)
    return rows


def measure(
    lanes: list[Lane], copy: DeviceCopy, rounds: Iterable[int], warmup: int
) -> tuple[list[Row], dict[str, Any]]:
    """(rows, the copy of the same rounds) of one block."""
    floor = copy.lane()
    interleave([floor, *lanes], rounds, warmup=warmup)
    q1, median, q3 = quartiles(floor.samples)
    bandwidth = COPY_BYTES / median
    return rows_with_ratios(lanes, bandwidth), {
        "bytes": COPY_BYTES,
        "median_s": median,
        "q1_s": q1,
        "q3_s": q3,
        "gb_per_s": bandwidth / 1e9,
        "samples_s": floor.samples,
    }


def print_plan(blocks: list[Block], contestants: list[str]) -> None:
    """The workloads with the bytes of a step; the contestants."""
    columns = (
        "workload",
        "tensors",
        "params",
        "dtype",
        "rule",
        "bytes/param",
        "GB a step",
        "needs",
    )
    title = "What is measured (bytes/param: without clip, with our clip, with clip_grad_norm_)"
    table = Table(*columns, title=title)
    for block, dtype, optimizer in blocks:
        for name in BLOCKS[block][0]:
            workload = WORKLOADS[name]
            kinds = ("none", "fused", "separate")
            least = [bytes_per_param(optimizer, dtype, kind) for kind in kinds]
            table.add_row(
                name,
                str(len(workload.shapes)),
                f"{workload.numel / 1e6:.2f}M",
                dtype,
                optimizer,
                ", ".join(map(str, least)),
                f"{least[0] * workload.numel / 1e9:.4f}",
                f"{memory_bytes(workload, dtype) / 1e9:.1f} GB",
            )
    console.print(table)
    console.print(f"contestants: {', '.join(contestants)}; where memory is short 250m for 1b")
    console.print("each without and with clipping, taking turns with a copy of 1 GiB")


def print_rows(rows: list[Row], floors: list[dict[str, Any]]) -> None:
    """The table of all rows, a section for each block."""
    columns: tuple[str, ...] = (
        "groups",
        "contestant",
        "clip",
        "ms",
        "q1, q3",
        "host us",
        "GB/s",
        "of copy",
    )
    columns += ("launches", "extra MB", "fused / it")
    for floor in floors:
        same = ("block", "dtype", "optimizer")
        members = [row for row in rows if all(row[column] == floor[column] for column in same)]
        size = f"{members[0]['tensors']} tensors, {members[0]['numel'] / 1e6:.2f}M params"
        name = " ".join(floor[column] for column in same)
        table = Table(*columns, title=f"{name}, {size}, copy {floor['gb_per_s']:.0f} GB/s")
        for row in members:
            table.add_row(
                str(row["groups"]),
                row["contestant"] + mark(row),
                "yes" if row["clip"] else "no",
                f"{row['median_s'] * 1e3:.3f}",
                f"{row['q1_s'] * 1e3:.3f}, {row['q3_s'] * 1e3:.3f}",
                f"{row['host_median_s'] * 1e6:.0f}",
                f"{row['gb_per_s']:.0f}",
                f"{row['floor_fraction']:.1%}",
                f"{row['launches']:.0f}",
                f"{row['extra_bytes'] / 1e6:.1f}",
                optional(row["ratio_vs_torch_fused"], "{:.2f}"),
            )
        console.print(table)


def main(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick", help="Under a minute: few rounds, torch fused alone; not for figures."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be measured; needs no GPU.")
    ] = False,
    workload: Annotated[cli.Names, cli.choice("--workload", BLOCKS)] = None,
    dtype: Annotated[cli.Names, cli.choice("--dtype", (*DTYPES, MIXED))] = None,
    optimizer: Annotated[cli.Names, cli.choice("--optimizer", HYPERPARAMETERS)] = None,
    contestant: cli.Contestants = None,
    repeats: cli.Repeats = None,
    output: cli.Output = None,
) -> None:
    """Time of one optimizer step on an NVIDIA GPU: fusedopt against torch.optim."""
    assert workload is not None  # the callbacks of the options fill these four in
    assert dtype is not None
    assert optimizer is not None
    assert contestant is not None
    if quick:
        contestant = [name for name in contestant if name in QUICK_CONTESTANTS] or contestant
    blocks = plan(workload, dtype, optimizer)
    if dry_run:
        print_plan(blocks, contestant)
        return
    reason = gpu.missing_device()
    if reason:
        print(f"bench gpu: {reason}; --dry-run prints the plan", file=sys.stderr)
        sys.exit(1)
    path = cli.prepare("step-gpu", output, None, quick)
    repeats, warmup = cli.rounds_of(quick, repeats, default=15)
    present, missing = present_and_absent(contestant, optimizer, gpu.DEVICE)
    options = {"quick": quick, "repeats": repeats, "warmup_rounds": warmup, "workload": workload}
    options |= {"dtype": dtype, "optimizer": optimizer, "contestant": contestant}
    run = describe_run(options)
    print_absent(missing)
    absent = [*missing]
    copy = DeviceCopy()
    rows: list[Row] = []
    floors: list[dict[str, Any]] = []
    seconds = QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS
    with progress_bar() as progress:
        for block, dtype_name, optimizer_name in blocks:
            entries, refused = admit(present, optimizer_name, dtype_name, gpu.DEVICE)
            torch.compiler.reset()  # a function has at most 8 graphs
            absent += refused
            if not entries:
                continue
            free = gpu.free_memory()
            sizes = [fitting(WORKLOADS[name], dtype_name, free) for name in BLOCKS[block][0]]
            lanes = []
            for size in sizes:
                taken, left = eligible(entries, size)
                absent += left
                lanes += build_lanes(size, dtype_name, optimizer_name, taken, seconds)
            if not lanes:
                continue
            label = f"{block} {dtype_name} {optimizer_name}"
            rounds = progress.track(range(warmup + repeats), description=label)
            new_rows, floor = measure(lanes, copy, rounds, warmup)
            where = {"block": block, "dtype": dtype_name, "optimizer": optimizer_name}
            rows += [{**where, **row} for row in new_rows]
            floors.append({**where, **floor})
            del lanes  # its gigabytes, before the next block takes its own
            gc.collect()
            torch.compiler.reset()
    run["machine"]["gpu"] = gpu.describe_gpu(copy)
    goals = evaluate(rows, GPU_GOALS)
    tables = {"absent": absent, "floors": floors, "rows": rows, "goals": goals}
    write_results(path, {**run, **tables})
    print_rows(rows, floors)
    print_wrong(rows)
    print_absent(absent[len(missing) :])
    print_goals(goals, "the GPU")
    print_written(path)
    sys.exit(0 if rows else 1)
