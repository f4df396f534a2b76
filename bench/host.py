"""Host time of one optimizer step: 300 tensors of 16 elements in 1, 10 and 300 param groups.

    python -m bench host [--quick] [--workload 300-tiny-1-groups] [--variant steady] ...

The arithmetic of these steps takes nothing: what is timed is Python, dispatch and launches. Three
variants: `steady` (the same grads on each step), `fresh-grads` (newly allocated grads on each
step, as after zero_grad(set_to_none=True)) and `lr-changes` (every group's lr changes before each
step, as under a scheduler). What a variant prepares is not timed.

All contestants, group counts and variants take turns in one process. The first step of a turn,
which finds its tensors out of the caches as after a forward and backward, is kept as `cold`; when
steps have run for 2 ms, the next one is the sample.
Results, all samples included, go to runs/host-cpu.json.
"""

import itertools
import sys
from collections.abc import Callable
from typing import Annotated, Any

import torch
from rich.table import Column, Table

from bench import cli
from bench.contestants import (
    Contestant,
    admit,
    eligible,
    present_and_absent,
)
from bench.goals import Row, evaluate
from bench.machine import describe_run
from bench.measure import Lane, Runner, interleave, paired_ratio
from bench.progress import progress_bar
from bench.report import (
    console,
    mark,
    optional,
    partner,
    print_absent,
    print_goals,
    print_head,
    print_written,
    print_wrong,
    rows_of,
    write_results,
)
from bench.workloads import InputSet, Workload, host_workloads

WORKLOADS = host_workloads()
# After another contestant's turn it took three or four steps until a step of 300 tiny tensors
# stopped getting faster (the second was still 1.6 times the fifth).
SETTLE_SECONDS = 2e-3

Preparation = Callable[[], Any]


def prepare_steady(instance: torch.optim.Optimizer, inputs: InputSet) -> Preparation:
    """Nothing changes between steps."""
    return lambda: None


def prepare_fresh_grads(instance: torch.optim.Optimizer, inputs: InputSet) -> Preparation:
    """Every grad is a new tensor at a new address."""

    def renew() -> None:
        instance.zero_grad(set_to_none=True)
        inputs.renew_grads()

    return renew


def prepare_lr_changes(instance: torch.optim.Optimizer, inputs: InputSet) -> Preparation:
    """Every group's lr is another float than on the step before."""
    base = instance.param_groups[0]["lr"]
    lrs = itertools.cycle([base * (1 - i / 100) for i in range(100)])

    def schedule() -> None:
        lr = next(lrs)
        for group in instance.param_groups:
            group["lr"] = lr

    return schedule


VARIANTS = {
    "steady": prepare_steady,
    "fresh-grads": prepare_fresh_grads,
    "lr-changes": prepare_lr_changes,
}


def build_lane(
    workload: Workload,
    variant: str,
    optimizer: str,
    dtype: str,
    entry: tuple[Contestant, bool, float],
) -> Lane:
    """A lane with params of its own: with shared ones, the fresh grads of one lane would change
    the grads of another between its steps."""
    contestant, clip, error = entry
    inputs = InputSet(workload, dtype, seed=0)
    instance, step = contestant.build(optimizer, inputs.param_groups(), clip)
    before = VARIANTS[variant](instance, inputs)
    key = {
        "workload": workload.name,
        "variant": variant,
        "dtype": dtype,
        "optimizer": optimizer,
        "contestant": contestant.name,
        "clip": clip,
        "groups": workload.groups,
        "tensors": len(workload.shapes),
        "numel": workload.numel,
        "step_error": error,
    }
    return Lane(key, [Runner(step, before, inputs.restore_grads)])


def rows_with_ratios(lanes: list[Lane]) -> list[Row]:
    """Rows with seconds a tensor and the median ratio, round by round, to the same in one group."""
    rows = rows_of(lanes, same=("workload", "variant", "clip"))
    for row, lane in zip(rows, lanes, strict=True):
        row["per_tensor_s"] = row["median_s"] / row["tensors"]
        one_group = partner(lanes, lane, ("contestant", "variant", "clip"), groups=1)
        if one_group is not None:
            row["ratio_to_one_group"] = paired_ratio(lane.samples, one_group.samples)
    return rows


def print_rows(rows: list[Row]) -> None:
    """A table for each dtype, optimizer and clip: microseconds a step, a line for each variant and
    contestant, a column for each number of groups."""
    blocks: dict[tuple, dict[tuple, dict[int, Row]]] = {}
    for row in rows:
        block = blocks.setdefault((row["dtype"], row["optimizer"], row["clip"]), {})
        block.setdefault((row["variant"], row["contestant"]), {})[row["groups"]] = row
    for (dtype, optimizer, clip), lines in blocks.items():
        counts = list(dict.fromkeys(count for cells in lines.values() for count in cells))
        heads = [f"{count} groups" if count > 1 else "1 group" for count in counts]
        tensors = next(iter(next(iter(lines.values())).values()))["tensors"]
        name = f"{dtype} {optimizer}{', clip' if clip else ''}"
        title = f"{tensors} tiny tensors, {name}: us a step"
        columns = [*heads, f"{heads[0]}, cold", "torch fused / it"]
        table = Table("variant", Column("contestant", no_wrap=True), *columns, title=title)
        for (variant, kind), cells in lines.items():
            times = [f"{cells[n]['median_s'] * 1e6:.0f}" if n in cells else "-" for n in counts]
            first = next(iter(cells.values()))
            figures = [f"{first['cold_median_s'] * 1e6:.0f}"]
            figures.append(optional(first["ratio_vs_torch_fused"], "{:.2f}"))
            table.add_row(variant, kind + mark(first), *times, *figures)
        console.print(table)


def main(
    quick: cli.Quick = False,
    workload: Annotated[cli.Names, cli.choice("--workload", WORKLOADS)] = None,
    variant: Annotated[cli.Names, cli.choice("--variant", VARIANTS)] = None,
    dtype: cli.Dtypes = None,
    optimizer: cli.Optimizers = None,
    contestant: cli.Contestants = None,
    repeats: cli.Repeats = None,
    threads: cli.Threads = None,
    output: cli.Output = None,
) -> None:
    """Host time of one optimizer step on the CPU: fusedopt against torch.optim."""
    path = cli.prepare("host-cpu", output, threads, quick)
    repeats, warmup = cli.rounds_of(quick, repeats, default=51)
    present, missing = present_and_absent(contestant, optimizer, quick=quick)
    options = {"quick": quick, "repeats": repeats, "warmup_rounds": warmup, "workload": workload}
    options |= {
        "variant": variant,
        "dtype": dtype,
        "optimizer": optimizer,
        "contestant": contestant,
    }
    run = describe_run(options)
    print_head(run, missing)
    absent = [*missing]
    rows: list[Row] = []
    with progress_bar() as progress:
        for dtype_name, optimizer_name in itertools.product(dtype, optimizer):
            entries, refused = admit(present, optimizer_name, dtype_name)
            absent += refused
            lanes = []
            for kind, name in itertools.product(variant, workload):
                size = host_workloads(quick)[name]
                taken, left = eligible(entries, size)
                absent += left
                lanes += [
                    build_lane(size, kind, optimizer_name, dtype_name, entry) for entry in taken
                ]
            if not lanes:
                continue
            label = f"{dtype_name} {optimizer_name}"
            rounds = progress.track(range(warmup + repeats), description=label)
            interleave(lanes, rounds, warmup=warmup, settle=SETTLE_SECONDS)
            rows += rows_with_ratios(lanes)
    goals = evaluate(rows)
    write_results(path, {**run, "absent": absent, "rows": rows, "goals": goals})
    print_rows(rows)
    print_wrong(rows)
    print_absent(absent[len(missing) :])
    print_goals(goals)
    print_written(path)
    sys.exit(0 if rows else 1)
