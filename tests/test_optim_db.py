"""Promise 27: PyTorch's own table of optimizer inputs, with the fused classes as subject."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any
from unittest import mock

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
from torch.testing._internal import common_optimizers

from fusedopt import FusedOptimizer
from tests.helpers import (
    CLASSES,
    TORCH,
    assert_close,
    assert_close_to,
    assert_same,
    contents,
    make_params,
    params_of,
    run,
    use_driver,
)

backend = pytest.fixture(use_driver, params=("cpu-direct", "reference"))
driver = pytest.fixture(use_driver, params=("cpu-direct", "cpu-dlpack", "cpu-python", "reference"))

INFOS = {
    cls: next(i for i in common_optimizers.optim_db if i.optim_cls is TORCH[cls]) for cls in CLASSES
}
SECTIONS = ("cpu", "cuda")


def on_cpu(section: str, function: Callable[..., list[Any]], dtype: torch.dtype) -> list[Any]:
    """The inputs that the table has for a kind of device, on the CPU."""
    with mock.patch.object(common_optimizers, "_get_device_type", return_value=section):
        return function("cpu", dtype)


def inputs() -> Iterator[Any]:
    for cls, info in INFOS.items():
        seen = set()
        for section in SECTIONS:
            for entry in on_cpu(section, info.optim_inputs_func, torch.float64):
                if entry.desc not in seen:
                    seen.add(entry.desc)
                    yield pytest.param(cls, entry.kwargs, id=f"{cls.__name__}-{entry.desc}")


def error_inputs() -> Iterator[Any]:
    for cls, info in INFOS.items():
        for section in SECTIONS:
            for number, error in enumerate(
                on_cpu(section, info.optim_error_inputs_func, torch.float32)
            ):
                description = error.optimizer_error_input.desc
                yield pytest.param(
                    cls, error, id=f"{cls.__name__}-{section}-{number}-{description}"
                )


def scheduler_inputs() -> Iterator[Any]:
    for cls, info in INFOS.items():
        for number, constructors in enumerate(info.scheduler_inputs):
            yield pytest.param(cls, constructors, id=f"{cls.__name__}-{number}")


def for_torch(kwargs: dict[str, Any], tensors: bool) -> dict[str, Any]:
    """`kwargs` for torch's for-loop, which refuses capturable on the CPU; the flag changes no
    result. Without `tensors`, those of float32 become numbers: with a float32 lr, torch computes
    step sizes in float32 whatever the dtype of the params."""
    own = {**deepcopy(kwargs), "foreach": False}
    own.pop("capturable", None)
    if not tensors:
        own["lr"] = float(own.get("lr", 1e-3))
        if "betas" in own:
            own["betas"] = tuple(float(beta) for beta in own["betas"])
    return own


def test_the_table_is_not_empty() -> None:
    for cls in CLASSES:
        assert sum(p.values[0] is cls for p in inputs()) >= 9
        assert sum(p.values[0] is cls for p in error_inputs()) >= 7
        assert sum(p.values[0] is cls for p in scheduler_inputs()) >= 1


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_inputs(cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]) -> None:
    subject = cls(make_params(torch.float64), **deepcopy(kwargs), backend=backend)
    oracle = TORCH[cls](make_params(torch.float64), **for_torch(kwargs, tensors=False))
    for number in range(5):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        assert_close_to(subject, oracle)


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_inputs_in_float32(cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]) -> None:
    subject = cls(make_params(), **deepcopy(kwargs), backend=backend)
    oracle = TORCH[cls](make_params(), **for_torch(kwargs, tensors=True))
    for number in range(5):
        for optimizer in (subject, oracle):
            run(optimizer, [number])
        for p, q in zip(params_of(subject), params_of(oracle), strict=True):
            torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_inputs_with_flags(cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]) -> None:
    # foreach and fused choose an implementation of torch; here they change nothing.
    results = []
    for flags in ({}, {"fused": True}, {"fused": False}, {"foreach": True}, {"foreach": False}):
        tensors = isinstance(kwargs.get("lr"), torch.Tensor) or "betas" in kwargs
        if flags.get("foreach") and tensors:
            flags = {**flags, "capturable": True}
        optimizer = cls(make_params(), **{**deepcopy(kwargs), **flags}, backend=backend)
        run(optimizer, range(3))
        result = contents(optimizer)
        results.append((result["params"], result["state"]))
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_complex_params(cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]) -> None:
    assert INFOS[cls].supports_complex
    subject = cls(make_params(torch.complex128), **deepcopy(kwargs), backend=backend)
    oracle = TORCH[cls](make_params(torch.complex128), **for_torch(kwargs, tensors=False))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    for _ in range(4):
        for optimizer, generator in zip((subject, oracle), generators, strict=True):
            for p in params_of(optimizer):
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            optimizer.step()
        assert_close_to(subject, oracle)


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_inputs_through_a_checkpoint(
    cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]
) -> None:
    subject = cls(make_params(), **deepcopy(kwargs), backend=backend)
    run(subject, range(3))
    fresh = cls([Parameter(p.detach().clone()) for p in params_of(subject)], backend=backend)
    fresh.load_state_dict(deepcopy(subject.state_dict()))
    assert_same(contents(fresh), contents(subject))
    for optimizer in (subject, fresh):
        run(optimizer, range(3, 5))
    assert_same(contents(fresh), contents(subject))


@pytest.mark.parametrize(("cls", "kwargs"), list(inputs()))
def test_a_hyperparameter_in_a_group(
    cls: type[FusedOptimizer], backend: str, kwargs: dict[str, Any]
) -> None:
    both = []
    own = (deepcopy(kwargs), for_torch(kwargs, tensors=False))
    for make, group, extra in zip((cls, TORCH[cls]), own, ({"backend": backend}, {}), strict=True):
        params = make_params(torch.float64)
        both.append(
            make(
                [{"params": params[:3], "foreach": False}, {"params": params[3:], **group}], **extra
            )
        )
    for number in range(3):
        for optimizer in both:
            run(optimizer, [number])
    assert_close_to(*both)


@pytest.mark.parametrize(("cls", "error"), list(error_inputs()))
def test_error_inputs(cls: type[FusedOptimizer], backend: str, error: Any) -> None:
    entry = error.optimizer_error_input
    on_step = error.error_on is common_optimizers.OptimizerErrorEnum.STEP_ERROR

    def attempt(make: type[Optimizer], **options: Any) -> tuple[str, type, str]:
        """When which exception or warning came, and its text."""
        params, kwargs = deepcopy((entry.params, entry.kwargs))
        moment = "construction"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                optimizer = make(params, **kwargs, **options)
                moment = "step"
                optimizer.step()
            except Exception as exception:
                return moment, type(exception), str(exception)
        return "never", type(None), ""

    moment, kind, text = attempt(cls, backend=backend)
    assert moment == ("step" if on_step else "construction")
    assert kind is error.error_type
    assert re.search(error.error_regex, text)
    assert (moment, kind, text) == attempt(TORCH[cls])


@pytest.mark.parametrize(("cls", "constructors"), list(scheduler_inputs()))
def test_scheduler_inputs(cls: type[FusedOptimizer], driver: str, constructors: Any) -> None:
    both = []
    for make, extra in ((cls, {"backend": driver}), (TORCH[cls], {"foreach": False})):
        params = make_params(torch.float64)
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 0.01}]
        both.append(make(groups, lr=0.001, **extra))
    seen = set()
    schedulers = [[construct(optimizer) for construct in constructors] for optimizer in both]
    for number in range(12):
        for optimizer, own in zip(both, schedulers, strict=True):
            run(optimizer, [number])
            for scheduler in own:
                metric = (1.0,) if isinstance(scheduler, ReduceLROnPlateau) else ()
                scheduler.step(*metric)
        rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in both]
        assert rates[0] == rates[1]
        seen.add(tuple(rates[0]))
    assert len(seen) > 1
    assert_close_to(*both)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_sparse_gradients(cls: type[FusedOptimizer], driver: str) -> None:
    info = INFOS[cls]
    kwargs = info.metadata_for_sparse[0] if info.supports_sparse else {}
    both = []
    for make, extra in ((cls, {"backend": driver}), (TORCH[cls], {"foreach": False})):
        both.append(make(make_params(torch.float64, shapes=((30, 4),)), **kwargs, **extra))
    generators = [torch.Generator().manual_seed(0) for _ in both]
    errors = []
    for _ in range(3):
        for optimizer, generator in zip(both, generators, strict=True):
            (p,) = params_of(optimizer)
            rows = torch.randint(30, (1, 7), generator=generator)  # some of them twice
            values = torch.randn(7, 4, generator=generator, dtype=torch.float64)
            p.grad = torch.sparse_coo_tensor(rows, values, p.shape, check_invariants=True)
            try:
                optimizer.step()
            except RuntimeError as error:
                errors.append(str(error))
    if info.supports_sparse:
        assert not errors
    else:
        assert len(errors) == 6
        # Until torch 2.6 its AdamW has a message of its own.
        assert len({error.replace("AdamW", "Adam").partition(",")[0] for error in errors}) == 1
    for p, q in zip(*map(params_of, both), strict=True):
        assert_close(p.detach(), q.detach())
