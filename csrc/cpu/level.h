// One instruction-set level of the CPU kernels, and what all levels share.
#pragma once

#include <cstdint>
#include <type_traits>

#include "core/dispatch.h"
#include "core/table.h"
#include "rules/registry.h"

namespace fusedopt::cpu {

template <class Rule>
struct ScalarsPair {
  typename Rule::template Scalars<float> f32;
  typename Rule::template Scalars<double> f64;

  template <class T>
  FUSEDOPT_FN const auto& get() const {
    if constexpr (std::is_same_v<T, double>) {
      return f64;
    } else {
      return f32;
    }
  }
};

// Each function works on elements [begin, begin + count) of a row; layout is null for a flat row.
struct Level {
  const char* name;
  void (*update[kRules])(const Row& row, const Layout* layout, int64_t begin, int64_t count,
                         const GradTransform& transform, const void* scalars);
  double (*squares)(const Row& row, const Layout* layout, int64_t begin, int64_t count);
  void (*scale)(const Row& row, const Layout* layout, int64_t begin, int64_t count, double coef,
                double limit);
};

extern const Level kBaseline;
#if defined(__x86_64__)
extern const Level kAvx2;
extern const Level kAvx512;
#endif

// The best level that this machine runs, or the one that FUSEDOPT_CPU_LEVEL names.
const Level& level();

}  // namespace fusedopt::cpu
