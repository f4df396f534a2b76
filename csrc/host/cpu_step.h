// Runs the CPU driver over a plan's table.
#pragma once

#include <cstdint>

#include "cpu/apply.h"
#include "host/plan.h"

namespace fusedopt::host {

// What a step does, and where its figures go: null where nobody asks for them.
struct CpuStep {
  // Runs it, and returns whether it was skipped. Long steps let other Python threads run.
  bool run(Plan* plan) const;

  cpu::StepOptions options;
  float* norm_out = nullptr;
  int64_t* skipped_out = nullptr;
};

}  // namespace fusedopt::host
