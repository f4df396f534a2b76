"""The CUDA C++ driver for params on NVIDIA GPUs (csrc/cuda): one launch a step on each device."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._native import _C, missing
from fusedopt.distributed import all_reduce_sum
from fusedopt.plan import Host, as_step

if TYPE_CHECKING:
    from fusedopt._C import CudaClip, CudaPlan
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer
    from fusedopt.rule import Rule

_INFINITY = float("inf")

_BUILD: dict[str, Any] = {} if _C is None else _C.build_info()

# "cuda"; "cpu" in the build that emulates a GPU for tests.
DEVICE_TYPE: str = _BUILD.get("cuda_device_type", "cuda")


def unavailable() -> str:
    if _C is None:
        return missing
    if _BUILD["cuda_archs"] == "none":
        return "fusedopt was built without CUDA (nvcc was not found, or failed)"
    if DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason: str = _C.cuda_unavailable()
    return reason


class DeviceMemory:
    """Memory on one device, for the native driver to ask for."""

    def __init__(self) -> None:
        self._memory: dict[str, Tensor] = {}
        self._captured: list[Tensor] = []  # what captured graphs read: alive for good

    def upload(self, address: int, size: int, slot: str, index: int) -> int:
        """Copies bytes of the host to device memory, and returns their address there.

        Raises:
            RuntimeError: under graph capture, where a replay would read the host's memory again.
        """
        if _capturing():
            raise RuntimeError(
                "the tensors of this step are not those of the step before: run one step with "
                "the same tensors before a CUDA graph is captured"
            )
        pinned = DEVICE_TYPE == "cuda"
        source = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        ctypes.memmove(source.data_ptr(), address, size)
        # The pinned memory is reused only after the copy, the old table only after its kernels:
        # both allocators go by the stream.
        self._memory[slot] = table = source.to(_device(index), non_blocking=True, copy=True)
        return table.data_ptr()

    def workspace(self, size: int, index: int) -> int:
        """The address of `size` bytes, zeros at first, the same on each call."""
        if "workspace" not in self._memory:
            self._memory["workspace"] = torch.zeros(size, dtype=torch.uint8, device=_device(index))
        return self._memory["workspace"].data_ptr()

    def keep_for_graphs(self) -> None:
        """Keeps all memory of this step alive: a graph that is being captured will read it."""
        known = {id(t) for t in self._captured}
        self._captured += [t for t in self._memory.values() if id(t) not in known]


class CudaHost(Host, DeviceMemory):
    """What the CUDA plan of one optimizer and device asks Python for."""

    def __init__(self, rule: Rule) -> None:
        Host.__init__(self, rule)
        DeviceMemory.__init__(self)

    def new_state(self, param: Tensor, key: str) -> Tensor:
        """As Host, on the param's device."""
        if _capturing():
            raise RuntimeError("run one step before a CUDA graph is captured: it makes the state")
        return super().new_state(param, key).to(param.device)

    def normalise_step(self, param: Tensor, state: dict[str, Any]) -> None:
        state["step"] = as_step(state["step"]).to(param.device)


def _device(index: int) -> torch.device:
    return torch.device("cuda", index) if DEVICE_TYPE == "cuda" else torch.device("cpu")


def _capturing() -> bool:
    return DEVICE_TYPE == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    if DEVICE_TYPE != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


_clips: dict[tuple[torch.device, int], tuple[CudaClip, DeviceMemory]] = {}


def clip_(
    tensors: list[Tensor],
    *,
    norm: bool,
    norm_only: bool = False,
    max_norm: float = _INFINITY,
    clip_value: float = _INFINITY,
) -> Tensor | None:
    """Scales gradients in place, in one launch; or, with norm_only, takes their total L2 norm.

    Args:
        tensors: gradients on one CUDA device.
        norm: scale by min(1, max_norm / (total norm + 1e-6)).
        clip_value: clamp each element to +-this.

    Returns:
        The total norm as a 0-dim float64 tensor on the device (0 without `norm`), or None where
        the kernels cannot serve these tensors.
    """
    if not tensors or tensors[0].device.type != DEVICE_TYPE or unavailable():
        return None
    assert _C is not None
    device = tensors[0].device
    stream = _stream(device)
    if (device, stream) not in _clips:
        _clips.setdefault((device, stream), (_C.CudaClip(), DeviceMemory()))
    native, host = _clips[device, stream]
    if _capturing():
        host.keep_for_graphs()
    total = torch.zeros((), dtype=torch.float64, device=device)
    if native.run(tensors, host, norm, norm_only, max_norm, clip_value, total, stream):
        return None
    return total


class Driver:
    """The plan and the memory of one optimizer on one device."""

    def __init__(self, rule: Rule) -> None:
        assert _C is not None
        self.plan: CudaPlan = _C.CudaPlan(rule.name)
        self.host = CudaHost(rule)


def step(optimizer: FusedOptimizer, request: Request) -> str:
    device = next(_devices(optimizer), None)
    if device is None:
        return _step_without_gradients(optimizer, request)
    if device.type != DEVICE_TYPE:
        return f"the first param with a gradient is not on a {DEVICE_TYPE} device"
    if not (request.needs_norm and request.process_group is not None):
        driver = _driver(optimizer, device)
        options = _options(optimizer, request, device, device)
        tensors = optimizer.param_groups, optimizer.state, driver.host
        reason: str = driver.plan.step(*tensors, *options)
        if not reason:
            return ""
    devices = list(dict.fromkeys(_devices(optimizer)))
    if any(d.type != DEVICE_TYPE for d in devices):
        return f"not all params with a gradient are on a {DEVICE_TYPE} device"
    if len(devices) == 1 and request.process_group is None:
        return reason
    return _step_in_parts(optimizer, request, devices)


def _step_without_gradients(optimizer: FusedOptimizer, request: Request) -> str:
    """Changes nothing; but other ranks may have gradients, and wait for this one's share."""
    if _capturing():
        raise RuntimeError("no param has a gradient: a CUDA graph of this step would do nothing")
    first = next((p for group in optimizer.param_groups for p in group["params"]), None)
    device = torch.device(DEVICE_TYPE) if first is None else first.device
    if device.type != DEVICE_TYPE:
        return f"the first param is not on a {DEVICE_TYPE} device"
    if request.needs_norm:
        squared = torch.zeros((), dtype=torch.float64, device=device)
        if request.process_group is not None:
            squared = all_reduce_sum(squared, request.process_group)
        scale = 1.0 if request.grad_scale is None else request.grad_scale.to(device)
        optimizer._norm_buffer(device).copy_(squared.sqrt() / scale)
    return ""


def _devices(optimizer: FusedOptimizer) -> Iterator[torch.device]:
    """Of each param with a gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                yield param.device


def _driver(optimizer: FusedOptimizer, device: torch.device) -> Driver:
    drivers: dict[torch.device, Driver] = optimizer.__dict__.setdefault("_cuda_drivers", {})
    if device not in drivers:
        drivers.setdefault(device, Driver(optimizer.rule))
    driver = drivers[device]
    if _capturing():
        driver.host.keep_for_graphs()
    return driver


def _options(
    optimizer: FusedOptimizer, request: Request, device: torch.device, main: torch.device
) -> tuple[Any, ...]:
    """The arguments of CudaPlan.step for one device; the figures are written on the main one."""
    max_norm, clip_value = request.max_grad_norm, request.clip_grad_value
    return (
        request.needs_norm,
        _INFINITY if max_norm is None else max_norm,
        _INFINITY if clip_value is None else clip_value,
        _on(request.grad_scale, device),
        _on(request.found_inf, device),
        request.skip_nonfinite,
        optimizer._norm_buffer(main) if request.needs_norm and device == main else None,
        optimizer._skipped_buffer(main) if device == main else None,
        _stream(device),
    )


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device, torch.float32)


def _step_in_parts(optimizer: FusedOptimizer, request: Request, devices: list[torch.device]) -> str:
    """A step whose norm spans devices or ranks: the norm of each device, their sum, the update."""
    main = devices[0]
    drivers = {device: _driver(optimizer, device) for device in devices}
    refreshed: list[Driver] = []
    try:
        for device, driver in drivers.items():
            reason = driver.plan.refresh(
                _groups_on(optimizer, device), optimizer.state, driver.host
            )
            if reason:
                for other in refreshed:
                    other.plan.roll_back()
                return reason
            refreshed.append(driver)
        total: Tensor | None = None
        if request.needs_norm:
            parts = []
            for device, driver in drivers.items():
                part = torch.empty((), dtype=torch.float64, device=device)
                driver.plan.squared_norm(part, _stream(device))
                parts.append(part.to(main))
            total = torch.stack(parts).sum()
            if request.process_group is not None:
                total = all_reduce_sum(total, request.process_group)
        for device, driver in drivers.items():
            squared = None if total is None else total.to(device)
            driver.plan.apply(squared, *_options(optimizer, request, device, main))
    except BaseException:
        for driver in refreshed:
            driver.plan.roll_back()
        raise
    return ""


def _groups_on(optimizer: FusedOptimizer, device: torch.device) -> list[dict[str, Any]]:
    """The param groups with only the params on one device."""
    return [
        {**group, "params": [p for p in group["params"] if p.device == device]}
        for group in optimizer.param_groups
    ]
