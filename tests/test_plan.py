"""The native plan: every way of reading tensors, one table, no trust in the step before."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fusedopt
from fusedopt import _native
from fusedopt.rule import Rule
from tests.cases import CASES, SHORT, Case, check_against_oracle, make_params, new_grads, signed

_C = _native._C
assert _C is not None
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("case", SHORT, ids=str)
def test_every_way_of_reading_tensors(case: Case, tensor_access: str) -> None:
    way, _, reader = tensor_access.partition(":")
    info = _C.build_info()
    assert (info["tensor_access"], info.get("tensor_reader", "")) == (way, reader)
    params = [
        *make_params([0, 1, 17, (3, 5), (), 70001], torch.float32),
        *make_params([33], torch.bfloat16),
        torch.nn.Parameter(signed((5, 6), torch.Generator().manual_seed(5)).t().contiguous().t()),
    ]
    optimizer = case.fused(params, max_grad_norm=1e9, backend="cpu", **case.options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        new_grads(params, generator)
        params[2].grad = None
        versions = [p._version for p in params]
        check_against_oracle(case, optimizer, params)
        moved = [p._version - v for p, v in zip(params, versions, strict=True)]
        assert moved == [0 if p.grad is None else 1 for p in params]


@pytest.mark.parametrize("rule", dict.fromkeys(c.fused.rule for c in CASES), ids=lambda r: r.name)
def test_python_and_cpp_agree_on_the_rules(rule: Rule) -> None:
    hyper, state, has_step = _C.rules()[rule.name]
    assert (tuple(hyper), tuple(state), has_step) == (rule.hyper, rule.state, rule.has_step)
    assert set(_C.rules()) == {c.fused.rule.name for c in CASES}


def test_rows_that_lie_alike_are_flat() -> None:
    image = torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last)
    params = [
        torch.nn.Parameter(torch.randn(3, 4)),
        torch.nn.Parameter(image),
        torch.nn.Parameter(torch.randn(5, 6).t()),
        torch.nn.Parameter(torch.randn(6, 4)),
        torch.nn.Parameter(torch.randn(3, 1, 2)),
    ]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = fusedopt.FusedAdamW(params, backend="cpu")
    optimizer.step()
    driver = optimizer._drivers["cpu", torch.device("cpu"), ()]
    plan = driver.plan
    assert driver.refresh(optimizer.param_groups, optimizer.state) == ""
    assert (plan.rows, plan.flat_rows) == (5, 5)
    params[3].grad = torch.randn(4, 6).t()
    driver.refresh(optimizer.param_groups, optimizer.state)
    assert (plan.rows, plan.flat_rows) == (5, 4)
    plan.roll_back()
    assert plan.rows == 0


def test_state_made_for_a_step_that_fails_is_taken_back() -> None:
    params = make_params([5, 7], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend="cpu")
    optimizer.state[params[1]] = {"exp_avg": torch.ones(3)}
    with pytest.raises(ValueError, match="has shape"):
        optimizer.step()
    assert list(optimizer.state) == [params[1]]
    assert list(optimizer.state[params[1]]) == ["exp_avg"]


@pytest.fixture
def eager_thread_switches() -> Iterator[None]:
    """Python switches threads at nearly every bytecode, so that no gap between two is too short."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("eager_thread_switches")
@pytest.mark.parametrize("numel", [1_500_000, 1_000], ids=["without-gil", "with-gil"])
def test_gradients_dropped_by_another_thread_during_a_step(numel: int) -> None:
    params = make_params([numel] * 4, torch.float32)
    grads = [p.grad for p in params]
    optimizer = fusedopt.FusedAdamW(params, lr=1e-3, backend="cpu")
    optimizer.step()
    stop = threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            for p in params:
                # torch itself crashes where one thread reads a `.grad` that dies in another: it
                # must not die before it has left its param.
                grad, p.grad = p.grad, None
                del grad
                optimizer.state[p]["exp_avg"] = optimizer.state[p]["exp_avg"].clone()
            for p, g in zip(params, grads, strict=True):
                assert g is not None
                p.grad = g.clone()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(20 if numel > 10_000 else 2000):
            optimizer.step()
    finally:
        stop.set()
        thread.join()
    assert all(p.isfinite().all() for p in params)


@pytest.mark.usefixtures("eager_thread_switches")
@pytest.mark.parametrize("numel", [1_500_000, 1_000], ids=["without-gil", "with-gil"])
def test_one_optimizer_in_two_threads_steps_or_raises(numel: int) -> None:
    params = make_params([numel] * 4, torch.float32)
    optimizer = fusedopt.FusedAdamW(params, lr=1e-3, backend="cpu")
    errors: list[str] = []
    rounds = 20 if numel > 10_000 else 2000

    def steps() -> None:
        for _ in range(rounds):
            try:
                optimizer.step()
            except RuntimeError as error:
                errors.append(str(error))

    threads = [threading.Thread(target=steps) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all("running already" in e for e in errors)
    for p in params:
        assert p.isfinite().all()
        assert optimizer.state[p]["step"].item() == 3 * rounds - len(errors)


def test_the_kernels_know_no_torch() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    assert len(sources) > 15
    for path in sources:
        text = path.read_text()
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", text), path
        if path.name != "bindings.cpp":
            assert "pybind11" not in text, path
    assert "import torch" not in re.sub(r'""".*?"""', "", (ROOT / "setup.py").read_text())


def test_a_step_that_fails_late_takes_its_state_back(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(
        params, max_grad_norm=1.0, process_group=torch.distributed.ProcessGroup(0, 1)
    )
    with pytest.raises((ValueError, TypeError, AttributeError, RuntimeError)):  # no such group
        optimizer.step()
    assert not optimizer.state
    optimizer.process_group = None
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1


def test_auto_returns_to_the_fast_backend() -> None:
    params = make_params([5], torch.float32)
    odd = torch.nn.Parameter(torch.ones(3, dtype=torch.float8_e4m3fn), requires_grad=False)
    odd.grad = torch.ones(3, dtype=torch.float8_e4m3fn)
    optimizer = fusedopt.FusedSGD([*params, odd], lr=0.5)
    optimizer.step()
    assert optimizer.backend_in_use == "reference"
    assert (odd.float() == 0.5).all()
    odd.grad = None
    optimizer.step()
    assert optimizer.backend_in_use == "cpu"


def test_broken_step_counts() -> None:
    params = make_params([5], torch.float32)
    optimizer = fusedopt.FusedAdamW(params, backend="cpu")
    optimizer.step()
    step = optimizer.state[params[0]]["step"]
    before = params[0].detach().clone()
    for bad in (float("nan"), -1.0):
        step.fill_(bad)
        with pytest.raises(ValueError, match="the step of param_groups"):
            optimizer.step()
    assert torch.equal(params[0], before)
    step.fill_(1e20)  # bias corrections are 1 long before
    optimizer.step()
    assert params[0].isfinite().all()
