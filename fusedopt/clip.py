"""Drop-ins for the gradient clipping functions of torch.nn.utils."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fusedopt import distributed, fake, mistakes
from fusedopt._native import _C
from fusedopt.backends import cuda
from fusedopt.forked import on_one_thread

_NORM_ALONE = 'write float("inf") to measure the norm without clipping'
_GRADIENTS = "the gradients: [p.grad for p in model.parameters() if p.grad is not None]"


def _gradients(params: list[Tensor]) -> list[Tensor]:
    try:
        return [p.grad for p in params if p.grad is not None]
    except AttributeError as error:
        raise mistakes.no_tensor("parameters", params, error) from None


def _without_values(tensors: list[Tensor]) -> bool:
    """Whether torch shall have them: fake tensors, or any under an active FakeTensorMode."""
    return fake.mode_is_active() or any(fake.is_fake(t) for t in tensors[:1])


def _norm_dtype(tensors: list[Tensor]) -> torch.dtype:
    wide = any(t.dtype in (torch.float64, torch.complex128) for t in tensors)
    return torch.float64 if wide else torch.float32


def _check_finite(norm: Tensor | float, norm_type: float) -> None:
    if not math.isfinite(float(norm)):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from `parameters` is "
            "non-finite, so it cannot be clipped. To disable this error and scale the gradients "
            "by the non-finite norm anyway, set `error_if_nonfinite=False`"
        )


def _cpu_norm(tensors: list[Tensor], norm_type: float) -> float | None:
    """The L2 norm by the C++ kernels, None where they do not serve."""
    if _C is None or norm_type != 2.0 or not tensors:
        return None
    result = _C.squared_norm(tensors, torch.get_num_threads())
    return None if isinstance(result, str) else math.sqrt(result)


def _norm(
    tensors: list[Tensor], norm_type: float, error_if_nonfinite: bool, foreach: bool | None
) -> tuple[Tensor, float | None]:
    """The total norm as a tensor, and in full precision where it was computed on the CPU: rounded
    to float32, the norm of four elements of 3e38 would be infinite, and the clipped gradients 0."""
    if norm_type == 2.0:
        total = cuda.clip_(tensors, norm=True, norm_only=True)
        if total is not None:
            if error_if_nonfinite:
                _check_finite(total, norm_type)
            return total.to(_norm_dtype(tensors)), None
    norm = _cpu_norm(tensors, norm_type)
    if norm is None:
        total = torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        return total, float(total) if total.device.type == "cpu" else None
    if error_if_nonfinite:
        _check_finite(norm, norm_type)
    return torch.tensor(norm, dtype=_norm_dtype(tensors), device="cpu"), norm


@on_one_thread
@torch.no_grad()
def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """The norm of all tensors as one vector, as torch.nn.utils.get_total_norm.

    Dense tensors on the CPU or on one CUDA device take one pass with norm_type 2, with squares
    summed in float64, so that no float32 gradient overflows; anything else is handed to torch.

    Args:
        tensors: a tensor or an iterable of them, of any shapes and floating dtypes.
        norm_type: order of the norm.
        error_if_nonfinite: raise where the norm is NaN or infinite.
        foreach: handed to torch where torch computes the norm.

    Returns:
        A 0-dim tensor: float32, or float64 where a tensor is float64.

    Raises:
        RuntimeError: a non-finite norm with error_if_nonfinite=True.
        TypeError: for what is no iterable of tensors.
    """
    tensors = mistakes.tensors_of("tensors", tensors, _GRADIENTS)
    norm_type = mistakes.number("norm_type", norm_type)
    try:
        if _without_values(tensors):
            return torch.nn.utils.get_total_norm(tensors, norm_type, error_if_nonfinite, foreach)
        return _norm(tensors, norm_type, error_if_nonfinite, foreach)[0]
    except (AttributeError, RuntimeError, TypeError) as error:
        raise mistakes.no_tensor("tensors", tensors, error) from None


def _scale(grads: list[Tensor], coef: float, limit: float) -> bool:
    """grad = clamp(grad * coef, -limit, limit) in C++; False where it does not serve."""
    if coef == 1.0 and cuda.clip_(grads, norm=False, clip_value=limit) is not None:
        increment_version(grads)
        return True
    if _C is None or not grads or _C.scale_(grads, coef, limit, torch.get_num_threads()):
        return False
    increment_version(grads)
    return True


@on_one_thread
@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scales the gradients in place so that their total norm is at most max_norm, as
    torch.nn.utils.clip_grad_norm_: by min(1, max_norm / (total_norm + 1e-6)).

    An optimizer's own `max_grad_norm` does the same without writing the gradients.

    Args:
        parameters: a tensor or an iterable of them; those without a gradient are left out.
        max_norm: the largest total norm that is left as it is, >= 0.
        norm_type: order of the norm.
        error_if_nonfinite: raise where the norm is NaN or infinite, before anything is written.
        foreach: handed to torch where torch computes the norm.

    Returns:
        The total norm before clipping, a 0-dim tensor as `get_total_norm` gives.

    Raises:
        RuntimeError: a non-finite norm with error_if_nonfinite=True.
        TypeError: for what is no iterable of tensors; None for max_norm.
        ValueError: a negative max_norm, which would turn the gradients round, or NaN.
    """
    params = mistakes.tensors_of("parameters", parameters)
    grads = _gradients(params)
    max_norm = mistakes.number("max_norm", max_norm, 0, _NORM_ALONE)
    norm_type = mistakes.number("norm_type", norm_type)
    if _without_values(grads):
        return torch.nn.utils.clip_grad_norm_(
            params, max_norm, norm_type, error_if_nonfinite, foreach
        )
    if norm_type == 2.0:
        if error_if_nonfinite:
            norm_on_device = cuda.clip_(grads, norm=True, norm_only=True)
            if norm_on_device is not None:
                _check_finite(norm_on_device, norm_type)
        on_device = cuda.clip_(grads, norm=True, max_norm=max_norm)
        if on_device is not None:
            increment_version(grads)
            return on_device.to(_norm_dtype(grads))
    total, norm = _norm(grads, norm_type, error_if_nonfinite, foreach)
    coef = None if norm is None else max_norm / (norm + 1e-6)
    if coef is not None and coef >= 1:
        return total  # nothing to scale, nothing written
    if coef is None or not _scale(grads, coef, float("inf")):
        # Summed over the ranks first: torch 2.9 adds the 1e-6 on each of them before.
        whole: Tensor = total.full_tensor() if distributed.is_dtensor(total) else total  # type: ignore
        scale = torch.clamp(max_norm / (whole + 1e-6), max=1.0)
        for grad in grads:
            grad.mul_(scale.to(grad.device))
    return total


@on_one_thread
@torch.no_grad()
def clip_grad_value_(
    parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
) -> None:
    """Clamps the gradients in place to [-clip_value, clip_value], as
    torch.nn.utils.clip_grad_value_; a NaN stays a NaN.

    Args:
        parameters: a tensor or an iterable of them; those without a gradient are left out.
        clip_value: the largest absolute value that is left as it is, >= 0.
        foreach: handed to torch where torch clips.

    Raises:
        TypeError: for what is no iterable of tensors; None for clip_value.
        ValueError: a negative clip_value, or NaN.
    """
    params = mistakes.tensors_of("parameters", parameters)
    grads = _gradients(params)
    clip_value = mistakes.number("clip_value", clip_value, 0, "leave the call out to clip nothing")
    if not grads:  # which torch does not take
        return
    if _without_values(grads) or not _scale(grads, 1.0, clip_value):
        torch.nn.utils.clip_grad_value_(params, clip_value, foreach)
