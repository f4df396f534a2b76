#include "host/cpu_step.h"

namespace fusedopt::host {
namespace {

cpu::StepResult apply(Plan* plan, const cpu::StepOptions& options) {
  // A short step keeps the GIL: to hold its gradients would cost more than the step.
  constexpr int64_t kLongStep = 1 << 20, kLongRow = 1 << 14;
  const int64_t rows = static_cast<int64_t>(plan->rows());
  if (plan->elements() < kLongStep || plan->elements() / rows < kLongRow)
    return cpu::apply(plan->rule(), plan->table(), options);
  plan->hold_grads();
  const WithoutGil unlocked;
  return cpu::apply(plan->rule(), plan->table(), options);
}

}  // namespace

bool CpuStep::run(Plan* plan) const {
  const cpu::StepResult result = apply(plan, options);
  if (options.norm && norm_out != nullptr) *norm_out = static_cast<float>(result.total_norm);
  if (result.skipped && skipped_out != nullptr) *skipped_out += 1;
  return result.skipped;
}

}  // namespace fusedopt::host
