"""Timing: lanes that take turns in one process, and the statistics of their samples."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

# The in-place pass whose bandwidth is the floor: 2^26 float32 = 268 MB, read and written.
FLOOR_ELEMENTS = 1 << 26
FLOOR_BYTES = 8 * FLOOR_ELEMENTS


def nothing() -> None:
    """For a runner that has nothing to prepare or to restore."""


@dataclass
class Runner:
    """One call to time; `before` and `after` run outside of the time."""

    step: Callable[[], Any]
    before: Callable[[], Any] = nothing
    after: Callable[[], Any] = nothing

    def time(self) -> float:
        """Seconds that `step` takes."""
        self.before()
        start = time.perf_counter_ns()
        self.step()
        seconds = (time.perf_counter_ns() - start) / 1e9
        self.after()
        return seconds


@dataclass
class Lane:
    """What one row of the results measures: the same step on one or several input sets.

    key: the columns that name the row. samples: seconds, one a round. cold: with
    settling, the seconds of each turn's first step, which finds its tensors out of the caches.
    """

    key: dict[str, Any]
    runners: list[Runner]
    samples: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)


def turn_order(lanes: Sequence[Lane], round_number: int) -> list[Lane]:
    """Lanes of one round: each round starts one further and runs the other way round, so that no
    lane always has the same predecessor, whose leftovers in the caches it would pay for."""
    first = round_number % len(lanes)
    order = [*lanes[first:], *lanes[:first]]
    return order[::-1] if round_number % 2 else order


def interleave(
    lanes: Sequence[Lane],
    rounds: Iterable[int],
    *,
    warmup: int,
    settle: float | None = None,
) -> None:
    """Time every lane once in each round and append the seconds to its samples.

    Successive turns use successive runners of a lane, so that an input set comes back only after
    all others. With `settle` a turn is several steps: the first goes to `cold`, more are run until
    they have taken `settle` seconds together, and the next one goes to `samples`.
    `rounds` is iterated for its progress display; the first `warmup` rounds are not kept.
    """
    gc.collect()
    gc.disable()  # a collection in the middle of a step is not the step's time
    turn = 0
    try:
        for number in rounds:
            for lane in turn_order(lanes, number):
                runner = lane.runners[turn % len(lane.runners)]
                turn += 1
                cold = None if settle is None else settled(runner, settle)
                seconds = runner.time()
                if number < warmup:
                    continue
                lane.samples.append(seconds)
                if cold is not None:
                    lane.cold.append(cold)
    finally:
        gc.enable()


def settled(runner: Runner, seconds: float) -> float:
    """Run steps for `seconds` and return the time of the first, in seconds."""
    first = spent = runner.time()
    while spent < seconds:
        spent += runner.time()
    return first


class InPlacePass:
    """`x.mul_(c)` over 268 MB of random float32: the memory floor of an in-place optimizer."""

    def __init__(self) -> None:
        self.x = torch.randn(FLOOR_ELEMENTS, generator=torch.Generator().manual_seed(0))
        self.factors = (0.5, 2.0)  # exact, and undone by the next pass

    def run(self) -> None:
        self.x.mul_(self.factors[0])
        self.factors = self.factors[::-1]

    def lane(self) -> Lane:
        """A lane that takes its turns among the contestants."""
        return Lane({"contestant": "in-place"}, [Runner(self.run)])


def operators_of(step: Callable[[], Any]) -> int:
    """Calls of torch's operators in one step, by torch.profiler, without those inside of others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    count = 0
    for event in profile.events():
        parent = event.cpu_parent
        while parent is not None and parent.is_user_annotation:
            parent = parent.cpu_parent
        count += parent is None and not event.is_user_annotation
    return count


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), interpolated between the samples."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, statistics.median(samples), q3


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Median of the ratios of samples of the same round: what the machine does to one round, it
    does to both."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))
