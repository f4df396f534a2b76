"""fuse(): a torch.optim optimizer in, the fused one out."""

from __future__ import annotations

import functools
import gc
import inspect
import weakref
from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fusedopt import checks
from fusedopt.adamw import FusedAdam, FusedAdamW
from fusedopt.optimizer import FusedOptimizer
from fusedopt.plan import is_sparse
from fusedopt.rule import Rule
from fusedopt.sgd import FusedSGD
from fusedopt.step_count import as_step, stays

# Subclasses before their bases.
_FUSED: tuple[tuple[type[Optimizer], type[FusedOptimizer]], ...] = (
    (torch.optim.AdamW, FusedAdamW),
    (torch.optim.Adam, FusedAdam),
    (torch.optim.SGD, FusedSGD),
)

# What a subclass may do in its own way, and the fused optimizer would not.
_METHODS = (
    *("step", "_init_group", "zero_grad", "add_param_group", "state_dict", "load_state_dict"),
)

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def fuse(optimizer: Optimizer, **options: Any) -> FusedOptimizer:
    """The fused optimizer that goes on where `optimizer` is: same groups, same state tensors.

    State tensors and registered hooks are shared, not copied: drop the old optimizer. A
    learning-rate scheduler that was built on it goes along: it drives the new one from now on.

    Args:
        optimizer: a torch.optim.AdamW, Adam or SGD, or a subclass that steps as they do.
        options: keyword options of the fused class, such as max_grad_norm. A hyperparameter, such
            as lr, replaces the value in every group.

    Returns:
        A FusedAdamW, FusedAdam or FusedSGD.

    Raises:
        TypeError: for an optimizer of another class; for one whose step(), or another method that
            the fused one would not run, is its own; for an option that the fused class has not.
        ValueError: a value out of its range; a hyperparameter that a scheduler sets.
        RuntimeError: for differentiable=True.
    """
    plain, target = _classes(optimizer)
    _refuse_own_methods(optimizer, plain, target)
    schedulers = _schedulers(optimizer)
    accepted = inspect.signature(target).parameters
    defaults = {k: v for k, v in optimizer.defaults.items() if k in accepted}
    fused: FusedOptimizer = target(
        [{"params": list(group["params"])} for group in optimizer.param_groups],
        **{**defaults, **options},
    )
    for name, value in optimizer.defaults.items():
        fused.defaults.setdefault(name, value)
    given = {name: fused.defaults[name] for name in options if name in fused.defaults}
    _refuse_scheduled(given, schedulers)
    pairs = zip(fused.param_groups, optimizer.param_groups, strict=True)
    for index, (group, old) in enumerate(pairs):
        group.update({key: value for key, value in old.items() if key != "params"})
        group.update(given)
        if "lr" in given and "initial_lr" in group:  # where the next scheduler begins
            group["initial_lr"] = deepcopy(given["lr"])
        checks.drop_in_flags({"differentiable": group["differentiable"]})
        fused.check_values(group, f"param_groups[{index}]")
        group.update(fused._plain(group))
    for key, entry in optimizer.state.items():
        of_param = isinstance(key, Tensor) and isinstance(entry, dict)
        fused.state[key] = _shared(entry, fused.rule, key) if of_param else entry
    for name in _HOOKS:  # the dicts themselves, so that handles remove what they added
        setattr(fused, name, getattr(optimizer, name))
    if schedulers:
        _note_steps(fused, getattr(optimizer, "_opt_called", False))
    for scheduler in schedulers:
        scheduler.optimizer = fused
    return fused


def _classes(optimizer: Optimizer) -> tuple[type[Optimizer], type[FusedOptimizer]]:
    for plain, target in _FUSED:
        if isinstance(optimizer, plain):
            return plain, target
    names = ", ".join(f"torch.optim.{plain.__name__}" for plain, _ in _FUSED)
    raise TypeError(f"optimizer must be one of {names}, got {type(optimizer).__name__}")


def _refuse_own_methods(
    optimizer: Optimizer, plain: type[Optimizer], target: type[FusedOptimizer]
) -> None:
    kind = type(optimizer)
    for name in _METHODS:
        expected = _innermost(getattr(plain, name))
        if _innermost(getattr(kind, name)) is not expected:
            raise TypeError(
                f"fuse() cannot take over a {kind.__name__}: its {name}() is not that of "
                f"torch.optim.{plain.__name__}, and the fused optimizer would not run it; derive "
                f"the class from fusedopt.{target.__name__} instead"
            )
        if name in vars(optimizer) and _innermost(vars(optimizer)[name]) is not expected:
            raise TypeError(
                f"fuse() cannot take over an optimizer whose {name} was replaced by "
                f"{vars(optimizer)[name]!r}, which the fused optimizer would not run; call fuse() "
                "first, and replace it on what that returns"
            )


def _innermost(function: Any) -> Any:
    """The function in torch's own wrappers: for hooks and the profiler, no_grad, a scheduler."""
    while True:
        if isinstance(function, MethodType):
            function = function.__func__
        # What functools.wraps has copied from a function says nothing about its wrapper.
        module = getattr(function, "__globals__", {}).get("__name__", "")
        if not (module.startswith("torch.optim.") and hasattr(function, "__wrapped__")):
            return function
        function = function.__wrapped__


def _schedulers(optimizer: Optimizer) -> list[Any]:
    """All schedulers that hold the optimizer, of torch and of other libraries. The optimizer knows
    none of them, so they are looked for among all objects."""
    is_scheduler: dict[type, bool] = {}
    found = []
    frozen = gc.get_freeze_count() > 0
    if frozen:  # gc.get_objects() leaves out what was frozen
        gc.unfreeze()
    objects = gc.get_objects()
    if frozen:
        gc.freeze()
    for thing in objects:
        kind = type(thing)
        if kind not in is_scheduler:
            is_scheduler[kind] = any("Scheduler" in base.__name__ for base in kind.__mro__)
        if is_scheduler[kind] and getattr(thing, "__dict__", {}).get("optimizer") is optimizer:
            found.append(thing)
    return found


def _refuse_scheduled(given: dict[str, Any], schedulers: list[Any]) -> None:
    for scheduler in schedulers:
        cycled = ("betas", "momentum") if getattr(scheduler, "cycle_momentum", False) else ()
        for name in given:
            if name == "lr" or name in cycled:
                kind = type(scheduler).__name__
                raise ValueError(
                    f"{name} cannot be given: a {kind} was built on the optimizer and sets it; "
                    f"leave {name} out, or build the {kind} on what fuse() returns"
                )


def _note_steps(fused: FusedOptimizer, called: bool) -> None:
    """Wraps `fused.step` as torch's LRScheduler does when it is built, and warns otherwise."""
    function, owner = fused.step.__func__, weakref.ref(fused)  # type: ignore[attr-defined]

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        this: Any = owner()
        this._opt_called = True
        return function(this, *args, **kwargs)

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    fused.step = step  # type: ignore[method-assign]
    fused._opt_called = called  # type: ignore[attr-defined]


def _shared(entry: dict[Any, Any], rule: Rule, param: Tensor) -> dict[Any, Any]:
    """The state of a param with the same tensors, but for what is sparse and for a step count that
    cannot stay what it is."""
    state = {}
    for key, value in entry.items():
        if key == "step" and rule.has_step:
            state[key] = value if stays(value, param.device) else as_step(value)
        elif key not in rule.state:
            state[key] = value
        elif value is not None:
            sparse = isinstance(value, Tensor) and is_sparse(value)
            state[key] = value.to_dense() if sparse else value
    return state
