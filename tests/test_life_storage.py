"""Promises 18 and 24: params, state and gradients move to other memory; autograd sees each step."""

from __future__ import annotations

import random
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from fusedopt import FusedOptimizer
from tests import life
from tests.helpers import (
    CLASSES,
    OPTIONS,
    assert_same,
    bits,
    build,
    contents,
    make_params,
    params_of,
    random_grads,
    run,
)
from tests.life import STORAGE, network, twin_of

backend, cls, driver = life.backend, life.cls, life.driver


def test_new_gradient_buffers_on_each_step(cls: type[FusedOptimizer], driver: str) -> None:
    reused, renewed = build(cls, driver), build(cls, driver)
    run(reused, [0])
    old = []
    for number in range(5):
        params = params_of(reused)
        for p, grad in zip(params, random_grads(params, number), strict=True):
            p.grad.copy_(grad)
        if number:
            reused.step()
        run(renewed, [number])
        # Kept alive and poisoned: a step that read an old buffer would show it.
        old += [p.grad for p in params_of(renewed)]
        for grad in old:
            grad.fill_(float("nan"))
        assert_same(contents(reused)["params"], contents(renewed)["params"])
        assert_same(contents(reused)["state"], contents(renewed)["state"])


@pytest.mark.parametrize("change", STORAGE.values(), ids=STORAGE.keys())
def test_param_data_swapped(cls: type[FusedOptimizer], driver: str, change: Any) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    params = params_of(optimizer)
    old = [p.data for p in params]
    for p in params:
        p.data = change(p.data)
    new = [p.data for p in params]
    kept, started = [bits(t) for t in old], [bits(t) for t in new]
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    for p, now, before, then, bytes_before in zip(params, new, old, started, kept, strict=True):
        assert torch.equal(bits(before), bytes_before)
        assert (p.data_ptr(), p.stride()) == (now.data_ptr(), now.stride())
        # A few elements alone may round back to what they were, in a short dtype.
        assert p.numel() < 10 or not torch.equal(bits(now), then)


@pytest.mark.parametrize(
    ("how", "change"),
    [
        *(pytest.param("replaced", change, id=name) for name, change in STORAGE.items()),
        *(pytest.param("data", STORAGE[name], id=f"data-{name}") for name in ("clone", "gaps")),
    ],
)
def test_state_tensors_swapped(
    cls: type[FusedOptimizer], driver: str, how: str, change: Any
) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    old, new = [], []
    for entry in optimizer.state.values():
        for key in [k for k in entry if k != "step"]:
            old.append(entry[key].data)
            new.append(change(entry[key].data))
            if how == "replaced":
                entry[key] = new[-1]
            else:
                entry[key].data = new[-1]
    kept, started = [bits(t) for t in old], [bits(t) for t in new]
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    now = [v for entry in optimizer.state.values() for k, v in entry.items() if k != "step"]
    for tensor, buffer, then, before, bytes_before in zip(
        now, new, started, old, kept, strict=True
    ):
        assert torch.equal(bits(before), bytes_before)
        assert tensor.data_ptr() == buffer.data_ptr()
        assert tensor.numel() < 10 or not torch.equal(bits(buffer), then)


STEPS = {
    "int": 7,
    "float": 7.0,
    "float32": torch.tensor(7.0),
    "one-element": torch.tensor([7.0]),
    "float64": torch.tensor(7.0, dtype=torch.float64),
    "int64": torch.tensor(7),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_step_replaced(cls: type[FusedOptimizer], driver: str, step: Any) -> None:
    optimizer, plain = build(cls, driver), build(cls, driver)
    for subject in (optimizer, plain):
        run(subject, range(3))
    old = [entry["step"] for entry in optimizer.state.values()]
    for entry, other in zip(optimizer.state.values(), plain.state.values(), strict=True):
        entry["step"] = deepcopy(step)
        other["step"] = torch.tensor(7.0)
    for subject in (optimizer, plain):
        run(subject, [3, 4])
    assert_same(contents(optimizer)["params"], contents(plain)["params"])
    assert [float(entry["step"]) for entry in optimizer.state.values()] == [9.0] * len(old)
    assert [tensor.item() for tensor in old] == [3.0] * len(old)


@pytest.mark.parametrize("cls", CLASSES[:2], ids=lambda cls: cls.__name__)
def test_step_data_swapped(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    old = [entry["step"].data for entry in optimizer.state.values()]
    for entry in optimizer.state.values():
        entry["step"].data = torch.tensor(7.0)
    run(optimizer, [3])
    assert [entry["step"].item() for entry in optimizer.state.values()] == [8.0] * len(old)
    assert [tensor.item() for tensor in old] == [3.0] * len(old)


def test_state_dicts_in_any_order(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer, plain = build(cls, driver), build(cls, driver)
    chooser = random.Random(0)
    for number in range(8):
        for p in optimizer.state:
            items = [*optimizer.state[p].items(), (f"note {chooser.random()}", None), (5, "five")]
            known = [(k, v) for k, v in items if k in ("step", *cls.rule.state)]
            items = items if chooser.random() < 0.5 else known
            chooser.shuffle(items)
            # A key that is equal to the usual one, but is another object.
            optimizer.state[p] = {"".join(k) if isinstance(k, str) else k: v for k, v in items}
        for subject in (optimizer, plain):
            run(subject, [number])
        assert_same(contents(optimizer)["params"], contents(plain)["params"])


def test_swap_tensors(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    run(optimizer, range(3))
    params, others = params_of(optimizer), make_params(torch.bfloat16, seed=5)
    for p, other in zip(params, others, strict=True):
        torch.utils.swap_tensors(p, other)
    kept = [bits(t) for t in others]
    assert all(t.dtype == torch.float32 for t in others)
    twin = twin_of(optimizer)
    run(optimizer, range(3, 6))
    run(twin, range(3, 6))
    assert_same(contents(optimizer), contents(twin))
    assert all(p.dtype == torch.bfloat16 for p in params)
    for other, before in zip(others, kept, strict=True):
        assert torch.equal(bits(other), before)


def test_module_converted_after_construction(cls: type[FusedOptimizer], backend: str) -> None:
    model = network().float()
    optimizer = cls(model.parameters(), **OPTIONS[cls], backend=backend)
    run(optimizer, [0])
    model.double()
    optimizer.zero_grad()
    twin = twin_of(optimizer)
    run(optimizer, [1, 2])
    run(twin, [1, 2])
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert_same(contents(optimizer), contents(twin))


# Promise 24: version counters.


@pytest.mark.parametrize("layout", ["clone", "transposed", "gaps"])
def test_backward_through_an_overwritten_weight_raises(
    cls: type[FusedOptimizer], driver: str, layout: str
) -> None:
    weights = [Parameter(STORAGE[layout](t.data)) for t in make_params(shapes=((9, 7), (9, 7)))]
    stepped, idle = weights
    optimizer = cls(weights, **OPTIONS[cls], backend=driver)
    for number in range(2):
        losses = [w.square().sum() for w in weights]  # each keeps its w for backward
        stepped.grad = random_grads([stepped], number)[0]
        idle.grad = None
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses[0].backward()
        losses[1].backward()


def test_version_counters_of_a_large_step(cls: type[FusedOptimizer], backend: str) -> None:
    # Large enough that the native driver lets other threads run meanwhile.
    weight = Parameter(make_params(shapes=((1 << 20) + 3,))[0].data)
    optimizer = cls([weight], **OPTIONS[cls], backend=backend)
    loss = weight.square().sum()
    weight.grad = random_grads([weight], 0)[0]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
