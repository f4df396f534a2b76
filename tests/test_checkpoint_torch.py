"""Promise 21: checkpoints of torch.optim, old ones too, are loaded, and ours by torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import (
    OPTIONS,
    TORCH,
    assert_close_to,
    assert_same,
    build,
    contents,
    groups_of,
    make_params,
    params_of,
    run,
)
from tests.life import FLAVOURS, flavour, mark, through_a_file, torch_optimizer

backend, cls = life.backend, life.cls


def copies_of(optimizer: Optimizer) -> list[Parameter]:
    return [Parameter(p.detach().clone()) for p in params_of(optimizer)]


def unmark(optimizer: Optimizer, flags: dict[str, Any]) -> None:
    """Makes torch step in this flavour on the CPU, whatever flags the checkpoint had."""
    for group in optimizer.param_groups:
        group.update({"foreach": None, "fused": None, **flags, "capturable": False})


@flavour
def test_from_torch(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any]) -> None:
    oracle = torch_optimizer(cls, flags)
    run(oracle, range(3))
    mark(oracle, flags)
    saved = through_a_file(oracle.state_dict())
    subject = cls(groups_of(copies_of(oracle)), lr=0.9, backend=backend)
    subject.load_state_dict(saved)
    for p, q in zip(params_of(subject), params_of(oracle), strict=True):
        assert_same(dict(subject.state[p]), dict(oracle.state[q]))
    for group, other in zip(subject.param_groups, saved["param_groups"], strict=True):
        assert {k: group[k] for k in other if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    unmark(oracle, flags)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


@flavour
def test_to_torch(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any]) -> None:
    subject = build(cls, backend, torch.float64, **flags)
    run(subject, range(3))
    saved = through_a_file(subject.state_dict())
    oracle = torch_optimizer(cls, flags, copies_of(subject))
    oracle.load_state_dict(saved)
    for p, q in zip(params_of(subject), params_of(oracle), strict=True):
        assert_same(dict(subject.state[p]), dict(oracle.state[q]))
    for group, other in zip(oracle.param_groups, subject.param_groups, strict=True):
        for key in ("lr", "betas", "momentum", "weight_decay", "amsgrad", "nesterov", "maximize"):
            assert group.get(key) == other.get(key)
    unmark(oracle, flags)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_there_and_back_is_bitwise(cls: type[FusedOptimizer], backend: str) -> None:
    subject = build(cls, backend)
    run(subject, range(3))
    between = TORCH[cls](groups_of(copies_of(subject)))
    between.load_state_dict(through_a_file(subject.state_dict()))
    back = cls(groups_of(copies_of(subject)), backend=backend)
    back.load_state_dict(through_a_file(between.state_dict()))
    for optimizer in (subject, back):
        run(optimizer, range(3, 5))
    assert_same(contents(back)["params"], contents(subject)["params"])
    assert_same(contents(back)["state"], contents(subject)["state"])


def without(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for group in saved["param_groups"]:
            for key in keys:
                group.pop(key, None)

    return change


def with_steps(make: Callable[[float], Any]) -> Callable[[dict[str, Any]], None]:
    def change(saved: dict[str, Any]) -> None:
        for entry in saved["state"].values():
            if "step" in entry:
                entry["step"] = make(entry["step"].item())

    return change


NEWER = ("maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")


def oldest(saved: dict[str, Any]) -> None:
    without(*NEWER, "initial_lr")(saved)
    with_steps(int)(saved)


OLDER: dict[str, Callable[[dict[str, Any]], None]] = {
    **{f"no {key}": without(key) for key in NEWER},
    "none of the newer keys": without(*NEWER),
    "int step": with_steps(int),
    "float step": with_steps(float),
    "one-element step": with_steps(lambda value: torch.tensor([value])),
    "float64 step": with_steps(lambda value: torch.tensor(value, dtype=torch.float64)),
    "int64 step": with_steps(lambda value: torch.tensor(int(value))),
    "oldest": oldest,
}


@pytest.mark.parametrize("change", OLDER.values(), ids=OLDER.keys())
def test_older_checkpoints(cls: type[FusedOptimizer], backend: str, change: Any) -> None:
    oracle = torch_optimizer(cls, FLAVOURS["for-loop"])
    run(oracle, range(3))
    saved = deepcopy(oracle.state_dict())
    change(saved)
    subject = cls(groups_of(copies_of(oracle)), backend=backend)
    subject.load_state_dict(saved)
    for number in range(3, 6):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_sgd_without_momentum_buffers(backend: str) -> None:
    # torch.optim.SGD saves None where momentum is off.
    oracle = torch.optim.SGD(make_params(torch.float64), lr=0.1, foreach=False)
    run(oracle, range(2))
    saved = deepcopy(oracle.state_dict())
    for number in range(len(params_of(oracle))):
        saved["state"][number] = {"momentum_buffer": None}
    subject = FusedSGD(copies_of(oracle), backend=backend)
    subject.load_state_dict(saved)
    for optimizer in (subject, oracle):
        optimizer.param_groups[0].update(momentum=0.9, dampening=0.4)
    for number in range(2, 5):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_state_of_some_params_only(cls: type[FusedOptimizer], backend: str) -> None:
    oracle = torch_optimizer(cls, FLAVOURS["for-loop"])
    params = params_of(oracle)
    for p in params[::2]:
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).to(p)
    oracle.step()
    subject = cls(groups_of(copies_of(oracle)), backend=backend)
    subject.load_state_dict(through_a_file(oracle.state_dict()))
    assert len(subject.state) == 3
    for optimizer in (subject, oracle):
        run(optimizer, range(2))
    assert_close_to(subject, oracle)


def test_adam_and_adamw_checkpoints_in_the_other_class(backend: str) -> None:
    # As in torch: AdamW stays decoupled whatever it loads; Adam takes over the saved flag.
    for source, target in ((torch.optim.Adam, FusedAdamW), (torch.optim.AdamW, FusedAdam)):
        donor = source(groups_of(make_params(torch.float64)), **OPTIONS[target], foreach=False)
        run(donor, range(2))
        both = [
            target(groups_of(copies_of(donor)), backend=backend),
            TORCH[target](groups_of(copies_of(donor)), foreach=False),
        ]
        for optimizer in both:
            optimizer.load_state_dict(deepcopy(donor.state_dict()))
            run(optimizer, range(2, 5))
        assert_close_to(*both)
