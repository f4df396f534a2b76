"""The table of a step: which tensors an optimizer updates now.

The native drivers build theirs in C++ (csrc/host/plan.h), with `Host` for what is rare;
fusedopt/table.py builds the same table in Python, for the reference backend. Neither remembers
anything of a tensor between two steps: `p.data` may be swapped, state or group dicts replaced,
gradients reallocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed, step_count
from fusedopt._native import PLAIN_TYPES
from fusedopt.forked import on_one_thread
from fusedopt.rule import Rule
from fusedopt.step_count import as_step

_SPARSE = (
    *(torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
)


def name_of(group: int, index: int) -> str:
    return f'param_groups[{group}]["params"][{index}]'


def is_sparse(tensor: Tensor) -> bool:
    return tensor.layout in _SPARSE


class Host:
    """What the native plan asks Python for.

    Attributes:
        last_stream: that of the last step on a GPU outside of graphs.
    """

    last_stream: Any = None

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.refuses_dtensors = False
        self.met_dtensor = False

    def begin(self, optimizer: Any) -> Any:
        """Called before each step of an optimizer; end() is given what it returns."""
        return None

    def end(self, turn: Any) -> None:
        """Called after each begin() and what followed it."""

    @on_one_thread
    def new_state(self, param: Tensor, key: str) -> Tensor:
        """A zero state tensor in the param's shape, dtype and layout, or a zero step count."""
        if key == "step":
            return as_step(0)
        return torch.zeros_like(param, memory_format=torch.preserve_format, requires_grad=False)

    @on_one_thread
    def dense_state(self, tensor: Any, role: str, group: int, index: int) -> Tensor | None:
        """A dense copy of a sparse state tensor, such as torch.optim.SGD makes of sparse gradients;
        None for any other.

        Raises:
            RuntimeError: sparse state of a rule that takes no sparse gradients.
        """
        if not isinstance(tensor, Tensor) or not is_sparse(tensor):
            return None
        if self.rule.sparse_error is not None:
            raise RuntimeError(
                f"the {role} of {name_of(group, index)} is sparse, expected a dense tensor"
            )
        return tensor.detach().to_dense()

    def borrow_step(
        self, param: Tensor, state: dict[str, Any]
    ) -> tuple[Tensor, Callable[[], None]]:
        """For a step count that the native plan does not read: see `step_count.borrow`."""
        return step_count.borrow(state, param.device)

    @on_one_thread
    def own_step(self, step: Tensor) -> Tensor | None:
        """A copy, for one param, of a step count that others have, too; None to leave it."""
        return step_count.own(step)

    @on_one_thread
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
        if is_sparse(tensor) and role == "grad":
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
