"""Steps on streams other than the one that params, gradients and the optimizer's own memory were
made on, from threads that have not met CUDA, and after errors."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests import gpu_params

pytestmark = pytest.mark.gpu
NUMELS = [300, 1 << 20, 7, 40_000]
SLEEP = 2_000_000  # cycles, about a millisecond: what does not wait runs before what it needs


def twins_of(
    backend: str, numels: list[int] = NUMELS, **options: Any
) -> tuple[fusedopt.FusedAdamW, fusedopt.FusedAdamW]:
    params = gpu_params.make(numels)
    ours, same = (
        fusedopt.FusedAdamW(ps, lr=1e-2, backend=backend, **options)
        for ps in (params, gpu_params.copies(params))
    )
    torch.cuda.synchronize()
    return ours, same


def params_of(optimizer: fusedopt.FusedOptimizer) -> list[Parameter]:
    params: list[Parameter] = optimizer.param_groups[0]["params"]
    return params


def garbage() -> None:
    """Writes into what was given back on the current stream."""
    for size in (512, 1 << 12, 1 << 14, 1 << 16):
        for _ in range(20):
            torch.full((size,), 255, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("numels", [NUMELS, [1 + i % 30 for i in range(4_200)]], ids=len)
def test_gradients_of_one_stream_and_steps_on_another(
    numels: list[int], clip: float | None, backend: str
) -> None:
    """The roles go round, so that table and workspace, too, are made on one stream and used on
    others; and the table changes, so that the old one is given back while its step may run."""
    ours, same = twins_of(backend, numels, max_grad_norm=clip)
    streams = [torch.cuda.Stream() for _ in range(3)]
    kept = [p.grad for p in params_of(ours)], [p.grad for p in params_of(same)]
    for i in range(12):
        maker, stepper = streams[i % 3], streams[(2 * i + 1) % 3]
        for optimizer, grads in zip((ours, same), kept, strict=True):
            for j, (p, grad) in enumerate(zip(params_of(optimizer), grads, strict=True)):
                p.grad = None if i % 4 == 2 and j % 2 else grad
        with torch.cuda.stream(maker):
            torch.cuda._sleep(SLEEP)
            torch._foreach_mul_([g for g in kept[0] if g is not None], -0.75)
        stepper.wait_stream(maker)
        with torch.cuda.stream(stepper):
            ours.step()
            garbage()
        maker.wait_stream(stepper)
        streams[(i + 1) % 3].wait_stream(stepper)
        with torch.cuda.stream(maker):
            garbage()
        torch._foreach_mul_([g for g in kept[1] if g is not None], -0.75)
        same.step()
    torch.cuda.synchronize()
    gpu_params.assert_same(ours, same)


def test_params_that_are_made_on_a_stream_that_lags(backend: str) -> None:
    maker, stepper = torch.cuda.Stream(), torch.cuda.Stream()
    values, grads = (torch.randn(1 << 20, device="cuda") for _ in range(2))
    torch.cuda.synchronize()
    with torch.cuda.stream(maker):
        torch.cuda._sleep(20 * SLEEP)
        param = Parameter(values.clone())
        param.grad = grads.clone()
    stepper.wait_stream(maker)
    with torch.cuda.stream(stepper):
        ours = fusedopt.FusedAdamW([param], lr=1e-2, max_grad_norm=0.5, backend=backend)
        for _ in range(3):
            ours.step()
    maker.wait_stream(stepper)
    with torch.cuda.stream(maker):  # the state was made on the other one
        for _ in range(3):
            ours.step()
    torch.cuda.synchronize()
    twin = Parameter(values)
    twin.grad = grads
    same = fusedopt.FusedAdamW([twin], lr=1e-2, max_grad_norm=0.5, backend=backend)
    for _ in range(6):
        same.step()
    gpu_params.assert_same(ours, same)


def in_thread(work: Callable[[], Any]) -> None:
    """Runs it in a thread that has not met CUDA; raises what it raises."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("before", [0, 1, 3])
def test_a_step_from_a_fresh_thread(before: int, clip: float | None, backend: str) -> None:
    ours, same = twins_of(backend, max_grad_norm=clip, skip_nonfinite=clip is not None)
    for _ in range(before):
        ours.step()
    for _ in range(2):
        in_thread(ours.step)
    ours.step()
    for _ in range(before + 3):
        same.step()
    gpu_params.assert_same(ours, same)


def test_clipping_from_a_fresh_thread() -> None:
    params = gpu_params.make(NUMELS)
    twins = gpu_params.copies(params)
    in_thread(lambda: fusedopt.clip_grad_norm_(params, 0.5))
    fusedopt.clip_grad_norm_(twins, 0.5)
    for p, twin in zip(params, twins, strict=True):
        assert p.grad is not None
        assert twin.grad is not None
        assert torch.equal(p.grad, twin.grad)


def sparse_grad(optimizer: fusedopt.FusedAdamW) -> None:
    p = params_of(optimizer)[0]
    p.grad = torch.sparse_coo_tensor(
        torch.tensor([[1, 5]], device="cuda"), torch.ones(2, device="cuda"), (300,)
    )


def state_on_the_cpu(optimizer: fusedopt.FusedAdamW) -> None:
    state = optimizer.state[params_of(optimizer)[1]]
    state["exp_avg"] = state["exp_avg"].cpu()


def state_of_another_shape(optimizer: fusedopt.FusedAdamW) -> None:
    optimizer.state[params_of(optimizer)[3]]["exp_avg_sq"] = torch.zeros(3, device="cuda")


def param_on_the_cpu(optimizer: fusedopt.FusedAdamW) -> None:
    param = Parameter(torch.ones(5))
    param.grad = torch.ones(5)
    params_of(optimizer).append(param)


def lr_of_words(optimizer: fusedopt.FusedAdamW) -> None:
    optimizer.param_groups[0]["lr"] = "fast"


def negative_norm(optimizer: fusedopt.FusedAdamW) -> None:
    optimizer.max_grad_norm = -1.0


MISTAKES = [
    sparse_grad,
    state_on_the_cpu,
    state_of_another_shape,
    param_on_the_cpu,
    lr_of_words,
    negative_norm,
]


def step_with(
    mistake: Callable[[fusedopt.FusedAdamW], None], optimizer: fusedopt.FusedAdamW
) -> None:
    mistake(optimizer)
    optimizer.step()


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda f: f.__name__)
def test_the_step_after_a_step_that_raised(
    mistake: Callable[[fusedopt.FusedAdamW], None], backend: str
) -> None:
    """Nothing has changed, no counter of the device is left half way, no error is left behind."""
    ours, same = twins_of(backend, max_grad_norm=0.5, skip_nonfinite=True)
    for optimizer in (ours, same):
        optimizer.step()
    params, group = list(params_of(ours)), dict(ours.param_groups[0])
    grads: list[Tensor | None] = [p.grad for p in params]
    state = {p: dict(ours.state[p]) for p in params}
    for _ in range(2):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            step_with(mistake, ours)
        torch.cuda.synchronize()
        ours.param_groups[0].update({**group, "params": list(params)})
        ours.max_grad_norm = 0.5
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
            ours.state[p].update(state[p])
        gpu_params.assert_same(ours, same)
        for optimizer in (ours, same):
            optimizer.step()
        gpu_params.assert_same(ours, same)
        assert ours.backend_in_use == backend


def test_a_first_step_after_one_that_raised(backend: str) -> None:
    ours, same = twins_of(backend, max_grad_norm=0.5)
    good = params_of(ours)[0].grad
    sparse_grad(ours)
    with pytest.raises(RuntimeError, match="sparse"):
        ours.step()
    assert not ours.state
    params_of(ours)[0].grad = good
    for _ in range(2):
        for optimizer in (ours, same):
            optimizer.step()
    gpu_params.assert_same(ours, same)


def test_equal_steps_are_repeated() -> None:
    """csrc/host/repeated_step.h: until what it asks of torch has another answer."""
    ours, same = twins_of("cuda", max_grad_norm=0.1)  # nine steps each

    def repeats() -> bool:
        return ours._repeated is not None and ours._repeated(ours.__dict__)

    ours.step()
    assert repeats()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert not repeats()
        ours.step()
        assert repeats()
    torch.cuda.current_stream().wait_stream(side)
    assert not repeats()
    ours.step()
    assert repeats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert not repeats()
        ours.step()
    graph.replay()
    for _ in range(2):
        ours.step()
    for _ in range(9):
        same.step()
    torch.cuda.synchronize()
    gpu_params.assert_same(ours, same)
