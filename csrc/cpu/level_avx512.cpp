// The CPU kernels for AVX-512 (F, BW, DQ, VL). The headers come first: only the kernels may use the
// wider instructions.
#include "cpu/level.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                        \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512")
#endif

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // g++ 12 means its own intrinsics
#endif
#define FUSEDOPT_AVX512  // g++ does not define __AVX512F__ after the pragma

namespace fusedopt::cpu {
namespace {
#include "cpu/kernels.h"
}  // namespace

#define FUSEDOPT_LEVEL kAvx512
#define FUSEDOPT_LEVEL_NAME "avx512"
#include "cpu/level_table.h"

}  // namespace fusedopt::cpu

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
