"""The CUDA C++ driver for params on NVIDIA GPUs (csrc/cuda): one launch a step on each device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._native import _C, missing
from fusedopt.backends.native import DeviceHost, DeviceMemory, Driver, Native, Options

if TYPE_CHECKING:
    from fusedopt._C import CudaClip, CudaPlan
    from fusedopt.rule import Rule

_INFINITY = float("inf")

_BUILD: dict[str, Any] = {} if _C is None else _C.build_info()

# "cuda"; "cpu" in the build that emulates a GPU for tests.
_DEVICE_TYPE: str = _BUILD.get("cuda_device_type", "cuda")


def unavailable() -> str:
    if _C is None:
        return missing
    if _BUILD["cuda_archs"] == "none":
        return "fusedopt was built without CUDA (nvcc was not found, or failed)"
    if _DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason: str = _C.cuda_unavailable()
    return reason


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


class CudaDriver(Driver):
    def __init__(self, rule: Rule, device: torch.device) -> None:
        assert _C is not None
        self.plan: CudaPlan = _C.CudaPlan(rule.name)
        self.host = DeviceHost(rule, device)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        return self.plan.step(groups, state, self.host, *_arguments(options))

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        return self.plan.refresh(groups, state, self.host)

    def squared_norm(self, out: Tensor) -> None:
        self.plan.squared_norm(out, _stream(out.device))

    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        self.plan.apply(squared_norm, *_arguments(options))

    def roll_back(self) -> None:
        self.plan.roll_back()


def _arguments(options: Options) -> tuple[Any, ...]:
    """The options in the order of CudaPlan.step, and the stream."""
    return (
        options.norm,
        options.max_norm,
        options.clip_value,
        options.grad_scale,
        options.found_inf,
        options.skip_nonfinite,
        options.grad_norm,
        options.skipped_steps,
        _stream(options.device),
    )


step = Native("cuda", _DEVICE_TYPE, CudaDriver).step

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
    if not tensors or tensors[0].device.type != _DEVICE_TYPE or unavailable():
        return None
    assert _C is not None
    device = tensors[0].device
    stream = _stream(device)
    if (device, stream) not in _clips:
        _clips.setdefault((device, stream), (_C.CudaClip(), DeviceMemory(device)))
    native, host = _clips[device, stream]
    host.keep_for_graph()
    total = torch.zeros((), dtype=torch.float64, device=device)
    if native.run(tensors, host, norm, norm_only, max_norm, clip_value, total, stream):
        return None
    return total
