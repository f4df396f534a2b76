#include "host/cpu_step.h"

namespace fusedopt::host {

cpu::StepResult run_on_cpu(Plan* plan, const cpu::StepOptions& options) {
  // A short step keeps the GIL: to hold its gradients would cost more than the step.
  constexpr int64_t kLongStep = 1 << 20, kLongRow = 1 << 14;
  const int64_t rows = static_cast<int64_t>(plan->rows());
  if (plan->elements() < kLongStep || plan->elements() / rows < kLongRow)
    return cpu::apply(plan->rule(), plan->table(), options);
  plan->hold_grads();
  const WithoutGil unlocked;
  return cpu::apply(plan->rule(), plan->table(), options);
}

}  // namespace fusedopt::host
