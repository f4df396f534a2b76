"""Rows of figures out of lanes of samples; the results file; the tables that are printed."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.contestants import BASELINE, ERROR_LIMIT, SUBJECT
from bench.goals import FIGURES, RATIO, Row
from bench.machine import ROOT
from bench.measure import Lane, paired_ratio, quartiles

QUIET = 0.5  # load average above which somebody else was at work

# A log has no width; 120 columns keep the tables unbroken there.
console = Console(width=None if sys.stdout.isatty() else 120)


def say(text: str) -> None:
    """Text as it is, on one line where there is no terminal."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def rows_of(
    lanes: Sequence[Lane], same: Sequence[str], baseline: str = BASELINE, column: str = RATIO
) -> list[Row]:
    """One row a lane: its key, median and quartiles, the ratio to the baseline, all samples.

    Times are in seconds. The ratio, in `column`, is the median over rounds of the baseline's time
    through this lane's, where the baseline's lane is that whose key agrees in the columns `same`.
    """
    rows = []
    for lane in lanes:
        q1, median, q3 = quartiles(lane.samples)
        row = {**lane.key, "median_s": median, "q1_s": q1, "q3_s": q3}
        other = partner(lanes, lane, same, contestant=baseline)
        row[column] = None if other is None else paired_ratio(other.samples, lane.samples)
        row["samples_s"] = lane.samples
        if lane.cold:
            row["cold_median_s"] = quartiles(lane.cold)[1]
            row["cold_samples_s"] = lane.cold
        rows.append(row)
    return rows


def partner(lanes: Sequence[Lane], lane: Lane, same: Sequence[str], **other: Any) -> Lane | None:
    """The lane that agrees with `lane` in the columns `same` and has the values `other`."""
    wanted = {**{column: lane.key[column] for column in same}, **other}
    for candidate in lanes:
        if all(candidate.key[column] == value for column, value in wanted.items()):
            return candidate
    return None


def write_results(path: Path, results: dict[str, Any]) -> None:
    """Write JSON with one line for each row, so that a file of thousands of samples diffs well."""
    if "absent" in results:
        results = results | {"absent": unique(results["absent"])}

    def lines(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n" + ",\n".join("    " + json.dumps(item) for item in value) + "\n  ]"
        return json.dumps(value)

    body = ",\n".join(f"  {json.dumps(key)}: {lines(value)}" for key, value in results.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + body + "\n}\n")
    json.loads(path.read_text())


def unique(entries: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """Each entry once, in order: a contestant is absent for one reason in several blocks."""
    return [entry for i, entry in enumerate(entries) if entry not in entries[:i]]


def print_head(run: dict[str, Any], absent: Sequence[dict[str, str]]) -> None:
    """Who is missing, and whether the machine was quiet; before minutes of measuring."""
    print_absent(absent)
    load = run["machine"]["load_average"]
    if load > QUIET:
        say(f"load average {load}: others use this machine, so trust ratios at most")


def print_absent(absent: Sequence[dict[str, str]]) -> None:
    """Contestants that took no part, or not in all blocks: a line for each, with all reasons."""
    reasons: dict[str, list[str]] = {}
    for entry in unique(absent):
        reasons.setdefault(entry["contestant"], []).append(entry["reason"])
    for contestant, found in reasons.items():
        say(f"absent: {contestant}: {'; '.join(found)}")


def print_written(path: Path) -> None:
    """Where results, pictures or tables are: below this repository, or as it was given."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    say(f"written: {shown}")


def print_skipped(skipped: Sequence[dict[str, str]]) -> None:
    """Workloads that this machine is too small for."""
    for entry in skipped:
        say(f"skipped: {entry['workload']}: {entry['reason']}")


def print_wrong(rows: Sequence[Row]) -> None:
    """Contestants whose steps do not compute the optimizer: their times are not a comparison."""
    wrong = {
        (row["contestant"], row["optimizer"], row["dtype"]): row["step_error"]
        for row in rows
        if not row["step_error"] <= ERROR_LIMIT
    }
    for (contestant, optimizer, dtype), error in wrong.items():
        say(
            f"inexact: {contestant} {optimizer} {dtype} ends {error:.0f} roundings from float64,"
            f" more than {ERROR_LIMIT:.0f}: its times (marked !) are those of another result"
        )


def print_goals(goals: Sequence[dict[str, Any]], where: str = "the CPU") -> None:
    """The goals whose rows were measured."""
    if not goals:
        say("No goal was judged: none of their rows is in this run.")
        return
    table = Table("goal", "measured", "met", title=f"Goals of {SUBJECT} on {where}")
    for goal in goals:
        name, unit, number = FIGURES[goal["figure"]]
        bound = f"{goal['sense']} {number.format(goal['bound'] / unit)} {name}"
        met = "[green]yes" if goal["met"] else "[red]no"
        table.add_row(f"{goal['goal']}: {bound}", number.format(goal["measured"] / unit), met)
    console.print(table)


def mark(row: Row) -> str:
    """ "!" after the name of a contestant that computed something else."""
    return "" if row["step_error"] <= ERROR_LIMIT else " !"


def optional(value: float | None, number: str) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else number.format(value)
