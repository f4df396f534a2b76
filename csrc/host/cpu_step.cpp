#include "host/cpu_step.h"

namespace fusedopt::host {
namespace {

// Lets other Python threads run while it lives.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(thread_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace

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
