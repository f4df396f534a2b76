"""The CUDA and the Triton driver on a real GPU. Skipped where there is none;
tests/test_cuda_emulator.py and tests/test_triton.py run the same kernels' source there."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _native, backends, fallback
from fusedopt.tensor_access import DEVICES, describe
from tests.cases import CASES, DTYPES, SHORT, Case, make_params, new_grads

pytestmark = pytest.mark.gpu
SIZES = [1, 7, 8, 9, 255, 257, 16383, 16385, 300_001]


def assert_agree(backend: str, on_cpu: list[Tensor], on_gpu: list[Tensor]) -> None:
    """CUDA computes the bits of the CPU; Triton derives its scalars in float64 alone."""
    for a, b in zip(on_cpu, on_gpu, strict=True):
        if backend == "cuda" or not a.is_floating_point():
            assert torch.equal(a, b)
        else:
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(b, a, rtol=4 * eps, atol=eps / 100)


def on_gpu(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    """The same params and gradients on the GPU."""
    moved = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    copy_grads(params, moved)
    return moved


def copy_grads(params: list[torch.nn.Parameter], moved: list[torch.nn.Parameter]) -> None:
    for p, m in zip(params, moved, strict=True):
        assert p.grad is not None
        m.grad = p.grad.cuda()


def tensors_of(optimizer: fusedopt.FusedOptimizer) -> list[Tensor]:
    """Params and state, on the CPU."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach().cpu())
            found += [t.cpu() for t in optimizer.state.get(p, {}).values() if t is not None]
    return found


def adamw(numels: list[int], backend: str, **options: Any) -> fusedopt.FusedAdamW:
    params = on_gpu(make_params(numels, torch.float32))
    optimizer = fusedopt.FusedAdamW(params, lr=1e-2, backend=backend, **options)
    optimizer.step()
    return optimizer


@pytest.fixture
def no_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_and_gpu_agree(case: Case, dtype: torch.dtype, backend: str) -> None:
    params = make_params(SIZES, dtype)
    moved = on_gpu(params)
    on_cpu = case.fused(params, backend="cpu", **case.options)
    on_device = case.fused(moved, backend=backend, **case.options)
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        new_grads(params, generator)
        copy_grads(params, moved)
        on_cpu.step()
        on_device.step()
    assert_agree(backend, tensors_of(on_cpu), tensors_of(on_device))


@pytest.mark.parametrize("grad", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_mixed_dtypes_agree(case: Case, grad: torch.dtype, backend: str) -> None:
    params = make_params(SIZES, torch.bfloat16, grad_dtype=grad)
    moved = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    for p, m in zip(params, moved, strict=True):
        assert p.grad is not None
        m.grad_dtype = grad
        m.grad = p.grad.cuda()
    optimizers = [
        case.fused(params, backend="cpu", **case.options),
        case.fused(moved, backend=backend, **case.options),
    ]
    for optimizer in optimizers:
        optimizer.step()
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if name != "step" and value is not None:
                    entry[name] = value.float()
        optimizer.step()
    assert_agree(backend, *map(tensors_of, optimizers))


WIDE = [  # param, gradient and state; max_grad_norm. Triton compiles two kernels for each.
    ((torch.float64, torch.float64, torch.float64), None),
    ((torch.float64, torch.float64, torch.float64), 0.5),
    ((torch.float64, torch.float32, torch.float32), None),
    ((torch.float32, torch.float64, torch.float32), None),
    ((torch.bfloat16, torch.bfloat16, torch.float64), None),
]


@pytest.mark.parametrize(("dtypes", "clip"), WIDE, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_float64_operands_agree(
    case: Case, dtypes: tuple[torch.dtype, ...], clip: float | None, backend: str
) -> None:
    param, grad, state = dtypes
    params = make_params(SIZES, param, grad_dtype=grad)
    moved = [torch.nn.Parameter(p.detach().cuda()) for p in params]
    for p, m in zip(params, moved, strict=True):
        assert p.grad is not None
        m.grad_dtype = grad
        m.grad = p.grad.cuda()
    optimizers = [
        case.fused(params, backend="cpu", max_grad_norm=clip, **case.options),
        case.fused(moved, backend=backend, max_grad_norm=clip, **case.options),
    ]
    for optimizer in optimizers:
        optimizer.step()
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if name != "step" and value is not None:
                    entry[name] = value.to(state)
        optimizer.step()
    if clip is None:
        assert_agree(backend, *map(tensors_of, optimizers))
    else:  # the norm is summed in another order
        for a, b in zip(*map(tensors_of, optimizers), strict=True):
            eps = torch.finfo(a.dtype).eps
            torch.testing.assert_close(b, a, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_layouts_and_offsets_agree(case: Case, backend: str) -> None:
    def build(device: str) -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(3)
        params = []
        for offset in range(1, 9):
            base = torch.randn(1000, generator=generator).to(device)
            grad = torch.randn(1000, generator=generator).to(device)
            params.append(torch.nn.Parameter(base[offset : offset + 900]))
            params[-1].grad = grad[offset // 2 : offset // 2 + 900]
        for view in (lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[::3]):
            base = torch.randn(60, 40, generator=generator).to(device)
            grad = torch.randn(60, 40, generator=generator).to(device)
            params.append(torch.nn.Parameter(view(base)))
            params[-1].grad = view(grad).contiguous()
        return params

    optimizers = [
        case.fused(build("cpu"), backend="cpu", **case.options),
        case.fused(build("cuda"), backend=backend, **case.options),
    ]
    for optimizer in optimizers:
        optimizer.step()
        optimizer.step()
    assert_agree(backend, *map(tensors_of, optimizers))


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_clipping_agrees_with_the_cpu(case: Case, backend: str) -> None:
    params = make_params(SIZES, torch.float32)
    moved = on_gpu(params)
    optimizers = [
        case.fused(params, backend="cpu", max_grad_norm=0.5, **case.options),
        case.fused(moved, backend=backend, max_grad_norm=0.5, **case.options),
    ]
    for optimizer in optimizers:
        optimizer.step()
    norms = [o.grad_norm.cpu() for o in optimizers if o.grad_norm is not None]
    torch.testing.assert_close(norms[1], norms[0], rtol=1e-6, atol=0)
    for a, b in zip(*map(tensors_of, optimizers), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7)


def test_the_norm_is_bitwise_deterministic() -> None:
    grads = [torch.randn(1_000_003, device="cuda") for _ in range(9)]
    norms = {fusedopt.get_total_norm(grads).item() for _ in range(20)}
    assert len(norms) == 1


def test_clip_functions_as_torch() -> None:
    for dtype in DTYPES:
        ours, theirs = (on_gpu(make_params(SIZES, dtype)) for _ in range(2))
        norm = fusedopt.clip_grad_norm_(ours, 0.3)
        want = torch.nn.utils.clip_grad_norm_(theirs, 0.3)
        tolerance = (
            {"rtol": 1e-5, "atol": 1e-6} if dtype.itemsize > 2 else {"rtol": 2e-2, "atol": 1e-3}
        )
        torch.testing.assert_close(norm.float(), want.float(), **tolerance)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, **tolerance)
        fusedopt.clip_grad_value_(ours, 1e-3)
        torch.nn.utils.clip_grad_value_(theirs, 1e-3)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.grad, b.grad, **tolerance)


@pytest.mark.usefixtures("no_sync")
def test_a_step_does_not_wait_for_the_device(backend: str) -> None:
    torch.cuda.set_sync_debug_mode("default")
    optimizer = adamw([100, 70_000], backend, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    for _ in range(3):
        optimizer.step()


def test_a_log_is_one_copy_from_the_device(backend: str) -> None:
    optimizer = adamw([100, 70_000], backend, max_grad_norm=1.0, skip_nonfinite=True)
    for _ in range(2):
        optimizer.step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        figures = optimizer.log()
    assert sum("Memcpy DtoH" in event.name for event in profile.events()) == 1
    assert optimizer.grad_norm is not None
    norm = optimizer.grad_norm.item()
    coef = min(1.0, 1.0 / (norm + 1e-6))
    assert figures == {"clip_coef": coef, "grad_norm": norm, "skipped_steps": 0.0}


def test_a_gpu_without_kernels_brings_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "_warned", False)
    monkeypatch.setattr(backends.cuda, "unavailable", lambda: "no nvcc")
    monkeypatch.setattr(backends.cuda, "unserved", lambda rule, device: "no nvcc")
    monkeypatch.setattr(backends.triton, "unavailable", lambda: "no triton")
    optimizer = fusedopt.FusedAdamW(on_gpu(make_params([100], torch.float32)))
    said = "cuda: no nvcc; triton: no triton; the reference backend serves params on cuda"
    with pytest.warns(RuntimeWarning, match=said):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert optimizer.backend_in_use == "reference"


def test_one_launch_a_step_and_no_allocation(backend: str) -> None:
    params = []
    for i, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16]):
        params += on_gpu(make_params([1 + n % 40 for n in range(i, 10_000, 3)], dtype, seed=i))
    groups = [{"params": params[g::465]} for g in range(465)]
    optimizer = fusedopt.FusedAdamW(groups, lr=1e-3, max_grad_norm=1.0, backend=backend)
    for _ in range(2):
        optimizer.step()
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    names = [  # torch's range around step() is among the events of the device, too
        e.name
        for e in kernels
        if "Memcpy" not in e.name and "Memset" not in e.name and not e.is_user_annotation
    ]
    assert len(names) == 1, names
    assert "step_kernel" in names[0]
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations


def test_a_skipped_step_changes_nothing(backend: str) -> None:
    params = on_gpu(make_params([5, 1000], torch.float32))
    optimizer = fusedopt.FusedSGD(
        params, lr=0.1, momentum=0.9, dampening=0.5, skip_nonfinite=True, backend=backend
    )
    before = [p.detach().clone() for p in params]
    grads = [p.grad for p in params]
    params[1].grad = torch.full_like(params[1], float("inf"))
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    assert not optimizer.state
    for p, old, grad in zip(params, before, grads, strict=True):
        assert torch.equal(p, old)
        p.grad = grad
    optimizer.step()  # the first one that counts: momentum begins undampened
    for p, old, grad in zip(params, before, grads, strict=True):
        assert grad is not None
        torch.testing.assert_close(p.detach(), old - 0.1 * grad)


def test_grad_scaler_clips_after_unscaling(backend: str) -> None:
    params, plain = (on_gpu(make_params([33, 5000], torch.float32)) for _ in range(2))
    optimizer = fusedopt.FusedAdamW(params, lr=1e-2, max_grad_norm=0.1, backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    loss = sum((p * p).sum() for p in params)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    reference = torch.optim.AdamW(plain, lr=1e-2)
    reference.zero_grad()
    sum((p * p).sum() for p in plain).backward()  # type: ignore[union-attr]
    torch.nn.utils.clip_grad_norm_(plain, 0.1)
    reference.step()
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_graph_replays_honour_lr_and_advance_step(backend: str) -> None:
    params = on_gpu(make_params([300, 20_000], torch.float32))
    lr = torch.tensor(1e-2, device="cuda")
    optimizer = fusedopt.FusedAdamW(
        params, lr=lr, max_grad_norm=1.0, capturable=True, backend=backend
    )
    plain = [torch.nn.Parameter(p.detach().clone()) for p in params]
    copy_grads(params, plain)
    reference = fusedopt.FusedAdamW(plain, lr=1e-2, max_grad_norm=1.0, backend=backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    warm_ups = 1 if backend == "cuda" else 2  # Triton's table says which state is new
    with torch.cuda.stream(side):
        for _ in range(warm_ups):
            optimizer.step()
            reference.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for value in (1e-2, 5e-3, 1e-3):
        lr.fill_(value)
        graph.replay()
        reference.param_groups[0]["lr"] = lr.item()
        reference.step()
    assert optimizer.state[params[0]]["step"].item() == warm_ups + 3
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b)


def test_capture_of_a_first_step_is_refused(backend: str) -> None:
    params = on_gpu(make_params([300], torch.float32))
    optimizer = fusedopt.FusedAdamW(params, lr=1e-2, backend=backend)
    with (
        pytest.raises(RuntimeError, match="run one step"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    assert not optimizer.state


def test_capture_of_a_kernel_that_is_not_loaded_is_refused() -> None:
    if reason := backends.BACKENDS["triton"].unavailable():
        pytest.skip(reason)
    optimizer = adamw([300], "triton")
    optimizer.step()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    optimizer.max_grad_norm = 1.0
    with (
        pytest.raises(RuntimeError, match="run one step like it before"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()
    for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
        assert torch.equal(p, old)
    optimizer.step()


@pytest.fixture
def untuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a tuning that begins anew."""
    if reason := backends.BACKENDS["triton"].unavailable():
        pytest.skip(reason)
    monkeypatch.setenv("FUSEDOPT_CACHE", str(tmp_path))
    monkeypatch.delenv("FUSEDOPT_AUTOTUNE", raising=False)
    return tmp_path


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_tuning_measures_on_the_params_device(device: str, untuned: Path) -> None:
    if torch.device(device).index >= torch.cuda.device_count():
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    states = torch.cuda.get_rng_state_all()
    param = torch.nn.Parameter(torch.ones(1000, device=device))
    param.grad = torch.ones_like(param)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all candidates work
        fusedopt.FusedAdamW([param], backend="triton").step()
    (file,) = untuned.iterdir()
    times = json.loads(file.read_text())["adamw"]["milliseconds"]
    # 2^24 float32 of four operands and 28 bytes: no GPU moves them in 20 us.
    assert len(times) == 4
    assert all(time > 0.02 for time in times.values())
    assert torch.cuda.current_device() == 0
    for before, after in zip(states, torch.cuda.get_rng_state_all(), strict=True):
        assert torch.equal(before, after)


def test_capture_without_gradients_is_refused(backend: str) -> None:
    optimizer = adamw([300], backend)
    optimizer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="no param has a gradient"), torch.cuda.graph(graph):
        optimizer.step()


def test_a_side_stream(backend: str) -> None:
    params = on_gpu(make_params([1 << 20], torch.float32))
    twins = on_gpu(make_params([1 << 20], torch.float32))
    ours = fusedopt.FusedAdamW(params, lr=1e-2, backend=backend)
    same = fusedopt.FusedAdamW(twins, lr=1e-2, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            ours.step()
    torch.cuda.current_stream().wait_stream(stream)
    for _ in range(5):
        same.step()
    assert torch.equal(params[0], twins[0])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_params_on_two_devices_share_one_norm(backend: str) -> None:
    params = make_params([1000, 2000], torch.float32)
    moved = [torch.nn.Parameter(p.detach().to(f"cuda:{i}")) for i, p in enumerate(params)]
    for p, m in zip(params, moved, strict=True):
        assert p.grad is not None
        m.grad = p.grad.to(m.device)
    fusedopt.FusedAdamW(params, lr=1e-2, max_grad_norm=0.1, backend="cpu").step()
    with torch.cuda.device(0):
        fusedopt.FusedAdamW(moved, lr=1e-2, max_grad_norm=0.1, backend=backend).step()
        assert torch.cuda.current_device() == 0
    for p, m in zip(params, moved, strict=True):
        torch.testing.assert_close(m.detach().cpu(), p.detach())


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("numel", [2**31 + 1, 2**32 + 1])
def test_more_elements_than_32_bits_can_count(numel: int, backend: str) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 6 * numel:
        pytest.skip(f"needs {6 * numel / 1e9:.0f} GB of device memory")
    grad = torch.randn(numel, dtype=torch.bfloat16, device="cuda")
    param = torch.nn.Parameter(torch.zeros(numel, dtype=torch.bfloat16, device="cuda"))
    param.grad = grad
    fusedopt.FusedSGD([param], lr=1.0, backend=backend).step()
    for new, old in zip(param.detach().split(2**28), grad.split(2**28), strict=True):
        assert torch.equal(new, -old)


def test_checkpoints_pass_between_devices_and_torch(backend: str) -> None:
    optimizer = adamw([40, 5000], backend, max_grad_norm=1.0)
    saved = optimizer.state_dict()
    assert all(e["step"].device.type == "cpu" for e in saved["state"].values())
    device = [torch.nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]]
    host = [torch.nn.Parameter(p.detach().cpu()) for p in device]
    others = [
        torch.optim.AdamW(device, lr=1e-2, fused=True),
        fusedopt.FusedAdamW(host, lr=1e-2, backend="cpu"),
    ]
    for other in others:
        other.load_state_dict(copy.deepcopy(saved))  # torch would share its tensors
        for p, source in zip(
            other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True
        ):
            p.grad = source.grad.to(p.device)
        other.step()
    optimizer.max_grad_norm = None
    optimizer.step()
    for p, d, h in zip(optimizer.param_groups[0]["params"], device, host, strict=True):
        torch.testing.assert_close(d, p)
        assert_agree(backend, [h.detach()], [p.detach().cpu()])


def test_tensors_on_the_gpu_are_read_as_python_sees_them(tensor_access: str) -> None:
    assert _native._C is not None
    for tensor in (
        torch.ones(3, 4, device="cuda").t(),
        torch.ones((), device="cuda", dtype=torch.bfloat16),
        torch.ones(5, device="cuda", dtype=torch.float64)[1:],
        torch.zeros(0, 3, device="cuda", dtype=torch.float16),
    ):
        seen = _native._C.describe(tensor)
        assert seen == describe(tensor)
        assert seen[1:3] == (DEVICES["cuda"], tensor.device.index)
    sparse = torch.eye(3, device="cuda").to_sparse()
    negated = torch.tensor([1 + 2j], device="cuda").conj().imag
    assert [_native._C.describe(t) for t in (sparse, negated)] == [None, None]


@pytest.mark.parametrize("skipped", [False, True])
def test_step_counts_of_another_make(skipped: bool, backend: str) -> None:
    """Those on the device and those in shared memory stay what they are; others are moved."""
    counts = {
        "one float32": torch.ones(1, device="cuda"),
        "int64": torch.ones((), dtype=torch.int64, device="cuda"),
        "one float64": torch.ones(1, dtype=torch.float64, device="cuda"),
        "shared": torch.ones(1, dtype=torch.int64).share_memory_(),
        "on the cpu": torch.ones(()),
        "bfloat16": torch.ones((), dtype=torch.bfloat16, device="cuda"),
    }
    optimizer = adamw([40] * len(counts), backend)
    twin = adamw([40] * len(counts), backend)
    params = optimizer.param_groups[0]["params"]
    for p, own in zip(params, counts.values(), strict=True):
        optimizer.state[p]["step"] = own
    for subject in (optimizer, twin):
        if skipped:
            subject.found_inf = torch.ones((), device="cuda")
        subject.step()
    expected = 1 if skipped else 2
    for p, q, (kind, own) in zip(
        params, twin.param_groups[0]["params"], counts.items(), strict=True
    ):
        assert torch.equal(p, q)
        step = optimizer.state[p]["step"]
        assert step.item() == expected
        assert (step is own) == (kind not in ("on the cpu", "bfloat16"))
        assert step is own or (step.device == p.device and step.dtype == torch.float32)


def test_a_step_count_on_the_gpu_of_a_param_on_the_cpu() -> None:
    params = make_params([40], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend="cpu")
    optimizer.step()
    own = torch.ones(1, dtype=torch.int64, device="cuda")
    optimizer.state[params[0]]["step"] = own
    optimizer.step()
    assert optimizer.state[params[0]]["step"] is own
    assert own.item() == 2
