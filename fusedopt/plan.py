"""The table of a step: which tensors an optimizer updates now.

The native drivers build theirs in C++ (csrc/host/plan.h), with `Host` for what is rare. `collect`
builds the same table in Python, for the reference backend. Neither remembers anything of a tensor
between two steps: `p.data` may be swapped, state or group dicts replaced, gradients reallocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt._native import PLAIN_TYPES
from fusedopt.rule import Rule


def name_of(group: int, index: int) -> str:
    return f'param_groups[{group}]["params"][{index}]'


def as_step(value: Any) -> Tensor:
    """A step count as a new 0-dim float32 CPU tensor, whatever the default dtype.

    Raises:
        TypeError: for what is neither a number nor a one-element tensor.
        ValueError: for NaN, infinity or a negative count.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.is_meta:
            raise TypeError(
                f"step must be a number or a one-element tensor, got a tensor of shape "
                f"{tuple(value.shape)} and dtype {value.dtype}"
            )
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"step must be a number or a one-element tensor, got {value!r}")
    if not 0 <= value < float("inf"):
        raise ValueError(f"step must be a finite number >= 0, got {value!r}")
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


class Host:
    """What the native plan asks Python for."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.refuses_dtensors = False
        self.met_dtensor = False

    def begin(self, optimizer: Any) -> Any:
        """Called before each step of an optimizer; end() is given what it returns."""
        return None

    def end(self, turn: Any) -> None:
        """Called after each begin() and what followed it."""

    def new_state(self, param: Tensor, key: str) -> Tensor:
        """A zero state tensor in the param's shape, dtype and layout, or a zero step count."""
        if key == "step":
            return as_step(0)
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)

    def normalise_step(self, param: Tensor, state: dict[str, Any]) -> None:
        """Makes the step count of a param's state one that the native plan reads."""
        state["step"] = as_step(state["step"])

    def own_step(self, param: Tensor, state: dict[str, Any]) -> None:
        """Gives a param whose step count is another param's, too, one of its own."""
        state["step"] = state["step"].detach().clone()

    def resolve(self, tensor: Any, role: str, group: int, index: int, param: Any) -> Tensor | None:
        """A plain strided real tensor with the memory (param, state) or the values (grad) of
        `tensor`, on this rank; None where only the reference backend can serve.

        Raises:
            RuntimeError: a sparse gradient that the rule does not take.
            TypeError: what is no tensor.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"the {role} of {name_of(group, index)} must be a tensor, got {tensor!r}"
            )
        if distributed.is_dtensor(tensor):
            self.met_dtensor = True
            if self.refuses_dtensors:
                return None
            tensor = distributed.local_tensor(tensor, param)
        if tensor.is_sparse and role == "grad":
            if self.rule.sparse_error is not None:
                raise RuntimeError(self.rule.sparse_error)
            tensor = tensor.detach().to_dense()
        if type(tensor) not in PLAIN_TYPES or tensor.layout != torch.strided:
            return None
        tensor = tensor.detach()
        if role == "grad":
            tensor = tensor.resolve_conj().resolve_neg()
        elif tensor.is_conj() or tensor.is_neg():
            return None
        return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass
class Row:
    """One tensor of the step; `state` holds the tensors in use, in the rule's order. `owner` is the
    param as the optimizer has it: a DTensor, where the others are this rank's shards."""

    owner: Tensor
    param: Tensor
    grad: Tensor
    state: list[Tensor]
    step: Tensor | None
    group: dict[str, Any]
    first: bool


class Table:
    """The rows of a step, and the state that was created for it."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.steps: set[int] = set()  # addresses
        self._created: list[tuple[dict[Any, Any], Any]] = []

    def set(self, target: dict[Any, Any], key: Any, value: Any) -> None:
        target[key] = value
        self._created.append((target, key))

    def roll_back(self) -> None:
        """Removes the created state again: the step did not happen."""
        for target, key in reversed(self._created):
            target.pop(key, None)


def collect(rule: Rule, param_groups: list[dict[str, Any]], state: dict[Tensor, Any]) -> Table:
    """The table of a step, in the order of the groups; params without a gradient are left out.

    Raises:
        ValueError: a gradient or state of another shape than its param.
        RuntimeError: a gradient or param that torch.optim refuses, too.
    On an exception, no state has been added.
    """
    table, host = Table(), Host(rule)
    try:
        for g, group in enumerate(param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    table.rows.append(_row(table, host, param, group, state, g, i))
    except BaseException:
        table.roll_back()
        raise
    return table


def _row(
    table: Table,
    host: Host,
    param: Tensor,
    group: dict[str, Any],
    state: dict[Tensor, Any],
    g: int,
    i: int,
) -> Row:
    rule, grad = host.rule, param.grad
    assert grad is not None
    if not (param.is_floating_point() or param.is_complex()):
        raise RuntimeError(
            f"{name_of(g, i)} must be a floating-point or complex tensor, got {param.dtype}"
        )
    if grad.is_sparse:
        dense = host.resolve(grad, "grad", g, i, param)
        assert dense is not None
        grad = dense
    names = rule.state[: rule.states(group)]
    entry: dict[str, Any] = {}
    if names or rule.has_step:
        if param not in state:
            table.set(state, param, {})
        entry = state[param]
    first = False
    for name in names:
        if entry.get(name) is None:
            table.set(entry, name, host.new_state(param, name))
            first = True
        if not isinstance(entry[name], Tensor) or entry[name].shape != param.shape:
            shape = tuple(getattr(entry[name], "shape", ()))
            raise ValueError(
                f"the {name} of {name_of(g, i)} has shape {list(shape)}, "
                f"expected {list(param.shape)}"
            )
    if rule.has_step:
        if "step" not in entry:
            table.set(entry, "step", host.new_state(param, "step"))
        elif not (isinstance(entry["step"], Tensor) and entry["step"].ndim == 0):
            host.normalise_step(param, entry)
        if entry["step"].data_ptr() in table.steps:
            host.own_step(param, entry)
        table.steps.add(entry["step"].data_ptr())
    grad = distributed.local_tensor(grad, param)
    tensors = [distributed.local_tensor(entry[n], param) for n in names]
    local = distributed.local_tensor(param, param)
    return Row(param, local, grad, tensors, entry.get("step"), group, first)
