"""Params and gradients for the tests that need a GPU, made there: the CPU would take seconds."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt


def make(numels: list[int], device: str = "cuda", seed: int = 0) -> list[Parameter]:
    """Float32 params with gradients, views of one tensor each, at a distance of 64 bytes."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = [-(-n // 16) * 16 for n in numels]
    values, grads = (
        torch.randn(sum(lengths), device=device, generator=generator).split(lengths)
        for _ in range(2)
    )
    params = []
    for numel, value, grad in zip(numels, values, grads, strict=True):
        params.append(Parameter(value[:numel]))
        params[-1].grad = grad[:numel]
    return params


def copies(params: list[Parameter]) -> list[Parameter]:
    """The same params with the same gradients in other memory."""
    made = []
    for param in params:
        made.append(Parameter(param.detach().clone()))
        made[-1].grad = None if param.grad is None else param.grad.clone()
    return made


def tensors_of(optimizer: fusedopt.FusedOptimizer) -> list[Tensor]:
    """Params, state and the norm, where they are."""
    found = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            found.append(p.detach())
            found += [t for t in optimizer.state.get(p, {}).values() if t is not None]
    norm = optimizer._norm_tensor
    return found if norm is None else [*found, norm]


def assert_same(ours: fusedopt.FusedOptimizer, same: fusedopt.FusedOptimizer) -> None:
    """Equality of every bit; a NaN is a failure."""
    for a, b in zip(tensors_of(ours), tensors_of(same), strict=True):
        assert torch.equal(a, b)
