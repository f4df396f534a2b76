"""Measuring on a CUDA device: time by events, host time, launches, memory, the copy that is the
floor, and what the results file says of the GPU."""

import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd import DeviceType

from bench.measure import Lane, Runner

DEVICE = "cuda"

# The copy whose bandwidth is the floor: 2^28 float32, 1 GiB read and 1 GiB written.
COPY_ELEMENTS = 1 << 28
COPY_BYTES = 8 * COPY_ELEMENTS
COPIES = 20  # a sample

MIN_STEPS, MAX_STEPS = 2, 100  # a sample

SMI_FIELDS = ("driver_version", "power.limit", "clocks.max.sm", "clocks.max.mem")
SMI_FIELDS_UNDER_LOAD = ("clocks.sm", "clocks.mem", "temperature.gpu")


@dataclass
class DeviceRunner(Runner):
    """Several steps back to back. A sample is their seconds by CUDA events through `steps`; the
    host's seconds in the same calls, which wait for nothing, go to `host_samples`."""

    steps: int = 1
    host_samples: list[float] = field(default_factory=list)

    def time(self) -> float:
        """Seconds of one step on the device, the host's gaps included where it is the slower."""
        self.before()
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        self.step()  # untimed: the device is at work when the first event is recorded
        begin.record()
        start = time.perf_counter_ns()
        for _ in range(self.steps):
            self.step()
        host = (time.perf_counter_ns() - start) / 1e9
        end.record()
        end.synchronize()
        self.after()
        self.host_samples.append(host / self.steps)
        seconds: float = begin.elapsed_time(end) / 1e3
        return seconds / self.steps


def steps_for(seconds: float, step: Callable[[], Any]) -> int:
    """How many steps take `seconds`, by the time of one, at least MIN_STEPS."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    count = math.ceil(seconds / (time.perf_counter() - start))
    return max(MIN_STEPS, min(count, MAX_STEPS))


class DeviceCopy:
    """`target.copy_(source)` of 1 GiB of random float32: the memory floor of a step."""

    def __init__(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)
        self.source = torch.randn(COPY_ELEMENTS, generator=generator, device=DEVICE)
        self.target = torch.empty_like(self.source)

    def run(self) -> None:
        self.target.copy_(self.source)

    def lane(self) -> Lane:
        """A lane that takes its turns among the contestants."""
        return Lane({"contestant": "copy"}, [DeviceRunner(self.run, steps=COPIES)])


def launches_of(step: Callable[[], Any]) -> dict[str, float]:
    """{launches, copies, device_s} of one step by torch.profiler: kernels, copies and fills, and
    the device's seconds in them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        step()
        torch.cuda.synchronize()
    # Ranges such as "Optimizer.step#AdamW.step" are shown on the device, but launch nothing.
    events = [
        event
        for event in profile.events()
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    copies = [event for event in events if event.name.startswith(("Memcpy", "Memset"))]
    return {
        "launches": len(events) - len(copies),
        "copies": len(copies),
        "device_s": sum(event.time_range.elapsed_us() for event in events) / 1e6,
    }


def extra_memory(step: Callable[[], Any]) -> int:
    """Bytes that one step allocates on top of what was allocated before, at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def free_memory() -> int:
    """Bytes of device memory that can be allocated."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def missing_device() -> str:
    """Why nothing can be measured here, or ""."""
    if torch.cuda.is_available():
        return ""
    cuda = torch.version.cuda
    built = f"built for CUDA {cuda}" if cuda else "built without CUDA"
    return f"an NVIDIA GPU is needed, but torch {torch.__version__} ({built}) finds none"


def nvidia_smi(fields: tuple[str, ...]) -> dict[str, str | None]:
    """What nvidia-smi says of the device; None for each field where it cannot be asked."""
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    command = ["nvidia-smi", f"--id=GPU-{uuid}"]
    command += [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(fields)
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def describe_gpu(copy: DeviceCopy) -> dict[str, Any]:
    """Name, memory, driver, clocks (also those under load, read while copies run)."""
    properties = torch.cuda.get_device_properties(0)
    idle = nvidia_smi(SMI_FIELDS)
    for _ in range(500):  # some tenths of a second, which the host does not wait for
        copy.run()
    load = nvidia_smi(SMI_FIELDS_UNDER_LOAD)
    torch.cuda.synchronize()
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_cache_mib": round(getattr(properties, "L2_cache_size", 0) / (1 << 20), 1),
        "cuda_of_torch": torch.version.cuda,
        **idle,
        "under_load": load,
    }
