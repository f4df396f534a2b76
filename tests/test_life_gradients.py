"""Promises 17 and 25, and zero_grad of 26: gradients come and go, and a step leaves them alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from fusedopt import FusedOptimizer, FusedSGD
from tests import life
from tests.helpers import (
    OPTIONS,
    TORCH,
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
from tests.life import at_offset, backward, network, networks, pair, transposed, with_gaps

backend, cls, driver = life.backend, life.cls, life.driver


@pytest.mark.parametrize("set_to_none", [True, False])
def test_params_frozen_and_unfrozen(
    cls: type[FusedOptimizer], backend: str, set_to_none: bool
) -> None:
    models, both = networks(cls, backend)
    for number in range(8):
        for model, optimizer in zip(models, both, strict=True):
            model[0].requires_grad_(number not in (0, 3, 4))
            model[2].bias.requires_grad_(number < 5)
            optimizer.zero_grad(set_to_none=set_to_none)
            backward(model, number)
            optimizer.step()
        assert_close_to(*both)


def test_a_frozen_param_with_a_gradient_is_stepped(cls: type[FusedOptimizer], driver: str) -> None:
    both = pair(cls, driver)
    for optimizer in both:
        for p in params_of(optimizer)[::2]:
            p.requires_grad_(False)
        run(optimizer, [0, 1])
    assert_close_to(*both)


def test_gradients_coming_and_going(cls: type[FusedOptimizer], driver: str) -> None:
    subject, oracle = pair(cls, driver)
    chooser = random.Random(0)
    counts = [0] * len(params_of(subject))
    for number in range(14):
        before = [bits(p) for p in params_of(subject)]
        # The first gradient of param i arrives in step i or later.
        present = [number >= i and chooser.random() < 0.6 for i in range(len(counts))]
        for optimizer in (subject, oracle):
            params = params_of(optimizer)
            for p, grad, there in zip(params, random_grads(params, number), present, strict=True):
                p.grad = grad if there else None
            optimizer.step()
        assert_close_to(subject, oracle)
        for i, p in enumerate(params_of(subject)):
            counts[i] += present[i]
            if not present[i]:
                assert torch.equal(bits(p), before[i])
            if counts[i] == 0:
                assert p not in subject.state
            elif cls is not FusedSGD:
                assert subject.state[p]["step"].item() == counts[i]
    assert len(set(counts)) > 3  # the params really differ in their counts


def test_first_momentum_is_the_gradient_whatever_the_dampening(driver: str) -> None:
    params = make_params()
    optimizer = FusedSGD(params, lr=0.1, momentum=0.9, dampening=0.7, backend=driver)
    for late in range(len(params)):
        for i, (p, grad) in enumerate(zip(params, random_grads(params, late), strict=True)):
            p.grad = grad if i <= late else None
        optimizer.step()
        assert torch.equal(optimizer.state[params[late]]["momentum_buffer"], params[late].grad)


def test_steps_from_within_backward(cls: type[FusedOptimizer], driver: str) -> None:
    # An optimizer for each param, stepped as soon as its gradient is there.
    models = [network(), network()]
    both: list[list[Optimizer]] = [
        [cls([p], **OPTIONS[cls], backend=driver) for p in models[0].parameters()],
        [TORCH[cls]([p], **OPTIONS[cls], foreach=False) for p in models[1].parameters()],
    ]
    for model, optimizers in zip(models, both, strict=True):
        for p, optimizer in zip(model.parameters(), optimizers, strict=True):

            def hook(_: Tensor, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            p.register_post_accumulate_grad_hook(hook)
        for number in range(4):
            backward(model, number)
    for subject, oracle in zip(*both, strict=True):
        assert_close_to(subject, oracle)


def test_a_step_without_gradients_is_nothing(cls: type[FusedOptimizer], driver: str) -> None:
    optimizer = build(cls, driver)
    before = contents(optimizer)
    optimizer.step()
    assert_same(contents(optimizer), before)
    assert not optimizer.state
    run(optimizer, [0])
    before = contents(optimizer)
    optimizer.zero_grad()
    optimizer.step()
    assert_same(contents(optimizer), before)


def test_zero_grad(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:
        run(optimizer, [0, 1])
        grads = [p.grad for p in params_of(optimizer)]
        optimizer.zero_grad(set_to_none=False)
        for p, grad in zip(params_of(optimizer), grads, strict=True):
            assert p.grad is grad
            assert torch.equal(grad, torch.zeros_like(grad))
        optimizer.step()  # moments decay under zero gradients
        optimizer.zero_grad()
        assert all(p.grad is None for p in params_of(optimizer))
        optimizer.step()
        run(optimizer, [2])
    assert_close_to(*both)


# Promise 25: what a step leaves alone.

GRAD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "maximize": {"maximize": True},
    "norm": {"max_grad_norm": 0.5},
    "value": {"clip_grad_value": 0.1},
    "skip": {"skip_nonfinite": True},
}


@pytest.mark.parametrize("options", GRAD_OPTIONS.values(), ids=GRAD_OPTIONS.keys())
def test_gradients_are_not_modified(
    cls: type[FusedOptimizer], driver: str, options: dict[str, Any]
) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    params = [p for dtype in dtypes for p in make_params(dtype)]
    optimizer = cls(params, **OPTIONS[cls], backend=driver, **options)
    for number, change in enumerate([torch.clone, transposed, with_gaps, at_offset]):
        for p, grad in zip(params, random_grads(params, number), strict=True):
            p.grad = change(grad)
        for p in params[4::6]:
            p.grad = random_grads([p[:1]], number)[0].expand(p.shape)
        if "max_grad_norm" in options:
            optimizer.grad_scale = torch.tensor(2.0)  # as GradScaler hands it over
        grads = [p.grad for p in params]
        before = [(bits(g), g.data_ptr(), g.stride(), g._version) for g in grads]
        optimizer.step()
        for p, grad, (values, *rest) in zip(params, grads, before, strict=True):
            assert p.grad is grad
            assert torch.equal(bits(grad), values)
            assert [grad.data_ptr(), grad.stride(), grad._version] == rest
