"""Steps and clipping of every kind, short, for compute-sanitizer: odd sizes, every offset from 16
bytes, strides, four dtypes, float32 state of bfloat16 params, clipping, skipped steps.

    compute-sanitizer --tool memcheck python tests/gpu_sanitize.py [cuda]

The data are made on the CPU, so that nearly all kernels that run are those of fusedopt.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fusedopt

SIZES = (1, 7, 8, 9, 255, 257, 4095, 16385)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CLIPS: tuple[dict[str, float], ...] = ({"max_grad_norm": 0.5}, {"clip_grad_value": 0.1})
RULES: tuple[tuple[type[fusedopt.FusedOptimizer], dict[str, Any]], ...] = (
    (fusedopt.FusedAdamW, {"amsgrad": True, "weight_decay": 0.1}),
    (fusedopt.FusedAdamW, {}),
    (fusedopt.FusedSGD, {"momentum": 0.9, "nesterov": True}),
    (fusedopt.FusedSGD, {}),
)


def make_params(device: str, dtype: torch.dtype) -> list[Parameter]:
    """Flat params of all sizes, flat ones at offsets of 1 to 8 elements, strided ones."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    params, grads = [], []
    for numel in SIZES:
        params.append(randn(numel))
        grads.append(randn(numel))
    for offset in range(1, 9):
        params.append(randn(700)[offset : offset + 600])
        grads.append(randn(700)[offset // 2 : offset // 2 + 600])
    params += [randn(60, 40).t(), randn(60, 40)[:, ::2], randn(60, 40)[::3]]
    grads += [randn(40, 60), randn(60, 20), randn(20, 40)]
    made = [Parameter(value) for value in params]
    for param, grad in zip(made, grads, strict=True):
        param.grad = grad
    return made


def check_finite(params: list[Parameter]) -> None:
    assert all(bool(param.isfinite().all()) for param in params)


def steps(backend: str, device: str) -> None:
    """Plain steps, and clipped ones of which one is skipped, of each rule and dtype."""
    for (cls, options), dtype in itertools.product(RULES, DTYPES):
        plain = make_params(device, dtype)
        cls(plain, lr=1e-3, backend=backend, **options).step()
        check_finite(plain)
        for clip in CLIPS:
            params = make_params(device, dtype)
            guards: dict[str, Any] = {**clip, "skip_nonfinite": True}
            optimizer = cls(params, lr=1e-3, backend=backend, **guards, **options)
            optimizer.step()
            if dtype == torch.bfloat16:
                widen_state(optimizer)
            grad = params[3].grad
            params[3].grad = torch.full_like(params[3], float("inf"))
            optimizer.step()
            params[3].grad = grad
            optimizer.step()
            assert optimizer.skipped_steps.item() == 1
            check_finite(params)


def widen_state(optimizer: fusedopt.FusedOptimizer) -> None:
    for entry in optimizer.state.values():
        for name, value in entry.items():
            if name != "step" and isinstance(value, Tensor):
                entry[name] = value.float()


def clip_functions(device: str) -> None:
    """The drop-ins of torch.nn.utils, on contiguous and strided gradients."""
    for dtype in DTYPES:
        params = make_params(device, dtype)
        before = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
        fusedopt.clip_grad_norm_(params, 0.3)
        after = fusedopt.get_total_norm([p.grad for p in params if p.grad is not None])
        assert after < before
        assert abs(float(after) - 0.3) < 0.01
        fusedopt.clip_grad_value_(params, 1e-3)
        assert all(p.grad is not None and float(p.grad.abs().max()) < 1.1e-3 for p in params)


def main(device: str = "cuda") -> None:
    steps("cuda" if device == "cuda" else "auto", device)
    clip_functions(device)
    if device == "cuda":
        torch.cuda.synchronize()
    print("all steps ran")


if __name__ == "__main__":
    main(*sys.argv[1:])
