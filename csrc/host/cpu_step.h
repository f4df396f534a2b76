// Runs the CPU driver over a plan's table.
#pragma once

#include "cpu/apply.h"
#include "host/plan.h"

namespace fusedopt::host {

// Long steps let other Python threads run.
cpu::StepResult run_on_cpu(Plan* plan, const cpu::StepOptions& options);

}  // namespace fusedopt::host
