"""The regression gate: fusedopt against torch's fused step in one process, with a wide margin.

    make gate

The ratios of bench/goals.py do not depend on how fast a machine is, but on what else it does: the
gate asks for a part of each, and runs alone. Times in seconds are for the benchmarks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.goals import GOALS, Goal, Row

pytestmark = pytest.mark.timing

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.7  # of a goal
JUDGED = [goal for goal in GOALS if goal.figure != "median_s"]


def measured(command: str, folder: Path, *arguments: str) -> list[Row]:
    """The rows of a run of fusedopt and torch fused."""
    output = folder / f"{command}.json"
    words = [sys.executable, "-m", "bench", command, "--output", str(output), *arguments]
    for name in ("fusedopt", "torch-fused"):
        words += ["--contestant", name]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, text=True)
    return json.loads(output.read_text())["rows"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    folder = tmp_path_factory.mktemp("gate")
    large = ["--workload", "16x4096x1024", "--workload", "1000x64x64"]
    dtypes = ["--dtype", "float32", "--dtype", "bfloat16"]
    tiny = ["--workload", "300-tiny-1-groups", "--workload", "300-tiny-300-groups"]
    tiny += ["--variant", "steady", "--dtype", "float32", "--optimizer", "adamw"]
    return [
        *measured("step", folder, *large, *dtypes, "--repeats", "7"),
        *measured("host", folder, *tiny, "--repeats", "15"),
    ]


@pytest.mark.parametrize("goal", JUDGED, ids=lambda goal: f"{goal.text} {goal.figure}")
def test_no_goal_is_missed_by_more_than_the_margin(rows: list[Row], goal: Goal) -> None:
    value = goal.measured(rows)
    assert value is not None
    if goal.at_least is not None:
        assert value >= MARGIN * goal.at_least
    else:
        assert goal.at_most is not None
        assert value <= goal.at_most / MARGIN
