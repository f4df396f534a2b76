"""Numbers of 106 bits as unevaluated sums of two float64, (high, low): csrc/core/double_double.h
has the sources. For scalars of float64 params; float32 maths needs no more than float64 scalars."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fast_sum(a, b):
    """a + b exactly, for |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


@triton.jit
def add(a, b):
    total = a[0] + b[0]
    part = total - a[0]
    low = (a[0] - (total - part)) + (b[0] - part)
    return fast_sum(total, low + (a[1] + b[1]))


@triton.jit
def exact_product(a, b):
    product = a * b
    return product, tl.fma(a, b, -product)


@triton.jit
def multiply(a, b):
    high, low = exact_product(a[0], b[0])
    return fast_sum(high, low + (a[0] * b[1] + a[1] * b[0]))


@triton.jit
def divide(a, b):
    first = a[0] / b[0]
    high, low = multiply(b, (first, tl.zeros((), tl.float64)))
    rest = add(a, (-high, -low))
    return fast_sum(first, rest[0] / b[0])


@triton.jit
def square_root(a):
    first = tl.sqrt(a[0])
    high, low = exact_product(first, first)
    rest = add(a, (-high, -low))
    correction = tl.where(first > 0, rest[0] / (2 * first), 0.0)
    return fast_sum(first, correction)


@triton.jit
def one_minus(a):
    zero = tl.zeros((), tl.float64)
    return add((zero + 1, zero), (-a[0], -a[1]))


@triton.jit
def one_minus_power(base, n):
    """1 - base^n for a whole n >= 1 and 0 <= base < 1."""
    bits = tl.minimum(n, 4.0e18).to(tl.int64)
    zero = tl.zeros((), tl.float64)
    high, low = zero, zero
    power, power_low = one_minus((base, zero))
    while bits > 0:
        if bits & 1 != 0:
            rest = one_minus((high, low))
            high, low = add((high, low), multiply((power, power_low), rest))
        rest = one_minus((power, power_low))
        power, power_low = add((power, power_low), multiply((power, power_low), rest))
        bits = bits >> 1
    return high, low
