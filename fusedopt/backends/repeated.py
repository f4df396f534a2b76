"""Which step the next one may repeat without this package's Python code: csrc/host/repeated_step.h
does it, and sees whether it is like the one before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

if TYPE_CHECKING:
    from fusedopt.backends.native import Driver, Options
    from fusedopt.optimizer import FusedOptimizer

# Does a step of the optimizer with this __dict__, or returns False and has changed nothing.
Repeated = Callable[[dict[str, Any]], bool]

# A function without arguments, and what it has returned.
Answer = tuple[Callable[[], Any], Any]


class StepBefore(NamedTuple):
    """What a repeated step must be like: csrc/host/repeated_step.h."""

    options: tuple[Any, ...]
    keys: int
    norm: bool
    max_norm: float
    clip_value: float
    skip_nonfinite: bool
    grad_norm: Tensor | None
    skipped_steps: Tensor | None
    empty: list[dict[Any, Any]]
    answers: list[Answer]


class Whole(NamedTuple):
    """A step that one call of a driver has done.

    Attributes:
        options: what it was told.
        stream: what it ran on; the same object as long as steps stay on it.
    """

    driver: Driver
    options: Options
    stream: Any


# Where a step looks in the class, too, and a repeated one does not.
_IN_DICT = ("param_groups", "state", "defaults", "grad_scale", "found_inf")


def repeated_step(optimizer: FusedOptimizer, whole: Whole) -> Repeated | None:
    """A function that does a step like the last one of this optimizer, without scaling;
    csrc/host/repeated_step.h says when. None where a step depends on what is not seen there."""
    checked = optimizer._checked_options
    if any(hasattr(type(optimizer), name) for name in _IN_DICT):
        return None
    if checked[3] is not None or any(type(v) not in (float, int, type(None)) for v in checked[:2]):
        return None  # a process group; or a tensor, whose value may change
    told = whole.options
    before = StepBefore(
        checked,
        optimizer._checked_keys,
        told.norm,
        told.max_norm,
        told.clip_value,
        told.skip_nonfinite,
        told.grad_norm,
        told.skipped_steps,
        [_global_optimizer_pre_hooks, _global_optimizer_post_hooks],
        [(torch.autograd._profiler_enabled, False), (torch._C._len_torch_dispatch_stack, 0)],
    )
    return whole.driver.repeated_step(before)
