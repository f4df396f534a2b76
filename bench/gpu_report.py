"""The tables that `python -m bench gpu` prints: what it would measure, and what it measured."""

from typing import Any

from rich.table import Table

from bench.goals import Row
from bench.report import console, mark, optional
from bench.workloads import Workload, bytes_per_param, memory_bytes


def print_plan(steps: list[tuple[Workload, str, str]], contestants: list[str]) -> None:
    """The (workload, dtype, optimizer) with the bytes of a step; the contestants."""
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
    for workload, dtype, optimizer in steps:
        kinds = ("none", "fused", "separate")
        least = [bytes_per_param(optimizer, dtype, kind) for kind in kinds]
        table.add_row(
            workload.name,
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
