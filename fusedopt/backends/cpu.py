"""The C++ driver for params in CPU memory (csrc/cpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fusedopt._native import _C, missing
from fusedopt.distributed import all_reduce_sum

if TYPE_CHECKING:
    from fusedopt._C import Plan
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer

_INFINITY = float("inf")


def unavailable() -> str:
    return missing


def step(optimizer: FusedOptimizer, request: Request) -> str:
    plan = optimizer._native_plan
    if plan is None:
        assert _C is not None
        # Atomic: of two threads in their first step, one must see the other's plan.
        plan = optimizer.__dict__.setdefault("_native_plan", _C.Plan(optimizer.rule.name))
    needs_norm = request.needs_norm
    max_norm, clip_value = request.max_grad_norm, request.clip_grad_value
    scale, found_inf = request.grad_scale, request.found_inf
    tensors = optimizer.param_groups, optimizer.state, optimizer._host
    options = (
        needs_norm,
        _INFINITY if max_norm is None else max_norm,
        _INFINITY if clip_value is None else clip_value,
        1.0 if scale is None else float(scale),
        found_inf is not None and float(found_inf) != 0,
        request.skip_nonfinite,
        torch.get_num_threads(),
        optimizer._norm_buffer("cpu") if needs_norm else None,
        optimizer._skipped_buffer("cpu"),
    )
    if needs_norm and request.process_group is not None:
        return _step_over_ranks(plan, tensors, options, request.process_group)
    reason: str = plan.step(*tensors, *options)
    return reason


def _step_over_ranks(
    plan: Plan, tensors: tuple[Any, ...], options: tuple[Any, ...], group: Any
) -> str:
    """The step around an all-reduce of the squared norm."""
    reason = plan.refresh(*tensors)
    if reason:
        return reason
    try:
        squares = plan.squared_norm(torch.get_num_threads())
        local = torch.tensor(squares, dtype=torch.float64, device="cpu")
        plan.apply(float(all_reduce_sum(local, group)), *options)
    except BaseException:
        plan.roll_back()
        raise
    return ""
