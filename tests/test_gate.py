"""The regression gate: fusedopt against torch's fused step in one process, with a wide margin.

    make gate

The ratios of bench/goals.py do not depend on how fast a machine is, but on what else it does: the
gate asks for a part of each, and runs alone. Times in seconds are for the benchmarks.
"""

from __future__ import annotations

import pytest

from bench.contestants import CONTESTANTS, Contestant, admit
from bench.goals import GOALS, Goal, Row
from bench.host import SETTLE_SECONDS, build_lane, rows_with_ratios
from bench.measure import InPlacePass, interleave
from bench.step import build_lanes, measure
from bench.workloads import host_workloads, step_workloads

pytestmark = pytest.mark.timing

MARGIN = 0.7  # of a goal
JUDGED = [goal for goal in GOALS if goal.figure != "median_s"]
TIMED, WARMUP = 7, 2
PAIR = [CONTESTANTS["fusedopt"], CONTESTANTS["torch-fused"]]


def admitted(optimizer: str, dtype: str) -> list[tuple[Contestant, bool, float]]:
    entries, refused = admit(PAIR, optimizer, dtype)
    assert refused == []
    return entries


def step_rows() -> list[Row]:
    """The steps that the goals name."""
    in_place, rows = InPlacePass(), []
    cases = {(g.where["workload"], g.where["dtype"], g.where["optimizer"]) for g in JUDGED}
    for workload, dtype, optimizer in sorted(cases):
        if workload in step_workloads():
            entries = admitted(optimizer, dtype)
            size = step_workloads()[workload]
            lanes = build_lanes(size, optimizer, dtype, entries, None, in_place)
            rows += measure(lanes, in_place, range(WARMUP + TIMED), WARMUP)[0]
    return rows


def host_rows() -> list[Row]:
    """300 tiny tensors in one group and in 300."""
    entries = admitted("adamw", "float32")
    lanes = [
        build_lane(workload, "steady", "adamw", "float32", entry)
        for workload in host_workloads().values()
        for entry in entries
    ]
    interleave(lanes, range(WARMUP + TIMED), warmup=WARMUP, settle=SETTLE_SECONDS)
    return rows_with_ratios(lanes)


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return step_rows() + host_rows()


@pytest.mark.parametrize("goal", JUDGED, ids=lambda goal: f"{goal.text} {goal.figure}")
def test_no_goal_is_missed_by_more_than_the_margin(rows: list[Row], goal: Goal) -> None:
    value = goal.measured(rows)
    assert value is not None
    if goal.at_least is not None:
        assert value >= MARGIN * goal.at_least
    else:
        assert goal.at_most is not None
        assert value <= goal.at_most / MARGIN
