"""step_in_backward(): each param is updated as soon as its gradient is there, and the gradient
freed."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn

from fusedopt import distributed
from fusedopt.optimizer import FusedOptimizer


class StepInBackward:
    """The hooks that `step_in_backward` has set; `remove()` takes them off again."""

    def __init__(self, optimizer: FusedOptimizer, params: list[Tensor]) -> None:
        self._optimizer = optimizer
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in params]

    def _step(self, param: Tensor) -> None:
        _check(self._optimizer)
        with self._lock:
            self._optimizer.step()
            param.grad = None

    def remove(self) -> None:
        """Back to stepping after backward."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def step_in_backward(model: nn.Module, optimizer: FusedOptimizer) -> StepInBackward:
    """Updates each param of a model during backward(), as soon as its gradient is complete, and
    frees the gradient: the gradients of the whole model are never there at once.

    `optimizer.step()` and `zero_grad()` may stay in the loop; they find nothing to do. Schedulers
    work as before. The updates are those of a step after backward, bit for bit.

    Args:
        model: whose params the optimizer has; all that require a gradient.
        optimizer: with a norm of nothing: an update cannot wait for the gradients of other params.

    Returns:
        A handle with remove().

    Raises:
        ValueError: what cannot work: `max_grad_norm` or `skip_nonfinite`; a GradScaler; a model in
            DistributedDataParallel, or with DTensor params, whose gradients are reduced after the
            hooks; params that the optimizer does not have; gradients that are there already
            (accumulation).
    """
    _check(optimizer)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "model must not be in DistributedDataParallel: it reduces gradients after the hooks "
            "that update the params"
        )
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params: list[Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if id(param) not in owned:
            raise ValueError(f"the optimizer does not have the model's param {name!r}")
        if distributed.is_dtensor(param):
            raise ValueError(
                f"the param {name!r} is a DTensor, whose gradient is reduced over ranks outside of "
                "the hooks that update the params"
            )
        params.append(param)
    inside = {id(p) for p in params}
    for group in optimizer.param_groups:
        if any(p.requires_grad and id(p) not in inside for p in group["params"]):
            raise ValueError("the optimizer has params that are not the model's")
    if any(p.grad is not None for p in params):
        raise ValueError(
            "gradients are there already, and each backward() makes a step: gradients cannot be "
            "accumulated; call zero_grad() first"
        )
    return StepInBackward(optimizer, params)


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer must be a fusedopt optimizer, got {type(optimizer).__name__}")
    for option in ("max_grad_norm", "skip_nonfinite"):
        if getattr(optimizer, option):
            raise ValueError(
                f"{option} needs the norm of all gradients, and they are never there at once"
            )
    if isinstance(getattr(optimizer, "grad_scale", None), torch.Tensor):
        raise ValueError(
            "a GradScaler looks for overflows in all gradients before the step, and they are never "
            "there at once; bfloat16 needs none"
        )
