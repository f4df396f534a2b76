"""Promises 1 to 9: how close a step is to exact maths."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import _native
from tests import old_torch, oracle
from tests.cases import (
    BACKENDS,
    CASES,
    DTYPES,
    NATIVE,
    SHORT,
    SIZES,
    Case,
    check_against_oracle,
    make_params,
    new_grads,
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_three_steps_match_the_oracle(case: Case, dtype: torch.dtype, backend: str) -> None:
    params = make_params(SIZES, dtype)
    optimizer = case.fused(params, backend=backend, **case.options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        new_grads(params, generator, sign=case.sign)
        check_against_oracle(case, optimizer, params)


MIXED = [
    (torch.bfloat16, torch.bfloat16, torch.float32),
    (torch.float16, torch.float16, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float16),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float32, torch.float32, torch.bfloat16),
    (torch.float32, torch.float32, torch.float64),
    (torch.float64, torch.float64, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.bfloat16, torch.float16, torch.float64),
]


@old_torch.needs_grads_of_other_dtypes
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_mixed_dtypes_in_one_group(case: Case, backend: str) -> None:
    sizes = [1, 17, 513, 70001]
    params: list[torch.nn.Parameter] = []
    for seed, (param, grad, _) in enumerate(MIXED):
        params += make_params(sizes, param, seed, grad)
    optimizer = case.fused(params, backend=backend, **case.options)
    optimizer.step()
    for i, p in enumerate(params):
        for name in case.fused.rule.state:
            if name in optimizer.state[p]:
                state_dtype = MIXED[i // len(sizes)][2]
                optimizer.state[p][name] = optimizer.state[p][name].to(state_dtype)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for i, p in enumerate(params):
            new_grads([p], generator, MIXED[i // len(sizes)][1])
        check_against_oracle(case, optimizer, params)


@pytest.mark.parametrize("backend", NATIVE)
def test_state_dtypes_that_differ_within_one_param(backend: str) -> None:
    params = make_params([700, 70001], torch.bfloat16)
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, backend=backend)
    optimizer.step()
    for p in params:
        optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].float()
    new_grads(params, torch.Generator().manual_seed(1))
    check_against_oracle(CASES[0], optimizer, params)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", [1, 2, 10, 999, 65536, 2**23, 2**24 - 2])
def test_bias_correction_at_any_step(step: int, backend: str) -> None:
    params = make_params([1000], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, backend=backend)
    optimizer.step()
    optimizer.state[params[0]]["step"].fill_(step)
    for _ in range(2):
        new_grads(params, torch.Generator().manual_seed(step))
        check_against_oracle(CASES[0], optimizer, params)
    assert optimizer.state[params[0]]["step"].item() == step + 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_gradients_of_every_magnitude_match_torch(case: Case, backend: str) -> None:
    options = {**case.options, "weight_decay": 0.0, "lr": 1e-3}
    magnitudes = torch.logspace(-45, 38.4, 5000, dtype=torch.float64)
    signs = torch.where(torch.randn(5000, generator=torch.Generator().manual_seed(0)) < 0, -1, 1)
    grad = (magnitudes * signs).float()
    assert grad[0] != 0
    assert grad.isfinite().all()
    ours, theirs = make_params([5000], torch.float32), make_params([5000], torch.float32)
    subject = case.fused(ours, backend=backend, **options)
    plain = case.plain(theirs, foreach=False, **options)
    for _ in range(2):
        ours[0].grad, theirs[0].grad = grad.clone(), grad.clone()
        subject.step()
        plain.step()
        torch.testing.assert_close(ours[0], theirs[0], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_zero_lr_moves_nothing(case: Case, dtype: torch.dtype, backend: str) -> None:
    params = make_params(SIZES, dtype)
    before = [p.detach().clone() for p in params]
    optimizer = case.fused(
        params, backend=backend, **{**case.options, "lr": 0.0, "weight_decay": 0.5}
    )
    for _ in range(2):
        optimizer.step()
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p, old)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_tensor_lr_equals_float_lr(case: Case, backend: str) -> None:
    lr = torch.tensor(2.0**-6)  # the same number in float32
    a, b = make_params(SIZES, torch.float32), make_params(SIZES, torch.float32)
    with_float = case.fused(a, backend=backend, **{**case.options, "lr": 2.0**-6})
    with_tensor = case.fused(b, backend=backend, **{**case.options, "lr": lr})
    for value in (2.0**-6, 2.0**-2):
        lr.fill_(value)
        with_float.param_groups[0]["lr"] = value
        with_float.step()
        with_tensor.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("case", SHORT, ids=str)
def test_one_bad_gradient_element_reaches_one_element(case: Case, bad: float, backend: str) -> None:
    for size in (1, 17, 513, 65537):
        for at in {0, size // 2, size - 1}:
            params, clean = (make_params([size], torch.float32) for _ in range(2))
            assert params[0].grad is not None
            params[0].grad[at] = bad
            for subject in (params, clean):
                case.fused(subject, backend=backend, **case.options).step()
            other = torch.arange(size) != at
            assert torch.equal(params[0][other], clean[0][other])
            theirs = make_params([size], torch.float32)
            assert theirs[0].grad is not None
            theirs[0].grad[at] = bad
            case.plain(theirs, foreach=False, **case.options).step()
            torch.testing.assert_close(params[0][at], theirs[0][at], equal_nan=True)


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_ten_thousand_steps_stay_near_float64(case: Case) -> None:
    options = {**case.options, "lr": 1e-3}
    ours, exact = make_params([37], torch.float32), make_params([37], torch.float64)
    with torch.no_grad():
        exact[0].copy_(ours[0])
    subject = case.fused(ours, backend="cpu", **options)
    plain = case.plain(exact, foreach=False, **options)
    generator = torch.Generator().manual_seed(3)
    target = torch.randn(37, generator=generator) + 3
    noise = torch.randn(10_000, 37, generator=generator)
    for i in range(10_000):
        grad = target * 0.1 + noise[i]
        ours[0].grad, exact[0].grad = grad, grad.double()
        subject.step()
        plain.step()
    error = (ours[0].double() - exact[0]).norm() / exact[0].norm()
    assert error < 1e-4


def test_results_do_not_depend_on_the_thread_count() -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 1):
            torch.set_num_threads(count)
            params = make_params([*SIZES, 300_000], torch.float32)
            optimizer = fusedopt.FusedAdamW(params, lr=0.01, max_grad_norm=0.5, backend="cpu")
            for _ in range(2):
                optimizer.step()
            assert optimizer.grad_norm is not None
            results.append([optimizer.grad_norm.clone(), *(p.detach().clone() for p in params)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


# Run for each instruction-set level in a process of its own: the level is chosen once.
LEVEL_SCRIPT = """
import hashlib, json, torch
import fusedopt
from fusedopt import _native
from tests.cases import CASES, DTYPES, SIZES, make_params
digest = hashlib.sha256()
for case in CASES:
    for dtype in DTYPES:
        params = make_params(SIZES, dtype)
        optimizer = case.fused(params, backend="cpu", max_grad_norm=3.0, **case.options)
        for _ in range(2):
            optimizer.step()
        for p in params:
            for t in [p.detach(), *optimizer.state.get(p, {}).values()]:
                digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
        digest.update(optimizer.grad_norm.numpy().tobytes())
# Every float16, and float32 results between all of them: ties, subnormals, overflow. The bits of a
# NaN may differ.
every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
for roll in (1, 77, 1023, 1025, 30000):
    param = torch.nn.Parameter(every.clone())
    param.grad = every.roll(roll)
    fusedopt.FusedSGD([param], lr=0.37, backend="cpu").step()
    result = param.detach().clone()
    result[result.isnan()] = 1.5
    digest.update(result.view(torch.uint8).numpy().tobytes())
print(json.dumps([_native._C.build_info()["cpu_level"], digest.hexdigest()]))
"""


def test_every_instruction_set_level_computes_the_same_bits() -> None:
    assert _native._C is not None
    best = _native._C.build_info()["cpu_level"]
    levels = ["baseline", "avx2", "avx512"]
    digests = {}
    for level in levels[: levels.index(best) + 1]:
        done = subprocess.run(
            [sys.executable, "-c", LEVEL_SCRIPT],
            env={**os.environ, "FUSEDOPT_CPU_LEVEL": level},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        )
        name, digests[level] = json.loads(done.stdout)
        assert name == level
    assert len(set(digests.values())) == 1, digests


def test_ulp_is_the_spacing_of_the_dtype() -> None:
    values = np.array([1.0, 1.5, 2.0, 3.0e-39, 0.0], dtype=np.longdouble)
    spacing = np.spacing(np.abs(values).astype(np.float32)).astype(np.longdouble)
    assert (oracle.ulp(values, torch.float32) == spacing).all()
    assert oracle.ulp(np.array([np.longdouble(1)]), torch.bfloat16)[0] == 2.0**-7
    assert oracle.ulp(np.array([np.longdouble(0)]), torch.float16)[0] == 2.0**-24
