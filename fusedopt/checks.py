"""Checks of hyperparameters, with torch.optim's exception types and messages where it has one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from numbers import Real
from typing import Any

import torch


def is_number(value: Any) -> bool:
    """A real number: of Python or numpy, a 0-dim array or a one-element tensor."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_meta
    if isinstance(value, Real):
        return True
    kind = getattr(getattr(value, "dtype", None), "kind", None)  # of a numpy array
    return kind in ("i", "u", "f") and getattr(value, "shape", None) == ()


def plain_number(value: Any) -> Any:
    """The same number as Python has it, so that a checkpoint holds nothing else; a tensor as it
    is, since what is written to it later counts."""
    if isinstance(value, (torch.Tensor, int, float)) and type(value).__module__ != "numpy":
        return value
    return value.item() if hasattr(value, "item") else float(value)


def pair(value: Any) -> tuple[Any, ...] | None:
    """The two items of a tuple, list, array, tensor or other sequence; None for what is none."""
    if isinstance(value, (str, bytes, Mapping, Set)):
        return None
    try:
        items = tuple(value)
    except TypeError:
        return None
    return items if len(items) == 2 else None


def plain(value: Any) -> Any:
    """A checked hyperparameter in Python's own types: a number, or a tuple of them."""
    if value is None or is_number(value):
        return value if value is None else plain_number(value)
    items = pair(value)
    return value if items is None else tuple(plain_number(item) for item in items)


def _reads_as_number(text: str) -> bool:
    """As YAML's 1e-3, which is a text there."""
    try:
        return not math.isnan(float(text))
    except ValueError:
        return False


def real(what: str, value: Any) -> None:
    """Raises unless `value` is a number, of either sign; `what` starts the message.

    Raises:
        ValueError: for NaN, or a tensor of several elements.
        TypeError: for what is no number.
    """
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        name = "lr" if what == "learning rate" else what
        raise ValueError(f"Tensor {name} must be 1-element")
    if not is_number(value):
        hint = "; 0 switches it off" if value is None and what == "weight_decay value" else ""
        if isinstance(value, str):
            hint = f"; write float({value!r})" if _reads_as_number(value) else ""
        raise TypeError(
            f"Invalid {what}: {value!r}; expected a number or a one-element tensor{hint}"
        )
    if math.isnan(float(value)):
        raise ValueError(f"Invalid {what}: {value}")


def non_negative(what: str, value: Any) -> None:
    """Raises unless `value` is a number >= 0; `what` starts the message, "Invalid learning rate".

    Raises:
        ValueError: for a negative value or NaN, or a tensor of several elements.
        TypeError: for what is no number.
    """
    real(what, value)
    if not float(value) >= 0.0:
        raise ValueError(f"Invalid {what}: {value}")


def betas(value: Any) -> None:
    """Raises unless `value` is a pair of numbers in [0, 1), both floats or both tensors."""
    items = pair(value)
    if items is None:
        raise TypeError(
            f"Invalid betas: {value!r}; expected a pair of numbers in [0, 1), as (0.9, 0.999)"
        )
    for index, beta in enumerate(items):
        if isinstance(beta, torch.Tensor) and beta.numel() != 1:
            raise ValueError(f"Tensor betas[{index}] must be 1-element")
        if not is_number(beta):
            raise TypeError(f"Invalid beta parameter at index {index}: {beta!r}")
        if not 0.0 <= float(beta) < 1.0:
            raise ValueError(f"Invalid beta parameter at index {index}: {beta}")
    if isinstance(items[0], torch.Tensor) != isinstance(items[1], torch.Tensor):
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
        for index, beta in enumerate(pair(group.get("betas", ())) or ()):
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


# What an option that clips does at 0, and what to write instead.
_AT_ZERO = "0 would make each gradient 0; write None to switch clipping off"


def limit(name: str, value: Any) -> float:
    """The number that clips, read now where it is a tensor.

    Raises:
        ValueError: 0, a negative value or NaN.
        TypeError: for what is no number.
    """
    if not is_number(value) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number > 0 or None, got {value!r}")
    number = float(value)
    if not number > 0:
        hint = f"; {_AT_ZERO}" if number == 0 else ""
        if number == 0 and name == "max_grad_norm":
            hint += ', or float("inf") to measure the norm alone'
        raise ValueError(f"{name} must be a number > 0 or None, got {value!r}{hint}")
    return number


def clip_options(max_grad_norm: Any, clip_grad_value: Any) -> None:
    """Raises unless at most one of the two is given, as a number > 0.

    Raises:
        ValueError: both given, 0, a negative value or NaN.
        TypeError: for what is no number.
    """
    for name, value in (("max_grad_norm", max_grad_norm), ("clip_grad_value", clip_grad_value)):
        if value is not None:
            limit(name, value)
    if max_grad_norm is not None and clip_grad_value is not None:
        raise ValueError(
            "max_grad_norm and clip_grad_value cannot both be given, got "
            f"{max_grad_norm!r} and {clip_grad_value!r}; write None for one of them"
        )
