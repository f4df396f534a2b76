"""Promise 17: options, param lists, groups and the default device change, or a step is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from fusedopt import FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import (
    assert_close_to,
    assert_same,
    bits,
    build,
    contents,
    make_params,
    params_of,
    random_grads,
    run,
)
from tests.life import pair, twin_of

backend, cls, driver = life.backend, life.cls, life.driver

ALL_CHANGES: list[dict[str, Any]] = [
    {},
    {"lr": 0.1},
    {"weight_decay": 0.0},
    {"weight_decay": 0.3, "lr": torch.tensor(0.004, dtype=torch.float64)},
    {"maximize": True},
    {"lr": 0.0},
    {"lr": 0.02, "maximize": False},
]
ADAM_CHANGES = [{"betas": (0.5, 0.9)}, {"eps": 1e-3}, {"amsgrad": False}, {}, {"amsgrad": True}]
SGD_CHANGES = [
    {"momentum": 0.0},
    {},
    {"momentum": 0.5},
    {"dampening": 0.9},
    {"dampening": 0.0, "nesterov": True},
    {"momentum": 0.99},
]


def test_hyperparameters_changed_between_steps(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    own = SGD_CHANGES if cls is FusedSGD else ADAM_CHANGES
    for number, change in enumerate(ALL_CHANGES + own):
        for optimizer in both:
            optimizer.param_groups[number % 2].update(change)
            run(optimizer, [number])
        assert_close_to(*both)


def test_momentum_that_comes_later_starts_with_the_gradient(backend: str) -> None:
    both = pair(FusedSGD, backend, momentum=0.0, dampening=0.5)
    for number in range(4):
        for optimizer in both:
            if number == 2:
                optimizer.param_groups[0]["momentum"] = 0.9
            run(optimizer, [number])
        assert_close_to(*both)


def test_group_dicts_replaced(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for number in range(6):
        for optimizer in both:
            old = optimizer.param_groups
            # Another order of the keys, foreign keys before and after the known ones.
            new = [
                {"name": f"{number}", **dict(reversed(group.items())), 7: "seven"} for group in old
            ]
            new[number % 2]["lr"] = 0.01 * (number + 1)
            if number % 3:
                optimizer.param_groups = new
            else:
                optimizer.param_groups[:] = new
            for group in old if number % 3 else []:
                group["lr"] = float("nan")  # the old dicts are out of use
            run(optimizer, [number])
        assert_close_to(*both)


def test_param_lists_changed(cls: type[FusedOptimizer], driver: str) -> None:
    both = pair(cls, driver)
    removed: dict[int, list[Tensor]] = {}
    for number in range(6):
        for which, optimizer in enumerate(both):
            first, second = (group["params"] for group in optimizer.param_groups)
            if number == 1:  # moves to another group, with its state
                second.append(first.pop(2))
            elif number == 2:
                second.reverse()
            elif number == 3:
                removed[which] = [second.pop(1), second.pop(1)]
                kept = [bits(p) for p in removed[which]]
            elif number == 4:
                optimizer.param_groups[0]["params"] = first[::-1]
            elif number == 5:
                second += removed[which]
            run(optimizer, [number])
            if number == 3:
                for p, before in zip(removed[which], kept, strict=True):
                    assert torch.equal(bits(p), before)
        assert_close_to(*both)


def test_groups_added(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:
        run(optimizer, [0, 1])
        added = make_params(torch.float64, seed=1, shapes=((40,), (3, 3)))
        optimizer.add_param_group({"params": added, "lr": 0.5, "weight_decay": 0.7})
        run(optimizer, [2, 3])
        optimizer.add_param_group({"params": Parameter(torch.ones(5, dtype=torch.float64))})
        run(optimizer, [4])
    assert_close_to(*both)


def test_a_group_that_is_refused_is_not_added(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    before = contents(optimizer)
    new = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        optimizer.add_param_group({"params": [new], "lr": -1.0})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})
    assert_same(contents(optimizer), before)


@pytest.mark.parametrize("missing", ["lr", "weight_decay", "params"])
def test_a_group_that_lacks_a_key(cls: type[FusedOptimizer], backend: str, missing: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    value = optimizer.param_groups[0].pop(missing)
    params = optimizer.param_groups[1]["params"]
    before = [bits(p) for p in params]
    with pytest.raises(KeyError, match=missing):
        optimizer.step()
    optimizer.param_groups[0][missing] = value
    for p, bytes_before in zip(params, before, strict=True):
        assert torch.equal(bits(p), bytes_before)


def test_a_step_that_raises_changes_nothing(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    params = params_of(optimizer)
    for p, grad in zip(params[2:], random_grads(params[2:], 0), strict=True):
        p.grad = grad
    optimizer.step()
    key = next(k for k in optimizer.state[params[-1]] if k != "step")
    good = optimizer.state[params[-1]][key]
    optimizer.state[params[-1]][key] = good[:-1].clone()
    before = contents(optimizer)
    for p, grad in zip(params, random_grads(params, 1), strict=True):
        p.grad = grad
    with pytest.raises(ValueError, match=f"{key}.*" + r"param_groups\[1\].*shape"):
        optimizer.step()
    assert_same(contents(optimizer), before)
    assert params[0] not in optimizer.state
    optimizer.state[params[-1]][key] = good
    twin = twin_of(optimizer)
    run(optimizer, [2])
    run(twin, [2])
    assert_same(contents(optimizer), contents(twin))


def test_another_default_device(cls: type[FusedOptimizer], driver: str) -> None:
    optimizers = [build(cls, driver, max_grad_norm=0.1) for _ in range(2)]
    for number in range(4):
        grads = random_grads(params_of(optimizers[0]), number)
        for optimizer in optimizers:
            for p, grad in zip(params_of(optimizer), grads, strict=True):
                p.grad = grad
        optimizers[0].step()
        with torch.device("meta"):
            optimizers[1].step()
            optimizers[1].load_state_dict(optimizers[1].state_dict())
        assert_same(contents(optimizers[1]), contents(optimizers[0]))
