// The dtype combinations that drivers compile a loop of their own for.
//
// Every combination of the four storage dtypes is legal; the ones listed here are read, updated and
// written in one pass through registers. The CPU driver takes any other through blocks in the L1
// cache (cpu/kernels.h).
#pragma once

#include "core/dtype.h"

namespace fusedopt {

// X(param and grad dtype, state dtype)
#define FUSEDOPT_FUSED_DTYPES(X)        \
  X(DType::kFloat32, DType::kFloat32)   \
  X(DType::kFloat64, DType::kFloat64)   \
  X(DType::kBFloat16, DType::kBFloat16) \
  X(DType::kFloat16, DType::kFloat16)   \
  X(DType::kBFloat16, DType::kFloat32)  \
  X(DType::kFloat16, DType::kFloat32)

}  // namespace fusedopt
