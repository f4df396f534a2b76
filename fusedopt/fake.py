"""Tensors without values: what FakeTensorMode makes, to plan memory and to trace."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed

_count_of_modes = torch._C._len_torch_dispatch_stack
_mode = torch._C._get_dispatch_mode
_KEYS = torch._C._TorchDispatchModeKey


def is_fake(tensor: Any) -> bool:
    """Whether a tensor, or this rank's shard of a DTensor, is a FakeTensor."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    if module is None or not isinstance(tensor, Tensor):
        return False
    local = distributed.local_tensor(tensor, tensor) if distributed.is_dtensor(tensor) else tensor
    return isinstance(local, module.FakeTensor)


def mode_is_active() -> bool:
    """Whether a FakeTensorMode is entered, so that each new tensor is a fake one."""
    return _mode(_KEYS.FAKE) is not None


def is_traced() -> bool:
    """Whether make_fx records the ops, and wants to see all of them."""
    return _mode(_KEYS.PROXY) is not None


def concerns(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a step over these params is one without values, or has to be seen op by op."""
    if _count_of_modes() and (mode_is_active() or is_traced()):
        return True
    for group in param_groups:
        for first in group["params"]:
            return type(first) is not torch.nn.Parameter and is_fake(first)
    return False
