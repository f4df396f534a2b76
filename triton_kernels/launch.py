"""Starts the kernel of a step: grid, compiler options, one launch or two."""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from fusedopt.triton_kernels.apply import step_kernel
from fusedopt.triton_kernels.norm import MAX_PROGRAMS, SQUARED
from fusedopt.triton_kernels.rules import RULES
from triton.runtime.interpreter import InterpretedFunction

INTERPRETED = isinstance(step_kernel, InterpretedFunction)

# Elements. The interpreter takes about as long for a large block as for a small one.
CHUNK = 1 << 16 if INTERPRETED else 1 << 14
INTERPRETED_PROGRAMS = 2


@dataclass(frozen=True)
class Config:
    """What can be tuned: elements of a block, and warps of a program."""

    block: int
    warps: int


# Enough for every rule without spilling, and two programs of 8 warps on a multiprocessor, which
# have 64 KiB in flight.
MAX_REGISTERS = 128

# Eight elements a thread: one 16-byte access of a 16-bit operand, two of a 32-bit one.
DEFAULT = Config(1 << 13, 1) if INTERPRETED else Config(2048, 8)


@dataclass(frozen=True)
class Table:
    """The table in device memory (csrc/host/triton_step.h)."""

    rows: int
    layouts: int
    chunks: int
    words: int
    row_count: int
    chunk_count: int
    kinds: tuple[int, ...]


@dataclass(frozen=True)
class Scalars:
    """Addresses on the device, 0 for none, and the limits. Addresses may be 2^63 and more, here
    and in a table: Intel's are."""

    grad_scale: int = 0
    found_inf: int = 0
    grad_norm: int = 0
    skipped_steps: int = 0
    max_norm: float = float("inf")
    clip_value: float = float("inf")


def target() -> str:
    """What kernels are compiled for: "cuda", "hip" or "xpu"."""
    return str(triton.runtime.driver.active.get_current_target().backend)


def compiler_options(backend: str, config: Config, barrier: bool) -> dict[str, Any]:
    """Of a kernel for a target; `barrier`: programs wait for each other."""
    options: dict[str, Any] = {
        "num_warps": config.warps,
        "enable_fp_fusion": False,  # as in C++: fma() where it is meant, nowhere else
    }
    if backend == "cuda":
        options["maxnreg"] = MAX_REGISTERS
    if barrier:
        options["launch_cooperative_grid"] = True
    return options


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes it the current device: kernels, streams and events are that one's."""
    if device.type == "cpu":
        return nullcontext()
    guard: AbstractContextManager[Any] = torch.get_device_module(device.type).device(device)
    return guard


def capturing(device: torch.device) -> bool:
    """Whether the current stream of the current device is being captured into a graph."""
    try:
        return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    except RuntimeError:  # a torch without CUDA, which tests pretend to have a device
        return False


def resident_programs(kernel: Any, warps: int, device: torch.device) -> int:
    """Programs that run at once. Only one on a multiprocessor of other devices than NVIDIA's, whose
    rules for registers are others: enough for the barrier to end."""
    limits = torch.get_device_module(device.type).get_device_properties(device)
    if device.type != "cuda" or torch.version.hip:
        return int(getattr(limits, "multi_processor_count", 0) or limits.max_compute_units)
    kernel.run  # noqa: B018  loads the kernel: its registers are known from then on
    registers = -(-kernel.n_regs // 8) * 8 * 32 * warps  # given out by 8 a thread
    shared = kernel.metadata.shared + 1024  # the driver keeps 1 KiB of each block
    fitting = min(
        limits.regs_per_multiprocessor // registers,
        limits.max_threads_per_multi_processor // (32 * warps),
        limits.shared_memory_per_multiprocessor // shared,
    )
    return min(int(limits.multi_processor_count) * max(fitting, 1), MAX_PROGRAMS.value)


class Launcher:
    """Launches the kernels of one rule on one device; keeps what was compiled."""

    def __init__(self, rule: str, device: torch.device, config: Config = DEFAULT) -> None:
        self.prepare, self.update = RULES[rule]
        self.device = device
        self.config = config
        self.launches = 0
        # Whether all programs of a grid can be made to run at once, to wait for each other.
        self.can_wait = not INTERPRETED and target() in ("cuda", "hip")
        self._compiled: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def step(
        self, table: Table, scalars: Scalars, workspace: int, clip: bool, skip_nonfinite: bool
    ) -> None:
        """A whole step: in one launch where programs can wait for each other, or need not."""
        if clip and not self.can_wait:
            squared = workspace + 8 * SQUARED.value
            self.norm(table, workspace, squared)
            self.apply(table, scalars, workspace, squared, clip, skip_nonfinite)
        else:
            self._launch(table, scalars, workspace, 0, (clip, True, clip, skip_nonfinite))

    def norm(self, table: Table, workspace: int, squared: int) -> None:
        """The squared norm of the gradients as they are stored, into a float64."""
        self._launch(table, Scalars(), workspace, squared, (True, False, False, False))

    def apply(
        self,
        table: Table,
        scalars: Scalars,
        workspace: int,
        squared: int,
        clip: bool,
        skip_nonfinite: bool,
    ) -> None:
        """The rest of the step."""
        self._launch(table, scalars, workspace, squared, (False, True, clip, skip_nonfinite))

    def _launch(
        self,
        table: Table,
        scalars: Scalars,
        workspace: int,
        squared: int,
        flags: tuple[bool, bool, bool, bool],
    ) -> None:
        arguments = (
            as_int64(table.rows),
            as_int64(table.layouts),
            as_int64(table.chunks),
            as_int64(table.words),
            table.row_count,
            table.chunk_count,
            as_int64(workspace),
            as_int64(scalars.grad_scale),
            as_int64(scalars.found_inf),
            as_int64(squared),
            as_int64(scalars.grad_norm),
            as_int64(scalars.skipped_steps),
            float_bits(scalars.max_norm),
            float_bits(scalars.clip_value),
            self.prepare,
            self.update,
            table.kinds,
            CHUNK,
            self.config.block,
            *flags,
        )
        self.launches += 1
        if INTERPRETED:
            step_kernel[(min(INTERPRETED_PROGRAMS, max(table.chunk_count, 1)),)](*arguments)
            return
        with on_device(self.device):
            key = (table.kinds, flags)
            if key not in self._compiled:
                if capturing(self.device):
                    raise RuntimeError(
                        "this step needs a kernel that is not loaded yet: run one step like it "
                        "before a CUDA graph is captured"
                    )
                barrier = flags[0] and flags[1]
                options = compiler_options(target(), self.config, barrier)
                kernel = step_kernel.warmup(*arguments, grid=(1,), **options)
                programs = resident_programs(kernel, self.config.warps, self.device)
                self._compiled[key] = kernel, programs
            kernel, programs = self._compiled[key]
            kernel[(max(1, min(programs, table.chunk_count)), 1, 1)](*arguments)


def as_int64(address: int) -> int:
    """The same 64 bits as a signed number, which is what kernels take."""
    return address if address < 1 << 63 else address - (1 << 64)


def float_bits(value: float) -> int:
    """The bits of a float64 as an int64."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
