"""Promise 26: closures, hooks and the profiler see each step once and in torch's order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fusedopt import FusedOptimizer
from tests import life
from tests.helpers import assert_close_to, assert_same, bits, build, contents, params_of, run
from tests.life import backward, networks, pair

backend, cls = life.backend, life.cls


@pytest.fixture
def hooked() -> Iterator[None]:
    handle = register_optimizer_step_pre_hook(lambda *_: None)
    yield
    handle.remove()


@pytest.mark.parametrize("hook", [False, True], ids=["", "hooked"])
@pytest.mark.parametrize("keyword", [False, True], ids=["", "keyword"])
def test_closure_called_once_with_grad_enabled(
    cls: type[FusedOptimizer], backend: str, keyword: bool, hook: bool, request: Any
) -> None:
    if hook:
        request.getfixturevalue("hooked")
    models, both = networks(cls, backend)
    for number in range(3):
        for model, optimizer in zip(models, both, strict=True):
            calls = []

            def closure(model: Any = model, optimizer: Any = optimizer, calls: Any = calls) -> Any:
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                calls.append(backward(model, number))  # noqa: B023
                return calls[-1]

            with torch.no_grad():
                loss = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
                assert not torch.is_grad_enabled()
            assert len(calls) == 1
            assert loss is calls[0]
        assert_close_to(*both)
    assert both[0].step() is None


def test_closure_that_raises(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    before = contents(optimizer)

    def closure() -> None:
        raise ZeroDivisionError("in the closure")

    with pytest.raises(ZeroDivisionError, match="in the closure"):
        optimizer.step(closure)
    assert_same(contents(optimizer), before)
    assert torch.is_grad_enabled()


CALLS: dict[str, Callable[[Optimizer, Any], Any]] = {
    "nothing": lambda optimizer, closure: optimizer.step(),
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "keyword": lambda optimizer, closure: optimizer.step(closure=closure),
}


def hook_log(optimizer: Optimizer, call: Callable[[Optimizer, Any], Any]) -> list[Any]:
    """What the hooks of one step see, in their order."""
    log: list[Any] = []
    run(optimizer, [0])
    before = [bits(p) for p in params_of(optimizer)]

    def note(name: str) -> Callable[..., None]:
        def hook(subject: Optimizer, args: Any, kwargs: Any) -> None:
            assert subject is optimizer
            changed = any(
                not torch.equal(bits(p), b) for p, b in zip(params_of(subject), before, strict=True)
            )
            log.append((name, changed, [a is optimizer for a in args], sorted(kwargs)))

        return hook

    handles = [
        optimizer.register_step_post_hook(note("post 1")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre 1")),
        register_optimizer_step_pre_hook(note("global pre")),
        optimizer.register_step_post_hook(note("post 2")),
        optimizer.register_step_pre_hook(note("pre 2")),
    ]
    try:
        call(optimizer, lambda: log.append("closure"))
    finally:
        for handle in handles:
            handle.remove()
    call(optimizer, lambda: None)  # removed hooks are silent
    return log


@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_hooks_in_order(cls: type[FusedOptimizer], backend: str, call: Any) -> None:
    subject, oracle = pair(cls, backend)
    log = hook_log(subject, call)
    assert log == hook_log(oracle, call)
    names = [entry[0] for entry in log if entry != "closure"]
    assert names == ["global pre", "pre 1", "pre 2", "post 1", "post 2", "global post"]
    assert_close_to(subject, oracle)


@pytest.mark.parametrize("kind", ["pre", "post", "global pre", "global post"])
def test_a_single_hook_is_called(cls: type[FusedOptimizer], backend: str, kind: str) -> None:
    optimizer = build(cls, backend)
    calls = []
    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "global pre": register_optimizer_step_pre_hook,
        "global post": register_optimizer_step_post_hook,
    }[kind]
    handle = register(lambda *_: calls.append(kind))
    run(optimizer, [0, 1])
    handle.remove()
    run(optimizer, [2])
    assert calls == [kind, kind]


def test_hooks_of_a_subclass_with_a_step_of_its_own_run_once(
    cls: type[FusedOptimizer], backend: str
) -> None:
    class Own(cls):  # type: ignore[misc, valid-type]
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    param = torch.nn.Parameter(torch.randn(3))
    param.grad = torch.randn(3)
    optimizer = Own([param], lr=0.1, backend=backend)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.step()
    assert calls == ["pre", "post"]


def test_a_pre_hook_changes_the_arguments(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    optimizer.register_step_pre_hook(lambda self, args, kwargs: ((self, lambda: "other"), {}))
    assert optimizer.step(lambda: "given") == "other"
    assert optimizer.step() == "other"
    optimizer.register_step_pre_hook(lambda *_: "neither None nor a pair")
    before = contents(optimizer)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()
    assert_same(contents(optimizer), before)


def test_a_pre_hook_that_sets_the_gradients(cls: type[FusedOptimizer], backend: str) -> None:
    both = pair(cls, backend)
    for optimizer in both:

        def clip(subject: Optimizer, args: Any, kwargs: Any) -> None:
            nn.utils.clip_grad_norm_(params_of(subject), 0.1)

        optimizer.register_step_pre_hook(clip)
        run(optimizer, range(3))
    assert_close_to(*both)


def test_the_profiler_sees_a_step(cls: type[FusedOptimizer], backend: str) -> None:
    optimizer = build(cls, backend)
    run(optimizer, [0])
    with torch.autograd.profiler.profile() as profile:
        run(optimizer, [1, 2])
    name = f"Optimizer.step#{cls.__name__}.step"
    assert [event.name for event in profile.function_events].count(name) == 2
