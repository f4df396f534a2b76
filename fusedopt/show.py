"""What a user looks at: the text of repr(optimizer), and the figures of log()."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt import options

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def as_text(optimizer: FusedOptimizer) -> str:
    """As torch.optim prints an optimizer: the groups, here without the options that all of them
    have in common; then these once, those that are not at their default, and the backend."""
    lines = [f"{type(optimizer).__name__} ("]
    groups = optimizer.param_groups
    common: dict[str, Any] = {}
    for name, default in options.DEFAULTS.items():
        values = [group[name] for group in groups if name in group]
        first = values[0] if values else optimizer.defaults.get(name, default)
        if all(options.same(value, first) for value in values):
            common[name] = first
    for index, group in enumerate(groups):
        lines.append(f"Parameter Group {index}")
        hidden = {"params", *common}
        lines += [f"    {key}: {group[key]}" for key in sorted(group) if key not in hidden]
        lines.append("")
    lines.append("Options of all groups")
    shown = {k: v for k, v in common.items() if not options.same(v, options.DEFAULTS[k])}
    if "backend" in common:
        shown["backend"] = common["backend"]
    shown["backend_in_use"] = optimizer.backend_in_use
    lines += [f"    {key}: {shown[key]}" for key in sorted(shown)]
    return "\n".join(lines) + "\n)"


def figures(optimizer: FusedOptimizer) -> dict[str, float]:
    """As FusedOptimizer.log()."""
    tensors: dict[str, Tensor] = {}
    request = None
    if optimizer._norm_tensor is not None:
        # A copy has not stepped yet, and has the figures of the original.
        request = optimizer._last_request or optimizer._request()
        if request.needs_norm:
            tensors["grad_norm"] = optimizer._norm_tensor
    if optimizer._skipped_tensor is not None:
        tensors["skipped_steps"] = optimizer._skipped_tensor
    values = {"skipped_steps": 0.0, **_read(tensors)}
    if request is not None and "grad_norm" in values:
        values["clip_coef"] = clip_coef(request.max_grad_norm, values["grad_norm"])
    return dict(sorted(values.items()))


def clip_coef(max_norm: float | None, total_norm: float) -> float:
    """What clipping multiplies gradients with, as torch.nn.utils.clip_grad_norm_: NaN for a norm
    that is NaN."""
    if max_norm is None:
        return 1.0
    ratio = max_norm / (total_norm + 1e-6)
    return 1.0 if ratio > 1 else ratio


def _read(tensors: dict[str, Tensor]) -> dict[str, float]:
    """The values of 0-dim tensors, in one copy from each device: all of them are on one, but for a
    count that no step on that device has written."""
    by_device: dict[torch.device, list[str]] = {}
    for name, tensor in tensors.items():
        by_device.setdefault(tensor.device, []).append(name)
    values: dict[str, float] = {}
    for names in by_device.values():
        read = torch.stack([tensors[name] for name in names]).tolist()
        values.update(zip(names, map(float, read), strict=True))
    return values
