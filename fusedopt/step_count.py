"""Step counts, `state[param]["step"]`: read from whatever holds them, and counted on in it.

fusedopt makes them 0-dim float32 tensors. A program may keep its own: a number, or a one-element
tensor of another shape, dtype or device, which other processes may share. A tensor stays the object
that it is, as far as it can count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# float32 counts in ones up to here. Bias corrections are 1 long before.
_LAST_EXACT = 2**24

# Dtypes in which torch adds in place.
_WITH_ADD = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
)


def number(value: Any) -> float | int:
    """A step count as a Python number.

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
    return value


def as_step(value: Any) -> Tensor:
    """A step count as a new 0-dim float32 CPU tensor, whatever the default dtype.

    Raises:
        TypeError, ValueError: as `number`.
    """
    return torch.tensor(float(number(value)), dtype=torch.float32, device="cpu")


def _largest(dtype: torch.dtype) -> float:
    """How far a tensor counts in ones: 256 in bfloat16, 127 in int8."""
    if dtype == torch.bool:
        return 0
    if dtype.is_floating_point:
        return 2 / torch.finfo(dtype).eps
    return torch.iinfo(dtype).max


def stays(value: Any, device: torch.device) -> bool:
    """Whether the count of a param on `device` is kept in this very object for good.

    Not so for a number; for a tensor whose dtype ends before a training run does; and for one in
    this process's CPU memory where the param is on another device, whose kernels count without
    waiting for the host.
    """
    return (
        isinstance(value, Tensor)
        and value.numel() == 1
        and not value.is_complex()
        and _largest(value.dtype) >= _LAST_EXACT
        and (device.type == "cpu" or value.device == device or value.is_shared())
    )


def _goes_on(step: Any, count: float) -> bool:
    """Whether the object can take the next count. float32 stays where it ends."""
    return isinstance(step, Tensor) and (
        step.dtype == torch.float32 or count < _largest(step.dtype)
    )


@torch.no_grad()
def _add(step: Tensor, by: Any) -> None:
    """step += by, in any real dtype."""
    if step.dtype in _WITH_ADD:
        step.add_(by if isinstance(by, int) else by.to(step.dtype))
    else:
        wide = torch.float32 if step.dtype.is_floating_point else torch.int64
        step.copy_(step.to(wide) + by)


def advance(state: dict[str, Any]) -> None:
    """Adds 1 to the count of a param's state: in the tensor that holds it, or in a new one."""
    step = state["step"]
    count = number(step)
    if _goes_on(step, count):
        _add(step, 1)
    else:
        state["step"] = as_step(count + 1)


def own(step: Tensor) -> Tensor | None:
    """A copy, for one param, of a step tensor that is in the state of others, too, and would be
    counted once for each in a step. None in shared memory, whose count is not this process's alone.
    """
    if step.device.type == "cpu" and step.is_shared():
        return None
    return step.detach().clone()


def borrow(state: dict[str, Any], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
    """A tensor for a native driver to count in where it cannot count in `state["step"]` itself.

    Returns:
        A 0-dim float32 tensor on `device`; and a function to call after the step, which adds what
        the driver has counted to the count in the state, or puts the tensor there where the count
        cannot stay in what it is.

    Raises:
        TypeError, ValueError: as `number`.
    """
    step = state["step"]
    if device.type != "cpu" and stays(step, device) and step.device == device:
        copy = step.detach().reshape(()).to(torch.float32, copy=True)  # no wait for the device
        copy.clamp_(max=_LAST_EXACT - 1)
        start = copy.clone()
        return copy, lambda: _add(step, copy - start)
    count = number(step)
    if stays(step, device) or (device.type == "cpu" and _goes_on(step, count)):
        # So that the driver can add 1, however far the count is.
        count = min(count, _LAST_EXACT - 1)
        copy = as_step(count).to(device)
        return copy, lambda: _add(step, int(copy.item() - count))
    copy = as_step(count).to(device)
    return copy, lambda: state.__setitem__("step", copy)
