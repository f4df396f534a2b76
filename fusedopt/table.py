"""The table of a step in Python, for the reference backend: csrc/host/plan.h in few lines.

All that can be known to be wrong is found while the table is built, before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from fusedopt import distributed, fake, options, step_count
from fusedopt.plan import Host, name_of
from fusedopt.rule import Rule, hyper_keys

# Hyperparameters that are switches: None is off, as for any `if`.
_SWITCHES = ("amsgrad", "nesterov", "decoupled_weight_decay")


@dataclass
class Row:
    """One tensor of the step; `state` holds the tensors in use, in the rule's order. `owner` is the
    param as the optimizer has it: a DTensor, where the others are this rank's shards. `entry` is
    its state, which holds the step count. `group` holds the rule's hyperparameters as numbers, and
    `maximize`. `valueless` says that there is nothing to compute: fake or meta tensors."""

    owner: Tensor
    param: Tensor
    grad: Tensor
    state: list[Tensor]
    entry: dict[str, Any]
    group: dict[str, Any]
    first: bool
    valueless: bool

    def next_step(self) -> float:
        """Which step this is, from 1."""
        return float(self.entry["step"]) + 1


class Table:
    """The rows of a step, and the state that was created or replaced for it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.steps: set[int] = set()  # addresses of step counts
        self._changes: list[tuple[dict[Any, Any], Any, Any]] = []

    def set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        self._changes.append((target, key, target.get(key)))
        target[key] = value

    def roll_back(self) -> None:
        """Takes the changes of the state back: the step did not happen."""
        for target, key, before in reversed(self._changes):
            if before is None:
                target.pop(key, None)
            else:
                target[key] = before


def collect(
    rule: Rule,
    param_groups: list[dict[str, Any]],
    state: dict[Tensor, Any],
    check_values: Callable[[dict[str, Any], str], None],
) -> Table:
    """The table of a step, in the order of the groups; params without a gradient are left out.
    `check_values` raises for hyperparameters out of their ranges.

    Raises:
        KeyError, TypeError: a hyperparameter that is missing, or no number.
        ValueError: a gradient or state of another shape than its param; a step count below 0.
        RuntimeError: a gradient, param or state that torch.optim refuses, too.
        AssertionError: a real param under an active FakeTensorMode.
    On an exception, no state has been added.
    """
    table, host = Table(), Host(rule)
    for name in options.DEFAULTS:
        options.agreed(param_groups, name, None)
    chosen = [
        (g, i, param)
        for g, group in enumerate(param_groups)
        for i, param in enumerate(group["params"])
        if param.grad is not None
    ]
    if not chosen:
        return table
    groups = [_numbers(rule, group, g) for g, group in enumerate(param_groups)]
    if not fake.mode_is_active():  # a fake lr has no value
        for g, group in enumerate(param_groups):
            check_values(group, f"param_groups[{g}]")
    try:
        for g, i, param in chosen:
            table.rows.append(_row(table, host, param, groups[g], state, g, i))
        _rehearse(rule, table.rows)
    except BaseException:
        table.roll_back()
        raise
    return table


def _numbers(rule: Rule, group: dict[str, Any], index: int) -> dict[str, Any]:
    """The hyperparameters of a group as numbers, and `maximize`."""

    def number(value: Any, name: str) -> float:
        if value is None and name in _SWITCHES:
            return 0.0
        if fake.is_fake(value):
            return 1.0  # nobody computes with it
        try:
            if isinstance(value, (str, bytes)):
                raise TypeError
            return float(value)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise _refused(name, "a number or a one-element tensor", value) from None

    def _refused(name: str, expected: str, value: Any) -> TypeError:
        return TypeError(f"param_groups[{index}][{name!r}] must be {expected}, got {value!r}")

    numbers: dict[str, Any] = {"maximize": bool(group.get("maximize"))}
    for name, size in hyper_keys(rule):
        if not size:
            numbers[name] = number(group[name], name)
            continue
        try:
            values = tuple(group[name])
        except TypeError:
            values = ()
        if len(values) != size:
            raise _refused(name, f"{size} numbers", group[name])
        numbers[name] = tuple(number(value, name) for value in values)
    return numbers


def _row(
    table: Table,
    host: Host,
    param: Tensor,
    group: dict[str, Any],
    state: dict[Tensor, Any],
    g: int,
    i: int,
) -> Row:
    rule, grad, where = host.rule, param.grad, name_of(g, i)
    assert grad is not None
    local = distributed.local_tensor(param, param)
    if fake.mode_is_active() and not fake.is_fake(local):
        raise AssertionError(
            f"Please convert all Tensors to FakeTensors first: {where} is a real tensor under an "
            "active FakeTensorMode"
        )
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(f"{where} must be a floating-point or complex tensor, got {param.dtype}")
    if grad.layout != torch.strided:
        dense = host.resolve(grad, "grad", g, i, param)
        grad = grad if dense is None else dense
    grad = distributed.local_tensor(grad, param)
    _check(f"the grad of {where}", grad, local, written=False)
    _check(where, local, local)
    names = rule.state[: rule.states(group)]
    entry: dict[str, Any] = {}
    if names or rule.has_step:
        if param not in state:
            table.set(state, param, {})
        entry = state[param]
        if not isinstance(entry, dict):
            raise TypeError(f"the state of {where} must be a dict")
    first = False
    tensors = []
    for name in names:
        if entry.get(name) is None:
            table.set(entry, name, host.new_state(param, name))
            first = True
        dense_state = host.dense_state(entry[name], name, g, i)
        if dense_state is not None:
            table.set(entry, name, dense_state)
        tensor = distributed.local_tensor(entry[name], param)
        _check(f"the {name} of {where}", tensor, local)
        tensors.append(tensor)
    valueless = local.is_meta or (fake.is_fake(local) and not fake.is_traced())
    if rule.has_step:
        if "step" not in entry:
            table.set(entry, "step", host.new_state(param, "step"))
        _check_step(where, entry["step"], valueless)
        if isinstance(entry["step"], Tensor) and not fake.is_fake(entry["step"]):
            address = entry["step"].data_ptr()
            own = step_count.own(entry["step"]) if address in table.steps else None
            if own is not None:
                table.set(entry, "step", own)
            table.steps.add(address)
    return Row(param, local, grad, tensors, entry, group, first, valueless)


def _check_step(where: str, step: Any, valueless: bool) -> None:
    if valueless and fake.is_fake(step):
        return
    try:
        with _disable_current_modes() if valueless else nullcontext():  # fake param, real count
            step_count.number(step)
    except (TypeError, ValueError) as error:
        raise type(error)(f"the step of {where}: {error}") from None


def _check(what: str, tensor: Any, param: Tensor, written: bool = True) -> None:
    """Raises for a tensor that a step over `param` cannot read, or write."""
    shape = list(getattr(tensor, "shape", ()))
    if not isinstance(tensor, Tensor) or tensor.shape != param.shape:
        raise ValueError(f"{what} has shape {shape}, expected {list(param.shape)}")
    numeric = tensor.is_complex() if param.is_complex() else tensor.is_floating_point()
    if not numeric or tensor.layout != torch.strided:
        raise RuntimeError(
            f"{what} has dtype {tensor.dtype} and layout {tensor.layout}, expected a strided "
            f"{'complex' if param.is_complex() else 'floating-point'} tensor"
        )
    if tensor.device != param.device:
        raise RuntimeError(f"{what} is on {tensor.device}, expected {param.device}")
    if written and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"Inplace update to inference tensor outside InferenceMode is not allowed: {what}"
        )
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    if written and tensor.numel() and any(size > 1 and stride == 0 for size, stride in sizes):
        raise RuntimeError(
            f"{what} is expanded: more than one element refers to a single memory location; "
            "clone() it first"
        )


def _rehearse(rule: Rule, rows: list[Row]) -> None:
    """Runs the update of tensors without elements: a hyperparameter that it cannot compute with
    raises here."""
    done = set()
    for row in rows:
        if row.valueless:
            continue
        step = row.next_step() if rule.has_step else 0.0
        key = (id(row.group), step, row.first)
        if key in done:
            continue
        done.add(key)
        empty = torch.empty(0, device="cpu")
        rule.update(empty, empty, [empty] * len(row.state), row.group, step, row.first)
