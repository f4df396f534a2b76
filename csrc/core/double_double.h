// Numbers of 106 bits as unevaluated sums of two doubles, for scalars that are derived once a step.
//
// Only +, -, *, /, sqrt and fma of double are used, so that CPU and CUDA derive the same bits.
// Dekker, A floating-point technique for extending the available precision, 1971; Hida, Li and
// Bailey, Algorithms for quad-double precision floating point arithmetic, 2001.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"

namespace fusedopt {

struct DoubleDouble {
  double high, low;

  FUSEDOPT_FN DoubleDouble(double value) : high(value), low(0) {}  // NOLINT: a double is one
  FUSEDOPT_FN DoubleDouble(double h, double l) : high(h), low(l) {}
  FUSEDOPT_FN explicit operator double() const { return high + low; }
};

// a + b exactly, for |a| >= |b|.
FUSEDOPT_FN DoubleDouble fast_sum(double a, double b) {
  const double sum = a + b;
  return {sum, b - (sum - a)};
}

FUSEDOPT_FN DoubleDouble exact_sum(double a, double b) {
  const double sum = a + b, part = sum - a;
  return {sum, (a - (sum - part)) + (b - part)};
}

FUSEDOPT_FN DoubleDouble exact_product(double a, double b) {
  const double product = a * b;
  return {product, ::fma(a, b, -product)};
}

FUSEDOPT_FN DoubleDouble operator+(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble sum = exact_sum(a.high, b.high);
  return fast_sum(sum.high, sum.low + (a.low + b.low));
}

FUSEDOPT_FN DoubleDouble operator-(DoubleDouble a, DoubleDouble b) {
  return a + DoubleDouble(-b.high, -b.low);
}

FUSEDOPT_FN DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble product = exact_product(a.high, b.high);
  return fast_sum(product.high, product.low + (a.high * b.low + a.low * b.high));
}

FUSEDOPT_FN DoubleDouble operator/(DoubleDouble a, DoubleDouble b) {
  const double first = a.high / b.high;
  const DoubleDouble rest = a - b * first;
  return fast_sum(first, rest.high / b.high);
}

FUSEDOPT_FN DoubleDouble square_root(DoubleDouble a) {
  if (a.high <= 0) return ::sqrt(a.high);
  const double first = ::sqrt(a.high);
  const DoubleDouble rest = a - exact_product(first, first);
  return fast_sum(first, rest.high / (2 * first));
}

// 1 - base^n for a whole n >= 1 and 0 <= base < 1, without the cancellation of that subtraction.
// With a = 1 - base^i and b = 1 - base^j, 1 - base^(i + j) is a + b (1 - a), a sum of terms of one
// sign; i and j run over the powers of two in n.
FUSEDOPT_FN DoubleDouble one_minus_power(double base, double n) {
  if (!(n < 0x1p62)) return n != n ? n : 1.0;  // past int64
  DoubleDouble result = 0, power = DoubleDouble(1) - base;
  for (int64_t bits = static_cast<int64_t>(n); bits > 0; bits >>= 1) {
    if (bits & 1) result = result + power * (DoubleDouble(1) - result);
    power = power + power * (DoubleDouble(1) - power);
  }
  return result;
}

}  // namespace fusedopt
