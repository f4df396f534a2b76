"""What is no checkpoint of this optimizer: refused with what to write where it is another thing or
one of another class; what stands in it beside ours is kept as torch.optim keeps it."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping
from copy import copy
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim.optimizer import Optimizer

from fusedopt.mistakes import named
from fusedopt.rule import Rule, hyper_keys

# Hyperparameters that do not tell one optimizer from another.
_COMMON = {"lr", "weight_decay", "decoupled_weight_decay", "amsgrad", "nesterov"}

# Classes of torch.optim: what their groups and the state of a param have, and what goes on from it.
_KNOWN: dict[str, tuple[set[str], set[str], str]] = {
    "SGD": ({"momentum", "dampening"}, {"momentum_buffer"}, "FusedSGD"),
    "Adam or AdamW": (
        {"betas", "eps"},
        {"step", "exp_avg", "exp_avg_sq"},
        "FusedAdam or FusedAdamW",
    ),
    "Adamax": ({"betas", "eps"}, {"step", "exp_avg", "exp_inf"}, ""),
    "RMSprop": ({"alpha", "eps", "momentum"}, {"step", "square_avg"}, ""),
    "Adadelta": ({"rho", "eps"}, {"step", "square_avg", "acc_delta"}, ""),
    "Adagrad": ({"lr_decay", "eps"}, {"step", "sum"}, ""),
}


def check_state_dict(given: Any, function: str) -> None:
    """Raises unless `given` is built as what an optimizer's state_dict() gives; `function` is what
    it was passed to.

    Raises:
        TypeError: for what is no dict.
        ValueError: for another dict: a model's, or a checkpoint that holds the right one.
    """
    check_is_dict(given, function)
    missing = [key for key in ("state", "param_groups") if key not in given]
    if not missing:
        return
    expected = f"{function}() takes what optimizer.state_dict() has given, and"
    lacks = f"has no {' and no '.join(map(repr, missing))}"
    places = _places(given)
    keys = ", ".join(map(str, list(given)[:5])) + (", ..." if len(given) > 5 else "")
    if places:
        calls = " or ".join(f"{function}(checkpoint{place})" for place in places)
        raise ValueError(f"{expected} this dict {lacks}: its keys are {keys}; write {calls}")
    if given and all(isinstance(value, Tensor) for value in given.values()):
        raise ValueError(
            f"{expected} this is a model's state_dict, which {lacks}: its keys are {keys}; pass "
            "the one that was saved from the optimizer"
        )
    raise ValueError(
        f"{expected} this dict {lacks}: " + (f"its keys are {keys}" if given else "it is empty")
    )


def check_is_dict(given: Any, function: str) -> None:
    """Raises TypeError, as `check_state_dict`, for what is no dict."""
    if isinstance(given, Mapping):
        return
    expected = f"{function}() takes the dict that optimizer.state_dict() has given, got"
    if isinstance(given, (str, os.PathLike)):
        path = os.fspath(given)
        hint = (
            f"; write {function}(torch.load({path!r})), or the part of it that is the optimizer's"
        )
    elif isinstance(given, (Optimizer, Module)):
        hint = f"; write {function}(optimizer.state_dict())"
    elif hasattr(given, "read"):
        hint = f"; write {function}(torch.load(file)), or the optimizer's part of it"
    else:
        calls = " or ".join(f"{function}(checkpoint{place})" for place in _places(given))
        hint = f"; write {calls}" if calls else ""
    raise TypeError(f"{expected} {named(given)}{hint}")


def _places(given: Any, depth: int = 3) -> list[str]:
    """Where in a checkpoint an optimizer's state_dict is, such as '["optimizer"]'."""
    if isinstance(given, Mapping):
        if "state" in given and "param_groups" in given:
            return [""]
        items: Iterable[tuple[str, Any]] = ((_quoted(key), given[key]) for key in given)
    elif isinstance(given, (list, tuple)):
        items = ((str(index), value) for index, value in enumerate(given[:8]))
    else:
        return []
    if not depth:
        return []
    return [f"[{key}]{rest}" for key, value in items for rest in _places(value, depth - 1)]


def _quoted(key: Any) -> str:
    return f'"{key}"' if isinstance(key, str) else repr(key)


def refuse_other_group(cls: str, rule: Rule, group: dict[str, Any], where: str) -> None:
    """Raises ValueError for a group that lacks what every version of this optimizer has."""
    if "lr" not in group:
        raise ValueError(f"{where} has no lr")
    needed = [name for name, _ in hyper_keys(rule)]
    missing = [name for name in needed if name not in _COMMON and name not in group]
    if missing:
        found = ", ".join(str(key) for key in group if key not in ("params", "param_names"))
        made_by = [name for name, (keys, _, _) in _KNOWN.items() if keys <= group.keys()]
        raise ValueError(
            f"{where} has no {', '.join(missing)}, which {cls} needs; "
            f"it has {found}{_hint(made_by)}"
        )


def refuse_other_state(cls: str, rule: Rule, entry: dict[Any, Any], where: str) -> None:
    """Raises ValueError for the state of another class of torch.optim, with nothing of this one."""
    made_by = [name for name, (_, keys, _) in _KNOWN.items() if keys <= entry.keys()]
    if made_by:
        raise ValueError(
            f"the loaded state of {where} has {', '.join(map(str, entry))}{_hint(made_by)}; "
            f"{cls} goes on from {', '.join(rule.state)}"
        )


def _hint(made_by: list[str]) -> str:
    if not made_by:
        return ""
    fits = _KNOWN[made_by[0]][2]
    return f", as torch.optim's {made_by[0]}" + (f", which {fits} would take" if fits else "")


def copied_state(value: Any, param: Tensor | None = None, key: Any = None) -> Any:
    """A copy of state that is not the rule's. That of a param goes, as in torch.optim, to the
    param's device and into its floating dtype, whatever dtype it had, but for a "step"."""
    if isinstance(value, Tensor):
        value = value.detach()
        if param is None or key == "step":
            return value.clone()
        dtype = param.dtype if param.is_floating_point() else value.dtype
        return value.to(param.device, dtype, copy=True)
    if isinstance(value, dict):
        same = copy(value)  # of the same type
        for k, v in value.items():
            same[k] = copied_state(v, param, k)
        return same
    if type(value) in (list, tuple, set, frozenset, deque):
        return type(value)(copied_state(v, param) for v in value)
    return value
