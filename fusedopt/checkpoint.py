"""Loading of a state_dict: checked as a whole first, then put in place."""

from __future__ import annotations

import sys
from collections import defaultdict
from copy import deepcopy
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt.plan import as_step, name_of

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

# What a checkpoint means that is older than these options: as torch.optim, whatever this optimizer
# was built with.
_OLDER = {"amsgrad": False, "maximize": False, "nesterov": False, "capturable": False}

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def with_steps_on_cpu(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same state_dict with each step count as a 0-dim float32 CPU tensor; those of one device
    are copied together."""
    away: dict[torch.device, list[Any]] = {}
    for key, entry in state_dict["state"].items():
        step = entry.get("step")
        if isinstance(step, Tensor) and step.device.type != "cpu":
            away.setdefault(step.device, []).append(key)
        elif isinstance(step, Tensor) and (step.ndim != 0 or step.dtype != torch.float32):
            state_dict["state"][key] = {**entry, "step": as_step(step)}
    for keys in away.values():
        steps = torch.stack([_scalar(state_dict["state"][key]["step"]) for key in keys]).cpu()
        for key, step in zip(keys, steps.unbind(), strict=True):
            # A copy of the dict: this one is the optimizer's own.
            state_dict["state"][key] = {**state_dict["state"][key], "step": step.clone()}
    return state_dict


def _scalar(step: Tensor) -> Tensor:
    return step.detach().reshape(()).to(torch.float32)


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Loads `state_dict` into `optimizer`, running its load hooks as torch.optim does.

    Raises:
        ValueError, TypeError: as FusedOptimizer.load_state_dict; the optimizer is as it was.
    """
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    groups = _groups(optimizer, state_dict)
    state = _state(optimizer, state_dict, groups)
    optimizer.__setstate__({"state": state, "param_groups": groups})
    for post_hook in optimizer._optimizer_load_state_dict_post_hooks.values():
        post_hook(optimizer)


def _groups(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> list[dict[str, Any]]:
    """The saved groups with this optimizer's params, checked."""
    saved, own = state_dict["param_groups"], optimizer.param_groups
    if not isinstance(saved, (list, tuple)) or not all(isinstance(g, dict) for g in saved):
        raise TypeError(f'state_dict["param_groups"] must be a list of dicts, got {type(saved)}')
    if len(saved) != len(own):
        raise ValueError("loaded state dict has a different number of parameter groups")
    groups = []
    for index, (new, old) in enumerate(zip(saved, own, strict=True)):
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group "
                "that doesn't match the size of optimizer's group"
            )
        group = {sys.intern(key): deepcopy(value) for key, value in new.items() if key != "params"}
        if "lr" not in group:
            raise ValueError(f"param_groups[{index}] of the loaded state dict has no lr")
        if "param_names" in old and "param_names" not in group:
            group["param_names"] = old["param_names"]
        group["params"] = old["params"]
        for key, default in {**optimizer.defaults, **_OLDER}.items():
            if key in optimizer.defaults:
                group.setdefault(key, default)
        # A checkpoint of another implementation may carry its own flags: they have no effect here.
        flags = {"foreach": None, "fused": None, "differentiable": False}
        try:
            optimizer.check_group({**group, **flags})
        except (ValueError, TypeError) as error:
            raise type(error)(f"param_groups[{index}] of the loaded state dict: {error}") from error
        groups.append(group)
    return groups


def _state(
    optimizer: FusedOptimizer, state_dict: dict[str, Any], groups: list[dict[str, Any]]
) -> defaultdict[Any, Any]:
    ids = list(chain.from_iterable(group["params"] for group in state_dict["param_groups"]))
    places = [
        (group, name_of(g, i), param)
        for g, group in enumerate(groups)
        for i, param in enumerate(group["params"])
    ]
    by_id = dict(zip(ids, places, strict=True))
    if not isinstance(state_dict["state"], dict):
        raise TypeError(f'state_dict["state"] must be a dict, got {type(state_dict["state"])}')
    state: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state_dict["state"].items():
        if key not in by_id:
            raise ValueError(f"the loaded state dict has state for {key!r}, which no group lists")
        group, where, param = by_id[key]
        if not isinstance(entry, dict):
            raise TypeError(f"the loaded state of {where} must be a dict, got {entry!r}")
        loaded = _param_state(optimizer, entry, group, where, param)
        if loaded:
            state[param] = loaded
    return state


def _param_state(
    optimizer: FusedOptimizer,
    entry: dict[str, Any],
    group: dict[str, Any],
    where: str,
    param: Tensor,
) -> dict[str, Any]:
    rule = optimizer.rule
    needed = rule.state[: rule.states(group)]
    loaded: dict[str, Any] = {}
    for key, value in entry.items():
        if value is None:
            continue  # torch.optim.SGD saves a buffer that is not there yet as None
        if key == "step":
            try:
                loaded[key] = as_step(value)
            except (ValueError, TypeError) as error:
                raise type(error)(f"the loaded state of {where}: {error}") from error
        elif key in rule.state:
            loaded[key] = _tensor(value, f"the loaded {key} of {where}", param)
        else:
            loaded[key] = deepcopy(value)
    if loaded and rule.has_step:
        missing = [key for key in ("step", *needed) if key not in loaded]
        if missing:
            raise ValueError(f"the loaded state of {where} lacks {', '.join(missing)}")
    return loaded


def _tensor(value: Any, what: str, param: Tensor) -> Tensor:
    """A copy of a state tensor, in its own dtype, on the param's device and in its layout."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {value!r}")
    if value.shape != param.shape:
        raise ValueError(f"{what} has shape {list(value.shape)}, expected {list(param.shape)}")
    fits = value.is_complex() if param.is_complex() else value.dtype in _FLOATING
    if not fits or value.layout != torch.strided:
        raise ValueError(
            f"{what} has dtype {value.dtype} and layout {value.layout}, expected a "
            "strided floating-point tensor"
        )
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{what} is a meta tensor without values")
    if any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    ):
        raise ValueError(f"{what} is an expanded tensor: its elements share memory")
    copied = torch.empty_like(param, dtype=value.dtype, requires_grad=False)
    copied.copy_(value.detach())
    return copied
