// Storage dtypes and their conversion to the type that the maths runs in.
//
// Widening is exact. Narrowing rounds once, to nearest even, and keeps NaN a NaN. All conversions
// are branch-free on 32-bit integers, so that a compiler vectorises a loop over them; a GPU has
// instructions for most of them, with the same results but for the payload of a NaN.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FUSEDOPT_FN __host__ __device__ __forceinline__
#else
// Always inlined: the same function is compiled into several instruction-set levels, and an
// out-of-line copy of one level must never be linked into another.
#define FUSEDOPT_FN inline __attribute__((always_inline))
#endif

namespace fusedopt {

enum class DType : uint8_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
inline constexpr int kDTypes = 4;
inline constexpr size_t kDTypeBytes[kDTypes] = {4, 8, 2, 2};

// Distinct types for the bits of a 16-bit float; enums, because compilers vectorise loads of
// scalars.
enum class bfloat16 : uint16_t {};
enum class float16 : uint16_t {};

template <DType>
struct Storage;
template <>
struct Storage<DType::kFloat32> {
  using type = float;
};
template <>
struct Storage<DType::kFloat64> {
  using type = double;
};
template <>
struct Storage<DType::kBFloat16> {
  using type = bfloat16;
};
template <>
struct Storage<DType::kFloat16> {
  using type = float16;
};

FUSEDOPT_FN uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

FUSEDOPT_FN float bits_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

FUSEDOPT_FN float widen(float x) { return x; }
FUSEDOPT_FN double widen(double x) { return x; }
FUSEDOPT_FN float widen(bfloat16 x) { return bits_float(static_cast<uint32_t>(x) << 16); }

FUSEDOPT_FN float widen(float16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(static_cast<uint16_t>(x)));
  return wide;
#else
  const uint32_t sign = (static_cast<uint32_t>(x) & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x) & 0x7fffu;
  const uint32_t exponent = magnitude & 0x7c00u;
  const uint32_t subnormal =
      float_bits(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t rebias = exponent == 0x7c00u ? (255u - 31u) << 23 : (127u - 15u) << 23;
  const uint32_t normal = (magnitude << 13) + rebias;
  return bits_float((exponent == 0 ? subnormal : normal) | sign);
#endif
}

FUSEDOPT_FN void narrow(float x, float* out) { *out = x; }
FUSEDOPT_FN void narrow(double x, double* out) { *out = x; }
FUSEDOPT_FN void narrow(double x, float* out) { *out = static_cast<float>(x); }
FUSEDOPT_FN void narrow(float x, double* out) { *out = x; }

// The upper 16 bits are the bfloat16; the lower ones are left over.
FUSEDOPT_FN uint32_t rounded_bits(float x) {
  const uint32_t bits = float_bits(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const uint32_t nan = bits | 0x400000u;
  return x != x ? nan : rounded;
}
FUSEDOPT_FN void narrow(float x, bfloat16* out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint16_t bits;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  *out = static_cast<bfloat16>(bits);
#else
  *out = static_cast<bfloat16>(rounded_bits(x) >> 16);
#endif
}

// Two bfloat16 in one 32-bit word, as they lie in memory (little-endian): no lane changes its width
// on the way, which saves a vector unit half of the work of conversion.
struct FloatPair {
  float first, second;
};
FUSEDOPT_FN FloatPair widen_pair(uint32_t word) {
  return {bits_float(word << 16), bits_float(word & 0xffff0000u)};
}
FUSEDOPT_FN uint32_t narrow_pair(FloatPair x) {
  return rounded_bits(x.first) >> 16 | (rounded_bits(x.second) & 0xffff0000u);
}

FUSEDOPT_FN void narrow(float x, float16* out) {
#if defined(__CUDA_ARCH__)
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
  *out = static_cast<float16>(bits);
#else
  const uint32_t bits = float_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // At 0.5 one float32 ULP is one float16 subnormal step: the addition rounds to it.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);
  const uint32_t rebiased = magnitude - ((127u - 15u) << 23);
  uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
  normal = normal > 0x7c00u ? 0x7c00u : normal;  // past 65520: infinity
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  *out = static_cast<float16>(half | sign);
#endif
}

// float64 maths stored in 16 bits goes through float32 rounded to odd, so that the second rounding
// cannot tip a tie: one rounding in effect.
FUSEDOPT_FN float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = static_cast<double>(nearest);
  const uint32_t bits = float_bits(nearest);
  if (back == x || x != x || (bits & 0x7f800000u) == 0x7f800000u || (bits & 1u)) return nearest;
  const bool away = (back < 0 ? -back : back) > (x < 0 ? -x : x);
  return bits_float(away ? bits - 1u : bits + 1u);
}
FUSEDOPT_FN void narrow(double x, bfloat16* out) { narrow(round_to_odd(x), out); }
FUSEDOPT_FN void narrow(double x, float16* out) { narrow(round_to_odd(x), out); }

}  // namespace fusedopt
