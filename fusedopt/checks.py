"""Checks of hyperparameters, with torch.optim's exception types and messages where it has one."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch


def is_number(value: Any) -> bool:
    """A Python or numpy real number, or a one-element tensor that holds one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    return isinstance(value, Real)


def non_negative(what: str, value: Any) -> None:
    """Raises unless `value` is a number >= 0; `what` starts the message, "Invalid learning rate".

    Raises:
        ValueError: for a negative value or NaN, or a tensor of several elements.
        TypeError: for what is no number.
    """
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        name = "lr" if what == "learning rate" else what
        raise ValueError(f"Tensor {name} must be 1-element")
    if not is_number(value):
        raise TypeError(
            f"Invalid {what}: {value!r}; expected a number or a one-element tensor >= 0"
        )
    if not float(value) >= 0.0:
        raise ValueError(f"Invalid {what}: {value}")


def betas(value: Any) -> None:
    """Raises unless `value` is a pair of numbers in [0, 1), both floats or both tensors."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"Invalid betas: {value!r}; expected a pair of numbers in [0, 1)")
    for index, beta in enumerate(value):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if not is_number(beta):
            raise TypeError(f"Invalid beta parameter at index {index}: {beta!r}")
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if isinstance(value[0], torch.Tensor) != isinstance(value[1], torch.Tensor):
        raise ValueError("betas must be either both floats or both Tensors")


def drop_in_flags(group: dict[str, Any]) -> None:
    """Raises for the combinations of foreach, fused, differentiable and capturable that
    torch.optim refuses, and for differentiable=True.

    Raises:
        RuntimeError: differentiable=True, or foreach and fused together.
        ValueError: a tensor hyperparameter with foreach=True and not capturable.
    """
    if group.get("foreach") and not group.get("capturable"):
        tensors = {"lr": group.get("lr")}
        for index, beta in enumerate(group.get("betas", ())):
            tensors[f"betas[{index}]"] = beta
        for name, value in tensors.items():
            if isinstance(value, torch.Tensor):
                raise ValueError(
                    f"{name} as a Tensor is not supported for capturable=False and foreach=True"
                )
    if group.get("differentiable"):
        raise RuntimeError("`fused` does not support `differentiable`")
    if group.get("foreach") and group.get("fused"):
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def clip_options(max_grad_norm: Any, clip_grad_value: Any) -> None:
    """Raises unless at most one of the two is given, as a number >= 0.

    Raises:
        ValueError: both given, a negative value or NaN.
        TypeError: for what is no number.
    """
    for name, value in (("max_grad_norm", max_grad_norm), ("clip_grad_value", clip_grad_value)):
        if value is None:
            continue
        if not isinstance(value, Real) or isinstance(value, bool):
            raise TypeError(f"{name} must be a number >= 0 or None, got {value!r}")
        if math.isnan(value) or value < 0:
            raise ValueError(f"{name} must be a number >= 0 or None, got {value!r}")
    if max_grad_norm is not None and clip_grad_value is not None:
        raise ValueError(
            "max_grad_norm and clip_grad_value cannot both be given, got "
            f"{max_grad_norm!r} and {clip_grad_value!r}"
        )
