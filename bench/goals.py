"""What the figures have to reach, a table for the CPU and one for a GPU, and its evaluation on the
rows of a run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]

LARGE = {"workload": "16x4096x1024", "numel": 16 * 4096 * 1024}
MEDIUM = {"workload": "1000x64x64", "numel": 1000 * 64 * 64}
ONE_GROUP = {"workload": "300-tiny-1-groups", "numel": 300 * 16, "variant": "steady"}
MANY_GROUPS = {"workload": "300-tiny-300-groups", "numel": 300 * 16, "variant": "steady"}


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of fusedopt's row that `where` selects.

    Exactly one of `at_least` and `at_most` is given, in the unit of the figure. `where` names the
    number of elements too, so that rows of a quick run, at other sizes, are not judged.
    """

    text: str
    figure: str
    where: dict[str, Any]
    at_least: float | None = None
    at_most: float | None = None

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The figure, or None where the run has no such row."""
        wanted = {"contestant": "fusedopt", **self.where}
        for row in rows:
            if all(row.get(key) == value for key, value in wanted.items()):
                return row.get(self.figure)
        return None

    def is_met(self, value: float) -> bool:
        """Whether `value` is on the right side of the bound; NaN is not."""
        if self.at_least is not None:
            return value >= self.at_least
        assert self.at_most is not None
        return value <= self.at_most


def case(size: dict[str, Any], optimizer: str, dtype: str, clip: bool) -> dict[str, Any]:
    """The columns that select one row of fusedopt."""
    return {**size, "optimizer": optimizer, "dtype": dtype, "clip": clip}


RATIO = "ratio_vs_torch_fused"
GOALS = (
    Goal("AdamW float32 67M", RATIO, case(LARGE, "adamw", "float32", False), at_least=0.97),
    Goal("SGD float32 67M", RATIO, case(LARGE, "sgd", "float32", False), at_least=0.97),
    Goal(
        "AdamW float32 67M", "floor_fraction", case(LARGE, "adamw", "float32", False), at_least=0.95
    ),
    Goal("SGD float32 67M", "floor_fraction", case(LARGE, "sgd", "float32", False), at_least=0.95),
    Goal("AdamW float32 67M, clip", RATIO, case(LARGE, "adamw", "float32", True), at_least=1.25),
    Goal("SGD float32 67M, clip", RATIO, case(LARGE, "sgd", "float32", True), at_least=1.4),
    Goal("AdamW bf16 67M", RATIO, case(LARGE, "adamw", "bfloat16", False), at_least=1.8),
    Goal("AdamW bf16 67M, clip", RATIO, case(LARGE, "adamw", "bfloat16", True), at_least=2.1),
    Goal(
        "AdamW float32 1,000 x 4,096", RATIO, case(MEDIUM, "adamw", "float32", False), at_least=2.8
    ),
    Goal(
        "AdamW float32 1,000 x 4,096, clip",
        RATIO,
        case(MEDIUM, "adamw", "float32", True),
        at_least=4.0,
    ),
    Goal(
        "AdamW 300 tiny tensors", RATIO, case(ONE_GROUP, "adamw", "float32", False), at_least=12.0
    ),
    Goal(
        "AdamW 300 tiny tensors",
        "median_s",
        case(ONE_GROUP, "adamw", "float32", False),
        at_most=150e-6,
    ),
    Goal(
        "AdamW 300 groups of one tiny tensor",
        "ratio_to_one_group",
        case(MANY_GROUPS, "adamw", "float32", False),
        at_most=1.5,
    ),
)

GPU_LARGE = {"workload": "1b", "numel": 60 * 4096 * 4096}
GPU_MANY = {"workload": "1000x1024", "numel": 1000 * 1024}
GPU_TINY = {"workload": "10000x64", "numel": 10_000 * 64}
GPU_GROUPS = {"workload": "1860-tiny-465-groups", "numel": 1860 * 16}
GPU_TENSORS = {"1b": 60, "1000x1024": 1000, "10000x64": 10_000, "1860-tiny-465-groups": 1860}
# Host time of a step: fixed, and for each tensor.
HOST_FIXED, HOST_TENSOR = 30e-6, 0.35e-6


def host_and_launches(size: dict[str, Any]) -> list[Goal]:
    """What holds for AdamW at any number of tensors and groups, without and with clipping."""
    name, found = size["workload"], []
    bound = HOST_FIXED + HOST_TENSOR * GPU_TENSORS[name]
    for clip in (False, True):
        where = case(size, "adamw", "float32", clip)
        text = f"AdamW {name}{', clip' if clip else ''}"
        found.append(Goal(text, "launches", where, at_most=1))
        found.append(Goal(text, "host_median_s", where, at_most=bound))
    return found


GPU_GOALS = (
    Goal(
        "AdamW float32 1B",
        "floor_fraction",
        case(GPU_LARGE, "adamw", "float32", False),
        at_least=0.92,
    ),
    Goal(
        "AdamW float32 1B, clip",
        "ratio_to_no_clip",
        case(GPU_LARGE, "adamw", "float32", True),
        at_most=1.15,
    ),
    Goal("AdamW float32 1B, clip", RATIO, case(GPU_LARGE, "adamw", "float32", True), at_least=1.3),
    Goal(
        "AdamW float32 1,000 x 1,024, clip",
        RATIO,
        case(GPU_MANY, "adamw", "float32", True),
        at_least=5.0,
    ),
    Goal(
        "AdamW 465 groups of 4 tiny tensors",
        "ratio_to_one_group",
        case(GPU_GROUPS, "adamw", "float32", False),
        at_most=1.1,
    ),
    *(g for size in (GPU_LARGE, GPU_MANY, GPU_TINY, GPU_GROUPS) for g in host_and_launches(size)),
)

# How a figure is called in the table, the unit's size and the format.
FIGURES = {
    RATIO: ("times as fast as torch fused", 1.0, "{:.2f}"),
    "floor_fraction": ("of the floor", 1.0, "{:.1%}"),
    "median_s": ("a step", 1e-6, "{:.0f} us"),
    "host_median_s": ("of host time a step", 1e-6, "{:.0f} us"),
    "launches": ("launches a step", 1, "{:.0f}"),
    "ratio_to_no_clip": ("times the step without clip", 1.0, "{:.2f}"),
    "ratio_to_one_group": ("times the time of one group", 1.0, "{:.2f}"),
}


def evaluate(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> list[dict[str, Any]]:
    """{goal, figure, bound, sense, measured, met} of each goal whose row is among `rows`."""
    results = []
    for goal in goals:
        value = goal.measured(rows)
        if value is None:
            continue
        at_least = goal.at_least is not None
        results.append(
            {
                "goal": goal.text,
                "figure": goal.figure,
                "sense": "at least" if at_least else "at most",
                "bound": goal.at_least if at_least else goal.at_most,
                "measured": value,
                "met": goal.is_met(value),
            }
        )
    return results
