// The CPU kernels for AVX2 with FMA and F16C. The headers come first: only the kernels may use the
// wider instructions.
#include "cpu/level.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif
#define FUSEDOPT_F16C  // g++ does not define __F16C__ after the pragma

namespace fusedopt::cpu {
namespace {
#include "cpu/kernels.h"
}  // namespace

#define FUSEDOPT_LEVEL kAvx2
#define FUSEDOPT_LEVEL_NAME "avx2"
#include "cpu/level_table.h"

}  // namespace fusedopt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
