"""The C++ driver for params in CPU memory (csrc/cpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._native import _C, missing
from fusedopt.backends.native import Driver, Native, Options
from fusedopt.backends.repeated import Repeated, StepBefore
from fusedopt.plan import Host

if TYPE_CHECKING:
    from fusedopt._C import Plan
    from fusedopt.rule import Rule


def unavailable() -> str:
    return missing


class CpuDriver(Driver):
    repeats = True

    def __init__(self, rule: Rule, device: torch.device) -> None:
        assert _C is not None
        self.plan: Plan = _C.Plan(rule.name)
        self.host = Host(rule)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        return self.plan.step(groups, state, self.host, *_arguments(options))

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        return self.plan.refresh(groups, state, self.host)

    def squared_norm(self, out: Tensor) -> None:
        out.fill_(self.plan.squared_norm(torch.get_num_threads()))

    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        squared = 0.0 if squared_norm is None else float(squared_norm)
        self.plan.apply(squared, *_arguments(options))

    def roll_back(self) -> None:
        self.plan.roll_back()

    def repeated_step(self, before: StepBefore) -> Repeated:
        return self.plan.repeated_step(self.host, *before, torch.get_num_threads)


def _arguments(options: Options) -> tuple[Any, ...]:
    """The options in the order of Plan.step."""
    scale, found_inf = options.grad_scale, options.found_inf
    return (
        options.norm,
        options.max_norm,
        options.clip_value,
        1.0 if scale is None else float(scale),
        found_inf is not None and float(found_inf) != 0,
        options.skip_nonfinite,
        torch.get_num_threads(),
        options.grad_norm,
        options.skipped_steps,
    )


step = Native("cpu", "cpu", CpuDriver).step
