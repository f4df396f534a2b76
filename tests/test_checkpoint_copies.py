"""Promise 20, and loading: a copy goes on bitwise and shares no memory with its source."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fusedopt import FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import CLASSES, OPTIONS, assert_same, build, contents, params_of, run
from tests.life import restored

backend, cls, driver = life.backend, life.cls, life.driver


def saved(value: Any) -> Any:
    """torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
}


def step_of(model: nn.Module, optimizer: FusedOptimizer, number: int) -> None:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
    optimizer.zero_grad()
    model(x).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize(
    "options",
    [{"max_grad_norm": 0.3, "skip_nonfinite": True}, {"clip_grad_value": 0.1}],
    ids=["norm", "value"],
)
def test_copies_continue_bitwise(
    cls: type[FusedOptimizer],
    driver: str,
    copy: Callable[[Any], Any],
    steps: int,
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 11), nn.Tanh(), nn.Linear(11, 2))
    optimizer = cls(model.parameters(), **OPTIONS[cls], backend=driver, **options)
    for number in range(steps):
        step_of(model, optimizer, number)
    other_model, other = copy((model, optimizer))
    names = ("max_grad_norm", "clip_grad_value", "skip_nonfinite", "process_group", "backend")
    for name in names:
        assert getattr(other, name) == getattr(optimizer, name)
    assert other.defaults == optimizer.defaults
    assert_same(contents(other), contents(optimizer))
    before = contents(optimizer)
    for number in range(steps, steps + 3):
        step_of(other_model, other, number)
    assert_same(contents(optimizer), before)  # the copy shares no memory
    for number in range(steps, steps + 3):
        step_of(model, optimizer, number)
    assert_same(contents(other), contents(optimizer))
    if "max_grad_norm" in options:
        assert torch.equal(other.grad_norm, optimizer.grad_norm)
        for p in params_of(other):
            p.grad = torch.full_like(p, float("nan"))
        norm, skipped = optimizer.grad_norm.clone(), optimizer.skipped_steps.clone()
        other.step()
        assert other.skipped_steps.item() == skipped.item() + 1
        assert torch.equal(optimizer.skipped_steps, skipped)
        assert torch.equal(optimizer.grad_norm, norm)


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    # torch 2.6 hangs where it drops a group whose thread still holds a tensor of Python.
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("of_its_own", [False, True])
@pytest.mark.usefixtures("one_rank")
def test_copies_have_the_process_group(
    cls: type[FusedOptimizer], driver: str, copy: Callable[[Any], Any], steps: int, of_its_own: bool
) -> None:
    group = dist.new_group([0]) if of_its_own else dist.group.WORLD
    options = {"max_grad_norm": 0.3, "process_group": group}
    optimizer = build(cls, driver, **options)
    run(optimizer, range(steps))
    other = copy(optimizer)
    assert other.process_group is optimizer.process_group is group
    run(other, range(steps, steps + 2))
    run(optimizer, range(steps, steps + 2))
    assert_same(contents(other), contents(optimizer))
    assert torch.equal(other.grad_norm, optimizer.grad_norm)


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES.keys())
def test_copies_under_a_scheduler_with_a_tensor_lr(
    cls: type[FusedOptimizer], backend: str, copy: Callable[[Any], Any]
) -> None:
    optimizer = build(cls, backend, lr=torch.tensor(0.01))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    run(optimizer, [0])
    scheduler.step()
    other = copy(optimizer)
    lr = other.param_groups[0]["lr"]
    scheduler.step()
    assert lr.item() == pytest.approx(0.005)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.0025)
    other.param_groups[0]["lr"].fill_(0.0025)
    other.param_groups[1]["lr"] = optimizer.param_groups[1]["lr"]
    run(optimizer, [1])
    run(other, [1])
    assert_same(contents(other)["params"], contents(optimizer)["params"])


# Loading copies: neither the dict nor other optimizers share memory with what was loaded.


def with_tensor_hyperparameters(cls: type[FusedOptimizer]) -> dict[str, Any]:
    if cls is FusedSGD:
        return {"lr": torch.tensor(0.05)}
    return {"lr": torch.tensor(0.01), "betas": (torch.tensor(0.8), torch.tensor(0.95))}


def test_two_optimizers_from_one_dict_share_nothing(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver, **with_tensor_hyperparameters(cls))
    run(optimizer, range(2))
    saved = optimizer.state_dict()
    before = deepcopy(saved)
    first, second = restored(optimizer, saved), restored(optimizer, saved)
    untouched = contents(second)
    run(first, range(2, 4))
    first.param_groups[0]["lr"].fill_(0.5)
    assert_same(contents(second), untouched)
    assert_same(saved, before)
    assert_same(contents(optimizer)["state"], untouched["state"])
    run(optimizer, range(2, 4))
    run(second, range(2, 4))
    assert_same(contents(first)["state"], contents(optimizer)["state"])
    assert_same(contents(second)["params"], contents(optimizer)["params"])


@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_tensor_betas_are_copied(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend, **with_tensor_hyperparameters(cls))
    run(optimizer, range(2))
    other = restored(optimizer, optimizer.state_dict())
    other.param_groups[0]["betas"][0].fill_(0.1)
    assert optimizer.param_groups[0]["betas"][0].item() == pytest.approx(0.8)
