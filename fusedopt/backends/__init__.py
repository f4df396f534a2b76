"""The drivers of a step, and the choice between them.

A backend is a module with

- ``unavailable() -> str``: why it cannot run on this machine, or "". It may ask CUDA.
- ``step(optimizer, request) -> str``: runs the step, or says why it cannot serve these tensors and
  has changed nothing. "" means done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from torch import Tensor

from fusedopt._native import missing, remedy
from fusedopt.backends import cpu, cuda, reference, triton

# What the option `backend` may be.
Backend = Literal["auto", "cuda", "triton", "cpu", "reference"]

# The types of devices that a backend takes params on; those that are not here, all.
_DEVICE_TYPES: dict[str, tuple[str, ...]] = {
    "cuda": (cuda.DEVICE_TYPE,),
    "triton": ("cuda", "xpu"),  # its interpreter takes those on the CPU, but is for tests
    "cpu": ("cpu",),
}


def made_for(device_type: str) -> list[str]:
    """The backends with kernels for params on a type of device, whether they run here or not."""
    return [name for name, types in _DEVICE_TYPES.items() if device_type in types]


# In the order in which "auto" tries them.
BACKENDS: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": triton,
    "cpu": cpu,
    "reference": reference,
}


@dataclass
class Request:
    """What one step does to the gradients.

    Attributes:
        max_grad_norm: clip to this total L2 norm, or None.
        clip_grad_value: clamp each element to +-this, or None.
        skip_nonfinite: make the step a no-op where the total norm is not finite.
        grad_scale: the gradients are divided by this 0-dim tensor, or None.
        found_inf: a non-zero tensor makes the step a no-op, or None.
        process_group: reduce the squared norm over its ranks, or None.
    """

    max_grad_norm: float | None
    clip_grad_value: float | None
    skip_nonfinite: bool
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    process_group: Any = None

    @property
    def needs_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite


def check_name(backend: str) -> str:
    """The backend to use: the name itself, or FUSEDOPT_BACKEND where it is "auto".

    Raises:
        ValueError: for a name that is none.
    """
    source = "backend"
    if backend == "auto":
        asked = os.environ.get("FUSEDOPT_BACKEND", "auto")
        backend, source = asked or "auto", "FUSEDOPT_BACKEND"
    if backend != "auto" and backend not in tuple(BACKENDS):
        names = ", ".join(["auto", *BACKENDS])
        raise ValueError(
            f'{source} must be one of {names}, got {backend!r}; "auto" chooses by where the params '
            "are"
        )
    return backend


def candidates(backend: str, device_type: str | None = None) -> list[tuple[str, ModuleType]]:
    """The backends to try for a checked name, those that run on this machine, best first: for
    params on a type of device, or for any.

    Raises:
        RuntimeError: a backend asked for by name that cannot run on this machine, with the reason.
    """
    if backend == "auto":
        return [
            (name, module)
            for name, module in BACKENDS.items()
            if (device_type is None or device_type in _DEVICE_TYPES.get(name, (device_type,)))
            and not ((module is triton and triton.interpreted()) or module.unavailable())
        ]
    module = BACKENDS[backend]
    reason = module.unavailable()
    if reason:
        cure = f"; {remedy}" if reason == missing else ""
        raise RuntimeError(f"backend {backend!r} cannot serve: {reason}{cure}")
    return [(backend, module)]


class Candidates:
    """The `candidates` of one optimizer. "auto" asks which of them run on this machine when it
    first meets params on a type of device: over params on the CPU it asks nothing of CUDA, which
    would start its driver, and after that no forked process could use it.

    Raises:
        RuntimeError: as `candidates`.
    """

    def __init__(self, backend: str) -> None:
        self.auto = backend == "auto"
        self._named = [] if self.auto else candidates(backend)
        self._by_type: dict[str, list[tuple[str, ModuleType]]] = {}

    def of(self, param_groups: list[dict[str, Any]]) -> list[tuple[str, ModuleType]]:
        """Those for the first param with a gradient, or where none has one, the first."""
        if self._named:
            return self._named
        device_type = _device_type(param_groups)
        if device_type not in self._by_type:
            self._by_type[device_type] = candidates("auto", device_type)
        return self._by_type[device_type]


def _device_type(param_groups: list[dict[str, Any]]) -> str:
    first = None
    for group in param_groups:
        for param in group["params"]:
            if param.grad is not None:
                return str(param.device.type)
            first = param if first is None else first
    return "cpu" if first is None else str(first.device.type)
