"""Time of one optimizer step on an NVIDIA GPU: fusedopt against torch.optim, with and without
clipping.

    python -m bench gpu [--quick] [--dry-run] [--workload 1b] [--dtype float32] ...

All contestants of a workload take turns in one process, on the same params, grads and moments. A
sample is several steps back to back between two CUDA events; the host's time in the same calls is
kept beside it. In each round a copy of 1 GiB is timed too: its bandwidth, reads plus writes, is
the floor that a step is measured against. The tensors of the small workloads stay in the L2 cache,
for all contestants: what those measure is the host and the launches.
Results, all samples included, go to runs/step-gpu.json, which is written anew after each block of
workloads: a run that is stopped leaves the blocks that it finished.
"""

import gc
import itertools
import sys
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

import torch
import typer

from bench import cli, gpu
from bench.contestants import (
    HYPERPARAMETERS,
    Contestant,
    admit,
    eligible,
    present_and_absent,
    reason_of,
    state_dtypes,
    widen_state,
)
from bench.goals import GPU_GOALS, Row, evaluate
from bench.gpu import COPY_BYTES, DeviceCopy, DeviceRunner
from bench.gpu_report import print_plan, print_rows
from bench.machine import describe_run
from bench.measure import Lane, interleave, paired_ratio, quartiles
from bench.progress import progress_bar
from bench.report import (
    partner,
    print_absent,
    print_goals,
    print_skipped,
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
    gpu_workloads,
    memory_bytes,
)

WORKLOADS = gpu_workloads()
# Workloads that take turns with each other, and their dtypes.
BLOCKS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "1b": (("1b",), (*DTYPES, MIXED)),
    "10x16.8M": (("10x16.8M",), ("float32", "bfloat16")),
    "200x1M": (("200x1M",), ("float32",)),
    "llama-7b-of-8-ranks": (("llama-7b-of-8-ranks",), ("float32",)),
    "1000x1024": (("1000x1024",), ("float32",)),
    "10000x64": (("10000x64",), ("float32",)),
    "groups": (("1860-tiny-1-groups", "1860-tiny-465-groups"), ("float32",)),
}
QUICK_CONTESTANTS = ("fusedopt", "torch-fused")
SAMPLE_SECONDS, QUICK_SAMPLE_SECONDS = 0.05, 0.02

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


def build_lane(
    inputs: InputSet,
    dtype: str,
    optimizer: str,
    entry: tuple[Contestant, bool, float],
    shared: SharedState,
    sample_seconds: float,
) -> Lane:
    """The lane of one (contestant, clip, step_error), with the moments that all share."""
    contestant, clip, _ = entry
    instance, step = contestant.build(optimizer, inputs.param_groups(), clip)
    if contestant.compiled:  # compiled once then, for the moments that are shared
        eager = replace(contestant, compiled=False)
        plain, make_state = eager.build(optimizer, inputs.param_groups(), clip)
        make_state()
        instance.state = plain.state
    else:
        step()  # makes the state
    widen_state(instance, dtype)
    share_state(instance, shared)
    step()  # knows the state
    key = lane_key(inputs.workload, dtype, optimizer, entry)
    key |= {"groups": inputs.workload.groups}
    key |= {"backend": getattr(instance, "backend_in_use", None)}
    key |= {"extra_bytes": gpu.extra_memory(step), **gpu.launches_of(step)}
    count = gpu.steps_for(sample_seconds, step)
    key |= {"steps_a_sample": count, "state_dtypes": state_dtypes(instance)}
    return Lane(key, [DeviceRunner(step, after=inputs.restore_grads, steps=count)])


def build_lanes(
    workload: Workload,
    dtype: str,
    optimizer: str,
    entries: list[tuple[Contestant, bool, float]],
    sample_seconds: float,
) -> tuple[list[Lane], list[dict[str, str]]]:
    """(a lane for each (contestant, clip, step_error), {contestant, reason} of those that fail).

    All step the same tensors in turn. One that fails at this size only, by a limit of its own or
    for want of memory, does not cost the others their figures.
    """
    inputs = InputSet(workload, dtype, seed=0, device=gpu.DEVICE)
    shared: SharedState = {}
    lanes, failed = [], []
    for entry in entries:
        contestant, clip, _ = entry
        try:
            with contestant.hushed():
                lane = build_lane(inputs, dtype, optimizer, entry, shared, sample_seconds)
        except Exception as error:
            case = f"{workload.name} {dtype} {optimizer}{', clip' if clip else ''}"
            failed.append({"contestant": contestant.name, "reason": f"{case}: {reason_of(error)}"})
        else:
            lanes.append(lane)
        inputs.restore_grads()
    return lanes, failed


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
        steps = [
            (WORKLOADS[name], dtype_name, optimizer_name)
            for block, dtype_name, optimizer_name in blocks
            for name in BLOCKS[block][0]
        ]
        print_plan(steps, contestant)
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
    run["machine"]["gpu"] = gpu.describe_gpu(copy)
    rows: list[Row] = []
    floors: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    seconds = QUICK_SAMPLE_SECONDS if quick else SAMPLE_SECONDS

    def write_all() -> None:
        tables = {"absent": absent, "skipped": skipped, "floors": floors, "rows": rows}
        write_results(path, {**run, **tables, "goals": evaluate(rows, GPU_GOALS)})

    with progress_bar() as progress:
        for block, dtype_name, optimizer_name in blocks:
            free = gpu.free_memory()
            sizes = [fitting(WORKLOADS[name], dtype_name, free) for name in BLOCKS[block][0]]
            needed = max(memory_bytes(size, dtype_name) for size in sizes)
            if needed > free:
                reason = f"needs {needed / (1 << 30):.0f} GiB of device memory in {dtype_name}"
                skipped.append({"workload": block, "reason": reason})
                continue
            entries, refused = admit(present, optimizer_name, dtype_name, gpu.DEVICE)
            torch.compiler.reset()  # a function has at most 8 graphs
            absent += refused
            lanes = []
            for size in sizes if entries else ():
                taken, left = eligible(entries, size)
                new_lanes, failed = build_lanes(size, dtype_name, optimizer_name, taken, seconds)
                lanes += new_lanes
                absent += left + failed
                del new_lanes
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
            write_all()
    if rows:
        write_all()  # with what the last blocks were skipped for
    else:
        print_absent(absent[len(missing) :])
        print_skipped(skipped)
        sys.exit(1)
    print_rows(rows, floors)
    print_wrong(rows)
    print_absent(absent[len(missing) :])
    print_skipped(skipped)
    print_goals(evaluate(rows, GPU_GOALS), "the GPU")
    print_written(path)
