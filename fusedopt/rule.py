"""What a fused optimizer is made of: the Python half of a rule (csrc/rules/rule.h is the other)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def precise(tensor: Tensor) -> Tensor:
    """In float64, where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


# update(param, grad, state, group, step, first) -> (param, state): the same maths in plain torch
# ops, out of place. All tensors have the param's shape and float32, or float64 where one of the
# stored tensors is float64; the new state is returned in that dtype, so that what overflows float32
# does so here, too. `step` counts from 1; `first` says that the state was created for this step.
Update = Callable[
    [Tensor, Tensor, list[Tensor], dict[str, Any], float, bool], tuple[Tensor, list[Tensor]]
]


@dataclass(frozen=True)
class Rule:
    """The description of an elementwise optimizer.

    Attributes:
        name: of the C++ rule, as `_C.rules()` lists it.
        hyper: keys of the param group that the C++ rule reads, in its order; "betas[2]" is a pair.
        state: keys of the param's state, in the order of the C++ rule.
        has_step: whether the state has a "step".
        states: how many of the state tensors a param group uses.
        update: the maths in plain torch ops.
        first_differs: whether an update with new state is another one than with state of zeros.
        sparse_error: the message for a sparse gradient, or None where it is taken as a dense one.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[str, ...]
    has_step: bool
    states: Callable[[dict[str, Any]], int]
    update: Update
    first_differs: Callable[[dict[str, Any]], bool] = lambda group: False
    sparse_error: str | None = None


def hyper_keys(rule: Rule) -> list[tuple[str, int]]:
    """(key, how many numbers it is a tuple of; 0 for one that is a number) of `Rule.hyper`."""
    parts = [key.partition("[") for key in rule.hyper]
    return [(name, int(count[:-1]) if count else 0) for name, _, count in parts]
