"""Grids of the GPU drivers: clipping with fewer and with more chunks than blocks run at once, and
how many do, by the driver of the GPU itself."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests import gpu_params

pytestmark = pytest.mark.gpu
CHUNK = 1 << 14  # kChunk in csrc/cuda/step.h, CHUNK in triton_kernels/launch.py
# An H100 has 132 multiprocessors; each takes 2 programs of Triton's, and 4 blocks of C++.
CHUNKS = [1, 131, 132, 133, 263, 264, 265, 527, 528, 529, 1056, 10_000]


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach() for t in tensors])


def check_clipping(params: list[Parameter], backend: str) -> None:
    """Steps with one max_grad_norm after the other: each element counts once in the norm, and is
    updated once. Norm and coefficient are those of float64; torch's own float32 norm of as many
    elements is off by 1e-4."""
    twins = gpu_params.copies(params)
    optimizer = fusedopt.FusedSGD(params, lr=0.5, momentum=0.9, max_grad_norm=0.5, backend=backend)
    plain = torch.optim.SGD(twins, lr=0.5, momentum=0.9)
    grads = [p.grad.clone() for p in twins if p.grad is not None]
    norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt().item()
    assert torch.nn.utils.get_total_norm(grads).item() == pytest.approx(norm, rel=1e-3)
    for max_norm in (0.5, 8.0, 1e9):  # two that clip, and one that does not
        for twin, grad in zip(twins, grads, strict=True):
            twin.grad = grad * min(1.0, max_norm / (norm + 1e-6))
        optimizer.max_grad_norm = max_norm
        optimizer.step()
        plain.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.item() == pytest.approx(norm, rel=2e-7)
        # In one piece each: ten thousand comparisons would take a minute.
        torch.testing.assert_close(*map(joined, (params, twins)), rtol=2e-6, atol=2e-7)
        buffers = [
            joined([o.state[p]["momentum_buffer"] for p in o.param_groups[0]["params"]])
            for o in (optimizer, plain)
        ]
        torch.testing.assert_close(*buffers, rtol=2e-6, atol=1e-8)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("chunks", CHUNKS)
def test_clipping_of_one_tensor_in_so_many_chunks(chunks: int, backend: str) -> None:
    check_clipping(gpu_params.make([chunks * CHUNK - 5]), backend)


@pytest.mark.parametrize("chunks", [1, 132, 264, 10_000])
def test_clipping_of_so_many_tensors_of_a_chunk(chunks: int, backend: str) -> None:
    check_clipping(gpu_params.make([1 + i % 60 for i in range(chunks)]), backend)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("chunks", [1, 132, 264, 10_000])
def test_clip_grad_norm_of_so_many_chunks(chunks: int) -> None:
    params = gpu_params.make([chunks * CHUNK - 5])
    (twin,) = gpu_params.copies(params)
    for max_norm in (8.0, 0.5):
        ours = fusedopt.clip_grad_norm_(params, max_norm)
        theirs = torch.nn.utils.clip_grad_norm_([twin], max_norm)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)  # torch sums in float32
        torch.testing.assert_close(params[0].grad, twin.grad, rtol=1e-4, atol=1e-8)
        assert params[0].grad is not None
        after = params[0].grad.double().square().sum().sqrt().item()
        assert after == pytest.approx(max_norm, rel=1e-5)


def occupancy(kernel: Any, warps: int) -> int:
    """Programs of a loaded Triton kernel that a multiprocessor takes, as the driver says."""
    libcuda = ctypes.CDLL("libcuda.so.1")
    blocks = ctypes.c_int(-1)
    status = libcuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(
        ctypes.byref(blocks),
        ctypes.c_void_p(kernel.function),
        ctypes.c_int(32 * warps),
        ctypes.c_size_t(kernel.metadata.shared),
    )
    assert status == 0, f"CUresult {status}"
    return blocks.value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", [fusedopt.FusedAdamW, fusedopt.FusedSGD], ids=["adamw", "sgd"])
def test_programs_that_wait_for_each_other_are_those_that_run_at_once(
    rule: type[fusedopt.FusedOptimizer], dtype: torch.dtype
) -> None:
    from fusedopt.backends import triton

    if reason := triton.unavailable():
        pytest.skip(reason)
    from fusedopt.triton_kernels.norm import MAX_PROGRAMS
    from fusedopt.triton_kernels.tune import CANDIDATES

    device = torch.device("cuda", torch.cuda.current_device())
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for config in CANDIDATES:
        param = Parameter(torch.ones(1000, dtype=dtype, device=device))
        param.grad = torch.ones_like(param)
        optimizer = rule([param], lr=0.1, max_grad_norm=0.5, backend="triton")
        driver = triton.TritonDriver(optimizer.rule, device, config)
        optimizer._drivers["triton", device, ()] = driver
        optimizer.step()
        (compiled,) = driver.launcher._compiled.values()
        kernel, programs = compiled
        fitting = occupancy(kernel, config.warps)
        told = f"{config}: {kernel.n_regs} registers, {kernel.metadata.shared} bytes shared"
        assert fitting >= 1, told
        assert programs == min(processors * fitting, MAX_PROGRAMS.value), told


def traced(optimizer: fusedopt.FusedOptimizer, path: Path) -> dict[str, Any]:
    """What the profiler says of the one kernel of a step."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    (kernel,) = [e for e in events if e.get("cat") == "kernel"]
    assert "step_kernel" in kernel["name"]
    found: dict[str, Any] = kernel["args"]
    return found


@pytest.mark.parametrize("clip", [None, 1.0])
def test_the_grid_of_a_large_step_fills_the_device(
    clip: float | None, backend: str, tmp_path: Path
) -> None:
    limits = torch.cuda.get_device_properties(torch.cuda.current_device())
    params = gpu_params.make([4096 * CHUNK])
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=clip, backend=backend)
    for _ in range(2):
        optimizer.step()
    kernel = traced(optimizer, tmp_path / "trace.json")
    threads = kernel["block"][0]
    registers = -(-kernel["registers per thread"] // 8) * 8 * threads
    fitting = min(
        limits.regs_per_multiprocessor // registers,
        limits.max_threads_per_multi_processor // threads,
        limits.shared_memory_per_multiprocessor // (kernel["shared memory"] + 1024),
    )
    assert kernel["grid"] == [limits.multi_processor_count * fitting, 1, 1], kernel
    if backend == "cuda":
        assert threads == 256
        assert fitting >= 4, kernel
