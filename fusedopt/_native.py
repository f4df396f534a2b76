"""Loads the native extension and teaches it to read torch tensors.

``_C`` is the extension module, or None with the reason in ``missing``. torch is imported first, so
that both share one OpenMP runtime. ``FUSEDOPT_TENSOR_ACCESS`` = direct, dlpack or python asks for
one way of reading tensors (csrc/host/tensor_access.h says what they are); the default is the
fastest that passes its check.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

_C: ModuleType | None
missing = ""
try:
    from fusedopt import _C
except ImportError as error:
    _C = None
    missing = f"the native extension is not there ({error}); install fusedopt with a C++17 compiler"

PLAIN_TYPES: tuple[type, ...] = (torch.Tensor, torch.nn.Parameter) + (
    (torch.nn.Buffer,) if isinstance(getattr(torch.nn, "Buffer", None), type) else ()
)

_FLOATING = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
}
# torch.device.type: DLPack device type. ROCm builds of torch call their devices "cuda", too.
DEVICES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}

# libtorch functions that the direct access calls: library, mangled name.
_TO_DLPACK = ("torch_cpu", "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor")
_GRAD = ("c10", "_ZNK3c1010TensorImpl4gradEv")
_IS_NEG = ("torch_cpu", "_ZN2at6native6is_negERKNS_6TensorE")
_BUMP_VERSION = ("torch_cpu", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE")


def describe(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """(address, DLPack device type, device index, DLPack type code, bits, shape, strides) of a
    strided tensor, sizes in elements; None for a tensor that has no such description."""
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATING:
        return None
    if tensor.device.type not in DEVICES or tensor.is_conj() or tensor.is_neg():
        return None
    device = (DEVICES[tensor.device.type], tensor.device.index or 0)
    layout = (tuple(tensor.shape), tuple(tensor.stride()))
    return (tensor.data_ptr(), *device, *_FLOATING[tensor.dtype], *layout)


def _address(library: str, symbol: str) -> int:
    path = os.path.join(os.path.dirname(torch.__file__), "lib", f"lib{library}.so")
    return ctypes.cast(getattr(ctypes.CDLL(path), symbol), ctypes.c_void_p).value or 0


def _offset_of_tensor(samples: list[torch.Tensor]) -> int:
    """Bytes from the start of a Python tensor to the pointer to its TensorImpl (`_cdata`)."""
    word = ctypes.sizeof(ctypes.c_void_p)
    candidates = range(2 * word, torch.Tensor.__basicsize__, word)
    found = [
        offset
        for offset in candidates
        if all(ctypes.c_size_t.from_address(id(t) + offset).value == t._cdata for t in samples)
    ]
    if len(found) != 1:
        raise RuntimeError(f"the TensorImpl of a tensor was found at {len(found)} offsets, not one")
    return found[0]


def _samples() -> list[torch.Tensor]:
    base = torch.arange(24.0).reshape(4, 6)
    return [
        base,
        base.t(),
        base[1:, ::2],
        torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
        torch.nn.Parameter(torch.ones((), dtype=torch.float64)),
        torch.zeros(0, 5, dtype=torch.float16),
        torch.tensor([1 + 2j]).conj().imag,  # lazily negated: no plain memory
    ]


def _use_direct(native: ModuleType) -> None:
    samples = _samples()
    offset = _offset_of_tensor(samples)
    get_grad = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_address(*_GRAD))
    references = [get_grad(t._cdata) for t in samples]
    undefined = {ctypes.c_size_t.from_address(ref).value for ref in references if ref}
    if not all(references) or len(undefined) != 1:
        raise RuntimeError("tensors without a gradient do not share one undefined tensor")
    native.use_direct(
        offset,
        _address(*_TO_DLPACK),
        _address(*_GRAD),
        _address(*_IS_NEG),
        _address(*_BUMP_VERSION),
        undefined.pop(),
    )


def _use_dlpack(native: ModuleType) -> None:
    native.use_dlpack(torch.Tensor.__dlpack_c_exchange_api__)


def _use_python(native: ModuleType) -> None:
    native.use_python(describe)


def _check(native: ModuleType) -> None:
    """Raises unless the native reader agrees with Python on real tensors."""
    for tensor in _samples():
        if native.describe(tensor) != describe(tensor):
            raise RuntimeError(f"a tensor was read as {native.describe(tensor)}")
    param = torch.nn.Parameter(torch.ones(3))
    if native.grad_pointer(param) is not None:
        raise RuntimeError("a missing gradient was taken for one")
    param.grad = torch.ones(3)
    if native.grad_pointer(param) != param.grad.data_ptr():
        raise RuntimeError("a gradient was not found")
    version = param._version
    native.bump_versions([param])
    if param._version != version + 1:
        raise RuntimeError("a version counter was not bumped")


WAYS: dict[str, Callable[[ModuleType], None]] = {
    "direct": _use_direct,
    "dlpack": _use_dlpack,
    "python": _use_python,
}


def use_tensor_access(way: str) -> None:
    """Switches to one way of reading tensors: "direct", "dlpack" or "python".

    Raises:
        ValueError: for another word.
        RuntimeError: where that way does not work with this torch; the way in use stays.
    """
    if way not in WAYS:
        raise ValueError(f"tensor access must be one of {', '.join(WAYS)}, got {way!r}")
    if _C is None:
        raise RuntimeError(missing)
    before = _C.build_info()["tensor_access"]
    try:
        WAYS[way](_C)
        _check(_C)
    except (RuntimeError, AttributeError, OSError) as error:
        WAYS[before](_C)
        raise RuntimeError(f"tensor access {way!r} does not work here: {error}") from error


rejected_access: dict[str, str] = {}


def _choose_tensor_access(native: ModuleType) -> None:
    native.set_types(torch.Tensor, PLAIN_TYPES)
    native.use_python(describe)
    asked = os.environ.get("FUSEDOPT_TENSOR_ACCESS")
    if asked:
        use_tensor_access(asked)
        return
    for way in WAYS:
        try:
            use_tensor_access(way)
            return
        except RuntimeError as error:
            rejected_access[way] = str(error)


if _C is not None:
    _choose_tensor_access(_C)
