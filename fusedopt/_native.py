"""Loads the native extension and teaches it to read torch tensors.

``_C`` is the extension module, or None with the reason in ``missing`` and what to do about it in
``remedy``. torch is imported first, so that both share one OpenMP runtime (fusedopt/extension.py).
``FUSEDOPT_TENSOR_ACCESS`` = direct, dlpack or python asks for one way of reading tensors
(csrc/host/tensor_access.h says what they are); the default is the fastest that passes its check. An
extension that can read no tensor counts as missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import ModuleType

import torch

from fusedopt import extension
from fusedopt.tensor_access import BY_READER, DEVICES, FAILURES, WAYS, check, describe

__all__ = [
    "BY_READER",
    "DEVICES",
    "PLAIN_TYPES",
    "WAYS",
    "_C",
    "missing",
    "rejected_access",
    "remedy",
]

_C: ModuleType | None
missing = remedy = ""
try:
    _C = extension.load()
except ImportError as error:
    _C = None
    missing, remedy = extension.explain(error)

PLAIN_TYPES: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter) + (
    (torch.nn.Buffer,) if isinstance(getattr(torch.nn, "Buffer", None), type) else ()
)

rejected_access: dict[str, str] = {}  # way: why it does not work here

_switch_back: Callable[[], None] | None = None  # to the way in use, where another has failed


def use_tensor_access(way: str) -> None:
    """Switches to one way of reading tensors: "direct", "dlpack" or "python"; "direct:shim" and
    the like for one reader of the direct way (fusedopt.tensor_access.READERS).

    Raises:
        ValueError: for another word.
        RuntimeError: where that way does not work with this torch; the way in use stays.
    """
    if _C is None:
        raise RuntimeError(f"{missing}; {remedy}")
    _use(_C, way)


def _use(native: ModuleType, way: str) -> None:
    global _switch_back
    use = {**WAYS, **BY_READER}.get(way)
    if use is None:
        raise ValueError(f"tensor access must be one of {', '.join(WAYS)}, got {way!r}")
    try:
        again = use(native)
        check(native)
    except FAILURES as error:
        if _switch_back is not None:
            _switch_back()
        raise RuntimeError(f"tensor access {way!r} does not work here: {error}") from error
    _switch_back = again


def _choose(native: ModuleType) -> str:
    """Switches to the way that is asked for, or to the fastest that works; "" or why none does."""
    asked = os.environ.get("FUSEDOPT_TENSOR_ACCESS")
    try:
        native.set_types(torch.Tensor, PLAIN_TYPES)
        native.use_python(describe)
        if asked:
            _use(native, asked)
            return ""
    except FAILURES as error:
        return f"FUSEDOPT_TENSOR_ACCESS: {error}" if asked else f"the native extension: {error}"
    for way in WAYS:
        try:
            _use(native, way)
            return ""
        except RuntimeError as error:
            rejected_access[way] = str(error.__cause__)
    reasons = "; ".join(f"{way}: {reason}" for way, reason in rejected_access.items())
    return f"the native extension cannot read tensors of torch {torch.__version__}: {reasons}"


if _C is not None:
    missing = _choose(_C)
    if missing:
        _C = None
        remedy = "install a newer fusedopt, or a torch of a version that docs/versions.md lists"
        if os.environ.get("FUSEDOPT_TENSOR_ACCESS"):
            remedy = "unset FUSEDOPT_TENSOR_ACCESS"
