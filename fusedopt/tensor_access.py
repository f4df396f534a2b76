"""The ways in which C++ reads torch tensors (csrc/host/tensor_access.h), and their check.

C++ includes no torch header, so that one build works with every torch. What it relies on instead
is found here by name, and compared with Python's view of real tensors before it is used.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

_FLOATING = {
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.float16: (2, 16),
    torch.bfloat16: (4, 16),
    torch.int64: (0, 64),
}
# torch.device.type: DLPack device type. ROCm builds of torch call their devices "cuda", too.
DEVICES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}

# The libtorch functions that the direct way calls: library, symbol. C++ names are mangled as by g++
# and clang. MSVC mangles otherwise, so that on Windows there is no direct way.
_SUFFIXES = {"linux": ".so", "darwin": ".dylib"}
_SYMBOLS = {
    "grad": ("c10", "_ZNK3c1010TensorImpl4gradEv"),
    "is_neg": ("torch_cpu", "_ZN2at6native6is_negERKNS_6TensorE"),
    "bump_version": ("torch_cpu", "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"),
    "to_dlpack_read_only": ("torch_cpu", "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensorb"),
    "to_dlpack": ("torch_cpu", "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor"),
    "has_storage": ("c10", "_ZNK3c1010TensorImpl11has_storageEv"),
    "dtype": ("torch_cpu", "aoti_torch_get_dtype"),
    "device_type": ("torch_cpu", "aoti_torch_get_device_type"),
    "device_index": ("torch_cpu", "aoti_torch_get_device_index"),
    "dim": ("torch_cpu", "aoti_torch_get_dim"),
    "sizes": ("torch_cpu", "aoti_torch_get_sizes"),
    "strides": ("torch_cpu", "aoti_torch_get_strides"),
    "data_ptr": ("torch_cpu", "aoti_torch_get_data_ptr"),
}
_ALWAYS = ("grad", "is_neg", "bump_version")
# By which function, or functions, the direct way describes a tensor; the first that is there and
# passes the check is used. A symbol's exact name stands for its signature.
READERS = {
    "read_only": ("to_dlpack_read_only",),  # torch >= 2.14
    "two_arguments": ("to_dlpack",),  # torch 2.10 to 2.13
    "shim": (  # the C functions for code that AOTInductor has compiled; serves older torch
        *("has_storage", "dtype", "device_type", "device_index"),
        *("dim", "sizes", "strides", "data_ptr"),
    ),
}


def _function(library: str, symbol: str) -> Any:
    """A function of libtorch, for ctypes.

    Raises:
        RuntimeError: on a platform whose names are others; no such function in the library.
        OSError: no such library.
    """
    if sys.platform not in _SUFFIXES:
        raise RuntimeError(f"the names of libtorch's functions on {sys.platform} are not known")
    name = f"lib{library}{_SUFFIXES[sys.platform]}"
    loaded = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))
    try:
        return getattr(loaded, symbol)
    except AttributeError:
        raise RuntimeError(f"{name} has no {symbol}") from None


def _address(function: str) -> int:
    return ctypes.cast(_function(*_SYMBOLS[function]), ctypes.c_void_p).value or 0


def describe(tensor: torch.Tensor) -> tuple[Any, ...] | None:
    """(address, DLPack device type, device index, DLPack type code, bits, shape, strides) of a
    strided tensor, sizes in elements; None for a tensor that has no such description."""
    if tensor.layout != torch.strided or tensor.dtype not in _FLOATING:
        return None
    if tensor.device.type not in DEVICES or tensor.is_conj() or tensor.is_neg():
        return None
    device = (DEVICES[tensor.device.type], tensor.device.index or 0)
    try:
        layout = (tuple(tensor.shape), tuple(tensor.stride()))
        return (tensor.data_ptr(), *device, *_FLOATING[tensor.dtype], *layout)
    except RuntimeError:  # a nested tensor, or one of torch.func: no sizes, or no memory
        return None


_WORD = ctypes.sizeof(ctypes.c_void_p)


def _offset_of_tensor(samples: list[torch.Tensor]) -> int:
    """Bytes from the start of a Python tensor to the pointer to its TensorImpl (`_cdata`)."""
    candidates = range(2 * _WORD, torch.Tensor.__basicsize__, _WORD)
    found = [
        offset
        for offset in candidates
        if all(ctypes.c_size_t.from_address(id(t) + offset).value == t._cdata for t in samples)
    ]
    if len(found) != 1:
        raise RuntimeError(f"the TensorImpl of a tensor was found at {len(found)} offsets, not one")
    return found[0]


def _undefined(samples: list[torch.Tensor]) -> int:
    """The address of the TensorImpl that "no gradient" is, by tensors that have none."""
    get_grad = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_address("grad"))
    references = [get_grad(t._cdata) for t in samples]
    found = {ctypes.c_size_t.from_address(ref).value for ref in references if ref}
    if not all(references) or len(found) != 1:
        raise RuntimeError("tensors without a gradient do not share one undefined tensor")
    return found.pop()


def _words(tensor: torch.Tensor) -> list[int]:
    """The first words of the TensorImpl."""
    return list((ctypes.c_size_t * 12).from_address(tensor._cdata))


def _hints(samples: list[torch.Tensor]) -> tuple[int, int, int]:
    """Where the pointers to the StorageImpl and to the autograd metadata lie in a TensorImpl, and
    the gradient from there, in bytes; 0 where they were not found in one place."""
    get_grad = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(_address("grad"))
    storages, grads = [], []
    for tensor in samples:
        words = list(enumerate(_words(tensor)))
        storage = tensor.untyped_storage()._cdata
        storages.append({i * _WORD for i, word in words if word == storage})
        if isinstance(tensor, torch.nn.Parameter):
            grad = get_grad(tensor._cdata) or 0
            grads.append({(i * _WORD, grad - word) for i, word in words if 0 < grad - word < 256})
    storage_at, grad_at = set.intersection(*storages), set.intersection(*grads)
    meta = grad_at.pop() if len(grad_at) == 1 else (0, 0)
    return (storage_at.pop() if len(storage_at) == 1 else 0, *meta)


def _shim_numbers() -> tuple[dict[int, tuple[int, int]], dict[int, int]]:
    """DLPack's (code, bits) by torch's number of a dtype, its device type by that of a device."""

    def number(of: str) -> int:
        value: int = _function("torch_cpu", f"aoti_torch_{of}")()
        return value

    dtypes = {number(f"dtype_{str(dtype)[6:]}"): code for dtype, code in _FLOATING.items()}
    devices = {number(f"device_type_{name}"): DEVICES[name] for name in ("cpu", "cuda")}
    with suppress(RuntimeError):  # torch < 2.6 does not tell its number
        devices[number("device_type_xpu")] = DEVICES["xpu"]
    return dtypes, devices


# Switches C++ to a way once more, with the functions that were found.
Again = Callable[[], None]


def _use_reader(native: ModuleType, reader: str) -> Again:
    functions = {name: _address(name) for name in (*_ALWAYS, *READERS[reader])}
    numbers = _shim_numbers() if reader == "shim" else ({}, {})
    with _plain_torch():
        samples = _described()
        offset, undefined = _offset_of_tensor(samples), _undefined(samples)
        hints = _hints(samples)
    use = partial(native.use_direct, reader, offset, undefined, functions, *numbers, hints)
    return _now(use)


def _use_direct(native: ModuleType) -> Again:
    reasons: dict[str, None] = {}  # in their order, each once
    for reader in READERS:
        try:
            again = _use_reader(native, reader)
            check(native)
            return again
        except FAILURES as error:
            reasons[str(error)] = None
    raise RuntimeError("; ".join(reasons))


def _use_dlpack(native: ModuleType) -> Again:
    return _now(partial(native.use_dlpack, torch.Tensor.__dlpack_c_exchange_api__))


def _use_python(native: ModuleType) -> Again:
    return _now(partial(native.use_python, describe))


def _now(switch: Again) -> Again:
    switch()
    return switch


# What makes a way unfit: a name that is not there, or an answer that is wrong.
FAILURES = (RuntimeError, AttributeError, OSError, TypeError, ValueError)

# The fastest first. Each switches C++ to a way, unchecked, or raises one of FAILURES.
WAYS: dict[str, Callable[[ModuleType], Again]] = {
    "direct": _use_direct,
    "dlpack": _use_dlpack,
    "python": _use_python,
}
# To ask for one reader of the direct way, as tests do: "direct:shim".
BY_READER: dict[str, Callable[[ModuleType], Again]] = {
    f"direct:{reader}": partial(_use_reader, reader=reader) for reader in READERS
}


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Tensors that are made in here are real, whatever the caller's modes."""
    with torch.inference_mode(False), _disable_current_modes():
        yield


class _Wrapper(torch.Tensor):
    """A tensor that says that it is on the CPU and has no memory there, as FakeTensor does."""

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} of a tensor without memory")


def _described() -> list[torch.Tensor]:
    """Tensors that have a description."""
    cpu = torch.device("cpu")
    base = torch.arange(24.0, dtype=torch.float32, device=cpu).reshape(4, 6)
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=cpu))
    return [
        base,
        base.t(),
        base[1:, ::2],
        base[0, :1].expand(5, 3, 1),
        weight,
        torch.nn.Parameter(torch.ones((), dtype=torch.float64, device=cpu)),
        torch.zeros(0, 5, dtype=torch.float16, device=cpu),
        torch.ones((), dtype=torch.int64, device=cpu),
        torch.ones(2, 3, 4, 5, dtype=torch.float32, device=cpu).to(
            memory_format=torch.channels_last
        ),
    ]


def _undescribed() -> list[torch.Tensor]:
    """Tensors that must be turned away: without plain memory, or of a dtype that is not read."""
    cpu = torch.device("cpu")
    ones = torch.ones(3, device=cpu)
    other = (torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
    return [
        torch.tensor([1 + 2j], device=cpu).conj().imag,  # lazily negated
        torch.tensor([1 + 2j], device=cpu).conj(),
        ones.to_sparse(),
        torch.ones(3, device="meta"),
        torch.Tensor._make_wrapper_subclass(_Wrapper, (3,), dtype=torch.float32, device=cpu),
        *(torch.zeros(3, dtype=dtype, device=cpu) for dtype in other),
    ]


def _usable(description: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    """The description of a tensor that a kernel may be given, else None."""
    if description is None or tuple(description[3:5]) not in _FLOATING.values():
        return None
    return None if description[0] == 0 and 0 not in description[5] else description


def check(native: ModuleType) -> None:
    """Raises RuntimeError unless the reader in use agrees with Python on real tensors: on address,
    device, dtype, shape and strides, on what is no plain memory, on gradients and on versions."""
    with _plain_torch():
        for tensor in (*_described(), *_undescribed()):
            seen = native.describe(tensor)
            if _usable(seen) != _usable(describe(tensor)):
                raise RuntimeError(f"a tensor of {tensor.dtype} was read as {seen}")
        param = torch.nn.Parameter(torch.ones(3, device="cpu"))
        if native.grad_pointer(param) is not None:
            raise RuntimeError("a missing gradient was taken for one")
        param.grad = torch.ones(3, device="cpu")
        if native.grad_pointer(param) != param.grad.data_ptr():
            raise RuntimeError("a gradient was not found")
        param.grad = param.grad.to_sparse()
        if native.grad_pointer(param) is not None:
            raise RuntimeError("a sparse gradient was taken for a dense one")
        param.grad = None
        if native.grad_pointer(param) is not None:
            raise RuntimeError("a gradient that is gone was taken for one")
        version = param._version
        native.bump_versions([param])
        if param._version != version + 1:
            raise RuntimeError("a version counter was not bumped")
