"""One optimizer step in extended precision, and distances in ULP.

The formulas are written here once more, from the papers, in numpy's longdouble (64 bits of
mantissa on x86-64): they share nothing with the code under test.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

MANTISSA_BITS = {torch.float32: 23, torch.float64: 52, torch.bfloat16: 7, torch.float16: 10}
SMALLEST_EXPONENT = {
    torch.float32: -126,
    torch.float64: -1022,
    torch.bfloat16: -126,
    torch.float16: -14,
}

Exact = Any  # np.ndarray of np.longdouble


def exact(tensor: Tensor) -> Exact:
    """The values of a tensor as longdouble, its logical order kept."""
    return tensor.detach().to(torch.float64).numpy().astype(np.longdouble)


def adam(p: Exact, g: Exact, state: list[Exact], group: dict[str, Any], step: int, first: bool):
    lr, eps, decay = (np.longdouble(float(group[k])) for k in ("lr", "eps", "weight_decay"))
    beta1, beta2 = (np.longdouble(float(b)) for b in group["betas"])
    one = np.longdouble(1)
    if group["decoupled_weight_decay"]:
        p = p - lr * decay * p
    else:
        g = g + decay * p
    m = beta1 * state[0] + (one - beta1) * g
    v = beta2 * state[1] + (one - beta2) * g * g
    new_state = [m, v]
    if group["amsgrad"]:
        new_state.append(np.maximum(state[2], v))
    v_hat = new_state[-1] / (one - beta2**step)
    m_hat = m / (one - beta1**step)
    return p - lr * m_hat / (np.sqrt(v_hat) + eps), new_state


def sgd(p: Exact, g: Exact, state: list[Exact], group: dict[str, Any], step: int, first: bool):
    lr, mu, tau, decay = (
        np.longdouble(float(group[k])) for k in ("lr", "momentum", "dampening", "weight_decay")
    )
    g = g + decay * p
    if mu == 0:
        return p - lr * g, []
    b = g if first else mu * state[0] + (1 - tau) * g
    return p - lr * (g + mu * b if group["nesterov"] else b), [b]


def ulp(values: Exact, dtype: torch.dtype) -> Exact:
    """The distance between neighbours of `dtype` at each value."""
    _, exponent = np.frexp(np.abs(values))
    exponent = np.where(values == 0, SMALLEST_EXPONENT[dtype] + 1, exponent)
    exponent = np.maximum(exponent - 1, SMALLEST_EXPONENT[dtype])
    return np.ldexp(np.longdouble(1), exponent - MANTISSA_BITS[dtype])


def distance(got: Tensor, want: Exact, old: Exact) -> float:
    """The largest distance in ULP of got's dtype, taken at the larger of old and new value."""
    if want.size == 0:
        return 0.0
    unit = ulp(np.maximum(np.abs(old), np.abs(want)), got.dtype)
    return float(np.max(np.abs(exact(got) - want) / unit))


def bound(dtype: torch.dtype, param: bool) -> float:
    """How far from the oracle a stored value may be, in ULP."""
    if dtype in (torch.bfloat16, torch.float16):
        return 0.51
    return 8.0 if param else 3.0
