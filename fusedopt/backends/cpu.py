"""The C++ driver for params in CPU memory (csrc/cpu)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from fusedopt._native import _C, missing
from fusedopt.backends.native import Driver, Native, Options
from fusedopt.plan import Host

if TYPE_CHECKING:
    from fusedopt._C import Plan
    from fusedopt.optimizer import FusedOptimizer
    from fusedopt.rule import Rule


def unavailable() -> str:
    return missing


class CpuDriver(Driver):
    def __init__(self, rule: Rule, device: torch.device) -> None:
        assert _C is not None
        self.plan: Plan = _C.Plan(rule.name)
        self.host = Host(rule)
        self.told: tuple[Any, ...] | None = None  # the arguments of the last step, if it was whole

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        self.told = _arguments(options)
        return self.plan.step(groups, state, self.host, *self.told)

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        self.told = None
        return self.plan.refresh(groups, state, self.host)

    def squared_norm(self, out: Tensor) -> None:
        out.fill_(self.plan.squared_norm(torch.get_num_threads()))

    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        squared = 0.0 if squared_norm is None else float(squared_norm)
        self.plan.apply(squared, *_arguments(options))

    def roll_back(self) -> None:
        self.plan.roll_back()


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

# Where a step looks in the class, too, and a repeated one does not.
_IN_DICT = ("param_groups", "state", "defaults", "grad_scale", "found_inf")


def repeated_step(optimizer: FusedOptimizer) -> Callable[[dict[str, Any]], bool] | None:
    """A function that does a step like the last one of this optimizer, which this backend served;
    csrc/host/repeated_step.h says when. None where a step depends on what is not seen there."""
    driver = optimizer._drivers.get(("cpu", torch.device("cpu"), ()))
    options, kind = optimizer._checked_options, type(optimizer)
    if driver is None or driver.told is None or any(hasattr(kind, name) for name in _IN_DICT):
        return None
    if options[3] is not None or any(type(v) not in (float, int, type(None)) for v in options[:2]):
        return None  # a process group; or a tensor, whose value may change
    norm, max_norm, clip_value, scale, found_inf, skip_nonfinite, _, *figures = driver.told
    if scale != 1.0 or found_inf:
        return None
    repeated: Callable[[dict[str, Any]], bool] = driver.plan.repeated_step(
        driver.host,
        options,
        optimizer._checked_keys,
        norm,
        max_norm,
        clip_value,
        skip_nonfinite,
        *figures,
        [_global_optimizer_pre_hooks, _global_optimizer_post_hooks],
        [torch.autograd._profiler_enabled, torch._C._len_torch_dispatch_stack],
        torch.get_num_threads,
    )
    return repeated
