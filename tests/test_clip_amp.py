"""Promises 28 to 35: clipping and mixed precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt import distributed
from tests import oracle
from tests.cases import (
    BACKENDS,
    CASES,
    DTYPES,
    EXAMPLES,
    NATIVE,
    SHORT,
    Case,
    check_against_oracle,
    make_params,
    new_grads,
    set_grad,
    signs,
)


def exact_norm(params: list[torch.nn.Parameter]) -> Any:
    return np.sqrt(sum((oracle.exact(p.grad) ** 2).sum() for p in params if p.grad is not None))


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_a_hundred_thousand_float16_elements(backend: str) -> None:
    param = torch.nn.Parameter(torch.randn(100_000).half())
    param.grad = torch.full((100_000,), 300.0).half()
    optimizer = fusedopt.FusedSGD([param], max_grad_norm=1.0, backend=backend)
    optimizer.step()
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(94868.3), rtol=1e-6, atol=0)
    total = fusedopt.get_total_norm([param.grad])
    torch.testing.assert_close(total, torch.tensor(94868.3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_gradients_have_a_finite_norm(backend: str) -> None:
    param = torch.nn.Parameter(torch.randn(1000))
    before = param.detach().clone()
    param.grad = torch.randn(1000) * 1e30
    optimizer = fusedopt.FusedSGD([param], lr=1.0, max_grad_norm=1.0, backend=backend)
    optimizer.step()
    assert optimizer.grad_norm is not None
    torch.testing.assert_close(
        optimizer.grad_norm.double(), param.grad.double().norm(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close((before - param).norm(), torch.tensor(1.0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_zero_norm_makes_no_nan(case: Case, backend: str) -> None:
    params = make_params([5, 700], torch.float32)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = case.fused(params, max_grad_norm=1.0, backend=backend, **case.options)
    check_against_oracle(case, optimizer, params)
    assert optimizer.grad_norm == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_clipping_matches_the_oracle(case: Case, max_norm: float, backend: str) -> None:
    sizes: list[Any] = [1, 17, 513, 4097]
    # The norm spans dtypes and groups, and ignores None. In float64 the rounding of the norm is
    # that of the maths: those params are compared with torch.
    wide, plain_wide = make_params(sizes, torch.float64), make_params(sizes, torch.float64)
    params = [p for d in DTYPES if d != torch.float64 for p in make_params(sizes, d)]
    params[3].grad = None
    groups = [{"params": params[:6]}, {"params": params[6:] + wide}]
    optimizer = case.fused(groups, max_grad_norm=max_norm, backend=backend, **case.options)
    plain = case.plain(plain_wide, foreach=False, **case.options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        new_grads([p for p in params if p.grad is not None] + wide, generator, sign=case.sign)
        norm = exact_norm(params + wide)
        coef = min(1, max_norm / (norm + 1e-6))
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        for p, q in zip(wide, plain_wide, strict=True):
            assert p.grad is not None
            q.grad = p.grad * float(coef)
        check_against_oracle(case, optimizer, params, coef)
        plain.step()
        assert abs(float(optimizer.grad_norm) / norm - 1) < 1e-6
        for p, q in zip(wide, plain_wide, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        for p, grad in zip(params, grads, strict=True):  # .grad is never written
            assert (p.grad is None) if grad is None else torch.equal(p.grad, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_clipping_equals_torch_clip_then_step(case: Case, backend: str) -> None:
    ours, theirs = (make_params([3, 1000, 70000], torch.float32) for _ in range(2))
    subject = case.fused(ours, max_grad_norm=1.0, backend=backend, **case.options)
    plain = case.plain(theirs, foreach=False, **case.options)
    for seed in range(3):
        for params in (ours, theirs):
            new_grads(params, torch.Generator().manual_seed(seed))
        total = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        subject.step()
        plain.step()
        torch.testing.assert_close(subject.grad_norm, total, rtol=1e-5, atol=0)
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_clip_grad_value(case: Case, backend: str) -> None:
    ours, theirs = (make_params([3, 1000, 70000], torch.float32) for _ in range(2))
    subject = case.fused(ours, clip_grad_value=0.25, backend=backend, **case.options)
    plain = case.plain(theirs, foreach=False, **case.options)
    for seed in range(2):
        for params in (ours, theirs):
            new_grads(params, torch.Generator().manual_seed(seed))
            params[1].grad[5] = float("nan")  # type: ignore[index]
            params[1].grad[6] = float("-inf")  # type: ignore[index]
        torch.nn.utils.clip_grad_value_(theirs, 0.25)
        subject.step()
        plain.step()
        assert not hasattr(subject, "grad_norm")
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_norm_propagates_as_in_torch(bad: float, backend: str) -> None:
    ours, theirs = (make_params([5, 70000], torch.float32) for _ in range(2))
    for params in (ours, theirs):
        params[1].grad[7] = bad  # type: ignore[index]
    torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    fusedopt.FusedAdamW(ours, max_grad_norm=1.0, backend=backend).step()
    torch.optim.AdamW(theirs, foreach=False).step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, equal_nan=True)


def snapshot(optimizer: fusedopt.FusedOptimizer, params: list[Any]) -> list[Any]:
    state = {
        i: {k: v.clone() for k, v in optimizer.state[p].items()}
        for i, p in enumerate(params)
        if p in optimizer.state
    }
    return [[p.detach().clone() for p in params], state]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("how", ["found_inf", "found_inf of two devices", "nan", "inf"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [*SHORT, next(c for c in CASES if c.name == "sgd-dampening")], ids=str
)
def test_a_skipped_step_changes_nothing(case: Case, backend: str, how: str) -> None:
    params, twins = (make_params([3, 40000], torch.float32) for _ in range(2))
    options = {"skip_nonfinite": True, "backend": backend, **case.options}
    optimizer, undisturbed = case.fused(params, **options), case.fused(twins, **options)
    for round_number in range(3):  # the very first step is one of those skipped
        for subject in (params, twins):
            new_grads(subject, torch.Generator().manual_seed(round_number))
        before = snapshot(optimizer, params)
        good = [p.grad.clone() for p in params if p.grad is not None]
        if how.startswith("found_inf"):
            optimizer.found_inf = torch.tensor(2.0 if "two" in how else 1.0)
        else:
            params[1].grad[39999] = float(how)  # type: ignore[index]
        optimizer.step()
        assert same(snapshot(optimizer, params), before)
        assert optimizer.skipped_steps == round_number + 1
        if how.startswith("found_inf"):
            del optimizer.found_inf
        for p, g in zip(params, good, strict=True):
            p.grad = g
        optimizer.step()
        undisturbed.step()
        assert same(snapshot(optimizer, params), snapshot(undisturbed, twins))


def scaled_run(case: Case, own_options: bool, unscale: bool, backend: str) -> Any:
    """Steps under a GradScaler whose gradients overflow now and then."""
    model = torch.nn.Linear(16, 8)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    clip = {"max_grad_norm": 0.7} if own_options else {}
    optimizer = case.fused(model.parameters(), backend=backend, **clip, **case.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=3)
    for i in range(8):
        optimizer.zero_grad()
        x = torch.randn(4, 16, generator=generator)
        loss = (model(x) * (1e36 if i in (0, 4) else 1.0)).pow(2).mean()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
        if not own_options:
            if not unscale:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.7)
        scaler.step(optimizer)
        scaler.update()
    assert not hasattr(optimizer, "grad_scale")
    return [p.detach().clone() for p in model.parameters()], scaler.get_scale(), optimizer


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_grad_scaler_with_own_clipping(case: Case, backend: str, unscale: bool) -> None:
    ours, scale, optimizer = scaled_run(case, True, unscale, backend)
    theirs, other_scale, _ = scaled_run(case, False, unscale, backend)
    assert optimizer._step_supports_amp_scaling
    assert scale == other_scale
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert optimizer.skipped_steps >= 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_optimizers_under_one_scaler(backend: str) -> None:
    """The gradients of one overflow: it skips, the others step, the scale goes down for all."""

    def run(fused: bool) -> tuple[list[list[torch.Tensor]], float]:
        torch.manual_seed(0)
        models = [torch.nn.Linear(16, 8) for _ in range(2)]
        optimizers = [
            fusedopt.FusedAdamW(m.parameters(), max_grad_norm=0.5, backend=backend)
            if fused
            else torch.optim.AdamW(m.parameters(), foreach=False)
            for m in models
        ]
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=100)
        history = []
        for i in range(4):
            x = torch.randn(4, 16, generator=torch.Generator().manual_seed(i))
            for j, model in enumerate(models):
                factor = 1e36 if (i, j) in ((0, 0), (2, 1)) else 1.0
                scaler.scale((model(x) * factor).square().mean()).backward()
            for model, optimizer in zip(models, optimizers, strict=True):
                if not fused:
                    scaler.unscale_(optimizer)
                    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
            history.append([p.detach().clone() for m in models for p in m.parameters()])
        if fused:
            assert [int(o.skipped_steps) for o in optimizers] == [1, 1]
        return history, scaler.get_scale()

    (ours, scale), (theirs, other_scale) = run(True), run(False)
    assert scale == other_scale == 2.0**14
    for step, other in zip(ours, theirs, strict=True):
        for p, q in zip(step, other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours[1][2], ours[2][2])  # the second optimizer skipped its third step
    assert not torch.equal(ours[1][0], ours[2][0])


def test_amp_flag_follows_the_options() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    assert not fusedopt.FusedAdamW([param])._step_supports_amp_scaling
    for options in ({"max_grad_norm": 1.0}, {"clip_grad_value": 1.0}, {"skip_nonfinite": True}):
        optimizer = fusedopt.FusedAdamW([param], **options)
        assert optimizer._step_supports_amp_scaling
        assert getattr(optimizer, "grad_scale", None) is None
        assert not hasattr(optimizer, "found_inf")


@pytest.mark.parametrize("backend", BACKENDS)
def test_unscaling_comes_before_the_norm(backend: str) -> None:
    params = make_params([300], torch.float32)
    new_grads(params, torch.Generator().manual_seed(2))
    set_grad(params[0], params[0].grad * 1024)  # type: ignore[operator]
    optimizer = fusedopt.FusedSGD(params, lr=1.0, max_grad_norm=0.5, backend=backend)
    optimizer.grad_scale = torch.tensor(1024.0)
    optimizer.found_inf = torch.tensor(0.0)
    norm = exact_norm(params) / 1024
    check_against_oracle(
        next(c for c in CASES if c.name == "sgd"),
        optimizer,
        params,
        min(1, 0.5 / (norm + 1e-6)) / 1024,
    )
    assert abs(float(optimizer.grad_norm) / norm - 1) < 1e-6


CLIP_SHAPES: list[Any] = [(), 0, 17, (33, 65), 70001]

# How far a clipped gradient may be from exact arithmetic, in ULP; docs/numerics.md derives it.
CLIPPED = {torch.float32: 1.5, torch.bfloat16: 0.501, torch.float16: 0.501}
# The relative error of a float64 norm of up to CLIP_SHAPES: half of 2,048 additions in a lane and a
# few more, each half an ULP.
SUM_ERROR = 1040 * 2.0**-53


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_grad_norm_drop_in(dtype: torch.dtype) -> None:
    for max_norm in (0.5, 1e9):
        ours, theirs = (make_params(CLIP_SHAPES, dtype) for _ in range(2))
        versions = [p.grad._version for p in ours if p.grad is not None]
        total = fusedopt.clip_grad_norm_(iter(ours), max_norm)
        exact = exact_norm(theirs)
        rounded = dtype != torch.float64  # the norm, to float32
        assert abs(float(total) / exact - 1) < (1e-7 if rounded else SUM_ERROR)
        coef = min(1, max_norm / (exact + 1e-6))
        for p, q in zip(ours, theirs, strict=True):
            assert p.grad is not None
            assert q.grad is not None
            want = oracle.exact(q.grad) * coef
            if dtype == torch.float64:  # the rounding of the norm is that of the maths
                assert torch.equal(p.grad, q.grad * min(1, max_norm / (float(total) + 1e-6)))
            else:
                assert oracle.distance(p.grad, want, want) <= CLIPPED[dtype]
        if max_norm < 1:
            bumped = [p.grad._version for p in ours if p.grad is not None]
            assert bumped == [v + 1 for v in versions]


def clip_error(values: torch.Tensor, max_norm: float) -> float:
    """How far clip_grad_norm_ is from exact arithmetic, in ULP."""
    param = torch.nn.Parameter(values.clone())
    param.grad = values.clone()
    exact = exact_norm([param])
    want = oracle.exact(values) * min(1, max_norm / (exact + 1e-6))
    fusedopt.clip_grad_norm_([param], max_norm)
    return oracle.distance(param.grad, want, want)


@pytest.mark.parametrize("dtype", CLIPPED, ids=str)
def test_clipped_gradients_that_come_near_the_bound(dtype: torch.dtype) -> None:
    """Coefficients that lie nearly halfway between two float32 numbers just above a power of 2,
    where that is the largest relative error; gradients with mantissas just below the next power,
    where a relative error is the most ULP. In 16 bits, where these two hardly count, any."""
    generator = torch.Generator().manual_seed(0)
    below, above = (32, 1 << 10) if dtype == torch.float32 else (1, 1 << 22)
    worst = 0.0
    for _ in range(8):
        values = (2 - torch.rand(70_001, generator=generator) / below).to(dtype)
        values *= signs(tuple(values.shape))
        step = 2 * int(torch.randint(above, (), generator=generator)) + 1
        halfway = 1 + np.longdouble(step) * 2.0**-23 + (1 - 2.0**-10) * 2.0**-24
        param = torch.nn.Parameter(values)
        param.grad = values
        max_norm = float(halfway / 8 * (exact_norm([param]) + 1e-6))
        worst = max(worst, clip_error(values, max_norm))
    assert worst <= CLIPPED[dtype]
    assert worst > CLIPPED[dtype] - 0.01  # else the data says nothing


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    dtype=st.sampled_from(list(CLIPPED)),
    numel=st.integers(1, 3000),
    seed=st.integers(0, 2**32 - 1),
    exponent=st.integers(-10, 10),
    fraction=st.floats(1e-4, 1.2),
)
def test_clipped_gradients_of_any_size(
    dtype: torch.dtype, numel: int, seed: int, exponent: int, fraction: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(numel, generator=generator) * 2.0**exponent).to(dtype)
    max_norm = fraction * float(values.double().norm())
    assert clip_error(values, max_norm) <= CLIPPED[dtype]


def test_clip_functions_on_layouts_and_other_norms() -> None:
    params = make_params([(6, 5, 4), (8, 8)], torch.float32)
    for order in (1.0, 2.0, float("inf"), 3.0):
        ours, theirs = (
            make_params([(6, 5, 4)], torch.float32),
            make_params([(6, 5, 4)], torch.float32),
        )
        for p in (*ours, *theirs):
            assert p.grad is not None
            p.grad = p.grad.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        a = fusedopt.clip_grad_norm_(ours, 0.3, norm_type=order)
        b = torch.nn.utils.clip_grad_norm_(theirs, 0.3, norm_type=order)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=2e-6, atol=0)
    fusedopt.clip_grad_value_(params, 0.2)
    for p in params:
        assert p.grad is not None
        assert p.grad.abs().max() == 0.2
    params[0].grad = torch.ones(1).expand(6, 5, 4)
    norm = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
    torch.testing.assert_close(
        norm.double(),
        torch.tensor(float(exact_norm(params)), dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )
    assert fusedopt.get_total_norm([]) == 0
    assert fusedopt.clip_grad_norm_([torch.nn.Parameter(torch.ones(2))], 1.0) == 0


def test_clip_grad_norm_error_if_nonfinite() -> None:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.tensor([1.0, float("nan"), 2.0])
    before = param.grad.clone()
    with pytest.raises(RuntimeError, match="non-finite"):
        fusedopt.clip_grad_norm_([param], 1.0, error_if_nonfinite=True)
    assert torch.equal(param.grad[[0, 2]], before[[0, 2]])
    assert fusedopt.clip_grad_norm_([param], 1.0).isnan()
    assert param.grad.isnan().all()


def test_the_norm_does_not_follow_the_default_device() -> None:
    with torch.device("meta"):
        assert fusedopt.get_total_norm([torch.ones(4, device="cpu")]) == 2


def test_clipping_in_place_of_gradients_whose_norm_overflows_float32() -> None:
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.full((4,), 3e38)
    assert fusedopt.clip_grad_norm_([param], 2.0, error_if_nonfinite=True).isinf()
    torch.testing.assert_close(param.grad, torch.ones(4))


@pytest.mark.parametrize("backend", NATIVE)
def test_the_norm_is_the_same_on_each_run(backend: str) -> None:
    norms = set()
    for _ in range(3):
        params = make_params([5, 100_003, 1, 40_000], torch.float32)
        optimizer = fusedopt.FusedSGD(params, lr=0.1, max_grad_norm=1.0, backend=backend)
        optimizer.step()
        assert optimizer.grad_norm is not None
        torch.testing.assert_close(
            optimizer.grad_norm.double(), torch.tensor(float(exact_norm(params))).double(),
            rtol=1e-6, atol=0,
        )  # fmt: skip
        norms.add(optimizer.grad_norm.item())
    assert len(norms) == 1


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_norm_that_is_reduced_over_ranks(
    found_inf: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four ranks with the same gradients: the sum of their squared norms is four times this one's.
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda t, group: t.mul_(4))
    params, plain = (make_params([1, 300, 20_000], torch.float32) for _ in range(2))
    norm = 2 * float(exact_norm(params))
    group = torch.distributed.ProcessGroup(0, 1)
    options = {"max_grad_norm": 0.5, "process_group": group, "backend": backend}
    subject = fusedopt.FusedAdamW(params, lr=1e-2, **options)
    reference = torch.optim.AdamW(plain, lr=1e-2, foreach=False)
    for p in plain:
        assert p.grad is not None
        p.grad.mul_(0.5 / (norm + 1e-6))
    subject.step()
    reference.step()
    subject.found_inf = torch.tensor(found_inf)  # type: ignore[attr-defined]
    subject.step()
    if not found_inf:
        reference.step()
    torch.testing.assert_close(subject.grad_norm, torch.tensor(norm).float(), rtol=1e-6, atol=0)
    assert subject.skipped_steps.item() == found_inf
    assert all(e["step"].item() == 2 - found_inf for e in subject.state.values())
    for a, b in zip(params, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-7)
