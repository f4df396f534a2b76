"""Tensors without values: what FakeTensorMode makes, to plan memory and to trace."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fusedopt import distributed

_modes = torch._C._len_torch_dispatch_stack


def is_fake(tensor: Any) -> bool:
    """Whether a tensor, or this rank's shard of a DTensor, is a FakeTensor."""
    module = sys.modules.get("torch._subclasses.fake_tensor")
    if module is None or not isinstance(tensor, Tensor):
        return False
    local = distributed.local_tensor(tensor, tensor) if distributed.is_dtensor(tensor) else tensor
    return isinstance(local, module.FakeTensor)


def mode_is_active() -> bool:
    """Whether a FakeTensorMode is entered, so that each new tensor is a fake one."""
    return bool(_modes()) and torch._guards.active_fake_mode() is not None


def concerns(param_groups: list[dict[str, Any]]) -> bool:
    """Whether a step over these params is one without values."""
    if _modes() and mode_is_active():
        return True
    for group in param_groups:
        for first in group["params"]:
            return type(first) is not torch.nn.Parameter and is_fake(first)
    return False
