"""What a checkpoint holds of another optimizer: refused where it is one of another class, kept as
torch.optim keeps it where it stands beside ours."""

from __future__ import annotations

from collections import deque
from copy import copy
from typing import Any

from torch import Tensor

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
