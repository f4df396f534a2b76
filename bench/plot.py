"""Pictures of the results: speed by workload, time against bytes, time against tensors and groups.

    python -m bench plot [--results runs] [--out docs/figures]

Every picture is made from the JSON files of a folder alone; one whose file is missing is left out
and said so. Without --results that folder is bench/results, without --out the pictures go to
runs/figures: those of the documents are written by bench/figures.sh.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl

mpl.use("Agg")
import typer
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.contestants import ERROR_LIMIT, SUBJECT
from bench.goals import Row
from bench.machine import RESULTS, RUNS
from bench.report import print_written, say

# Okabe and Ito's colours, which the colour-blind tell apart; each with a marker of its own.
STYLES = {
    "fusedopt": ("#D55E00", "o"),
    "torch-fused": ("#0072B2", "s"),
    "torch-foreach": ("#56B4E9", "^"),
    "torch-for-loop": ("#999999", "v"),
    "torch-compiled": ("#009E73", "D"),
    "optimi": ("#CC79A7", "P"),
    "torchao": ("#F0E442", "X"),
    "deepspeed-cpu": ("#000000", "*"),
}
OTHER = ("#666666", ".")


def load(folder: Path, name: str) -> dict[str, Any] | None:
    """A results file, or None where there is none."""
    path = folder / name
    if not path.exists():
        return None
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def subtitle(data: dict[str, Any]) -> str:
    """Machine and versions, under every picture."""
    machine, versions = data["machine"], data["versions"]
    place = (machine.get("gpu") or {}).get(
        "name"
    ) or f"{machine['cpu']}, {machine['threads']} threads"
    return f"{place}; torch {versions['torch']}; AdamW; medians"


def usable(rows: list[Row], **where: Any) -> list[Row]:
    """Rows with these values, without those that computed something else."""
    return [
        row
        for row in rows
        if row["step_error"] <= ERROR_LIMIT and all(row[k] == v for k, v in where.items())
    ]


def speed(data: dict[str, Any]) -> Figure:
    """Bars: how many times as fast as torch's fused step, by workload, without and with clip."""
    figure, axes = plt.subplots(1, 2, sharey=True, layout="constrained")
    names: list[str] = []
    for axis, clip in zip(axes, (False, True), strict=True):
        rows = usable(data["rows"], dtype="float32", optimizer="adamw", clip=clip)
        names = list(dict.fromkeys(row["workload"] for row in rows))
        kinds = list(dict.fromkeys(row["contestant"] for row in rows))
        height = 0.8 / len(kinds)
        for k, kind in enumerate(kinds):
            own = {
                r["workload"]: r["ratio_vs_torch_fused"] for r in rows if r["contestant"] == kind
            }
            places = [i + k * height - 0.4 + height / 2 for i, n in enumerate(names) if n in own]
            values = [own[n] for n in names if n in own]
            bars = axis.barh(places, values, height, color=STYLES.get(kind, OTHER)[0], label=kind)
            if kind == SUBJECT:
                axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="black", linewidth=0.8, linestyle=":")
        axis.set_xlabel("times as fast as torch fused" + (" + clip_grad_norm_" if clip else ""))
        axis.set_title("step with clipping" if clip else "step")
        axis.margins(x=0.12)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[1].legend(fontsize=8, loc="lower right")
    figure.set_size_inches(10, 1.8 + 0.65 * len(names))
    return figure


def lines(axis: Any, rows: list[Row], x: str) -> None:
    """Median time over column `x`, with quartiles, a line for each contestant."""
    for kind in dict.fromkeys(row["contestant"] for row in rows):
        own = sorted((r for r in rows if r["contestant"] == kind), key=lambda r: r[x])
        colour, marker = STYLES.get(kind, OTHER)
        xs = [row[x] for row in own]
        medians = [row["median_s"] * 1e6 for row in own]
        axis.plot(xs, medians, color=colour, marker=marker, markersize=4, linewidth=1.2, label=kind)
        low, high = ([row[q] * 1e6 for row in own] for q in ("q1_s", "q3_s"))
        axis.fill_between(xs, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.grid(alpha=0.3)


def curves(
    data: dict[str, Any], keep: Callable[[Row], bool], x: str, label: str, title: str
) -> Figure:
    """Time of a step over column `x`, of the rows that `keep` names, without and with clip."""
    figure, axes = plt.subplots(1, 2, sharey=True, figsize=(10, 4.2), layout="constrained")
    for axis, clip in zip(axes, (False, True), strict=True):
        rows = usable(data["rows"], dtype="float32", optimizer="adamw", clip=clip)
        lines(axis, [row for row in rows if keep(row)], x)
        axis.set_xlabel(label)
        axis.set_title(title + (", with clipping" if clip else ""))
    axes[0].set_ylabel("microseconds a step")
    return figure


def roofline(data: dict[str, Any]) -> Figure:
    """Time of a step over its bytes, with the line of an in-place pass; one tensor."""
    for row in data["rows"]:
        row["bytes"] = row["floor_bytes_per_param"] * row["numel"]
    label = "bytes that the step has to move"
    figure = curves(data, lambda row: row["tensors"] == 1, "bytes", label, "one tensor")
    for axis, clip in zip(figure.axes, (False, True), strict=True):
        rows = usable(data["rows"], dtype="float32", optimizer="adamw", clip=clip, tensors=1)
        floors = sorted({(row["bytes"], row["floor_s"]) for row in rows if row["numel"] >= 1 << 22})
        axis.plot(*zip(*[(b, s * 1e6) for b, s in floors], strict=True), color="black",
                  linestyle="--", linewidth=1, label="in-place pass")  # fmt: skip
    figure.axes[0].legend(fontsize=8)
    return figure


def tensors(data: dict[str, Any]) -> Figure:
    """Time of a step over the number of its tensors, of 1,024 elements each."""
    label = "tensors of 1,024 elements"
    figure = curves(data, lambda r: r["numel"] == r["tensors"] * 1024, "tensors", label, "step")
    figure.axes[0].legend(fontsize=8)
    return figure


def peers(data: dict[str, Any]) -> Figure:
    """Bars: milliseconds of a step with clip, each contestant; hatched where it is inexact."""
    rows = [row for row in data["rows"] if row["optimizer"] == "adamw" and row["clip"]]
    kinds = list(dict.fromkeys(row["dtype"] for row in rows))
    names = list(dict.fromkeys(row["workload"] for row in rows))
    figure, grid = plt.subplots(
        len(kinds), len(names), squeeze=False, layout="constrained",
        figsize=(5.2 * len(names), 0.6 + 2.9 * len(kinds)),
    )  # fmt: skip
    for axes, kind in zip(grid, kinds, strict=True):
        for axis, name in zip(axes, names, strict=True):
            own = [row for row in rows if (row["dtype"], row["workload"]) == (kind, name)]
            own.sort(key=lambda row: row["median_s"])
            bars = axis.barh(
                [row["contestant"] for row in own],
                [row["median_s"] * 1e3 for row in own],
                color=[STYLES.get(row["contestant"], OTHER)[0] for row in own],
                hatch=["" if row["step_error"] <= ERROR_LIMIT else "////" for row in own],
                edgecolor="white",
            )
            axis.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
            axis.margins(x=0.15)
            axis.invert_yaxis()
            axis.tick_params(labelsize=8)
            axis.set_title(f"{name}, {kind}", fontsize=9)
            label = f"milliseconds a step with clipping (hatched: error over {ERROR_LIMIT:.0f} ULP)"
            axis.set_xlabel(label, fontsize=8)
    return figure


def groups(data: dict[str, Any]) -> Figure:
    """Host time over the number of param groups: 300 tensors of 16 elements."""
    figure, axis = plt.subplots(figsize=(6, 4.2), layout="constrained")
    rows = usable(data["rows"], dtype="float32", optimizer="adamw", clip=False, variant="steady")
    lines(axis, rows, "groups")
    axis.set_xlabel("param groups of 300 tensors of 16 elements")
    axis.set_ylabel("microseconds a step")
    axis.legend(fontsize=8)
    return figure


def losses(data: dict[str, Any]) -> Figure:
    """Loss of each training step with torch's optimizer and with fusedopt's, a panel a dtype."""
    rows = data["rows"]
    panels = list(dict.fromkeys((row["size"], row["dtype"]) for row in rows))
    figure, axes = plt.subplots(
        1, len(panels), squeeze=False, layout="constrained", figsize=(5 * len(panels), 4.2)
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        own = [row for row in rows if (row["size"], row["dtype"]) == panel]
        for row in own:
            # The subject below, wide; the other dashed, so that equal curves are both visible.
            first = row["contestant"] == SUBJECT
            line = {"lw": 3, "alpha": 0.6} if first else {"lw": 1.2, "ls": "--", "zorder": 3}
            colour = STYLES.get(row["contestant"], OTHER)[0]
            label = f"{row['contestant']}: {row['tokens_per_s']:,.0f} tokens/s"
            steps = range(1, len(row["losses"]) + 1)
            axis.plot(steps, row["losses"], color=colour, label=label, **line)
        axis.set_title(f"{panel[0]}, {panel[1]}, batch {own[0]['batch']}")
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss, nats/byte")
    return figure


PICTURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "speed": ("step-cpu-models.json", speed),
    "peers": ("step-cpu-peers.json", peers),
    "roofline": ("step-cpu-sweep.json", roofline),
    "tensors": ("step-cpu-sweep.json", tensors),
    "groups": ("host-cpu.json", groups),
    "losses": ("train-gpu.json", losses),
}


def main(
    results: Annotated[
        Path, typer.Option(help="Folder with results files.", show_default="bench/results")
    ] = RESULTS,
    out: Annotated[
        Path, typer.Option(help="Folder for the pictures.", show_default="runs/figures")
    ] = RUNS / "figures",
) -> None:
    """Pictures of the results, as PNG."""
    found = {source: load(results, source) for source, _ in PICTURES.values()}
    absent = [source for source, data in found.items() if data is None]
    if len(absent) == len(found):
        raise typer.BadParameter(f"{results} has none of {', '.join(absent)}")
    out.mkdir(parents=True, exist_ok=True)
    for name, (source, draw) in PICTURES.items():
        data = found[source]
        if data is None:
            continue
        figure = draw(data)
        figure.supxlabel(subtitle(data), fontsize=8, color="#444444")
        figure.savefig(out / f"{name}.png", dpi=130)
        plt.close(figure)
        print_written(out / f"{name}.png")
    for source in absent:
        left = ", ".join(name for name, (file, _) in PICTURES.items() if file == source)
        say(f"no {source}: left out {left}")
