"""step_in_backward(): each param is updated as soon as its gradient is there, and the gradient
freed."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import _engine_run_backward
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction

from fusedopt import distributed
from fusedopt.instances import Watch
from fusedopt.optimizer import FusedOptimizer

_IN_DDP = (
    "model must not be in DistributedDataParallel: it reduces gradients after the hooks that "
    "update the params"
)
_SCALED = (
    "a GradScaler looks for overflows in all gradients before the step, and they are never there "
    "at once; bfloat16 needs none. Where the one that was found in this process scales the loss "
    "of another model only, pass unscaled=True to step_in_backward()"
)
_NESTED = (
    "backward() would be called by the backward of an autograd Function, as torch.utils.checkpoint "
    "does with use_reentrant=True: a layer that is used twice would be updated twice, each time by "
    "a part of its gradient; pass use_reentrant=False"
)


class StepInBackward:
    """The hooks that `step_in_backward` has set; `remove()` takes them off again."""

    def __init__(self, optimizer: FusedOptimizer, params: list[Tensor], unscaled: bool) -> None:
        self._optimizer = optimizer
        self._params = {id(p) for p in params}
        self._unscaled = unscaled
        self._watch = Watch(torch.amp.GradScaler, DistributedDataParallel, _CHECKPOINT)
        self._of_others: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._checked_backward = -1
        self._lock = threading.Lock()  # autograd has a thread for each device
        self._check_surroundings()
        self._handles = [p.register_post_accumulate_grad_hook(self._step) for p in params]

    def _step(self, param: Tensor) -> None:
        with self._lock:
            try:
                _check(self._optimizer)
                backward = torch._C._current_graph_task_id()
                if backward != self._checked_backward:
                    if _is_nested():
                        raise ValueError(_NESTED)
                    self._check_surroundings()
                    self._checked_backward = backward
                self._optimizer.step()
            finally:
                param.grad = None  # where a step was refused, too: the next one adds to nothing

    def _check_surroundings(self) -> None:
        """Raises for what has come to act on this model's gradients or on this backward()."""
        if self._reason():
            gc.collect()  # what was found may be garbage
            reason = self._reason()
            if reason:
                raise ValueError(reason)

    def _reason(self) -> str:
        checkpoints = False
        for found in self._watch.instances():
            if isinstance(found, torch.amp.GradScaler):
                # The scale is made when the first loss is scaled.
                used = found.is_enabled() and getattr(found, "_scale", None) is not None
                if used and not self._unscaled:
                    return _SCALED
            elif isinstance(found, _CHECKPOINT):
                checkpoints = True
            elif found not in self._of_others:
                if any(id(p) in self._params for p in found.parameters()):
                    return _IN_DDP
                self._of_others.add(found)
        # Those of other libraries are met when they call backward().
        if checkpoints and any(isinstance(node, _CHECKPOINT) for node in _nodes_of_this_backward()):
            return _NESTED
        return ""

    def remove(self) -> None:
        """Back to stepping after backward."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def step_in_backward(
    model: nn.Module, optimizer: FusedOptimizer, *, unscaled: bool = False
) -> StepInBackward:
    """Updates each param of a model during backward(), as soon as its gradient is complete, and
    frees the gradient: the gradients of the whole model are never there at once.

    `optimizer.step()` and `zero_grad()` may stay in the loop; they find nothing to do. Schedulers
    work as before. The updates are those of a step after backward, bit for bit.

    Args:
        model: whose params the optimizer has; all that require a gradient.
        optimizer: with a norm of nothing: an update cannot wait for the gradients of other params.
        unscaled: says that the loss of this model is never scaled, though a GradScaler has scaled
            one in this process.

    Returns:
        A handle with remove().

    Raises:
        ValueError: what cannot work: `max_grad_norm` or `skip_nonfinite`; a GradScaler; a model in
            DistributedDataParallel or FullyShardedDataParallel, or with DTensor params, whose
            gradients are reduced after the hooks; params that the optimizer does not have;
            gradients that are there already (accumulation).

    backward() raises ValueError, too, and updates nothing: for these options, a GradScaler that has
    scaled a loss, or a DistributedDataParallel around the model, since whenever they are there; and
    for torch.utils.checkpoint with use_reentrant=True. Where another library's checkpoint calls
    backward() inside of a backward(), it raises then: params outside of it may have been updated.
    """
    _check(optimizer)
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise ValueError(_IN_DDP)
    owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
    params: list[Tensor] = []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if id(param) not in owned:
            raise ValueError(f"the optimizer does not have the model's param {name!r}")
        if distributed.is_dtensor(param) or distributed.is_fsdp1(param):
            kind = "a DTensor" if distributed.is_dtensor(param) else "part of FSDP1's flat params"
            raise ValueError(
                f"the param {name!r} is {kind}, whose gradient is reduced over ranks outside of "
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
    return StepInBackward(optimizer, params, unscaled)


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, FusedOptimizer):
        hint = ""
        if isinstance(optimizer, torch.optim.Optimizer):
            hint = "; pass fusedopt.fuse(optimizer)"
        elif isinstance(optimizer, nn.Module):
            hint = "; write step_in_backward(model, optimizer)"
        raise TypeError(
            f"optimizer must be a fusedopt optimizer, got {type(optimizer).__name__}{hint}"
        )
    for option in ("max_grad_norm", "skip_nonfinite"):
        if getattr(optimizer, option):
            raise ValueError(
                f"{option} needs the norm of all gradients, and they are never there at once"
            )
    if isinstance(getattr(optimizer, "grad_scale", None), torch.Tensor):
        raise ValueError(_SCALED)


# Python functions that a thread is in while it runs a backward(), or the backward of a Function.
_RUN_BACKWARD = _engine_run_backward.__code__
_FUNCTION_BACKWARD = {
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
}
_CHECKPOINT: type = CheckpointFunction._backward_cls  # of its nodes in the graph


def _is_nested() -> bool:
    """In a hook: whether its backward() was called inside of the backward of a Function."""
    for stack in _stacks():
        outside = [frame.f_code for frame in stack]
        if _RUN_BACKWARD in outside:
            outside = outside[outside.index(_RUN_BACKWARD) :]
            if not _FUNCTION_BACKWARD.isdisjoint(outside):
                return True
    return False


def _nodes_of_this_backward() -> Iterator[Any]:
    """In a hook: each node of the graph, from the roots on."""
    pending: list[Any] = []
    for stack in _stacks():
        for frame in stack:
            if frame.f_code is _RUN_BACKWARD:
                roots = frame.f_locals["t_outputs"]
                pending += [getattr(r, "grad_fn", None) or getattr(r, "node", None) for r in roots]
    seen = set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [following for following, _ in node.next_functions]
            yield node


def _stacks() -> list[list[FrameType]]:
    """In a hook: the frames of the thread that called backward(), the innermost first. Where the
    hook runs in a thread of the engine, those of all threads."""
    own = _stack(sys._getframe())
    if any(frame.f_code is _RUN_BACKWARD for frame in own):
        return [own]
    return [_stack(frame) for frame in sys._current_frames().values()]


def _stack(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames
