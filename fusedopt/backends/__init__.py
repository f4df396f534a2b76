"""The drivers of a step, and the choice between them.

A backend is a module with

- ``unavailable() -> str``: why it cannot run on this machine, or "".
- ``step(optimizer, request) -> str``: runs the step, or says why it cannot serve these tensors and
  has changed nothing. "" means done.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from fusedopt.backends import cpu, cuda, reference, triton

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
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"{source} must be one of {names}, got {backend!r}")
    return backend


def candidates(backend: str) -> list[tuple[str, ModuleType]]:
    """The backends to try for a checked name, those that run on this machine, best first.

    Raises:
        RuntimeError: a backend asked for by name that cannot run on this machine, with the reason.
    """
    if backend == "auto":
        return [
            (name, module)
            for name, module in BACKENDS.items()
            if not ((module is triton and triton.interpreted()) or module.unavailable())
        ]
    module = BACKENDS[backend]
    reason = module.unavailable()
    if reason:
        raise RuntimeError(f"backend {backend!r} cannot serve: {reason}")
    return [(backend, module)]
