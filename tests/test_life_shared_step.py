"""Params whose state has one step tensor: each is counted for itself."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import pytest
import torch

import fusedopt
from tests.helpers import (
    DRIVERS,
    assert_same,
    make_params,
    params_of,
    random_grads,
    run,
    use_driver,
)


@pytest.fixture(params=DRIVERS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from use_driver(request)


def build(backend: str, shapes: int = 5) -> fusedopt.FusedAdamW:
    params = make_params(shapes=[(3 + i,) for i in range(shapes)])
    return fusedopt.FusedAdamW(
        [{"params": params[:2]}, {"params": params[2:]}], lr=0.01, backend=backend
    )


def share(optimizer: fusedopt.FusedAdamW) -> torch.Tensor:
    step: torch.Tensor = optimizer.state[params_of(optimizer)[0]]["step"]
    for param in params_of(optimizer)[:-1]:
        optimizer.state[param]["step"] = step
    return step


def test_each_param_is_counted_for_itself(backend: str) -> None:
    ours, apart = build(backend), build(backend)
    for optimizer in (ours, apart):
        run(optimizer, range(2))
    step = share(ours)
    for optimizer in (ours, apart):
        run(optimizer, range(2, 5))
    assert [ours.state[p]["step"].item() for p in params_of(ours)] == [5.0] * 5
    assert_same(params_of(ours), params_of(apart))
    assert ours.state[params_of(ours)[0]]["step"] is step
    addresses = {ours.state[p]["step"].data_ptr() for p in params_of(ours)}
    assert len(addresses) == 5


def test_views_of_one_count(backend: str) -> None:
    optimizer = build(backend)
    run(optimizer, range(2))
    step = optimizer.state[params_of(optimizer)[0]]["step"]
    for param in params_of(optimizer):
        optimizer.state[param]["step"] = step.detach()
    run(optimizer, range(2, 3))
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [3.0] * 5


def test_a_count_shared_by_copies_and_checkpoints(backend: str) -> None:
    optimizer = build(backend)
    run(optimizer, range(2))
    share(optimizer)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)  # keeps what is shared
    buffer.seek(0)
    loaded = build(backend)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(optimizer), loaded):
        run(other, range(2, 4))
        assert [other.state[p]["step"].item() for p in params_of(other)] == [4.0] * 5


def test_many_counts(backend: str) -> None:
    optimizer = build(backend, shapes=700)
    run(optimizer, range(1))
    share(optimizer)
    run(optimizer, range(1, 3))
    assert {optimizer.state[p]["step"].item() for p in params_of(optimizer)} == {3.0}


@pytest.mark.skipif("cpu-direct" not in DRIVERS, reason="once is enough")
def test_under_compile() -> None:
    optimizer = build("cpu")
    run(optimizer, range(2))
    share(optimizer)
    compiled = torch.compile(optimizer.step, backend="eager")
    for seed in range(2, 4):
        for p, grad in zip(
            params_of(optimizer), random_grads(params_of(optimizer), seed), strict=True
        ):
            p.grad = grad
        compiled()
    assert [optimizer.state[p]["step"].item() for p in params_of(optimizer)] == [4.0] * 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_shared_count_of_another_dtype_or_shape(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    optimizer = build(backend)
    run(optimizer, range(2))
    step = torch.full(shape, 2, dtype=dtype)
    for param in params_of(optimizer):
        optimizer.state[param]["step"] = step
    run(optimizer, range(2, 4))
    counts = [optimizer.state[p]["step"] for p in params_of(optimizer)]
    assert [c.item() for c in counts] == [4] * 5
    assert all(c.dtype == dtype and c.shape == shape for c in counts)
    assert counts[0] is step


def test_a_step_that_is_not_done_counts_nothing(backend: str) -> None:
    params = make_params(shapes=[(3,), (4,)])
    optimizer = fusedopt.FusedAdamW(params, lr=0.01, skip_nonfinite=True, backend=backend)
    run(optimizer, range(2))
    step = optimizer.state[params[0]]["step"]
    optimizer.state[params[1]]["step"] = step
    for p in params:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert [optimizer.state[p]["step"].item() for p in params] == [2.0, 2.0]


def test_a_count_in_shared_memory_is_left_to_other_processes(backend: str) -> None:
    optimizer = build(backend)
    run(optimizer, range(2))
    step = torch.zeros(()).share_memory_()
    for param in params_of(optimizer):
        optimizer.state[param]["step"] = step
    run(optimizer, range(2, 3))
    assert all(optimizer.state[p]["step"] is step for p in params_of(optimizer))
