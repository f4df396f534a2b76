"""CUDA graphs of a step: captured after as few warm-ups as the documentation says, with every way
in which the step's words reach the device, and beside eager steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt
from tests import gpu_params

pytestmark = pytest.mark.gpu

# Numels, and params of a group. A word for each row and 14 for each group: those of the last two
# are more than the 4,000 that are arguments of the kernel (kInlineWords in csrc/cuda/step.h).
MODELS: dict[str, tuple[list[int], int]] = {
    "few": ([300, 20_000, 1], 3),
    "many-chunks": ([1 << 24], 1),
    "many-rows": ([1 + i % 30 for i in range(4_200)], 4_200),
    "many-groups": ([1 + i % 30 for i in range(300)], 1),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 0.5},
    "guard": {"max_grad_norm": 0.5, "skip_nonfinite": True},
}
STEPS = 4


def groups_of(params: list[Parameter], size: int) -> list[dict[str, Any]]:
    return [{"params": params[i : i + size]} for i in range(0, len(params), size)]


def warm_ups(backend: str) -> int:
    return 1 if backend == "cuda" else 2  # Triton's table says which state is new


def twins_of(
    model: str, backend: str, **options: Any
) -> tuple[fusedopt.FusedAdamW, fusedopt.FusedAdamW]:
    """Two optimizers over equal params, of which one is to be captured."""
    numels, size = MODELS[model]
    params = gpu_params.make(numels)
    twins = gpu_params.copies(params)
    ours, same = (
        fusedopt.FusedAdamW(
            groups_of(ps, size), lr=1e-2, capturable=True, backend=backend, **options
        )
        for ps in (params, twins)
    )
    return ours, same


def params_of(optimizer: fusedopt.FusedOptimizer) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def grads_of(optimizer: fusedopt.FusedOptimizer) -> list[Tensor]:
    return [p.grad for p in params_of(optimizer) if p.grad is not None]


def warm_up(step: Callable[[], None], times: int) -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)


def capture(optimizer: fusedopt.FusedOptimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model", MODELS)
def test_replays_are_steps(model: str, options: str, backend: str) -> None:
    ours, same = twins_of(model, backend, **OPTIONS[options])
    warm_up(ours.step, warm_ups(backend))
    for _ in range(warm_ups(backend)):
        same.step()
    graph = capture(ours)
    gpu_params.assert_same(ours, same)  # a capture runs nothing
    for i in range(STEPS):
        for grad in (*grads_of(ours), *grads_of(same)):
            grad.mul_(-0.5 - i)
        if options == "guard" and i == 1:
            kept = [g.clone() for g in grads_of(ours)]
            for optimizer in (ours, same):
                grads_of(optimizer)[-1].fill_(float("nan"))
        graph.replay()
        same.step()
        if options == "guard" and i == 1:
            for optimizer in (ours, same):
                assert optimizer.skipped_steps.item() == 1
                for grad, value in zip(grads_of(optimizer), kept, strict=True):
                    grad.copy_(value)
    steps = warm_ups(backend) + STEPS - (options == "guard")
    assert {e["step"].item() for e in ours.state.values()} == {steps}
    ours.step()  # an eager one goes on from there
    same.step()
    gpu_params.assert_same(ours, same)


def test_replays_after_an_eager_step_over_other_params(backend: str) -> None:
    ours, same = twins_of("few", backend, max_grad_norm=0.5)
    warm_up(ours.step, warm_ups(backend))
    for _ in range(warm_ups(backend)):
        same.step()
    graph = capture(ours)
    for _ in range(3):
        for optimizer in (ours, same):  # another table, in other memory
            first = params_of(optimizer)[0]
            grad, first.grad = first.grad, None
            optimizer.step()
            first.grad = grad
        garbage = [torch.full((1 << 14,), 255, dtype=torch.uint8, device="cuda") for _ in range(99)]
        graph.replay()
        same.step()
        del garbage
    gpu_params.assert_same(ours, same)


def test_forward_backward_and_step_in_one_graph(backend: str) -> None:
    """As in torch's documentation. The gradients are made in the graph, in its own memory; for
    Triton, whose table has their addresses, they stay those of the warm-up."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    model.cuda()
    twin = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
    twin.cuda().load_state_dict(model.state_dict())
    options: dict[str, Any] = {"lr": 1e-2, "max_grad_norm": 0.1, "capturable": True}
    optimizer = fusedopt.FusedAdamW(model.parameters(), backend=backend, **options)
    reference = fusedopt.FusedAdamW(twin.parameters(), backend=backend, **options)
    x = torch.randn(128, 64, device="cuda")

    def train(module: torch.nn.Module, opt: fusedopt.FusedAdamW) -> None:
        opt.zero_grad(set_to_none=backend == "cuda")
        module(x).square().mean().backward()
        opt.step()

    warm_up(lambda: train(model, optimizer), 3)
    for _ in range(3):
        train(twin, reference)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train(model, optimizer)
    for _ in range(5):
        x.normal_()
        graph.replay()
        train(twin, reference)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_figures_after_a_refused_capture(backend: str) -> None:
    garbage = torch.full((1 << 28,), 255, dtype=torch.uint8, device="cuda")
    del garbage  # what a capture gets is not zero by chance
    params = gpu_params.make([300])
    twins = gpu_params.copies(params)
    ours, same = (
        fusedopt.FusedAdamW(ps, max_grad_norm=0.5, skip_nonfinite=True, backend=backend)
        for ps in (params, twins)
    )
    with pytest.raises(RuntimeError, match="run one step"):
        capture(ours)
    assert not ours.state
    assert ours.skipped_steps.item() == 0
    for optimizer in (ours, same):
        optimizer.step()
        assert optimizer.skipped_steps.item() == 0
    gpu_params.assert_same(ours, same)
    assert ours.log() == same.log()
