"""What the native drivers share: memory on a device, and a step over several devices or ranks."""

from __future__ import annotations

import ctypes
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fusedopt import distributed
from fusedopt.backends.repeated import Repeated, StepBefore, Whole
from fusedopt.plan import Host
from fusedopt.rule import Rule

if TYPE_CHECKING:
    from fusedopt.backends import Request
    from fusedopt.optimizer import FusedOptimizer

_INFINITY = float("inf")


def capturing(device: torch.device) -> bool:
    """Whether the device's current stream is being captured into a graph."""
    if device.type != "cuda":
        return False
    if device.index is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


class Turn(NamedTuple):
    """What a step on a GPU runs on.

    Attributes:
        stream: the device's current stream.
        captures: whether it is being captured into a graph.
    """

    stream: Any
    captures: bool

    @property
    def handle(self) -> int:
        """The cudaStream_t; 0 for other kinds of streams."""
        return getattr(self.stream, "cuda_stream", 0)


class DeviceMemory:
    """Memory on one device, for a native driver to ask for. The driver may change streams: steps
    that share this memory run one after the other, and none of it is given back under one."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._runtime: Any = getattr(torch, device.type)
        self._memory: dict[str, Tensor] = {}
        self._captured: list[Tensor] = []  # what captured graphs read: alive for good
        # The last step outside of graphs: its stream, and an event after it. The stream may be
        # destroyed by the next step.
        self.last_stream: Any = None
        self._last_step: Any = None

    def begin(self, optimizer: Any) -> Turn | None:
        """Called before each step of an optimizer, or of None; returns None for the CPU."""
        if self.device.type == "cpu":
            return None
        turn = Turn(self._runtime.current_stream(self.device), capturing(self.device))
        if turn.captures:  # whoever replays the graph orders that with other steps
            known = {id(t) for t in self._captured}
            self._captured += [t for t in self._memory.values() if id(t) not in known]
        elif turn.stream != self.last_stream:
            if self._last_step is not None:
                turn.stream.wait_event(self._last_step)
            self._record(optimizer, turn.stream)
        return turn

    def end(self, turn: Turn | None) -> None:
        """Called after each begin() and what followed it."""
        if turn is None or turn.captures:
            return
        if self._last_step is None:
            self._last_step = self._runtime.Event()
        self._last_step.record(turn.stream)
        if turn.stream != self.last_stream:  # torch makes an object for each call
            self.last_stream = turn.stream

    def another_end(self) -> Callable[[], None] | None:
        """What end() does after one more step on the last stream; None for the CPU."""
        if self._last_step is None:
            return None
        return functools.partial(self._last_step.record, self.last_stream)

    def _record(self, optimizer: Any, stream: Any) -> None:
        """Tells the allocator that a stream uses this memory, and the optimizer's figures."""
        figures = [getattr(optimizer, n, None) for n in ("_norm_tensor", "_skipped_tensor")]
        for tensor in (*self._memory.values(), *figures):
            if tensor is not None and tensor.device == self.device:
                tensor.record_stream(stream)

    def upload(self, address: int, size: int, slot: str) -> int:
        """Copies bytes of the host to device memory, and returns their address there.

        Raises:
            RuntimeError: under graph capture, where a replay would read the host's memory again.
        """
        if capturing(self.device):
            raise RuntimeError(
                "the tensors of this step are not those of the step before: run one step with "
                "the same tensors before a CUDA graph is captured"
            )
        pinned = self.device.type != "cpu"
        source = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        ctypes.memmove(source.data_ptr(), address, size)
        # The pinned memory is reused only after the copy, the old table only after its kernels:
        # both allocators go by the stream, and begin() tells them of the others.
        self._memory[slot] = table = source.to(self.device, non_blocking=True, copy=True)
        return table.data_ptr()

    def workspace(self, size: int) -> Tensor:
        """`size` bytes, zeros at first, the same on each call."""
        if "workspace" not in self._memory:
            zeros = torch.zeros(size, dtype=torch.uint8, device=self.device)
            self._memory["workspace"] = zeros
        return self._memory["workspace"]

    def workspace_address(self, size: int) -> int:
        return self.workspace(size).data_ptr()


class DeviceHost(DeviceMemory, Host):
    """What the plan of one optimizer and device asks Python for."""

    def __init__(self, rule: Rule, device: torch.device) -> None:
        Host.__init__(self, rule)
        DeviceMemory.__init__(self, device)

    def new_state(self, param: Tensor, key: str) -> Tensor:
        """As Host, on the param's device."""
        if capturing(self.device):
            raise RuntimeError("run one step before a CUDA graph is captured: it makes the state")
        return super().new_state(param, key).to(param.device)

    def own_step(self, step: Tensor) -> Tensor | None:
        """As Host.

        Raises:
            RuntimeError: under graph capture, whose replays would begin with the copy.
        """
        if capturing(self.device):
            raise RuntimeError(
                "params share a step count: run one step before a CUDA graph is captured, which "
                "gives each its own"
            )
        return super().own_step(step)

    def fetch_lr(self, lr: Tensor, group: int) -> float:
        """The value of a tensor lr that lies on another device than the params.

        Raises:
            RuntimeError: under graph capture, which cannot wait for it.
        """
        if capturing(self.device):
            raise RuntimeError(
                f'param_groups[{group}]["lr"] is on {lr.device} and its params are on '
                f"{self.device}: a CUDA graph needs it on the params' device"
            )
        return float(lr)


@dataclass
class Options:
    """What a step on one device does; tensors lie on the device.

    Attributes:
        device: of the params.
        norm: whether the total norm is asked for.
        max_norm, clip_value: infinity where not asked for.
        grad_scale, found_inf: 0-dim float32, or None.
        grad_norm: 0-dim float32 that takes the total norm, or None.
        skipped_steps: 0-dim int64 that a skipped step adds 1 to, or None.
        stream: the cudaStream_t; 0 for other kinds of devices.
    """

    device: torch.device
    norm: bool
    max_norm: float
    clip_value: float
    grad_scale: Tensor | None
    found_inf: Tensor | None
    skip_nonfinite: bool
    grad_norm: Tensor | None
    skipped_steps: Tensor | None
    stream: int = 0


class Driver(ABC):
    """The plan and the memory of one optimizer for params on one device, or for some of them."""

    host: Host
    repeats: ClassVar[bool] = False  # whether it has a repeated_step()

    @abstractmethod
    def step(self, groups: list[dict[str, Any]], state: dict[Any, Any], options: Options) -> str:
        """One step over tensors on this device; "" or why it cannot serve them."""

    @abstractmethod
    def refresh(self, groups: list[dict[str, Any]], state: dict[Any, Any]) -> str:
        """The first part of a step whose norm is a sum over drivers or ranks: builds the table."""

    @abstractmethod
    def squared_norm(self, out: Tensor) -> None:
        """Between refresh and apply: the squared norm of the gradients as they are stored, into a
        0-dim float64 tensor."""

    @abstractmethod
    def apply(self, squared_norm: Tensor | None, options: Options) -> None:
        """The rest of the step, with the sum of the squared norms."""

    @abstractmethod
    def roll_back(self) -> None:
        """Ends the step after refresh, and takes back the state that was created."""

    def repeated_step(self, before: StepBefore) -> Repeated:
        """A function that does another step like the last one."""
        raise NotImplementedError


# Params that one driver takes: their device, and over which ranks their norm is summed.
Part = tuple[torch.device, distributed.NormGroups]


class Native:
    """The steps of one backend, over params on devices of one type."""

    def __init__(
        self,
        name: str,
        device_type: str,
        new_driver: Callable[[Rule, torch.device], Driver],
        unserved: Callable[[Rule, torch.device], str] = lambda rule, device: "",
    ) -> None:
        self._name = name
        self._type = device_type
        self._new_driver = new_driver
        self._unserved = unserved  # why a rule cannot run on a device, or ""

    def step(self, optimizer: FusedOptimizer, request: Request) -> str:
        device = next(_devices(optimizer), None)
        if device is None:
            return self._step_without_gradients(optimizer, request)
        if device.type != self._type:
            return f"the first param with a gradient is not on a {self._type} device"
        reason = self._unserved(optimizer.rule, device)
        if reason:
            return reason
        if not (request.needs_norm and request.process_group is not None):
            driver = self._driver(optimizer, (device, ()))
            # The norm of DTensors is a sum over ranks. To have met one is to meet it again.
            driver.host.refuses_dtensors = request.needs_norm
            if not (request.needs_norm and driver.host.met_dtensor):
                turn = driver.host.begin(optimizer)
                try:
                    options = _options(optimizer, request, device, device, turn)
                    reason = driver.step(optimizer.param_groups, optimizer.state, options)
                finally:
                    driver.host.end(turn)
                if not reason:
                    if driver.repeats and not (turn is not None and turn.captures):
                        optimizer._whole = Whole(driver, options, driver.host.last_stream)
                    return ""
            if not driver.host.met_dtensor and all(d == device for d in _devices(optimizer)):
                return reason
        if any(d.type != self._type for d in _devices(optimizer)):
            return f"not all params with a gradient are on a {self._type} device"
        return self._step_in_parts(optimizer, request, device)

    def _step_without_gradients(self, optimizer: FusedOptimizer, request: Request) -> str:
        """Changes nothing; but other ranks may have gradients, and wait for this one's share."""
        first = next((p for group in optimizer.param_groups for p in group["params"]), None)
        device = torch.device(self._type) if first is None else first.device
        if device.type != self._type:
            return f"the first param is not on a {self._type} device"
        if capturing(device):
            raise RuntimeError("no param has a gradient: a CUDA graph of this step would be empty")
        if request.needs_norm:
            self._step_in_parts(optimizer, request, device)
        return ""

    def _driver(self, optimizer: FusedOptimizer, part: Part) -> Driver:
        key = (self._name, *part)
        if key not in optimizer._drivers:
            optimizer._drivers.setdefault(key, self._new_driver(optimizer.rule, part[0]))
        driver: Driver = optimizer._drivers[key]
        return driver

    def _step_in_parts(
        self, optimizer: FusedOptimizer, request: Request, main: torch.device
    ) -> str:
        """A step whose norm spans devices or ranks: the norm of each part, their sum, the update.
        The figures are written on the main device."""
        parts, kinds = _parts(optimizer, request.process_group)
        for device, _ in parts:
            reason = self._unserved(optimizer.rule, device)
            if reason:
                return reason
        drivers = {part: self._driver(optimizer, part) for part in parts}
        refreshed: list[Driver] = []
        turns = {part: driver.host.begin(optimizer) for part, driver in drivers.items()}
        try:
            for part, driver in drivers.items():
                driver.host.refuses_dtensors = False
                groups = _groups_of(optimizer, parts[part])
                reason = driver.refresh(groups, optimizer.state)
                if reason:
                    for other in refreshed:
                        other.roll_back()
                    return reason
                refreshed.append(driver)
            total: Tensor | None = None
            if request.needs_norm:
                squares = torch.zeros(len(kinds), dtype=torch.float64, device=main)
                for (device, kind), driver in drivers.items():
                    part_squares = torch.zeros((), dtype=torch.float64, device=device)
                    driver.squared_norm(part_squares)
                    squares[kinds.index(kind)] += part_squares.to(main)
                total = distributed.sum_over_ranks(squares, kinds)
            if total is not None and not drivers:
                scale = 1.0 if request.grad_scale is None else request.grad_scale.to(main)
                optimizer._norm_buffer(main).copy_(total.sqrt() / scale)
            figures_on: torch.device | None = main
            for part, driver in drivers.items():
                device = part[0]
                squared = None if total is None else total.to(device)
                options = _options(optimizer, request, device, figures_on, turns[part])
                driver.apply(squared, options)
                if device == main:  # once
                    figures_on = None
        except BaseException:
            for driver in refreshed:
                driver.roll_back()
            raise
        finally:
            for part, driver in drivers.items():
                driver.host.end(turns[part])
        return ""


def _devices(optimizer: FusedOptimizer) -> Iterator[torch.device]:
    """Of each param with a gradient."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                yield param.device


def _parts(
    optimizer: FusedOptimizer, process_group: Any
) -> tuple[dict[Part, set[int]], list[distributed.NormGroups]]:
    """The parts with the ids of their params that have gradients; and all kinds of norm groups,
    those of params without gradients, too: in the same order on each rank."""
    parts: dict[Part, set[int]] = {}
    kinds: dict[distributed.NormGroups, None] = {}
    for group in optimizer.param_groups:
        for param in group["params"]:
            kind = distributed.norm_groups(param, process_group)
            kinds[kind] = None
            if param.grad is not None:
                parts.setdefault((param.device, kind), set()).add(id(param))
    return parts, list(kinds)


def _groups_of(optimizer: FusedOptimizer, chosen: set[int]) -> list[dict[str, Any]]:
    """The param groups with only some of their params."""
    return [
        {**group, "params": [p for p in group["params"] if id(p) in chosen]}
        for group in optimizer.param_groups
    ]


def _options(
    optimizer: FusedOptimizer,
    request: Request,
    device: torch.device,
    figures_on: torch.device | None,
    turn: Turn | None,
) -> Options:
    """For one of the devices; figures are written where it is `figures_on`."""
    max_norm, clip_value = request.max_grad_norm, request.clip_grad_value
    figures = device == figures_on
    return Options(
        device,
        norm=request.needs_norm,
        max_norm=_INFINITY if max_norm is None else max_norm,
        clip_value=_INFINITY if clip_value is None else clip_value,
        grad_scale=_on(request.grad_scale, device),
        found_inf=_on(request.found_inf, device),
        skip_nonfinite=request.skip_nonfinite,
        grad_norm=optimizer._norm_buffer(device) if figures and request.needs_norm else None,
        skipped_steps=optimizer._skipped_buffer(device) if figures else None,
        stream=0 if turn is None else turn.handle,
    )


def _on(scalar: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scalar is None else scalar.to(device, torch.float32)
