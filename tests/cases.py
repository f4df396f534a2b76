"""The one table of numeric cases. A new optimizer adds its lines here and is tested everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusedopt
from fusedopt.backends import triton
from tests import oracle


@dataclass(frozen=True)
class Case:
    """An optimizer with options, torch's class for the same, and its formula in the oracle."""

    name: str
    fused: type[fusedopt.FusedOptimizer]
    plain: type[torch.optim.Optimizer]
    formula: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    @property
    def sign(self) -> float:
        """The sign of gradients that do not cancel against weight decay."""
        return -1.0 if self.options.get("maximize") else 1.0


def _adamw(name: str, **options: Any) -> Case:
    return Case(f"adamw{name}", fusedopt.FusedAdamW, torch.optim.AdamW, oracle.adam, options)


def _adam(name: str, **options: Any) -> Case:
    return Case(f"adam{name}", fusedopt.FusedAdam, torch.optim.Adam, oracle.adam, options)


def _sgd(name: str, **options: Any) -> Case:
    options = {"lr": 0.1, **options}
    return Case(f"sgd{name}", fusedopt.FusedSGD, torch.optim.SGD, oracle.sgd, options)


CASES = [
    _adamw(""),
    _adamw("-decay", lr=0.05, weight_decay=0.3),
    _adamw("-amsgrad", lr=0.01, amsgrad=True),
    _adamw("-maximize", lr=0.01, maximize=True, betas=(0.8, 0.95), eps=1e-6),
    _adam(""),
    _adam("-l2-amsgrad", lr=0.01, weight_decay=0.1, amsgrad=True),
    _adam("-l2-maximize", lr=0.01, weight_decay=0.1, maximize=True),
    _sgd(""),
    _sgd("-decay-maximize", weight_decay=0.2, maximize=True),
    _sgd("-momentum", momentum=0.9),
    _sgd("-dampening", momentum=0.8, dampening=0.3, weight_decay=0.1),
    _sgd("-nesterov", momentum=0.9, nesterov=True, weight_decay=0.01),
]
# One of each kind, for what does not depend on every option.
SHORT = [c for c in CASES if c.name in ("adamw-decay", "adam-l2-amsgrad", "sgd-nesterov")]

BACKENDS = os.environ.get("FUSEDOPT_TEST_BACKENDS", "cpu,reference").split(",")
# Those with kernels of their own, for what says nothing about the reference.
NATIVE = [b for b in BACKENDS if b != "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]

# Both sides of every vector width, of the block and of the chunk; how many tensors are many; how
# many models hypothesis draws.
SIZES = sorted(
    {1, 2, 3, 5, 65537} | {w + d for w in (8, 16, 32, 64, 128, 512, 1024, 4096) for d in (-1, 0, 1)}
)
MANY, EXAMPLES = 10_000, 60
if triton.interpreted():  # knows of no vectors, and takes 20 ms a tensor
    SIZES = [1, 5, 8191, 8192, 8193, 65537]
    MANY, EXAMPLES = 300, 6


def signs(shape: tuple[int, ...]) -> Tensor:
    """The same random signs for every tensor of a shape."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.where(torch.rand(shape, generator=generator) < 0.5, -1.0, 1.0)


def signed(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal values with the signs of the shape."""
    return torch.randn(shape, generator=generator).abs() * signs(shape)


def make_params(
    sizes: list[Any], dtype: torch.dtype, seed: int = 0, grad_dtype: torch.dtype | None = None
) -> list[torch.nn.Parameter]:
    """Random params with random gradients; sizes are numels or shapes."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for size in sizes:
        shape = (size,) if isinstance(size, int) else tuple(size)
        params.append(torch.nn.Parameter(signed(shape, generator).to(dtype)))
    new_grads(params, generator, grad_dtype)
    return params


def new_grads(
    params: list[torch.nn.Parameter],
    generator: torch.Generator,
    dtype: torch.dtype | None = None,
    sign: float = 1.0,
) -> None:
    """Fresh random gradient tensors, of magnitudes from 1e-4 to 10 or so.

    Their signs are those of the params, times `sign`: a gradient that cancels against the momentum
    or the weight decay leaves nothing but the rounding of its inputs, which no bound in ULP holds.
    """
    for p in params:
        values = signed(tuple(p.shape), generator) * sign
        scale = torch.exp(torch.randn(p.shape, generator=generator))
        set_grad(p, (values * scale * 0.3).to(dtype or p.dtype))


def set_grad(param: Tensor, grad: Tensor) -> None:
    """Assigns a gradient, of another dtype than the param's where that is asked for."""
    if grad.dtype != param.dtype:
        param.grad_dtype = grad.dtype
    param.grad = grad


def check_against_oracle(
    case: Case,
    optimizer: fusedopt.FusedOptimizer,
    params: list[Tensor],
    factor: Any = 1,
    step: Callable[[], Any] | None = None,
) -> None:
    """Runs one step and compares every element of `params` with the oracle's step from the stored
    state.

    `factor` is what clipping and unscaling multiply the gradients with. The product, rounded to the
    dtype of the maths, is what a rule is given.
    """
    before = []
    checked = {id(p) for p in params}
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None or id(p) not in checked:
                continue
            entry = optimizer.state.get(p, {})
            names = optimizer.rule.state[: optimizer.rule.states(group)]
            first = not all(n in entry for n in names)
            old = [oracle.exact(entry.get(n, torch.zeros_like(p))) for n in names]
            count = int(entry["step"]) + 1 if "step" in entry else 1
            grad = oracle.exact(p.grad) * (-1 if group["maximize"] else 1)
            if factor != 1:
                grad = (grad.astype(np.float32) * np.float32(factor)).astype(np.longdouble)
            before.append((group, p, oracle.exact(p), grad, old, names, count, first))
    (step or optimizer.step)()
    for group, p, old_p, grad, old, names, count, first in before:
        want_p, want_state = case.formula(old_p, grad, old, group, count, first)
        where = f"{case.name} {p.dtype} numel {p.numel()} step {count}"
        got = oracle.distance(p, want_p, old_p)
        assert got <= oracle.bound(p.dtype, True), f"{where}: param off by {got} ULP"
        for name, want, was in zip(names, want_state, old, strict=True):
            tensor = optimizer.state[p][name]
            got = oracle.distance(tensor, want, was)
            assert got <= oracle.bound(tensor.dtype, False), f"{where}: {name} off by {got} ULP"
        if optimizer.rule.has_step:
            assert optimizer.state[p]["step"].item() == count
