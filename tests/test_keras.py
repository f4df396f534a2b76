"""What is special in Keras; test_frameworks.py trains with it."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest
import torch

os.environ["KERAS_BACKEND"] = "torch"
keras = pytest.importorskip("keras")
ours = importlib.import_module("fusedopt.integrations.keras")


def variables() -> list[keras.Variable]:
    generator = np.random.default_rng(0)
    shapes = {"kernel": (5, 7), "bias": (7,), "gamma": (3,)}
    return [
        keras.Variable(generator.normal(size=shape).astype("float32"), name=name)
        for name, shape in shapes.items()
    ]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(v.shape, generator=generator) for v in variables()]


def test_excluded_variables_do_not_decay() -> None:
    runs = []
    for cls in (keras.optimizers.AdamW, ours.FusedAdamW):
        params, optimizer = variables(), cls(1e-2, weight_decay=0.5)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma"])
        for step in range(5):
            optimizer.apply(gradients(step), params)
        runs.append(params)
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused.value, plain.value, rtol=1e-5, atol=1e-6)


def test_epsilon_is_what_keras_means() -> None:
    """Added before the bias correction: with a large one, another update than that of torch."""
    runs = []
    for cls in (keras.optimizers.AdamW, ours.FusedAdamW):
        params, optimizer = variables(), cls(1e-2, epsilon=0.1)
        for step in range(5):
            optimizer.apply(gradients(step), params)
        runs.append(params)
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused.value, plain.value, rtol=1e-5, atol=1e-6)


def test_a_changed_iteration_count_is_used() -> None:
    runs = []
    for cls in (keras.optimizers.AdamW, ours.FusedAdamW):
        params, optimizer = variables(), cls(1e-2, epsilon=1e-3)
        for step in range(6):
            optimizer.apply(gradients(step), params)
            if step == 2:
                optimizer.iterations.assign(100)
        runs.append(params)
        assert int(optimizer.iterations) == 103
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused.value, plain.value, rtol=1e-5, atol=1e-6)


def test_gradients_are_as_they_were() -> None:
    params, optimizer = variables(), ours.FusedAdamW(1e-2, global_clipnorm=0.1)
    params[0].value.grad = mine = torch.ones(5, 7)
    grads = gradients(0)
    copies = [grad.clone() for grad in grads]
    optimizer.apply(grads, params)
    assert params[0].value.grad is mine
    assert params[1].value.grad is None
    assert all(torch.equal(grad, copy) for grad, copy in zip(grads, copies, strict=True))
    norm = torch.nn.utils.get_total_norm(grads)
    torch.testing.assert_close(optimizer.grad_norm, norm)


def test_the_norm_is_there_where_it_is_asked_for() -> None:
    params = variables()
    for options in ({}, {"clipvalue": 0.1}, {"clipnorm": 0.1}):
        plain = ours.FusedAdamW(1e-2, **options)
        plain.apply(gradients(0), params)
        with pytest.raises(AttributeError, match=r"write global_clipnorm=1\.0"):
            _ = plain.grad_norm
        assert getattr(plain, "grad_norm", None) is None
    assert ours.FusedAdamW(1e-2, global_clipnorm=1.0).grad_norm is None
    unclipped = ours.FusedAdamW(1e-2, global_clipnorm=float("inf"))
    unclipped.apply(gradients(0), params)
    norm = torch.nn.utils.get_total_norm(gradients(0))
    torch.testing.assert_close(unclipped.grad_norm, norm)


def test_the_variables_of_keras_adamw_are_taken_over() -> None:
    plain, fused = keras.optimizers.AdamW(1e-2), ours.FusedAdamW(1e-2)
    params, others = variables(), variables()
    for step in range(3):
        plain.apply(gradients(step), params)
    fused.build(others)
    store: dict[str, np.ndarray] = {}
    plain.save_own_variables(store)
    fused.load_own_variables(store)
    for p, q in zip(params, others, strict=True):
        q.assign(p)
    plain.apply(gradients(3), params)
    fused.apply(gradients(3), others)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(q.value, p.value, rtol=1e-5, atol=1e-6)
    assert ours.FusedAdamW.from_config(fused.get_config()).get_config() == fused.get_config()


def test_gradients_accumulate() -> None:
    runs = []
    for cls in (keras.optimizers.AdamW, ours.FusedAdamW):
        params = variables()
        optimizer = cls(1e-2, epsilon=1e-3, global_clipnorm=0.5, gradient_accumulation_steps=2)
        for step in range(7):
            optimizer.apply(gradients(step), params)
        runs.append(params)
    for plain, fused in zip(*runs, strict=True):
        torch.testing.assert_close(fused.value, plain.value, rtol=1e-5, atol=1e-6)


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(ImportError, match="Keras on its torch backend, and this is jax"):
        importlib.reload(ours)
