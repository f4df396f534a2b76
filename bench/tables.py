"""The tables of measured figures in README.md and docs/performance.md.

    python -m bench tables [--write]

Each stands between two comments and is made from the JSON files of bench/results alone. They are
printed; --write puts them into the documents.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from bench.contestants import BASELINE, ERROR_LIMIT, SUBJECT
from bench.goals import FIGURES, Row
from bench.machine import RESULTS, ROOT
from bench.report import print_written, say

WORKLOADS = {"16x4096x1024": "16 x (4096 x 1024)", "1000x64x64": "1,000 x (64 x 64)"}
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD, momentum"}
MIB = 1 << 20


def load(name: str) -> dict[str, Any]:
    """A results file of bench/results."""
    data: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return data


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def per_cent(fraction: float, digits: int = 0) -> str:
    """12 % for 0.12."""
    return f"{fraction:.{digits}%}".replace("%", " %")


def yes(clip: bool) -> str:
    return "yes" if clip else "no"


def pairs(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Each row of fusedopt with torch fused's row of the same workload."""
    keys = ("workload", "variant", "dtype", "optimizer", "clip")
    theirs = {tuple(r.get(k) for k in keys): r for r in rows if r["contestant"] == BASELINE}
    ours = [r for r in rows if r["contestant"] == SUBJECT]
    return [(r, theirs[tuple(r.get(k) for k in keys)]) for r in ours]


def step_table(data: dict[str, Any]) -> list[str]:
    """Steps beside torch's fused ones, where those are right."""
    return table(
        ["Tensors", "dtype", "Optimizer", "Clip", "fusedopt", "torch `fused=True`", "Ratio",
         "Of floor"],
        [
            [
                WORKLOADS[ours["workload"]],
                ours["dtype"],
                OPTIMIZERS[ours["optimizer"]],
                yes(ours["clip"]),
                f"{ours['median_s'] * 1e3:.1f} ms",
                f"{theirs['median_s'] * 1e3:.1f} ms",
                f"{ours['ratio_vs_torch_fused']:.2f}",
                per_cent(ours["floor_fraction"]),
            ]
            for ours, theirs in pairs(data["rows"])
            if theirs["step_error"] <= ERROR_LIMIT
        ],
    )  # fmt: skip


def host_table(data: dict[str, Any]) -> list[str]:
    """Host time of each number of groups beside torch's fused step."""
    return table(
        ["Param groups", "Clip", "fusedopt", "fusedopt, cold", "torch `fused=True`", "Ratio"],
        [
            [
                str(ours["groups"]),
                yes(ours["clip"]),
                f"{ours['median_s'] * 1e6:,.0f} us",
                f"{ours['cold_median_s'] * 1e6:,.0f} us",
                f"{theirs['median_s'] * 1e6:,.0f} us",
                f"{ours['ratio_vs_torch_fused']:.1f}",
            ]
            for ours, theirs in pairs(data["rows"])
            if ours["variant"] == "steady"
        ],
    )


def readme_figures() -> list[str]:
    """What a visitor reads first: AdamW in float32, and a step in which almost all is host time."""
    step, host = load("step-cpu.json"), load("host-cpu.json")
    found = [(WORKLOADS[ours["workload"]], ours, theirs) for ours, theirs in pairs(step["rows"])]
    found += [
        ("300 x 16", ours, theirs)
        for ours, theirs in pairs(host["rows"])
        if ours["variant"] == "steady" and ours["groups"] == 1
    ]
    rows = [
        [
            tensors,
            yes(ours["clip"]),
            f"{ours['median_s'] * 1e3:.2f} ms",
            f"{theirs['median_s'] * 1e3:.2f} ms",
            f"{ours['ratio_vs_torch_fused']:.3g}",
        ]
        for tensors, ours, theirs in found
        if (ours["optimizer"], ours["dtype"]) == ("adamw", "float32")
    ]
    return [
        f"A step of AdamW in float32 on {step['machine']['threads']} threads of a CPU:",
        "",
        *table(["Tensors", "Clip", "fusedopt", "torch `fused=True`", "Times as fast"], rows),
        "",
        "[docs/performance.md](docs/performance.md) has the machine, SGD, bfloat16, other",
        "libraries, models, memory and training.",
        "",
    ]


def step_figures() -> list[str]:
    """Every step beside torch's fused one."""
    step = load("step-cpu.json")
    machine = step["machine"]
    return [
        f"{machine['threads']} threads of a shared virtual machine ({machine['cpu']}, "
        f"{machine['simd']}), torch {step['versions']['torch']}.",
        "The contestants take turns in one process; medians. `fused=True` is torch.optim's, with",
        "`clip_grad_norm_` before it where clipping is asked. The floor is the time that an",
        "in-place pass of the same run needs for the bytes of the step.",
        "",
        *step_table(step),
        "",
        "300 tensors of 16 elements, AdamW float32: a step in which almost all is host time. Cold",
        "is the first step after another contestant's, whose objects have taken the cache.",
        "",
        *host_table(load("host-cpu.json")),
        "",
        "From `bench/results/step-cpu.json` and `bench/results/host-cpu.json`, which hold all",
        "samples, the versions and the commit.",
        "",
    ]


def goal_table() -> list[str]:
    """Every goal for the CPU with its measured figure."""
    rows = []
    for goal in [*load("step-cpu.json")["goals"], *load("host-cpu.json")["goals"]]:
        name, unit, number = FIGURES[goal["figure"]]
        bound, measured = (number.format(goal[key] / unit) for key in ("bound", "measured"))
        bound = f"{goal['sense']} {bound}".replace("%", " %")
        met = "yes" if goal["met"] else "**no**"
        rows.append([goal["goal"], name, bound, measured.replace("%", " %"), met])
    return [*table(["Case", "Figure", "Goal", "Measured", "Met"], rows), ""]


def peer_tables() -> list[str]:
    """Milliseconds of every contestant, a table for each optimizer and dtype."""
    data = load("step-cpu-peers.json")
    lines: list[str] = []
    columns = [(name, clip) for name in WORKLOADS for clip in (False, True)]
    heads = [f"{WORKLOADS[name]}{', clip' if clip else ''}" for name, clip in columns]
    for block in dict.fromkeys((row["optimizer"], row["dtype"]) for row in data["rows"]):
        members = [row for row in data["rows"] if (row["optimizer"], row["dtype"]) == block]
        found = {(row["contestant"], row["workload"], row["clip"]): row for row in members}
        rows = []
        for kind in dict.fromkeys(row["contestant"] for row in members):
            own = [found.get((kind, name, clip)) for name, clip in columns]
            cells = ["-" if row is None else f"{row['median_s'] * 1e3:.1f} ms" for row in own]
            error = max(row["step_error"] for row in own if row)
            many = found.get((kind, "1000x64x64", True))
            calls = str(many["operators"]) if many else "-"
            rows.append([kind, *cells, f"{error:.1f}{'' if error <= ERROR_LIMIT else ' !'}", calls])
        lines += [f"{OPTIMIZERS[block[0]]}, {block[1]}:", ""]
        lines += [*table(["", *heads, "Error", "Operators"], rows), ""]
    return lines


def memory_table() -> list[str]:
    """Peak memory of a step beside its tensors."""
    rows = load("memory-cpu.json")["rows"]
    cases = list(dict.fromkeys((row["dtype"], row["clip"]) for row in rows))
    found = {(row["contestant"], row["dtype"], row["clip"]): row for row in rows}
    cells = []
    for kind in dict.fromkeys(row["contestant"] for row in rows):
        own = [found.get((kind, *case)) for case in cases]
        cells.append([kind] + ["-" if r is None else f"{r['extra_bytes'] / MIB:.0f}" for r in own])
    heads = [f"{dtype}{', clip' if clip else ''}" for dtype, clip in cases]
    return [*table(["MiB", *heads], cells), ""]


def train_table() -> list[str]:
    """The example's training, with torch's optimizer and with fusedopt's."""
    columns = ["Size", "dtype", "Optimizer", "Params", "Tokens/s", "Optimizer", "Share", "Speedup"]
    rows = [
        [
            row["size"],
            row["dtype"],
            row["contestant"],
            f"{row['params'] / 1e6:.1f}M",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['optimizer_median_s'] * 1e3:.2f} ms",
            per_cent(row["optimizer_share"], 1),
            f"{row['speedup']:.3f}",
        ]
        for row in load("train-cpu.json")["rows"]
    ]
    return [*table(columns, rows), ""]


BLOCKS: dict[str, dict[str, Callable[[], list[str]]]] = {
    "README.md": {"figures": readme_figures},
    "docs/performance.md": {
        "steps": step_figures,
        "goals": goal_table,
        "peers": peer_tables,
        "memory": memory_table,
        "train": train_table,
    },
}


def updated(document: str, text: str) -> str:
    """The text of a document with its tables replaced."""
    for name, make in BLOCKS[document].items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        text = head + begin + "\n".join(make()) + rest[rest.index(end) :]
    return text


def main(
    write: Annotated[
        bool, typer.Option("--write", help="Replace the tables in the documents.")
    ] = False,
) -> None:
    """Tables of README.md and docs/performance.md, from bench/results."""
    for document, blocks in BLOCKS.items():
        path = ROOT / document
        if write:
            path.write_text(updated(document, path.read_text()))
            print_written(path)
            continue
        for name, make in blocks.items():
            say(f"{document}, {name}:\n")
            say("\n".join(make()))
