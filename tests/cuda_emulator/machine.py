"""The emulated GPU's machine as a test sets it up, and tensors that pretend to lie on its devices.

In a process with FUSEDOPT_EMULATED_GPUS set, the emulated extension takes tensors of type "cuda".
`Gpus` makes those: plain tensors in host memory, of which torch is made to say that they are on
cuda:0 or cuda:1.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

from fusedopt import _native
from fusedopt.backends import cuda


class Machine:
    """tests/cuda_emulator/machine.h, new: one device, of which no call has made a context."""

    def __init__(self) -> None:
        assert _native._C is not None
        self._library = ctypes.CDLL(_native._C.__file__)
        self._library.cuda_emulator_reset()
        cuda._unserved.clear()

    def set(self, name: str, value: int, device: int = 0) -> None:
        self._library.cuda_emulator_set(name.encode(), device, value)

    def calls(self) -> list[str]:
        """Such as "context 0", "set 1", "launch 1 on 7", "synchronize"."""
        text = ctypes.create_string_buffer(1 << 20)
        self._library.cuda_emulator_calls(text, len(text))
        return text.value.decode().splitlines()

    def clear(self) -> None:
        """Forgets the calls, and keeps the contexts."""
        self._library.cuda_emulator_clear()

    def device(self) -> int:
        """The current device of this thread."""
        index = ctypes.c_int()
        self._library.cudaGetDevice(ctypes.byref(index))
        return index.value

    def set_device(self, index: int) -> None:
        self._library.cudaSetDevice(index)

    def has_context(self, index: int) -> bool:
        return bool(self._library.cuda_emulator_has_context(index))


class Stream:
    """What the code asks of a torch.cuda.Stream."""

    def __init__(self, gpus: Gpus, handle: int) -> None:
        self.gpus, self.cuda_stream = gpus, handle

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.cuda_stream == self.cuda_stream

    def __hash__(self) -> int:
        return hash(self.cuda_stream)

    def wait_event(self, event: Event) -> None:
        self.gpus.log.append(f"{self.cuda_stream} waits for {event.recorded}")


class Event:
    """What the code asks of a torch.cuda.Event."""

    recorded = ""

    def __init__(self) -> None:
        self.made_by = threading.get_ident()

    def record(self, stream: Stream) -> None:
        assert stream.cuda_stream not in stream.gpus.destroyed
        self.recorded = f"step {stream.gpus.launches()} on {stream.cuda_stream}"


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value.partition(":")[0] in ("cpu", "cuda")
    )


class Gpus(TorchFunctionMode):
    """torch with `count` GPUs, while the mode is active in this thread.

    Attributes:
        machine: the emulated one.
        log: what streams waited for, and which tensors' memory was recorded on them.
        capturing: devices whose current stream is being captured.
        destroyed: handles of streams that are no longer there.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
        super().__init__()
        self.machine = Machine()
        self.machine.set("devices", count)
        self.log: list[str] = []
        self.capturing: set[int] = set()
        self.destroyed: set[int] = set()
        self._streams: dict[int, int] = {}
        self._target = threading.local()  # torch's device of a thread without a context
        self._places: dict[int, int] = {}  # of each storage, by address
        self._kept: list[Tensor] = []  # so that no address comes again
        outer = self

        class device:  # as torch.cuda.device
            def __init__(self, index: Any) -> None:
                self.index = index.index if isinstance(index, torch.device) else index

            def __enter__(self) -> None:
                self.before = outer.current_device()
                outer.exchange(self.index)

            def __exit__(self, *_: Any) -> None:
                outer.maybe_exchange(self.before)

        for name, value in {
            "is_available": lambda: True,
            "device_count": lambda: count,
            "current_device": self.current_device,
            "current_stream": self.stream,
            "is_current_stream_capturing": lambda: self.current_device() in self.capturing,
            "device": device,
            "Event": Event,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_cuda_getDevice": self.current_device,
            "_cuda_getCurrentRawStream": lambda index: self._streams.get(index, 0),
            "_cuda_isCurrentStreamCapturing": lambda: self.current_device() in self.capturing,
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        # torch looks at the stream before it asks the mode.
        monkeypatch.setattr(Tensor, "record_stream", self._record_stream())

    def _record_stream(self) -> Any:
        def record_stream(tensor: Tensor, stream: Stream) -> None:
            self.log.append(f"{stream.cuda_stream} keeps {tensor.dtype} x {tensor.numel()}")

        return record_stream

    # c10/cuda/CUDAFunctions.cpp

    def current_device(self) -> int:
        target: int = getattr(self._target, "index", -1)
        return target if target >= 0 else self.machine.device()

    def exchange(self, index: int) -> None:
        target = getattr(self._target, "index", -1)
        self._target.index = -1
        if target >= 0 or self.machine.device() != index:
            self.machine.set_device(index)

    def maybe_exchange(self, index: int) -> None:
        if self.machine.device() == index:
            return
        if self.machine.has_context(index):
            self.machine.set_device(index)
        else:
            self._target.index = index

    def stream(self, device: Any = None) -> Stream:
        index = self.current_device() if device is None else torch.device(device).index
        return Stream(self, self._streams.get(index, 0))

    def use_stream(self, index: int, handle: int) -> None:
        self._streams[index] = handle

    def launches(self) -> int:
        assert _native._C is not None
        return int(_native._C.cuda_launches())

    # Where tensors are

    def place(self, tensor: Tensor) -> int | None:
        return self._places.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None

    def put(self, tensor: Tensor, index: int) -> Tensor:
        """Makes a tensor one on a device."""
        self._places[tensor.untyped_storage().data_ptr()] = index
        self._kept.append(tensor)
        return tensor

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return torch.device(*args, **kwargs)
        if func == Tensor.device.__get__ and self.place(args[0]) is not None:
            return torch.device("cuda", self.place(args[0]))
        kwargs.pop("pin_memory", None)
        asked = [torch.device(a) for a in (*args, *kwargs.values()) if _is_device(a)]
        if not asked:
            return self._placed(func(*args, **kwargs), args)
        args = tuple("cpu" if _is_device(a) else a for a in args)
        result = func(*args, **{k: "cpu" if _is_device(v) else v for k, v in kwargs.items()})
        index: int | None = None
        if asked[0].type == "cuda":
            index = self.current_device() if asked[0].index is None else asked[0].index
        if self.place(result) == index:
            return result
        result = result.clone()
        return result if index is None else self.put(result, index)

    def _placed(self, result: Any, args: Any) -> Any:
        """The result of an operation is where its first operand is."""
        places = [self.place(a) for a in tree_iter(args) if isinstance(a, Tensor)]
        index = next((p for p in places if p is not None), None)
        for tensor in tree_iter(result):
            if index is not None and isinstance(tensor, Tensor) and tensor.numel():
                self._kept.append(tensor)
                self._places.setdefault(tensor.untyped_storage().data_ptr(), index)
        return result
