"""Loading takes what a step takes: narrow and sparse state, and hyperparameters as schedules and
configuration libraries write them."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import (
    CLASSES,
    OPTIONS,
    TORCH,
    assert_close_to,
    assert_same,
    build,
    contents,
    groups_of,
    make_params,
    params_of,
    random_grads,
    run,
)
from tests.life import restored, through_a_file, used

backend, cls, driver = life.backend, life.cls, life.driver


def cast(saved: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """A checkpoint whose state was brought to another dtype on saving, step counts apart."""
    for entry in saved["state"].values():
        for key, value in entry.items():
            if key != "step":
                entry[key] = value.to(dtype)
    return saved


# Dtypes.

WIDTHS = [
    *((param, saved, param) for param, saved in ((torch.float32, torch.float16),)),
    (torch.float32, torch.bfloat16, torch.float32),
    (torch.float64, torch.float32, torch.float64),
    (torch.float64, torch.float16, torch.float64),
    (torch.float64, torch.bfloat16, torch.float64),
    (torch.bfloat16, torch.float16, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.float16),
    (torch.float32, torch.float64, torch.float64),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.float16, torch.float32, torch.float32),
    (torch.bfloat16, torch.float64, torch.float64),
]


@pytest.mark.parametrize(("param", "saved", "expected"), WIDTHS, ids=str)
def test_narrow_state_is_widened_and_wide_state_stays(
    cls: type[FusedOptimizer], param: torch.dtype, saved: torch.dtype, expected: torch.dtype
) -> None:
    source = build(cls, dtype=param)
    run(source, [0])
    state = cast(deepcopy(source.state_dict()), saved)
    optimizer = restored(source, through_a_file(state))
    for number, p in enumerate(params_of(optimizer)):
        for key, value in optimizer.state[p].items():
            wanted = state["state"][number][key].to(torch.float32 if key == "step" else expected)
            assert_same(value, wanted)
    run(optimizer, [1])
    for entry in optimizer.state.values():
        assert {v.dtype for k, v in entry.items() if k != "step"} == {expected}


@pytest.mark.parametrize(
    ("param", "saved", "expected"),
    [
        (torch.complex128, torch.complex64, torch.complex128),
        (torch.complex64, torch.complex128, torch.complex128),
    ],
    ids=str,
)
def test_complex_state(
    cls: type[FusedOptimizer], param: torch.dtype, saved: torch.dtype, expected: torch.dtype
) -> None:
    values = torch.randn(5, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    optimizer = cls([Parameter(values.to(param))], **OPTIONS[cls])
    run(optimizer, [0])
    state = cast(deepcopy(optimizer.state_dict()), saved)
    optimizer.load_state_dict(state)
    (p,) = params_of(optimizer)
    for key, value in optimizer.state[p].items():
        if key != "step":
            assert_same(value, state["state"][0][key].to(expected))
    run(optimizer, [1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_halved_checkpoint_goes_on_as_in_torch(
    cls: type[FusedOptimizer], driver: str, dtype: torch.dtype
) -> None:
    source = TORCH[cls](groups_of(make_params(torch.float64)), **OPTIONS[cls], foreach=False)
    run(source, range(3))
    saved = cast(deepcopy(source.state_dict()), dtype)
    subject, oracle = (
        kind(groups_of([Parameter(p.detach().clone()) for p in params_of(source)]), **options)
        for kind, options in (
            (cls, {**OPTIONS[cls], "backend": driver}),
            (TORCH[cls], {**OPTIONS[cls], "foreach": False}),
        )
    )
    subject.load_state_dict(fusedopt.convert_state_dict(saved))
    oracle.load_state_dict(deepcopy(saved))
    assert_close_to(subject, oracle)
    for number in range(3, 9):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


# Sparse momentum, as torch.optim.SGD keeps it where the gradients are sparse.


def embedding(kind: Any, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(3)
    model = nn.ModuleList([nn.Linear(3, 2), nn.Embedding(7, 3, sparse=True)]).double()
    return model, kind(model.parameters(), lr=0.1, momentum=0.9, **options)


def learn(model: Any, optimizer: Any, steps: range) -> None:
    linear, table = model
    for number in steps:
        optimizer.zero_grad()
        words = torch.tensor([number % 7, (3 * number) % 7, number % 7])
        linear(table(words)).square().sum().backward()
        optimizer.step()


def same_values(model: Any, other: Any) -> None:
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_a_checkpoint_with_a_sparse_buffer(driver: str) -> None:
    plain, source = embedding(torch.optim.SGD, foreach=False)
    learn(plain, source, range(3))
    saved = deepcopy(source.state_dict())
    assert saved["state"][2]["momentum_buffer"].is_sparse
    for state in (saved, fusedopt.convert_state_dict(saved)):
        model, optimizer = embedding(FusedSGD, backend=driver)
        model.load_state_dict(plain.state_dict())
        optimizer.load_state_dict(state)
        entry = optimizer.state[model[1].weight]
        assert_same(entry["momentum_buffer"], saved["state"][2]["momentum_buffer"].to_dense())
        other, oracle = embedding(torch.optim.SGD, foreach=False)
        other.load_state_dict(plain.state_dict())
        oracle.load_state_dict(deepcopy(saved))
        learn(model, optimizer, range(3, 6))
        learn(other, oracle, range(3, 6))
        same_values(model, other)
    assert saved["state"][2]["momentum_buffer"].is_sparse


def test_fuse_of_a_sparse_buffer(driver: str) -> None:
    (model, source), (other, oracle) = (embedding(torch.optim.SGD, foreach=False) for _ in "ab")
    learn(model, source, range(3))
    learn(other, oracle, range(3))
    optimizer = fusedopt.fuse(source, backend=driver)
    assert not optimizer.state[model[1].weight]["momentum_buffer"].is_sparse
    learn(model, optimizer, range(3, 6))
    learn(other, oracle, range(3, 6))
    same_values(model, other)


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
def test_a_sparse_buffer_put_there_between_steps(driver: str, layout: torch.layout) -> None:
    optimizer, twin = build(FusedSGD, driver), build(FusedSGD, driver)
    for subject in (optimizer, twin):
        run(subject, range(2))
    p = params_of(optimizer)[4]
    buffer = optimizer.state[p]["momentum_buffer"].to_sparse(layout=layout)
    kept = buffer.to_dense().clone()
    optimizer.state[p]["momentum_buffer"] = buffer
    for subject in (optimizer, twin):
        run(subject, range(2, 5))
    assert_same(contents(optimizer), contents(twin))
    assert torch.equal(buffer.to_dense(), kept)


def test_a_sparse_buffer_in_a_step_that_is_skipped(driver: str) -> None:
    optimizer, twin = (build(FusedSGD, driver, skip_nonfinite=True) for _ in "ab")
    for subject in (optimizer, twin):
        run(subject, range(2))
    p = params_of(optimizer)[4]
    optimizer.state[p]["momentum_buffer"] = optimizer.state[p]["momentum_buffer"].to_sparse()
    for subject in (optimizer, twin):
        for q in params_of(subject):
            q.grad = torch.full_like(q, float("nan"))
        subject.step()
        assert subject.skipped_steps.item() == 1
        run(subject, [2])
    assert_same(contents(optimizer), contents(twin))


def test_a_sparse_buffer_under_compile(backend: str) -> None:
    optimizer, twin = build(FusedSGD, backend), build(FusedSGD, backend)
    compiled = torch.compile(lambda: optimizer.step(), backend="eager")
    for number in range(4):
        for subject in (optimizer, twin):
            for p, grad in zip(
                params_of(subject), random_grads(params_of(subject), number), strict=True
            ):
                p.grad = grad
        compiled()
        twin.step()
        if number < 3:
            entry = optimizer.state[params_of(optimizer)[4]]
            entry["momentum_buffer"] = entry["momentum_buffer"].to_sparse()
    assert_same(contents(optimizer), contents(twin))


def test_sparse_state_of_adam_is_refused_before_anything_changes(driver: str) -> None:
    optimizer = build(FusedAdamW, driver)
    run(optimizer, range(2))
    values = [p.detach().clone() for p in params_of(optimizer)]
    entry = optimizer.state[params_of(optimizer)[4]]
    entry["exp_avg"] = entry["exp_avg"].to_sparse()
    with pytest.raises(RuntimeError, match=r'exp_avg of param_groups\[1\]\["params"\]\[1\]'):
        run(optimizer, [2])
    for p, value in zip(params_of(optimizer), values, strict=True):
        assert torch.equal(p, value)


# Hyperparameters.


class ListConfig(Sequence[Any]):
    """A sequence that is neither list nor tuple, as omegaconf has it."""

    def __init__(self, items: Sequence[Any]) -> None:
        self._items = list(items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)


LRS: dict[str, Any] = {
    "negative": -0.01,
    "negative tensor": torch.tensor(-0.01),
    "numpy 0-dim": np.array(0.01),
    "numpy negative": np.array(-0.01, dtype=np.float32),
    "numpy number": np.float32(0.01),
    "int": 1,
}


@pytest.mark.parametrize("lr", LRS.values(), ids=LRS.keys())
def test_an_lr_that_a_step_takes_is_loaded(cls: type[FusedOptimizer], driver: str, lr: Any) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(2))
    optimizer.param_groups[1]["lr"] = deepcopy(lr)
    run(optimizer, [2])
    resumed = restored(optimizer, fusedopt.convert_state_dict(optimizer.state_dict()))
    assert float(resumed.param_groups[1]["lr"]) == float(lr)
    for subject in (optimizer, resumed):
        run(subject, [3])
    for name in ("params", "state"):
        assert_same(contents(resumed)[name], contents(optimizer)[name])


@pytest.mark.parametrize("cls", [FusedAdamW, FusedAdam], ids=lambda cls: cls.__name__)
def test_betas_that_a_step_takes_are_loaded(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    optimizer.param_groups[0]["betas"] = ListConfig([0.5, 0.75])
    optimizer.param_groups[1]["betas"] = [0.5, 0.75]
    optimizer.param_groups[1]["tags"] = ListConfig(["a"])
    run(optimizer, range(2))
    resumed = restored(optimizer, optimizer.state_dict())
    assert [tuple(group["betas"]) for group in resumed.param_groups] == [(0.5, 0.75)] * 2
    assert list(resumed.param_groups[1]["tags"]) == ["a"]
    for subject in (optimizer, resumed):
        run(subject, [2])
    for name in ("params", "state"):
        assert_same(contents(resumed)[name], contents(optimizer)[name])


def test_a_schedule_below_zero_resumes(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1 - epoch)
    for number in range(3):
        run(optimizer, [number])
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] < 0
    resumed = restored(optimizer, through_a_file(optimizer.state_dict()))
    for subject in (optimizer, resumed):
        run(subject, [3])
    assert_same(contents(resumed), contents(optimizer))


BAD: dict[str, dict[str, Any]] = {
    "lr NaN of numpy": {"lr": np.array(float("nan"))},
    "lr two of numpy": {"lr": np.array([0.1, 0.2])},
    "lr string of numpy": {"lr": np.array("x")},
    "lr complex": {"lr": 1j},
    "weight_decay negative": {"weight_decay": -0.1},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_what_no_step_takes_is_refused(cls: type[FusedOptimizer], change: dict[str, Any]) -> None:
    optimizer, saved = used(cls)
    saved["param_groups"][1].update(change)
    before = contents(optimizer)
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[1\]"):
        optimizer.load_state_dict(saved)
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("betas", [(0.9, 1.5), (0.9,), ("a", "b")], ids=str)
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_bad_betas_in_a_sequence_are_refused(cls: type[FusedOptimizer], betas: Any) -> None:
    optimizer, saved = used(cls)
    saved["param_groups"][1]["betas"] = ListConfig(betas)
    with pytest.raises((TypeError, ValueError), match=r"param_groups\[1\].*beta"):
        optimizer.load_state_dict(saved)


def test_a_step_count_in_half_precision(backend: str) -> None:
    optimizer = build(FusedAdamW, backend)
    run(optimizer, [0])
    saved = deepcopy(optimizer.state_dict())
    for entry in saved["state"].values():
        entry["step"] = torch.tensor(300.0, dtype=torch.float16)
    optimizer.load_state_dict(saved)
    for entry in optimizer.state.values():
        step: Tensor = entry["step"]
        assert (step.dtype, step.item()) == (torch.float32, 300.0)
