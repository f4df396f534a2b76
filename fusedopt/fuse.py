"""fuse(): a torch.optim optimizer in, the fused one out."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import Optimizer

from fusedopt.adamw import FusedAdam, FusedAdamW
from fusedopt.optimizer import FusedOptimizer
from fusedopt.sgd import FusedSGD
from fusedopt.step_count import as_step, stays

# Subclasses before their bases.
_FUSED: tuple[tuple[type[Optimizer], type[FusedOptimizer]], ...] = (
    (torch.optim.AdamW, FusedAdamW),
    (torch.optim.Adam, FusedAdam),
    (torch.optim.SGD, FusedSGD),
)


def fuse(optimizer: Optimizer, **options: Any) -> FusedOptimizer:
    """The fused optimizer that goes on where `optimizer` is: same groups, same state tensors.

    State tensors are shared, not copied: drop the old optimizer. A learning-rate scheduler refers
    to the old optimizer; build it on the new one.

    Args:
        optimizer: a torch.optim.AdamW, Adam or SGD.
        options: keyword options of the fused class, such as max_grad_norm.

    Raises:
        TypeError: for an optimizer of another class.
        RuntimeError: for differentiable=True.
    """
    target = next((fused for plain, fused in _FUSED if isinstance(optimizer, plain)), None)
    if target is None:
        names = ", ".join(f"torch.optim.{source.__name__}" for source, _ in _FUSED)
        raise TypeError(f"optimizer must be one of {names}, got {type(optimizer).__name__}")
    accepted = target.__init__.__annotations__
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    groups = [{**group, "params": list(group["params"])} for group in optimizer.param_groups]
    fused: FusedOptimizer = target(groups, **{**defaults, **options})
    for param, entry in optimizer.state.items():
        fused.state[param] = {
            key: value if key != "step" or stays(value, param.device) else as_step(value)
            for key, value in entry.items()
            if value is not None
        }
    return fused
