"""The CUDA driver itself: launches, uploads, equality with the CPU. Runs on the emulated GPU (see
test_cuda_emulator.py); on a real one by tests/test_gpu.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fusedopt
from fusedopt import _native, backends
from tests.cases import CASES, DTYPES, SHORT, Case, make_params, new_grads

_C = _native._C
pytestmark = pytest.mark.skipif(
    _C is None or _C.build_info()["cuda_archs"] != "emulated", reason="needs the emulated GPU"
)


def driver_of(optimizer: fusedopt.FusedOptimizer) -> Any:
    return optimizer._drivers["cuda", torch.device("cpu"), ()]


def launches() -> int:
    assert _C is not None
    count: int = _C.cuda_launches()
    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cpu_and_cuda_agree_bitwise(case: Case, dtype: torch.dtype) -> None:
    results = []
    for backend in ("cpu", "cuda"):
        params = make_params([1, 7, 8, 9, 255, 257, 16383, 16385, 40_001], dtype)
        optimizer = case.fused(params, backend=backend, clip_grad_value=0.7, **case.options)
        generator = torch.Generator().manual_seed(5)
        for _ in range(3):
            new_grads(params, generator)
            optimizer.step()
        tensors: list[Tensor] = [p.detach() for p in params]
        for p in params:
            tensors += [t for t in optimizer.state.get(p, {}).values() if t is not None]
        results.append(tensors)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_ten_thousand_tensors_of_three_dtypes_in_465_groups_are_one_launch() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    params = []
    for i, dtype in enumerate(dtypes):
        params += make_params([1 + n % 40 for n in range(i, 10_000, 3)], dtype, seed=i)
    groups = [{"params": params[g::465], "lr": 1e-3 * (1 + g % 7)} for g in range(465)]
    optimizer = fusedopt.FusedAdamW(groups, max_grad_norm=1.0, backend="cuda")
    uploads = []
    for _ in range(4):
        before = launches()
        optimizer.step()
        assert launches() - before == 1
        uploads.append(driver_of(optimizer).plan.uploads)
    # Table; gradient pointers and groups; then nothing.
    assert uploads == [2, 2, 2, 2]
    assert all(p.isfinite().all() for p in params)


def test_the_usual_step_uploads_nothing() -> None:
    params = make_params([100] * 50, torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=1e-3, max_grad_norm=1.0, backend="cuda")
    optimizer.step()
    plan = driver_of(optimizer).plan
    uploads = plan.uploads
    assert uploads == 1
    for i in range(5):
        for p in params:  # new gradients, another lr: both travel as arguments
            p.grad = torch.randn(100)
        optimizer.param_groups[0]["lr"] = 1e-3 * i
        optimizer.step()
    assert plan.uploads == uploads
    params[7].data = params[7].data.clone()
    optimizer.step()
    assert plan.uploads == uploads + 1


def test_a_first_step_that_is_skipped_is_followed_by_a_first_one() -> None:
    params = make_params([5, 70], torch.float32)
    twins = make_params([5, 70], torch.float32)
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "skip_nonfinite": True}
    ours = fusedopt.FusedSGD(params, backend="cuda", **options)
    same = fusedopt.FusedSGD(twins, backend="cpu", **options)
    good = [p.grad for p in params]
    for step in range(4):
        for group in (params, twins):
            for p, grad in zip(group, good, strict=True):
                p.grad = torch.full_like(p, float("inf")) if step in (0, 2) else grad
        ours.step()
        same.step()
    assert ours.skipped_steps.item() == 2
    for p, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(p, twin)
        key = "momentum_buffer"
        torch.testing.assert_close(ours.state[p][key], same.state[twin][key])


@pytest.mark.parametrize("way", list(_native.WAYS))
def test_each_way_of_reading_tensors_serves(way: str) -> None:
    before = _native._C.build_info()["tensor_access"]  # type: ignore[union-attr]
    try:
        _native.use_tensor_access(way)
    except RuntimeError as error:
        pytest.skip(str(error))
    try:
        params = make_params([5, 70], torch.float32)
        start = [p.detach().clone() for p in params]
        fusedopt.FusedAdamW(params, max_grad_norm=1.0, backend="cuda").step()
        assert fusedopt.clip_grad_norm_(params, 0.1) > 0.1
    finally:
        _native.use_tensor_access(before)
    assert not any(torch.equal(p, s) for p, s in zip(params, start, strict=True))


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_a_tensor_lr_is_read_by_the_kernel(case: Case) -> None:
    results = []
    for tensor in (True, False):
        params = make_params([33, 1000], torch.float32)
        lr: Any = torch.tensor(0.0625) if tensor else 0.0625
        optimizer = case.fused(params, backend="cuda", **{**case.options, "lr": lr})
        for value in (0.0625, 0.03125):
            if tensor:
                optimizer.param_groups[0]["lr"].fill_(value)
            else:
                optimizer.param_groups[0]["lr"] = value
            optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_wrong_geometry_is_refused() -> None:
    assert _C is not None
    for blocks, threads in [(-1, 0), (5000, 0), (0, 3), (0, 512), (0, -32)]:
        with pytest.raises(ValueError, match="must be"):
            _C.cuda_set_geometry(blocks, threads)


def test_scalars_of_a_wrong_type_are_refused() -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0, backend="cuda")
    optimizer.step()
    before = params[0].detach().clone()
    optimizer._norm_tensor = torch.zeros((), dtype=torch.float64)
    with pytest.raises(TypeError, match="grad_norm must be a 0-dim"):
        optimizer.step()
    assert torch.equal(params[0], before)


def test_two_launches_around_a_norm_that_is_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.native.distributed, "all_reduce_sum", lambda t, group: t.mul_(4))
    group = torch.distributed.ProcessGroup(0, 1)
    options = {"max_grad_norm": 0.5, "process_group": group, "backend": "cuda"}
    optimizer = fusedopt.FusedAdamW(make_params([1, 300], torch.float32), **options)
    before = launches()
    optimizer.step()
    assert launches() - before == 2
