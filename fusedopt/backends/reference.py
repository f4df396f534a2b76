"""Plain torch ops, on any device: the fallback of the kernels, and the tests' second voice.

It shares no code with the C++ drivers. Elements are widened to float32 (float64 where any tensor of
the row is float64), updated by the rule's own `update`, and rounded once on the way back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import _disable_current_modes

from fusedopt import distributed, fake, step_count
from fusedopt.forked import on_one_thread
from fusedopt.rule import Rule
from fusedopt.table import Row, collect

# The first call of a vector-library op in a process can be inexact in torch where several threads
# share it (https://github.com/pytorch/pytorch/issues/188792); one element takes one thread.
for _dtype in (torch.float32, torch.float64):
    torch.ones(1, dtype=_dtype).sqrt()

if TYPE_CHECKING:
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer


def unavailable() -> str:
    return ""


@on_one_thread
@torch.no_grad()
def step(optimizer: FusedOptimizer, request: Request) -> str:
    rule = optimizer.rule
    table = collect(rule, optimizer.param_groups, optimizer.state, optimizer.check_values)
    factor: float | None = 1.0
    if not table.rows or any(not row.valueless for row in table.rows):
        try:
            factor = _factor(optimizer, request, table.rows)
        except BaseException:
            table.roll_back()
            raise
    if factor is None:
        table.roll_back()
        return ""
    for row in table.rows:
        if row.valueless:
            _update_without_values(rule, row)
        else:
            _update(rule, row, factor, request.clip_grad_value)
    return ""


def _factor(optimizer: FusedOptimizer, request: Request, rows: list[Row]) -> float | None:
    """What unscaling and clipping multiply the gradients with; None where the step is skipped."""
    scale = 1.0 if request.grad_scale is None else float(request.grad_scale)
    skipped = request.found_inf is not None and float(request.found_inf) != 0
    coef = 1.0
    device = rows[0].param.device if rows else torch.device("cpu")
    if request.needs_norm:
        total_norm = _total_square(optimizer, rows, request.process_group, device).sqrt()
        total_norm = total_norm / scale
        optimizer._norm_buffer(device).copy_(total_norm)
        norm = float(total_norm)
        if request.max_grad_norm is not None:
            ratio = request.max_grad_norm / (norm + 1e-6)
            coef = 1.0 if ratio > 1 else ratio
        skipped |= request.skip_nonfinite and not bool(total_norm.isfinite())
    if skipped:
        optimizer._skipped_buffer(device).add_(1)
        return None
    return coef / scale


def _update_without_values(rule: Rule, row: Row) -> None:
    """A step over a fake or meta tensor. Its state is there, which is all that a fused step needs
    of memory; temporary tensors of this backend would only mislead a memory estimate."""
    increment_version([row.owner])
    if not rule.has_step:
        return
    with _disable_current_modes():
        if fake.is_fake(row.entry["step"]):
            row.entry["step"] += 1
        else:
            step_count.advance(row.entry)


def _total_square(
    optimizer: FusedOptimizer, rows: list[Row], process_group: Any, device: torch.device
) -> Tensor:
    """The squared norm of the gradients of all ranks."""
    params = (p for group in optimizer.param_groups for p in group["params"])
    kinds = list(dict.fromkeys(distributed.norm_groups(p, process_group) for p in params))
    if len(kinds) <= 1:  # the usual case
        squares = squared_norm([row.grad for row in rows], device)[None]
        return distributed.sum_over_ranks(squares, kinds)
    squares = torch.stack([squared_norm([], device)] * len(kinds))
    for row in rows:
        kind = distributed.norm_groups(row.owner, process_group)
        squares[kinds.index(kind)] += squared_norm([row.grad], device)
    return distributed.sum_over_ranks(squares, kinds)


def maths_dtype(tensors: list[Tensor]) -> torch.dtype:
    wide = {torch.float64, torch.complex128}
    return torch.float64 if any(t.dtype in wide for t in tensors) else torch.float32


def squared_norm(grads: list[Tensor], device: torch.device) -> Tensor:
    """Sum of the squares of all elements, a 0-dim tensor on `device`."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
    total = torch.zeros((), dtype=dtype, device=device)
    for grad in grads:
        values = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        total += values.to(dtype).square().sum().to(device)
    return total


def _update(rule: Rule, row: Row, factor: float, clip_value: float | None) -> None:
    tensors = [row.param, row.grad, *row.state]
    dtype = maths_dtype(tensors)
    if row.param.is_complex():
        tensors = [torch.view_as_real(t.resolve_conj()) for t in tensors]
    param, grad, *state = tensors
    grad = grad.to(dtype) * (-factor if row.group["maximize"] else factor)
    if clip_value is not None:
        grad = grad.clamp(-clip_value, clip_value)
    step = row.next_step() if rule.has_step else 0.0
    wide_state = [s.to(dtype) for s in state]
    new_param, new_state = rule.update(
        param.to(dtype), grad, wide_state, row.group, step, row.first
    )
    for old, new in zip(state, new_state, strict=True):
        old.copy_(new)
    param.copy_(new_param)
    if rule.has_step:
        step_count.advance(row.entry)
