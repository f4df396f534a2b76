"""The second of two equal steps is repeated in C++: all that Python would look at in between has to
be seen there. Of the CPU driver; of the CUDA driver by test_cuda_emulator.py."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt import FusedAdamW, FusedSGD
from tests.cases import BACKENDS
from tests.helpers import make_params

BACKEND = BACKENDS[0]
Change = Callable[[FusedAdamW], Any]


def stepped(**options: Any) -> FusedAdamW:
    params = make_params()
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    optimizer = FusedAdamW(params, lr=0.1, backend=BACKEND, **options)
    optimizer.step()
    return optimizer


def repeats(optimizer: FusedAdamW) -> bool:
    """Whether another step is a repeated one, which it then was."""
    return optimizer._repeated is not None and optimizer._repeated(optimizer.__dict__)


def pairs(a: FusedAdamW, b: FusedAdamW) -> Iterator[tuple[Parameter, Parameter]]:
    """Their params."""
    yield from zip(a.param_groups[0]["params"], b.param_groups[0]["params"], strict=True)


@pytest.mark.parametrize(
    "options",
    [
        *({}, {"max_grad_norm": 0.3}, {"max_grad_norm": 1}, {"clip_grad_value": 0.05}),
        *({"skip_nonfinite": True}, {"max_grad_norm": float("inf"), "skip_nonfinite": True}),
    ],
)
def test_repeated_steps_are_steps(options: dict[str, Any]) -> None:
    repeated, plain = stepped(**options), stepped(**options)
    for _ in range(3):
        assert repeats(repeated)
        plain._repeated = None
        plain.step()
    for a, b in pairs(repeated, plain):
        assert torch.equal(a, b)
        for name, value in plain.state[b].items():
            assert torch.equal(repeated.state[a][name], value)
    assert repeated.log() == plain.log()
    assert repeated.backend_in_use == plain.backend_in_use == BACKEND


def test_steps_after_scaled_ones() -> None:
    repeated, plain = stepped(max_grad_norm=1.0), stepped(max_grad_norm=1.0)
    for optimizer in (repeated, plain):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        for _ in range(2):
            assert not repeats(optimizer)
            optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    assert repeats(repeated)
    plain._repeated = None
    plain.step()
    for a, b in pairs(repeated, plain):
        assert torch.equal(a, b)
    assert repeated.log() == plain.log()


def test_a_step_that_is_skipped_is_counted() -> None:
    optimizer = stepped(skip_nonfinite=True)
    first = optimizer.param_groups[0]["params"][0]
    before, first.grad = first.detach().clone(), torch.full_like(first, float("nan"))
    for count in (1, 2):
        assert repeats(optimizer)
        assert optimizer.skipped_steps.item() == count
        assert torch.isnan(optimizer.grad_norm)
        assert torch.equal(first, before)
        assert optimizer.state[first]["step"].item() == 1


def set_in_group(name: str, value: Any) -> Change:
    return lambda optimizer: optimizer.param_groups[0].__setitem__(name, value)


def set_in_defaults(name: str, value: Any) -> Change:
    return lambda optimizer: optimizer.defaults.__setitem__(name, value)


CHANGES: dict[str, Change] = {
    "a hook before steps": lambda o: o.register_step_pre_hook(lambda *_: None),
    "a hook after steps": lambda o: o.register_step_post_hook(lambda *_: None),
    "a scale": lambda o: setattr(o, "grad_scale", torch.tensor(2.0)),
    "an overflow": lambda o: setattr(o, "found_inf", torch.tensor(1.0)),
    "a clip": lambda o: setattr(o, "max_grad_norm", 1e-3),
    "a clip in the group": set_in_group("max_grad_norm", 1e-3),
    "another clip": set_in_group("clip_grad_value", 1e-3),
    "a switch": set_in_group("skip_nonfinite", True),
    "another backend": lambda o: setattr(o, "backend", "reference"),
    "a process group": set_in_group("process_group", object()),
    "a process group of the attribute": set_in_defaults("process_group", object()),
    "a key that means nothing": set_in_group("weight_deacy", 0.1),
    "a group without an option": lambda o: o.param_groups[0].pop("backend"),
    "another group": lambda o: o.add_param_group({"params": make_params(seed=1)}),
    "no groups": lambda o: o.param_groups.clear(),
    "a fake param": lambda o: o.param_groups[0]["params"].insert(0, fake_param()),
    "another buffer of the count": lambda o: setattr(o, "_skipped_tensor", torch.zeros(())),
}


def fake_param() -> Parameter:
    with FakeTensorMode():
        return Parameter(torch.ones(3))


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_different_is_not_repeated(change: Change) -> None:
    optimizer = stepped()
    params = list(optimizer.param_groups[0]["params"])
    change(optimizer)
    before = [p.detach().clone() for p in params]
    assert not repeats(optimizer)
    for p, value in zip(params, before, strict=True):
        assert torch.equal(p, value)
        assert optimizer.state[p]["step"].item() == 1


def test_another_buffer_of_the_norm() -> None:
    optimizer = stepped(max_grad_norm=1.0)
    optimizer._norm_tensor = torch.zeros(())
    assert not repeats(optimizer)
    optimizer.step()
    assert optimizer.grad_norm > 0


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Mode, torch.autograd.profiler.profile, nullcontext])
def test_a_mode_or_a_profiler_sees_each_step(mode: Callable[[], Any]) -> None:
    optimizer = stepped()
    with mode():
        assert repeats(optimizer) is (mode is nullcontext)
    assert repeats(optimizer)


def test_a_hook_for_all_optimizers() -> None:
    optimizer, seen = stepped(), []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    try:
        assert not repeats(optimizer)
        optimizer.step()
    finally:
        handle.remove()
    assert seen == [1]
    assert repeats(optimizer)


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults", "grad_scale", "found_inf"])
def test_a_class_with_an_attribute_of_its_own(name: str) -> None:
    kind = type("Own", (FusedSGD,), {name: None})
    param = Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer = kind([param], lr=0.1, backend=BACKEND)
    optimizer.step()
    assert optimizer._repeated is None


def test_a_limit_whose_value_may_change() -> None:
    limit = torch.tensor(1e6)
    optimizer = stepped(max_grad_norm=limit)
    assert optimizer._repeated is None
    limit.fill_(1e-3)
    optimizer.step()
    assert optimizer.log()["clip_coef"] < 0.1


def test_values_that_steps_read_are_read_again() -> None:
    repeated, plain = stepped(), stepped()
    for optimizer in (repeated, plain):
        group = optimizer.param_groups[0]
        group["lr"], group["betas"], group["weight_decay"] = 0.7, (0.5, 0.6), 0.3
        for p in group["params"]:
            p.grad = torch.full_like(p, -0.4)
            optimizer.state[p]["exp_avg"] = torch.full_like(p, 0.2)
            p.data = p.data.clone() * 2
    assert repeats(repeated)
    plain._repeated = None
    plain.step()
    for a, b in pairs(repeated, plain):
        assert torch.equal(a, b)


def test_errors_are_those_of_a_step() -> None:
    optimizer = stepped()
    optimizer.param_groups[0]["lr"] = "fast"
    with pytest.raises(TypeError, match="lr"):
        repeats(optimizer)
    optimizer.param_groups[0]["lr"] = 0.1
    assert repeats(optimizer)
    for junk in (None, 3, [], optimizer):
        with pytest.raises(TypeError, match="__dict__"):
            optimizer._repeated(junk)
    for empty in ({}, {"param_groups": []}, dict.fromkeys(vars(optimizer))):
        assert optimizer._repeated(empty) is False


def test_the_optimizer_is_freed() -> None:
    optimizer = stepped(max_grad_norm=1.0)
    gc.collect()
    gc.disable()
    try:
        gone = weakref.ref(optimizer)
        del optimizer
        assert gone() is None
    finally:
        gc.enable()
