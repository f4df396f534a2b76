"""The Triton driver itself: launches, uploads, blocks, agreement with the CPU driver. Runs under
Triton's interpreter (see test_triton.py)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedopt
from fusedopt.backends import triton
from tests.cases import DTYPES, SHORT, Case, make_params, new_grads

pytestmark = pytest.mark.skipif(not triton.interpreted(), reason="needs TRITON_INTERPRET=1")


def driver_of(optimizer: fusedopt.FusedOptimizer) -> Any:
    return optimizer._drivers["triton", torch.device("cpu"), ()]


@pytest.mark.parametrize("programs", [1, 3, 7])
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_any_number_of_programs(case: Case, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.triton_kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED_PROGRAMS", programs)
    results = []
    for backend in ("triton", "cpu"):
        params = make_params([1, 300, 65_536, 70_000, 131_073], torch.float32)
        optimizer = case.fused(params, backend=backend, max_grad_norm=1.0, **case.options)
        for _ in range(2):
            optimizer.step()
        assert optimizer.grad_norm is not None
        results.append([optimizer.grad_norm, *(p.detach() for p in params)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-8)


F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize(
    "dtypes",
    [(F64, F64, F64), (F64, F32, F32), (F32, F64, F32), (F32, F32, F64), (BF16, BF16, F64)],
    ids=str,
)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_float64_operands_agree_with_the_cpu(
    case: Case, dtypes: tuple[torch.dtype, ...], clip: float | None
) -> None:
    param, grad, state = dtypes  # test_gpu.py has the same for a GPU
    results = []
    for backend in ("triton", "cpu"):
        params = make_params([1, 300, 70_000], param, grad_dtype=grad)
        optimizer = case.fused(params, backend=backend, max_grad_norm=clip, **case.options)
        optimizer.step()
        for entry in optimizer.state.values():
            for name, value in entry.items():
                if name != "step" and value is not None:
                    entry[name] = value.to(state)
        optimizer.step()
        entries = [t for e in optimizer.state.values() for t in e.values() if t is not None]
        results.append([p.detach() for p in params] + entries)
    for a, b in zip(*results, strict=True):
        eps = torch.finfo(a.dtype).eps
        # With a norm, whose sum has another order, the last bit of all products may differ.
        tolerance = (4 * eps, eps / 100) if clip is None else (8 * eps, eps)
        torch.testing.assert_close(a, b, rtol=tolerance[0], atol=tolerance[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_aligned_and_misaligned_blocks_agree_bitwise(dtype: torch.dtype) -> None:
    # The same values, with every operand on a 16-byte boundary and with one off it.
    results = []
    for offset in (0, 1):
        (param,) = make_params([20_000], dtype)
        memory = torch.zeros(20_001, dtype=dtype)
        memory[offset : offset + 20_000] = param.detach()
        moved = torch.nn.Parameter(memory[offset : offset + 20_000])
        assert param.grad is not None
        moved.grad = param.grad
        assert moved.data_ptr() % 16 == offset * dtype.itemsize
        optimizer = fusedopt.FusedAdamW([moved], lr=0.01, backend="triton")
        optimizer.step()
        results.append(moved.detach().clone())
        assert memory[20_000 * (1 - offset)] == 0
    assert torch.equal(*results)


def test_uploads_and_launches() -> None:
    params = make_params([100] * 20, torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=1e-3, backend="triton")
    seen = []
    for step in range(4):
        if step == 3:
            optimizer.param_groups[0]["lr"] = 2e-3
        optimizer.step()
        driver = driver_of(optimizer)
        seen.append((driver.plan.uploads, driver.launcher.launches))
    # The table twice, because the state is new at first; then the words alone.
    assert seen == [(2, 1), (4, 2), (4, 3), (5, 4)]
    optimizer.max_grad_norm = 1.0  # two launches, where programs cannot wait for each other
    optimizer.step()
    assert driver_of(optimizer).launcher.launches == 6


def test_many_groups_and_dtypes_in_one_launch() -> None:
    params = []
    for seed, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        params += make_params([1 + n % 40 for n in range(31)], dtype, seed=seed)
    groups = [{"params": [p], "lr": 1e-3 * (1 + i % 7)} for i, p in enumerate(params)]
    results = []
    for backend in ("triton", "cpu"):
        copies = [torch.nn.Parameter(p.detach().clone()) for p in params]
        for p, q in zip(params, copies, strict=True):
            q.grad = p.grad
        mine = [{**g, "params": [q]} for g, q in zip(groups, copies, strict=True)]
        optimizer = fusedopt.FusedAdamW(mine, backend=backend)
        optimizer.step()
        results.append([p.detach().float() for p in copies])
        if backend == "triton":
            assert driver_of(optimizer).launcher.launches == 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("lr_dtype", DTYPES, ids=str)
def test_a_tensor_lr_of_any_dtype(lr_dtype: torch.dtype) -> None:
    results = []
    for lr in (torch.tensor(0.0625, dtype=lr_dtype), 0.0625):
        params = make_params([33, 1000], torch.float32)
        optimizer = fusedopt.FusedSGD(params, lr=lr, backend="triton")
        optimizer.step()
        results.append([p.detach() for p in params])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_counters_of_the_workspace_are_reset() -> None:
    params = make_params([100, 200], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, max_grad_norm=1.0, backend="triton")
    for _ in range(2):
        new_grads(params, torch.Generator().manual_seed(0))
        optimizer.step()
        workspace = driver_of(optimizer).host.workspace(0).view(torch.int64)
        assert workspace[:2].tolist() == [0, 0]


def test_a_rule_without_triton_functions_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.triton_kernels import rules

    monkeypatch.delitem(rules.RULES, "adamw")
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend="triton")
    with pytest.raises(RuntimeError, match="triton: adamw has no Triton kernel"):
        optimizer.step()


@pytest.mark.parametrize("cls", [fusedopt.FusedAdamW, fusedopt.FusedSGD])
def test_the_measured_run_steps_with_every_candidate(
    cls: type[fusedopt.FusedOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedopt.triton_kernels import tune

    def times(steps: dict[Any, Any], device: torch.device) -> dict[Any, float]:
        for step in steps.values():
            step()
        return {config: float(i) for i, config in enumerate(steps)}

    monkeypatch.setattr(tune, "median_times", times)
    monkeypatch.setattr(triton, "_TUNING_ELEMENTS", 1000)
    candidates = tuple(tune.Config(block, 4) for block in (256, 512))
    measured = triton._measure(cls.rule, torch.device("cpu"), candidates)
    assert measured == dict(zip(candidates, (0.0, 1.0), strict=True))


def test_a_candidate_that_cannot_be_compiled_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.triton_kernels import tune

    class Event:
        def __init__(self, enable_timing: bool) -> None: ...
        def record(self) -> None: ...
        def synchronize(self) -> None: ...
        def elapsed_time(self, end: Event) -> float:
            return 10.0

    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    monkeypatch.setattr(triton, "_TUNING_ELEMENTS", 1000)
    works, fails = tune.Config(256, 4), tune.Config(300, 4)  # not a power of 2
    rule = fusedopt.FusedAdamW.rule
    with pytest.warns(UserWarning, match="block=300, warps=4.* which fails: .*power of 2"):
        assert triton._measure(rule, torch.device("cpu"), (fails, works)) == {works: 2.0}
    with (
        pytest.warns(UserWarning, match="which fails"),
        pytest.raises(RuntimeError, match="none of the configurations works"),
    ):
        triton._measure(rule, torch.device("cpu"), (fails,))


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_measuring_leaves_random_numbers_alone(
    default: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fusedopt.triton_kernels import tune

    used: list[int] = []

    def times(steps: dict[Any, Any], device: torch.device) -> dict[Any, float]:
        for step in steps.values():
            step()
        return dict.fromkeys(steps, 1.0)

    monkeypatch.setattr(tune, "median_times", times)
    monkeypatch.setattr(triton, "_TUNING_ELEMENTS", 1000)
    launch = triton.TritonHost.launch

    def recorded(self: Any, *arguments: Any) -> bool:
        used.extend(arguments[6])
        return launch(self, *arguments)

    monkeypatch.setattr(triton.TritonHost, "launch", recorded)
    before, dtype = torch.get_rng_state(), torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        triton._measure(fusedopt.FusedSGD.rule, torch.device("cpu"), (tune.Config(256, 4),))
    finally:
        torch.set_default_dtype(dtype)
    assert torch.equal(torch.get_rng_state(), before)
    assert {kind & 0xFFFF for kind in used} == {0}  # param and gradient in float32


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="whether the state is new is part of the table that is compared, so that the second "
    "step uploads it again: a graph can be captured after two steps, not after one",
)
def test_the_second_step_uploads_nothing() -> None:
    optimizer = fusedopt.FusedAdamW(make_params([100] * 20, torch.float32), backend="triton")
    optimizer.step()
    uploads = driver_of(optimizer).plan.uploads
    optimizer.step()
    assert driver_of(optimizer).plan.uploads == uploads
