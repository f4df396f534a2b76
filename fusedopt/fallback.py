"""The warning where the reference backend serves params that a faster one is made for."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fusedopt import backends, distributed
from fusedopt._native import _C, PLAIN_TYPES, missing, remedy
from fusedopt.callers import callers_level

_DTYPES = (
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16),
    *(torch.complex64, torch.complex128),
)

_warned = False  # once in a process


def cause(rule: str, device: torch.device) -> str:
    """Why only the reference backend serves plain params on a device, and what to do; "" where a
    faster one serves, or none is made for such a device.

    Args:
        rule: its name, as `Rule.name`.
    """
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return ""
    reasons = {}
    for name in backends.made_for(device.type):
        if name == "cuda":
            reasons[name] = backends.cuda.unserved(rule, device)
        else:
            reasons[name] = backends.BACKENDS[name].unavailable()
        if not reasons[name]:
            return ""
    if not reasons:
        return ""
    if _C is None:
        why, cure = missing, remedy
    else:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        cure = "install triton 3.5 or newer"
        if device.type == "cuda" and torch.version.hip is None:
            cure += ", or fusedopt again with nvcc on PATH and FUSEDOPT_CUDA_ARCHS for this GPU"
    return (
        f"{why}; the reference backend serves params on {device.type}, right but without fusion, "
        f"in plain torch ops. To mend it: {cure}"
    )


def warn_once(rule: str, param_groups: list[dict[str, Any]]) -> None:
    """Called before "auto" lets the reference backend serve: the first time in this process that
    its choice has a `cause`, that is a RuntimeWarning."""
    global _warned
    if _warned:
        return
    params = [p for group in param_groups for p in group["params"] if p.grad is not None]
    if not params or not _are_plain(params):
        return
    found = cause(rule, params[0].device)
    if not found:
        return
    _warned = True
    warnings.warn(
        f'{found}. backend="reference" or FUSEDOPT_BACKEND=reference asks for it without a warning',
        RuntimeWarning,
        stacklevel=callers_level(),
    )


@torch.no_grad()
def _are_plain(params: list[Tensor]) -> bool:
    """Whether a faster backend takes these params: no other backend than the reference takes
    tensor subclasses, other dtypes or params that are listed twice."""
    device = params[0].device
    for param in params:
        tensor: Any
        for tensor in (param, param.grad):
            local = tensor.to_local() if distributed.is_dtensor(tensor) else tensor
            if type(local) not in PLAIN_TYPES or local.device.type != device.type:
                return False
        if param.dtype not in _DTYPES or param.layout != torch.strided:
            return False
    return len({id(param) for param in params}) == len(params)
