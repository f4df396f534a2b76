// The CPU driver: one parallel region over all tensors of a step.
#pragma once

#include <limits>

#include "core/table.h"
#include "rules/registry.h"

namespace fusedopt::cpu {

struct StepOptions {
  bool norm = false;  // compute the total norm, and clip to max_norm
  double max_norm = std::numeric_limits<double>::infinity();
  double clip_value = std::numeric_limits<double>::infinity();
  double grad_scale = 1;        // gradients are divided by it
  bool found_inf = false;       // an overflow was found before the step
  bool skip_nonfinite = false;  // a non-finite total norm makes the step a no-op
  double squared_norm = -1;     // of the scaled gradients, where already reduced; else negative
  int threads = 1;
};

struct StepResult {
  double total_norm = 0;  // before clipping, after unscaling; 0 where not computed
  bool skipped = false;
};

// Updates all rows in place and advances their step counts. Rows must have been checked.
StepResult apply(RuleId rule, const TableView& table, const StepOptions& options);

// Sum of the squares of all gradients, the same bits for any number of threads.
double squared_norm(const TableView& table, int threads);

// grad = clamp(grad * coef, -limit, limit) in place.
void scale_gradients(const TableView& table, double coef, double limit, int threads);

}  // namespace fusedopt::cpu
