// The loops that drivers compile, and which of them a row takes.
//
// Every combination of the four storage dtypes is legal. The ones listed here, dense and in one
// order, are read, updated and written in one pass; any other row takes a loop that looks at the
// dtypes as it goes.
#pragma once

#include "core/dtype.h"
#include "core/table.h"

namespace fusedopt {

// X(index, param and grad dtype, state dtype)
#define FUSEDOPT_FUSED_DTYPES(X)           \
  X(0, DType::kFloat32, DType::kFloat32)   \
  X(1, DType::kFloat64, DType::kFloat64)   \
  X(2, DType::kBFloat16, DType::kBFloat16) \
  X(3, DType::kFloat16, DType::kFloat16)   \
  X(4, DType::kBFloat16, DType::kFloat32)  \
  X(5, DType::kFloat16, DType::kFloat32)

enum Loop : uint8_t { kAnyFloat = 6, kAnyDouble = 7, kLoops = 8 };  // 0 to 5: those of the list

// `row` is complete but for its loop. Without states, a row takes the loop with states of its
// dtype.
inline uint8_t choose_loop(const Row& row) {
  const DType param = row.dtype[kParam];
  const DType state = row.states > 0 ? row.dtype[kState0] : param;
  bool uniform = row.layout == kFlat && row.dtype[kGrad] == param;
  for (int k = 1; k < row.states; ++k) uniform = uniform && row.dtype[kState0 + k] == state;
#define FUSEDOPT_CASE(index, P, S) \
  if (uniform && param == P && state == S) return index;
  FUSEDOPT_FUSED_DTYPES(FUSEDOPT_CASE)
#undef FUSEDOPT_CASE
  for (int k = 0; k < kState0 + row.states; ++k)  // one is enough to do the maths in float64
    if (row.dtype[k] == DType::kFloat64) return kAnyDouble;
  return kAnyFloat;
}

}  // namespace fusedopt
