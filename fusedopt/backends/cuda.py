"""The CUDA C++ driver for params on NVIDIA GPUs (csrc/cuda): one launch a step on each device."""

from __future__ import annotations

import functools
import re
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt._native import _C, missing
from fusedopt.backends.native import (
    DeviceHost,
    DeviceMemory,
    Driver,
    Native,
    Options,
    capturing,
)
from fusedopt.backends.repeated import Answer, Repeated, StepBefore

if TYPE_CHECKING:
    from fusedopt._C import CudaClip, CudaPlan
    from fusedopt.rule import Rule

_INFINITY = float("inf")

_BUILD: dict[str, Any] = {} if _C is None else _C.build_info()

# "cuda"; "cpu" in the build that emulates a GPU for tests.
DEVICE_TYPE: str = _BUILD.get("cuda_device_type", "cuda")


def unavailable() -> str:
    if _C is None:
        return missing
    if _BUILD["cuda_archs"] == "none":
        return "fusedopt was built without CUDA (no nvcc, or FUSEDOPT_CUDA_ARCHS left it out)"
    if DEVICE_TYPE == "cuda" and not torch.cuda.is_available():
        return "torch finds no CUDA device"
    reason: str = _C.cuda_unavailable()
    if reason:
        return reason
    reasons = [not_compiled_for(c) for c in _C.cuda_capabilities()]
    return reasons[0] if all(reasons) else ""


def not_compiled_for(capability: int) -> str:
    """Why the kernels do not run on devices of a compute capability (90 is 9.0), or "".

    They run on those that they were compiled for; on later minor versions of these, too (100f; but
    not 90a); and as PTX of the last one, on all later versions.
    """
    archs = _BUILD["cuda_archs"]
    compiled = [(int(number), kind) for number, kind in re.findall(r"\b(\d+)([af]?)\b", archs)]
    for number, kind in compiled:
        later_minor = number // 10 == capability // 10 and number < capability
        if number == capability or (later_minor and kind != "a"):
            return ""
    if not compiled:  # the emulated GPU
        return ""
    last, kind = compiled[-1]
    if "PTX" in archs and last < capability and kind == "":
        return ""
    return f"the kernels were compiled for sm_{archs}, and the device is sm_{capability}"


# Why the kernels of a rule (clip_'s for "") do not run on a device.
_unserved: dict[tuple[str, torch.device], str] = {}


def unserved(rule: str, device: torch.device) -> str:
    """Why a rule's kernel does not run on a device that holds params, or "". Asked of CUDA once."""
    key = (rule, device)
    if key in _unserved:
        return _unserved[key]
    reason = unavailable()
    if not reason:
        if capturing(device):  # no time to load kernels
            return ""
        assert _C is not None
        index = device.index or 0
        reason = not_compiled_for(_C.cuda_capabilities()[index])
        if not reason:
            with _current(device):
                reason = _C.cuda_unserved(rule, index) if rule else _C.cuda_clip_unserved(index)
        if reason:
            reason = f"{device}: {reason}"
    _unserved[key] = reason
    return reason


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Makes a device the current one, as torch does: a thread that has used no device goes back to
    device 0 without a context there."""
    return torch.cuda.device(device.index) if device.type == "cuda" else nullcontext()


def _stream(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    stream: int = torch.cuda.current_stream(device).cuda_stream
    return stream


class CudaDriver(Driver):
    repeats = True

    def __init__(self, rule: Rule, device: torch.device) -> None:
        assert _C is not None
        self.plan: CudaPlan = _C.CudaPlan(rule.name)
        self.host: DeviceHost = DeviceHost(rule, device)

    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        with _current(options.device):
            return self.plan.step(groups, state, self.host, *_arguments(options))

    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        with _current(self.host.device):
            return self.plan.refresh(groups, state, self.host)

    def squared_norm(self, out: Tensor) -> None:
        with _current(self.host.device):
            self.plan.squared_norm(out, _stream(out.device))

    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        with _current(options.device):
            self.plan.apply(squared_norm, *_arguments(options))

    def roll_back(self) -> None:
        self.plan.roll_back()

    def repeated_step(self, before: StepBefore) -> Repeated:
        answers = [*before.answers, *_answers(self.host)]
        after = self.host.another_end()
        stream = getattr(self.host.last_stream, "cuda_stream", 0)
        return self.plan.repeated_step(self.host, *before._replace(answers=answers), stream, after)


def _answers(host: DeviceHost) -> list[Answer]:
    """What a repeated step asks of torch: no guard is needed where its device is the current one,
    and no order where its stream is that of the step before."""
    if host.device.type != "cuda":
        return []
    index = host.device.index
    return [
        (torch.cuda._is_in_bad_fork, False),  # CUDA cannot be used; torch's functions say so
        (torch._C._cuda_getDevice, index),
        (
            functools.partial(torch._C._cuda_getCurrentRawStream, index),
            host.last_stream.cuda_stream,
        ),
        (torch._C._cuda_isCurrentStreamCapturing, False),
    ]


def _arguments(options: Options) -> tuple[Any, ...]:
    """The options in the order of CudaPlan.step."""
    return (
        options.norm,
        options.max_norm,
        options.clip_value,
        options.grad_scale,
        options.found_inf,
        options.skip_nonfinite,
        options.grad_norm,
        options.skipped_steps,
        options.stream,
    )


step = Native(
    "cuda", DEVICE_TYPE, CudaDriver, lambda rule, device: unserved(rule.name, device)
).step


class _Clips(threading.local):
    """The kernels' memory for clip_ on each device: one for each thread, so that none waits for
    another's stream. It is taken out while it is used: a call may come in between, from a finalizer
    for one."""

    def __init__(self) -> None:
        self.free: dict[torch.device, tuple[CudaClip, DeviceMemory]] = {}


_clips = _Clips()
_captured: list[tuple[CudaClip, DeviceMemory]] = []  # each is a graph's alone, and alive for good


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
    if not tensors or tensors[0].device.type != DEVICE_TYPE:
        return None
    device = tensors[0].device
    if unserved("", device):
        return None
    assert _C is not None
    native, memory = _clips.free.pop(device, None) or (_C.CudaClip(), DeviceMemory(device))
    turn = memory.begin(None)
    try:
        total = torch.zeros((), dtype=torch.float64, device=device)
        stream = 0 if turn is None else turn.handle
        with _current(device):
            options = (norm, norm_only, max_norm, clip_value, total, stream)
            reason = native.run(tensors, memory, *options)
    finally:
        memory.end(turn)
        _clips.free[device] = native, memory
    if turn is not None and turn.captures:
        _captured.append(_clips.free.pop(device))
    return None if reason else total
