"""What only a real GPU can show of streams, threads, contexts and several devices. Skipped where
there is none; tests/test_cuda_devices.py shows the calls that lead there."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from fusedopt import backends
from fusedopt.backends import cuda
from tests.cases import make_params

pytestmark = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def on_gpu(numels: list[int], device: str = "cuda") -> list[Parameter]:
    params = make_params(numels, torch.float32)
    moved = [Parameter(p.detach().to(device)) for p in params]
    for p, m in zip(params, moved, strict=True):
        assert p.grad is not None
        m.grad = p.grad.to(device)
    return moved


def python(code: str) -> None:
    """Runs code in a process that has not met CUDA."""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_steps_on_two_streams_do_not_meet_in_the_workspace(backend: str) -> None:
    numels = [1 << 22, 1 << 22]
    params, twins = on_gpu(numels), on_gpu(numels)
    ours, same = (
        fusedopt.FusedAdamW(ps, lr=1e-2, max_grad_norm=0.1, backend=backend)
        for ps in (params, twins)
    )
    grads = [(p.grad, t.grad) for p, t in zip(params, twins, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for _ in range(20):  # each stream has a param of its own: nothing orders them but the workspace
        for active, stream in enumerate(streams):
            for i, (p, t) in enumerate(zip(params, twins, strict=True)):
                p.grad, t.grad = grads[i] if i == active else (None, None)
            with torch.cuda.stream(stream):
                ours.step()
            same.step()
    torch.cuda.synchronize()
    for p, t in zip(params, twins, strict=True):
        assert torch.equal(p, t)


def test_an_optimizer_that_dies_while_its_step_runs_on_another_stream(backend: str) -> None:
    params, twins = on_gpu([1 << 24]), on_gpu([1 << 24])
    same = fusedopt.FusedSGD(twins, lr=0.1, max_grad_norm=0.1, backend=backend)
    ours = fusedopt.FusedSGD(params, lr=0.1, max_grad_norm=0.1, backend=backend)
    for optimizer in (ours, same):
        optimizer.step()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        ours.step()
    del ours, optimizer
    garbage = [torch.full((1 << 14,), 255, dtype=torch.uint8, device="cuda") for _ in range(200)]
    same.step()
    torch.cuda.synchronize()
    assert len(garbage) == 200
    assert torch.equal(params[0], twins[0])


def test_params_that_share_a_step_count(backend: str) -> None:
    params = on_gpu([7] * 500)
    optimizer = fusedopt.FusedAdamW(params, lr=1e-2, backend=backend)
    optimizer.step()
    for p in params[1:]:
        optimizer.state[p]["step"] = optimizer.state[params[0]]["step"]
    for other in (copy.deepcopy(optimizer), optimizer):
        for p in other.param_groups[0]["params"]:
            p.grad = torch.ones(7, device="cuda")
        for _ in range(2):
            other.step()
        assert {e["step"].item() for e in other.state.values()} == {3.0}


def test_other_threads_run_while_a_first_step_waits() -> None:
    if reason := cuda.unavailable():
        pytest.skip(reason)
    fusedopt.FusedAdamW(on_gpu([100]), backend="cuda").step()  # kernels are loaded
    optimizer = fusedopt.FusedAdamW(on_gpu([100]), skip_nonfinite=True, backend="cuda")
    torch.cuda._sleep(1_000_000_000)  # about half a second
    ticks: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    optimizer.step()
    end = time.perf_counter()
    done.set()
    thread.join()
    assert end - begin > 0.1, "the step did not wait"
    inside = [t for t in ticks if begin < t < end]
    assert max(b - a for a, b in zip([begin, *inside], [*inside, end], strict=True)) < 0.1


def test_threads_clip_on_streams_of_their_own() -> None:
    wrong: list[float] = []
    ended: list[int] = []

    def work(seed: int) -> None:
        generator = torch.Generator("cuda").manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            param = Parameter(torch.empty(1 << 20, device="cuda"))
            for _ in range(50):
                param.grad = torch.randn(1 << 20, device="cuda", generator=generator)
                expected = param.grad.double().norm().item()
                found = fusedopt.clip_grad_norm_([param], 1.0).item()
                after = param.grad.double().norm().item()
                if abs(found / expected - 1) > 1e-6 or abs(after - 1) > 1e-4:
                    wrong.append(found)
        ended.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert sorted(ended) == [0, 1, 2, 3]


def test_captured_clipping_beside_eager_clipping() -> None:
    params, others = on_gpu([1 << 20]), on_gpu([1 << 20])
    grads: list[Tensor] = [p.grad.clone() for p in (*params, *others) if p.grad is not None]
    fusedopt.clip_grad_norm_(params, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fusedopt.clip_grad_norm_(params, 0.5)
    stream = torch.cuda.Stream()
    for _ in range(20):
        for p, grad in zip((*params, *others), grads, strict=True):
            assert p.grad is not None
            p.grad.copy_(grad)
        torch.cuda.synchronize()
        graph.replay()
        with torch.cuda.stream(stream):
            fusedopt.clip_grad_norm_(others, 0.5)
        torch.cuda.synchronize()
        for p in (*params, *others):
            assert p.grad is not None
            assert p.grad.double().norm().item() == pytest.approx(0.5, rel=1e-4)


def test_auto_goes_on_where_the_kernels_were_not_compiled_for_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if reason := cuda.unavailable():
        pytest.skip(reason)
    assert cuda.unserved("adamw", torch.device("cuda", 0)) == ""
    monkeypatch.setitem(cuda._BUILD, "cuda_archs", "20")
    monkeypatch.setattr(cuda, "_unserved", {})
    assert "the kernels were compiled for sm_20" in cuda.unavailable()
    optimizer = fusedopt.FusedAdamW(on_gpu([100]), lr=0.1)
    optimizer.step()
    expected = "reference" if backends.triton.unavailable() else "triton"
    assert optimizer.backend_in_use == expected


def test_an_optimizer_over_cpu_params_leaves_cuda_to_forked_processes() -> None:
    python(
        "import os, torch, fusedopt\n"
        "param = torch.nn.Parameter(torch.ones(5)); param.grad = torch.ones(5)\n"
        "fusedopt.FusedAdamW([param], max_grad_norm=1.0).step()\n"
        "fusedopt.clip_grad_norm_([param], 1.0)\n"
        "assert not torch.cuda.is_initialized()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    torch.ones(5, device='cuda').sum().item(); os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )


@two_gpus
def test_a_fresh_thread_makes_no_context_on_device_0() -> None:
    python(
        "import threading, torch, fusedopt\n"
        "param = torch.nn.Parameter(torch.ones(5, device='cuda:1'))\n"
        "param.grad = torch.ones_like(param)\n"
        "has = torch._C._cuda_hasPrimaryContext\n"
        "assert has(1) and not has(0)\n"
        "optimizer = fusedopt.FusedAdamW([param], max_grad_norm=1.0, backend='cuda')\n"
        "found = []\n"
        "def work():\n"
        "    for _ in range(2): optimizer.step()\n"
        "    fusedopt.clip_grad_norm_([param], 1.0)\n"
        "    found.append(torch.cuda.current_device())\n"
        "thread = threading.Thread(target=work); thread.start(); thread.join()\n"
        "assert found == [0] and not has(0)\n"
    )


@two_gpus
def test_a_capture_on_the_current_device_is_not_that_of_the_params() -> None:
    params = on_gpu([100], "cuda:1")
    with torch.cuda.device(0):
        graph = torch.cuda.CUDAGraph()
        value = torch.ones(5, device="cuda:0")
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            value += 1
            fusedopt.FusedAdamW(params, lr=0.1, backend="cuda").step()
    assert torch.isfinite(params[0]).all()


@two_gpus
def test_a_tensor_lr_on_another_device(backend: str) -> None:
    results = []
    for device in ("cuda:0", "cuda:1"):
        params = on_gpu([100], "cuda:1")
        lr: Any = torch.tensor(0.125, device=device)
        fusedopt.FusedSGD(params, lr=lr, backend=backend).step()
        results.append(params[0])
    assert torch.equal(*results)


@two_gpus
def test_gradients_on_one_device_alone(backend: str) -> None:
    params = [*on_gpu([100], "cuda:0"), *on_gpu([200], "cuda:1")]
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0, skip_nonfinite=True, backend=backend)
    grads = [p.grad for p in params]
    for active in ((0, 1), (1,), (0,)):
        for i, p in enumerate(params):
            p.grad = grads[i] if i in active else None
        optimizer.step()
        assert optimizer.grad_norm is not None
        assert optimizer.grad_norm.device.index == active[0]
        assert optimizer.skipped_steps.item() == 0
