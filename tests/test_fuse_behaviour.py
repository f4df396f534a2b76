"""fuse(): what an optimizer does beyond its class goes along or is refused, nothing is dropped."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler

import fusedopt
from fusedopt import FusedAdam, FusedAdamW, FusedOptimizer, FusedSGD
from tests import life, old_torch
from tests.helpers import (
    OPTIONS,
    TORCH,
    assert_close_to,
    assert_same,
    contents,
    make_params,
    params_of,
    run,
)
from tests.life import FLAVOURS, torch_optimizer

backend, cls = life.backend, life.cls


def build_torch(cls: type[FusedOptimizer]) -> Optimizer:
    return torch_optimizer(cls, FLAVOURS["for-loop"])


# Methods of its own.

METHODS: dict[str, Callable[..., Any]] = {
    "step": lambda self, closure=None: None,
    "_init_group": lambda self, *args: False,
    "zero_grad": lambda self, set_to_none=True: None,
    "add_param_group": lambda self, group: Optimizer.add_param_group(self, group),
    "state_dict": lambda self: {},
    "load_state_dict": lambda self, state_dict: None,
}


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_subclass_with_a_method_of_its_own_is_refused(
    cls: type[FusedOptimizer], name: str, used_before: bool
) -> None:
    if used_before:  # torch has wrapped step() of the class itself then
        run(TORCH[cls](make_params()), [0])
    base: Any = type("Base", (TORCH[cls],), {name: METHODS[name]})
    for kind in (base, type("Derived", (base,), {})):
        optimizer = kind(make_params(), lr=0.1)
        with pytest.raises(TypeError) as raised:
            fusedopt.fuse(optimizer)
        for part in (kind.__name__, f"{name}()", f"torch.optim.{TORCH[cls].__name__}"):
            assert part in str(raised.value)
        assert f"fusedopt.{cls.__name__}" in str(raised.value)


def test_a_step_that_calls_torchs_is_of_its_own() -> None:
    class Clipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            torch.nn.utils.clip_grad_norm_(params_of(self), 1.0)
            return super().step(closure)

    class Decorated(torch.optim.AdamW):
        pass

    Decorated.step = functools.wraps(Decorated.step)(  # type: ignore[method-assign]
        lambda self, closure=None: None
    )
    for kind in (Clipping, Decorated):
        with pytest.raises(TypeError, match=r"its step\(\) is not that of"):
            fusedopt.fuse(kind(make_params(), lr=0.1))


def test_a_step_of_a_mixin_is_of_its_own() -> None:
    class Mixin:
        def step(self, closure: Any = None) -> Any:
            raise ZeroDivisionError

    mixed: Any = type("Mixed", (Mixin, torch.optim.Adam), {})
    with pytest.raises(TypeError, match="Mixed"):
        fusedopt.fuse(mixed(make_params()))


def test_a_class_put_on_afterwards_is_seen() -> None:
    # As detectron2 clips.
    optimizer: Any = torch.optim.SGD(make_params(), lr=0.1)
    optimizer.__class__ = type("SGDWithClip", (torch.optim.SGD,), {"step": METHODS["step"]})
    with pytest.raises(TypeError, match="SGDWithClip"):
        fusedopt.fuse(optimizer)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_replaced_on_the_object_is_refused(cls: type[FusedOptimizer], name: str) -> None:
    replaced = build_torch(cls)
    setattr(replaced, name, MethodType(METHODS[name], replaced))
    with pytest.raises(TypeError, match=f"whose {name} was replaced"):
        fusedopt.fuse(replaced)
    wrapped = build_torch(cls)
    inner = getattr(wrapped, name)
    setattr(wrapped, name, functools.wraps(inner)(lambda *args, **kwargs: inner(*args, **kwargs)))
    with pytest.raises(TypeError, match=f"whose {name} was replaced"):
        fusedopt.fuse(wrapped)


def test_a_step_wrapped_around_a_schedulers_is_refused() -> None:
    optimizer = torch.optim.SGD(make_params(), lr=0.1)
    scheduler = lr_scheduler.StepLR(optimizer, 1)
    inner = optimizer.step
    optimizer.step = functools.wraps(inner)(lambda *args: inner(*args))  # type: ignore
    with pytest.raises(TypeError, match="whose step was replaced"):
        fusedopt.fuse(optimizer)
    assert scheduler.optimizer is optimizer  # left alone


def test_subclasses_that_step_as_torch_are_taken(cls: type[FusedOptimizer], backend: str) -> None:
    class Named(TORCH[cls]):  # type: ignore[misc,name-defined]
        """With a constructor, a repr and a helper."""

        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, **options)
            self.defaults["mine"] = 3
            for group in self.param_groups:
                group["mine"] = 3

        def __repr__(self) -> str:
            return "named"

        def helper(self) -> None:
            raise NotImplementedError

    sources = [Named(make_params(torch.float64), **OPTIONS[cls]) for _ in range(2)]
    for source in sources:
        source.step = source.step  # a bound method, as some wrappers put it back
        run(source, range(2))
    fused = fusedopt.fuse(sources[0], backend=backend)
    assert type(fused) is cls
    assert fused.param_groups[0]["mine"] == 3
    fused.add_param_group({"params": make_params(torch.float64, seed=4)})
    assert fused.param_groups[1]["mine"] == 3  # as torch fills in defaults
    del fused.param_groups[1]
    for optimizer in (fused, sources[1]):
        run(optimizer, range(2, 4))
    assert_close_to(fused, sources[1])


# Hooks.


def test_hooks_go_along(cls: type[FusedOptimizer], backend: str) -> None:
    source = build_torch(cls)
    log: list[tuple[str, Any]] = []

    def hook(name: str) -> Callable[..., None]:
        return lambda optimizer, *rest: log.append((name, optimizer))

    handles = [source.register_step_pre_hook(hook(f"pre {n}")) for n in range(2)]
    source.register_step_post_hook(hook("post"))
    source.register_state_dict_pre_hook(hook("save pre"))
    source.register_state_dict_post_hook(hook("save post"))
    source.register_state_dict_post_hook(hook("save post 0"), prepend=True)
    source.register_load_state_dict_pre_hook(hook("load pre"))
    source.register_load_state_dict_post_hook(hook("load post"))
    fused = fusedopt.fuse(source, backend=backend)
    fused.register_step_pre_hook(hook("pre new"))
    run(fused, [0])
    assert log == [(name, fused) for name in ("pre 0", "pre 1", "pre new", "post")]
    log.clear()
    fused.load_state_dict(fused.state_dict())
    names = ("save pre", "save post 0", "save post", "load pre", "load post")
    assert log == [(name, fused) for name in names]
    log.clear()
    handles[0].remove()
    run(fused, [1])
    assert [name for name, _ in log] == ["pre 1", "pre new", "post"]


def test_a_hook_that_changes_gradients_counts(cls: type[FusedOptimizer], backend: str) -> None:
    source, oracle = build_torch(cls), build_torch(cls)

    def double(optimizer: Optimizer, *_: Any) -> None:
        for p in params_of(optimizer):
            assert p.grad is not None
            p.grad *= 2

    for optimizer in (source, oracle):
        optimizer.register_step_pre_hook(double)
        run(optimizer, [0])
    fused = fusedopt.fuse(source, backend=backend)
    for number in range(1, 4):
        for optimizer in (fused, oracle):
            run(optimizer, [number])
        assert_close_to(fused, oracle)


# Options.


def test_a_given_lr_is_that_of_every_group(cls: type[FusedOptimizer], backend: str) -> None:
    source, oracle = build_torch(cls), build_torch(cls)
    lr_scheduler.StepLR(source, 1)  # writes initial_lr
    for optimizer in (source, oracle):
        run(optimizer, [0])
    fused = fusedopt.fuse(source, lr=0.125, weight_decay=0.5, backend=backend)
    for optimizer in (oracle,):
        for group in optimizer.param_groups:
            group.update(lr=0.125, weight_decay=0.5)
    assert [group["lr"] for group in fused.param_groups] == [0.125] * 2
    assert [group["lr"] for group in source.param_groups] != [0.125] * 2
    assert (fused.defaults["lr"], fused.defaults["weight_decay"]) == (0.125, 0.5)
    for number in range(1, 4):
        for optimizer in (fused, oracle):
            run(optimizer, [number])
        assert_close_to(fused, oracle)
    scheduler = lr_scheduler.LambdaLR(fused, lambda epoch: 1.0)
    assert scheduler.get_last_lr() == [0.125] * 2  # and not the initial_lr of the old run


def test_a_given_tensor_lr_leaves_initial_lr_alone() -> None:
    source = torch.optim.AdamW(make_params(), lr=0.5)
    lr_scheduler.StepLR(source, 1)
    fused = fusedopt.fuse(source, lr=torch.tensor(0.125))
    scheduler = lr_scheduler.LambdaLR(fused, lambda epoch: 1 / (1 + epoch))
    for number in range(3):
        advance(fused, scheduler, number)
    assert float(fused.param_groups[0]["lr"]) == 0.125 / 4
    assert float(fused.param_groups[0]["initial_lr"]) == 0.125


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (FusedAdamW, {"betas": (0.5, 0.75), "eps": 1e-4, "amsgrad": False}),
        pytest.param(
            *(FusedAdam, {"decoupled_weight_decay": True, "maximize": True}),
            marks=old_torch.needs_decoupled_adam,
        ),
        (FusedSGD, {"momentum": 0.5, "dampening": 0.0, "nesterov": True}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_given_hyperparameters_replace_the_old(
    cls: type[FusedOptimizer], backend: str, options: dict[str, Any]
) -> None:
    source, oracle = build_torch(cls), build_torch(cls)
    fused = fusedopt.fuse(source, max_grad_norm=float("inf"), backend=backend, **options)
    for group in oracle.param_groups:
        group.update(options)
    for number in range(3):
        for optimizer in (fused, oracle):
            run(optimizer, [number])
        assert_close_to(fused, oracle)
    for group in fused.param_groups:
        assert {key: group[key] for key in options} == options


def test_values_that_are_not_given_stay(cls: type[FusedOptimizer]) -> None:
    source = build_torch(cls)
    source.param_groups[0]["lr"] = -0.5  # as a schedule may write it
    source.param_groups[1]["lr"] = np.array(0.25)
    fused = fusedopt.fuse(source)
    assert [float(group["lr"]) for group in fused.param_groups] == [-0.5, 0.25]


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"lr": "fast"}, TypeError, "learning rate"),
        ({"lr": -1.0}, ValueError, "learning rate"),
        ({"weight_decay": -1.0}, ValueError, "weight_decay"),
        ({"weight_deacy": 0.1}, TypeError, "weight_deacy"),
        ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
    ],
    ids=str,
)
def test_bad_options_are_refused(
    cls: type[FusedOptimizer], options: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fusedopt.fuse(build_torch(cls), **options)


def test_a_bad_value_in_a_group_names_it(cls: type[FusedOptimizer]) -> None:
    source = build_torch(cls)
    source.param_groups[1]["weight_decay"] = -1.0
    with pytest.raises(ValueError, match=r"param_groups\[1\]: Invalid weight_decay"):
        fusedopt.fuse(source)


# Schedulers.

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.5, 0.25], total_steps=20),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def advance(optimizer: Optimizer, scheduler: Any, number: int) -> None:
    run(optimizer, [number])
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(1.0)
    else:
        scheduler.step()


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_a_scheduler_goes_along(
    cls: type[FusedOptimizer], make: Callable[[Optimizer], Any], before: int
) -> None:
    source, oracle = build_torch(cls), build_torch(cls)
    schedulers = [make(source), make(oracle)]
    for number in range(before):
        for optimizer, scheduler in zip((source, oracle), schedulers, strict=True):
            advance(optimizer, scheduler, number)
    fused = fusedopt.fuse(source)
    left = contents(source)["groups"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # scheduler.step() before optimizer.step(), says torch
        # What SequentialLR of torch 2.6 does itself.
        warnings.filterwarnings("ignore", "The epoch parameter in `scheduler.step")
        for number in range(before, before + 6):
            for optimizer, scheduler in zip((fused, oracle), schedulers, strict=True):
                advance(optimizer, scheduler, number)
            assert_close_to(fused, oracle)
            if number == before + 2:  # replaces the group dicts, as accelerate's prepare() does
                fused.load_state_dict(fused.state_dict())
    for group, other in zip(fused.param_groups, oracle.param_groups, strict=True):
        for key in ("lr", "betas", "momentum", "initial_lr"):
            assert group.get(key) == other.get(key)
    assert_same(contents(source)["groups"], left)


def test_a_scheduler_with_a_tensor_lr_goes_along() -> None:
    source = torch.optim.AdamW(make_params(), lr=torch.tensor(0.5))
    scheduler = lr_scheduler.ExponentialLR(source, 0.5)
    fused = fusedopt.fuse(source)
    advance(fused, scheduler, 0)
    assert float(fused.param_groups[0]["lr"]) == 0.25


def test_a_scheduler_of_another_library_goes_along() -> None:
    class Scheduler:  # as timm's: no class of torch
        def __init__(self, optimizer: Optimizer) -> None:
            self.optimizer = optimizer

    class WarmUp(Scheduler):
        def step(self) -> None:
            for group in self.optimizer.param_groups:
                group["lr"] = 0.125

    source = torch.optim.SGD(make_params(), lr=0.5)
    scheduler = WarmUp(source)
    fused = fusedopt.fuse(source)
    scheduler.step()
    assert fused.param_groups[0]["lr"] == 0.125


def test_other_schedulers_stay_where_they_are() -> None:
    source, other = (torch.optim.SGD(make_params(), lr=0.5) for _ in range(2))
    scheduler = lr_scheduler.ExponentialLR(other, 0.5)
    fusedopt.fuse(source)
    assert scheduler.optimizer is other


def test_a_scheduler_may_be_moved_by_hand_or_built_later() -> None:
    source = torch.optim.SGD(make_params(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(source, 0.5)
    fused = fusedopt.fuse(source)
    scheduler.optimizer = fused
    advance(fused, scheduler, 0)
    assert fused.param_groups[0]["lr"] == 0.25
    later = lr_scheduler.StepLR(fused, 1, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        advance(fused, later, 1)
    assert fused.param_groups[0]["lr"] == 0.125


def test_a_scheduler_that_the_garbage_collector_leaves_alone_goes_along() -> None:
    source = torch.optim.SGD(make_params(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(source, 0.5)
    gc.freeze()
    try:
        fused = fusedopt.fuse(source)
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
    assert scheduler.optimizer is fused


def test_what_a_scheduler_sets_cannot_be_given() -> None:
    source = torch.optim.SGD(make_params(), lr=0.5, momentum=0.9)
    plain = lr_scheduler.ExponentialLR(source, 0.5)
    with pytest.raises(ValueError, match=r"lr cannot be given: a ExponentialLR"):
        fusedopt.fuse(source, lr=0.1)
    assert plain.optimizer is source
    assert fusedopt.fuse(source, momentum=0.5).param_groups[0]["momentum"] == 0.5
    source = torch.optim.SGD(make_params(), lr=0.5, momentum=0.9)
    cycle = lr_scheduler.OneCycleLR(source, 1.0, total_steps=9)
    with pytest.raises(ValueError, match="momentum cannot be given: a OneCycleLR"):
        fusedopt.fuse(source, momentum=0.5)
    assert cycle.optimizer is source


def test_a_scheduled_optimizer_dies_with_its_last_reference() -> None:
    source = torch.optim.SGD(make_params(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(source, 0.5)
    fused = fusedopt.fuse(source)
    advance(fused, scheduler, 0)
    gone = weakref.ref(fused)
    gc.disable()
    try:
        del fused, scheduler
        assert gone() is None  # no cycle through the wrapped step()
    finally:
        gc.enable()


def test_a_closure_through_a_wrapped_step() -> None:
    source = torch.optim.SGD(make_params(), lr=0.5)
    scheduler = lr_scheduler.ExponentialLR(source, 0.5)
    fused = fusedopt.fuse(source)

    def closure() -> Tensor:
        loss = sum((p.square().sum() for p in params_of(fused)), torch.zeros(()))
        loss.backward()
        return loss

    before = params_of(fused)[4].detach().clone()
    assert isinstance(fused.step(closure), Tensor)
    assert torch.allclose(params_of(fused)[4], before - 0.5 * 2 * before, atol=1e-6)
    scheduler.step()
    assert fused.param_groups[0]["lr"] == 0.25
