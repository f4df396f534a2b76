"""fusedopt.fuse: going on with the params, options and state of an optimizer of torch.optim."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer
from tests import life, old_torch
from tests.helpers import TORCH, assert_close_to, make_params, params_of, run
from tests.life import FLAVOURS, flavour, mark, torch_optimizer

backend, cls = life.backend, life.cls


@flavour
@pytest.mark.parametrize("steps", [0, 3])
def test_fuse(cls: type[FusedOptimizer], backend: str, flags: dict[str, Any], steps: int) -> None:
    source, oracle = (torch_optimizer(cls, flags) for _ in range(2))
    for optimizer in (source, oracle):
        run(optimizer, range(steps))
    mark(source, flags)
    subject = fusedopt.fuse(source, backend=backend)
    assert type(subject) is cls
    assert subject.backend == backend
    assert [p is q for p, q in zip(params_of(subject), params_of(source), strict=True)] == [
        True
    ] * len(params_of(source))
    for group, other in zip(subject.param_groups, source.param_groups, strict=True):
        assert group is not other
        assert group["params"] is not other["params"]
        assert {k: group[k] for k in other if k != "params"} == {
            k: v for k, v in other.items() if k != "params"
        }
    for p in params_of(source):
        for key, value in source.state.get(p, {}).items():
            if key != "step" and value is not None:
                assert subject.state[p][key] is value
    for number in range(steps, steps + 3):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


def test_fuse_takes_options(cls: type[FusedOptimizer], backend: str) -> None:
    source, oracle = (torch_optimizer(cls, FLAVOURS["for-loop"]) for _ in range(2))
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, max_grad_norm=0.1, backend=backend)
    assert subject.max_grad_norm == 0.1
    oracle.register_step_pre_hook(
        lambda o, *_: nn.utils.clip_grad_norm_(params_of(o), 0.1) and None
    )
    for optimizer in (subject, oracle):
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)
    plain = fusedopt.fuse(source)
    assert (plain.max_grad_norm, plain.clip_grad_value, plain.skip_nonfinite) == (None, None, False)


def test_fuse_keeps_group_keys(cls: type[FusedOptimizer], backend: str) -> None:
    model = nn.Linear(4, 3)
    named = list(model.named_parameters())
    source = TORCH[cls](
        [
            {"params": named[:1], "lr": torch.tensor(0.25), "name": "weights", "weight_decay": 0.5},
            {"params": named[1:], "lr": 0.1, "maximize": True},
        ],
        lr=0.01,
        foreach=False,
    )
    torch.optim.lr_scheduler.StepLR(source, 3)
    subject = fusedopt.fuse(source, backend=backend)
    first, second = subject.param_groups
    assert first["lr"] is source.param_groups[0]["lr"]
    assert (first["name"], first["weight_decay"]) == ("weights", 0.5)
    assert (second["lr"], second["initial_lr"], second["maximize"]) == (0.1, 0.1, True)
    assert first["param_names"] == ["weight"]
    assert second["param_names"] == ["bias"]
    extra = Parameter(torch.ones(3))
    subject.add_param_group({"params": [("extra", extra)]})
    assert subject.param_groups[2]["lr"] == 0.01


def test_fuse_with_tensor_hyperparameters(backend: str) -> None:
    options = {
        "lr": torch.tensor(0.01, dtype=torch.float64),
        "betas": (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64)),
    }
    source, oracle = (
        torch.optim.AdamW(make_params(torch.float64), **deepcopy(options), foreach=False)
        for _ in range(2)
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, backend=backend)
    for optimizer in (subject, oracle):
        optimizer.param_groups[0]["lr"].fill_(0.3)
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


@old_torch.needs_decoupled_adam
def test_fuse_of_decoupled_adam(backend: str) -> None:
    source, oracle = (
        torch.optim.Adam(
            make_params(torch.float64), weight_decay=0.3, decoupled_weight_decay=True, foreach=False
        )
        for _ in range(2)
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    subject = fusedopt.fuse(source, backend=backend)
    assert type(subject) is FusedAdam
    subject.add_param_group({"params": make_params(torch.float64, seed=2)})
    oracle.add_param_group({"params": make_params(torch.float64, seed=2)})
    for optimizer in (subject, oracle):
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


def test_fuse_of_sgd_whose_momentum_comes_and_goes(backend: str) -> None:
    source, oracle = (
        torch.optim.SGD(
            [{"params": params[:3]}, {"params": params[3:], "momentum": 0.9}],
            lr=0.1,
            foreach=False,
        )
        for params in (make_params(torch.float64), make_params(torch.float64))
    )
    for optimizer in (source, oracle):
        run(optimizer, range(2))
    for p in params_of(source)[:3]:
        source.state[p]["momentum_buffer"] = None  # as older torch leaves it
    subject = fusedopt.fuse(source, backend=backend)
    assert "momentum_buffer" not in subject.state.get(params_of(subject)[0], {})
    for optimizer in (subject, oracle):
        optimizer.param_groups[0].update(momentum=0.5, dampening=0.5)
        run(optimizer, range(2, 5))
    assert_close_to(subject, oracle)


def test_fuse_of_a_subclass(backend: str) -> None:
    class Mine(torch.optim.AdamW):
        pass

    assert type(fusedopt.fuse(Mine(make_params()), backend=backend)) is FusedAdamW


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.RMSprop(params),
        lambda params: torch.optim.NAdam(params),
        lambda params: FusedAdamW(params),
        lambda params: None,
    ],
    ids=["RMSprop", "NAdam", "FusedAdamW", "None"],
)
def test_fuse_refuses_other_classes(make: Callable[[list[Parameter]], Any]) -> None:
    optimizer = make(make_params())
    with pytest.raises(TypeError, match=r"torch\.optim\.AdamW.*got " + type(optimizer).__name__):
        fusedopt.fuse(optimizer)


def test_fuse_refuses_differentiable(cls: type[FusedOptimizer]) -> None:
    params: list[Tensor] = [p.detach().clone() for p in make_params()]
    with pytest.raises(RuntimeError, match="differentiable"):
        fusedopt.fuse(TORCH[cls](params, differentiable=True))


def test_fuse_refuses_unknown_options(cls: type[FusedOptimizer]) -> None:
    with pytest.raises(TypeError, match="no_such_option"):
        fusedopt.fuse(TORCH[cls](make_params()), no_such_option=1)
