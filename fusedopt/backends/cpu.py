"""The C++ driver for params in CPU memory (csrc/cpu)."""

from __future__ import annotations

from typing import TYPE_CHECKING

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
        plan = optimizer._native_plan = _C.Plan(optimizer.rule.name)
    reason: str = plan.refresh(optimizer.param_groups, optimizer.state, optimizer._host)
    if reason:
        return reason
    try:
        _apply(optimizer, request, plan)
    except BaseException:
        plan.roll_back()
        raise
    return ""


def _apply(optimizer: FusedOptimizer, request: Request, plan: Plan) -> None:
    threads = torch.get_num_threads()
    needs_norm = request.needs_norm
    squared_norm = -1.0
    if needs_norm and request.process_group is not None:
        local = torch.tensor(plan.squared_norm(threads), dtype=torch.float64, device="cpu")
        squared_norm = float(all_reduce_sum(local, request.process_group))
    max_norm, clip_value = request.max_grad_norm, request.clip_grad_value
    scale, found_inf = request.grad_scale, request.found_inf
    plan.apply(
        needs_norm,
        _INFINITY if max_norm is None else max_norm,
        _INFINITY if clip_value is None else clip_value,
        1.0 if scale is None else float(scale),
        found_inf is not None and float(found_inf) != 0,
        request.skip_nonfinite,
        squared_norm,
        threads,
        optimizer._norm_buffer("cpu") if needs_norm else None,
        optimizer._skipped_buffer("cpu"),
    )
