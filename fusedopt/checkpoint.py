"""Saving and loading of a state_dict. Loading checks it as a whole first, then puts it in place."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from itertools import chain
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from fusedopt import foreign, options
from fusedopt.plan import is_sparse, name_of
from fusedopt.step_count import as_step

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer

# What a checkpoint means that is older than these options: as torch.optim, whatever this optimizer
# was built with.
_OLDER = {"amsgrad": False, "maximize": False, "nesterov": False, "capturable": False}

_FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def save(optimizer: FusedOptimizer) -> dict[str, Any]:
    """As FusedOptimizer.state_dict. Post hooks are called last, and what they return is final."""
    for pre_hook in optimizer._optimizer_state_dict_pre_hooks.values():
        pre_hook(optimizer)
    without_hooks = SimpleNamespace(
        state=optimizer.state,
        param_groups=optimizer.param_groups,
        _optimizer_state_dict_pre_hooks={},
        _optimizer_state_dict_post_hooks={},
    )
    state_dict: dict[str, Any] = Optimizer.state_dict(without_hooks)  # type: ignore[arg-type]
    groups = state_dict["param_groups"]
    placeholders = dict.fromkeys(options.DEFAULTS) if options.needed_in_state_dict() else {}
    groups[:] = [options.without(optimizer._plain(group)) | placeholders for group in groups]
    if optimizer.rule.has_step:
        ids = chain.from_iterable(group["params"] for group in groups)
        _steps_to_cpu(state_dict["state"], ids)
    for post_hook in optimizer._optimizer_state_dict_post_hooks.values():
        changed = post_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    return state_dict


def _steps_to_cpu(state: dict[Any, Any], ids: Iterable[Any]) -> None:
    """Puts 0-dim float32 CPU tensors in place of other step counts, all of a device in one copy."""
    away: dict[torch.device, list[Any]] = {}
    for key in dict.fromkeys(ids):
        entry = state.get(key)
        step = entry.get("step") if isinstance(entry, dict) else None
        if not isinstance(step, Tensor) or step.numel() != 1 or step.is_complex() or step.is_meta:
            continue
        if (step.device.type, step.dtype, step.ndim) != ("cpu", torch.float32, 0):
            away.setdefault(step.device, []).append(key)
    for keys in away.values():
        steps = [state[key]["step"].detach().reshape(()).to(torch.float32) for key in keys]
        for key, step in zip(keys, torch.stack(steps).cpu().unbind(), strict=True):
            # A copy of the dict: this one is the optimizer's own.
            state[key] = {**state[key], "step": step.clone()}


def load(optimizer: FusedOptimizer, state_dict: dict[str, Any]) -> None:
    """Loads `state_dict` into `optimizer`, running its load hooks as torch.optim does.

    Raises:
        ValueError, TypeError: as FusedOptimizer.load_state_dict; the optimizer is as it was.
    """
    foreign.check_is_dict(state_dict, "load_state_dict")
    state_dict = state_dict.copy()
    for pre_hook in optimizer._optimizer_load_state_dict_pre_hooks.values():
        changed = pre_hook(optimizer, state_dict)
        if changed is not None:
            state_dict = changed
    foreign.check_state_dict(state_dict, "load_state_dict")
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
        where = f"param_groups[{index}] of the loaded state dict"
        if "params" not in new:
            raise ValueError(f"{where} has no 'params', the numbers of its params")
        if len(new["params"]) != len(old["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group "
                "that doesn't match the size of optimizer's group"
            )
        foreign.refuse_other_group(type(optimizer).__name__, optimizer.rule, new, where)
        group = {
            sys.intern(key) if type(key) is str else key: deepcopy(value)
            for key, value in options.without(new).items()
            if key != "params"
        }
        for name in options.DEFAULTS:
            group[name] = old.get(name, optimizer.defaults[name])
        if "param_names" in old and "param_names" not in group:
            group["param_names"] = old["param_names"]
        group["params"] = old["params"]
        for key, default in {**optimizer.defaults, **_OLDER}.items():
            if key in optimizer.defaults:
                group.setdefault(key, default)
        optimizer.check_values(group, where)
        groups.append(optimizer._plain(group))
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
        if key in by_id:
            group, where, param = by_id[key]
            if not isinstance(entry, dict):
                raise TypeError(f"the loaded state of {where} must be a dict, got {entry!r}")
            loaded = _param_state(optimizer, entry, group, where, param)
            if loaded:
                state[param] = loaded
        elif isinstance(key, int) and isinstance(entry, dict) and _has(entry, optimizer.rule.state):
            raise ValueError(f"the loaded state dict has state for {key!r}, which no group lists")
        else:  # of no param: a wrapper's own
            state[key] = foreign.copied_state(entry)
    return state


def _has(entry: dict[Any, Any], keys: Iterable[str]) -> bool:
    return any(entry.get(key) is not None for key in keys)


def _param_state(
    optimizer: FusedOptimizer,
    entry: dict[Any, Any],
    group: dict[str, Any],
    where: str,
    param: Tensor,
) -> dict[Any, Any]:
    rule = optimizer.rule
    own_keys = ("step", *rule.state) if rule.has_step else rule.state
    if not any(key in entry for key in own_keys):
        foreign.refuse_other_state(type(optimizer).__name__, optimizer.rule, entry, where)
    loaded: dict[Any, Any] = {}
    for key, value in entry.items():
        if key not in own_keys:
            loaded[key] = foreign.copied_state(value, param, key)
        elif value is None:
            continue  # torch.optim.SGD saves a buffer that is not there yet as None
        elif key == "step":
            try:
                loaded[key] = as_step(value)
            except (ValueError, TypeError) as error:
                raise type(error)(f"the loaded state of {where}: {error}") from error
        else:
            takes_sparse = rule.sparse_error is None
            loaded[key] = _tensor(value, f"the loaded {key} of {where}", param, takes_sparse)
    if rule.has_step and _has(loaded, own_keys):
        needed = ("step", *rule.state[: rule.states(group)])
        missing = [key for key in needed if key not in loaded]
        if missing:
            raise ValueError(f"the loaded state of {where} lacks {', '.join(missing)}")
    return loaded


def _tensor(value: Any, what: str, param: Tensor, takes_sparse: bool) -> Tensor:
    """A copy of a state tensor on the param's device and in its layout; in its own dtype where that
    is wider than the param's, else in the param's."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{what} must be a tensor, got {value!r}")
    if value.shape != param.shape:
        raise ValueError(f"{what} has shape {list(value.shape)}, expected {list(param.shape)}")
    fits = value.is_complex() if param.is_complex() else value.dtype in _FLOATING
    sparse = is_sparse(value)
    if not fits or (value.layout != torch.strided and not (sparse and takes_sparse)):
        raise ValueError(
            f"{what} has dtype {value.dtype} and layout {value.layout}, expected a "
            "strided floating-point tensor"
        )
    if value.is_meta and not param.is_meta:
        raise ValueError(f"{what} is a meta tensor without values")
    if sparse:  # torch.optim.SGD has such a buffer where the gradients are sparse
        value = value.detach().to_dense()
    if any(
        stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)
    ):
        raise ValueError(f"{what} is an expanded tensor: its elements share memory")
    wide = value.dtype.itemsize > param.dtype.itemsize
    dtype = value.dtype if wide else param.dtype
    copied = torch.empty_like(param, dtype=dtype, requires_grad=False)
    copied.copy_(value.detach())
    return copied
