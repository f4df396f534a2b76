"""The maths of one element, as in csrc/rules/: a rule knows no memory, no dtype and no program.

A rule is two functions:

    prepare(hyper, lr, step, first, T) -> scalars
        float64 scalars of a tensor, as a tuple. `hyper` is the address of the group's
        hyperparameters, in the order of the C++ rule; `step` counts from 1; `first` says (1 or 0)
        that the state was created for this step; T is the dtype of the maths.
    update(param, grad, state0, state1, state2, scalars, VARIANT) -> param, state0, state1, state2
        blocks of T, float32 or float64; states that a variant does not use are zeros.

RULES lists them by the name of the C++ rule. Use tl.fma() where a fused multiply-add is meant:
contraction is off.
"""

from __future__ import annotations

import triton
import triton.language as tl
from fusedopt.triton_kernels import double_double
from fusedopt.triton_kernels.table import number


@triton.jit
def divide(a, b):
    if a.dtype == tl.float64:
        return a / b
    else:  # noqa: RET505  what follows a return is compiled, too: div_rn takes no float64
        return tl.div_rn(a, b)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:  # noqa: RET505  as above
        return tl.sqrt_rn(x)


@triton.jit
def one_minus_power(base, n):
    """1 - base^n for a whole n >= 1 and 0 <= base < 1, without cancellation:
    csrc/core/double_double.h says how."""
    bits = tl.minimum(n, 4.0e18).to(tl.int64)
    result = tl.zeros((), tl.float64)
    power = 1 - base
    while bits > 0:
        result = tl.where((bits & 1) != 0, result + power * (1 - result), result)
        power = power + power * (1 - power)
        bits = bits >> 1
    return result


@triton.jit
def adamw_prepare(hyper, lr, step, first, T: tl.constexpr):
    """Adam and AdamW: csrc/rules/adamw.h has the formula and its sources."""
    beta1 = number(hyper, 1)
    beta2 = number(hyper, 2)
    eps = number(hyper, 3)
    weight_decay = number(hyper, 4)
    if tl.float64 == T:
        zero = tl.zeros((), tl.float64)
        root = double_double.square_root(double_double.one_minus_power(beta2, step))
        factor = double_double.multiply(root, (lr, zero))
        size = double_double.divide(factor, double_double.one_minus_power(beta1, step))
        step_size = size[0] + size[1]
        bound = double_double.multiply(root, (eps, zero))
        scaled_eps = bound[0] + bound[1]
        left = double_double.one_minus(double_double.exact_product(lr, weight_decay))
        decay = left[0] + left[1]
    else:
        correction = tl.sqrt(one_minus_power(beta2, step))
        step_size = lr * correction / one_minus_power(beta1, step)
        scaled_eps = eps * correction
        decay = 1 - lr * weight_decay
    return decay, weight_decay, 1 - beta1, beta2, 1 - beta2, step_size, scaled_eps


@triton.jit
def adamw_update(param, grad, exp_avg, exp_avg_sq, max_exp_avg_sq, scalars, VARIANT: tl.constexpr):
    T: tl.constexpr = param.dtype
    AMSGRAD: tl.constexpr = VARIANT % 2 == 1
    COUPLED: tl.constexpr = VARIANT // 2 == 1
    decay, weight_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, eps = scalars
    if COUPLED:
        grad = tl.fma(weight_decay.to(T), param, grad)
    else:
        param = param * decay.to(T)
    exp_avg = tl.fma(one_minus_beta1.to(T), grad - exp_avg, exp_avg)
    rest = beta2.to(T) * exp_avg_sq
    weighted = one_minus_beta2.to(T) * grad
    if COUPLED:
        # The square doubles the rounding of the decayed gradient: give back what (1 - beta2) g
        # lost, as in C++.
        high = one_minus_beta2.to(tl.float32)
        low = (one_minus_beta2 - high.to(tl.float64)).to(T)
        high = high.to(T)
        weighted = high * grad
        lost = tl.fma(low, grad, tl.fma(high, grad, -weighted))
        rest = tl.fma(lost, tl.where(tl.abs(grad) > 1e18, grad * 0, grad), rest)
    exp_avg_sq = tl.fma(weighted, grad, rest)
    second = exp_avg_sq
    if AMSGRAD:
        # As torch.maximum: a NaN on either side stays.
        keep = (max_exp_avg_sq > second) | (max_exp_avg_sq != max_exp_avg_sq)
        second = tl.where(keep, max_exp_avg_sq, second)
        max_exp_avg_sq = second
    update = divide(exp_avg, square_root(second) + eps.to(T))
    return tl.fma(-step_size.to(T), update, param), exp_avg, exp_avg_sq, max_exp_avg_sq


@triton.jit
def sgd_prepare(hyper, lr, step, first, T: tl.constexpr):
    """SGD with momentum: csrc/rules/sgd.h has the formula and its source."""
    momentum = number(hyper, 1)
    return lr, momentum, 1 - number(hyper, 2), number(hyper, 3), number(hyper, 4), first


@triton.jit
def sgd_update(param, grad, buffer, state1, state2, scalars, VARIANT: tl.constexpr):
    T: tl.constexpr = param.dtype
    lr, momentum, one_minus_dampening, weight_decay, nesterov, first = scalars
    # Terms are switched off by their operand: 0 * infinity would be a NaN.
    grad = tl.fma(weight_decay.to(T), tl.where(weight_decay != 0, param, 0.0), grad)
    if VARIANT == 1:
        new = tl.where(first != 0, grad, one_minus_dampening.to(T) * grad)
        buffer = tl.fma(momentum.to(T), tl.where(first != 0, 0.0, buffer), new)
        grad = tl.fma(
            momentum.to(T),
            tl.where(nesterov != 0, buffer, 0.0),
            tl.where(nesterov != 0, grad, buffer),
        )
    return tl.fma(-lr.to(T), grad, param), buffer, state1, state2


RULES = {"adamw": (adamw_prepare, adamw_update), "sgd": (sgd_prepare, sgd_update)}
