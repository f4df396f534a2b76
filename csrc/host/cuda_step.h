// Runs the CUDA driver over a plan's table, or over a list of gradients. Gradient pointers and
// param groups travel as kernel arguments, or where they are too many are uploaded.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "cuda/launch.h"
#include "host/device_table.h"
#include "host/plan.h"

namespace fusedopt::host {

// The kind of device that the CUDA driver takes tensors of. The emulated GPU takes those of the
// CPU, or where the tests pretend that some lie on GPUs, these.
#if defined(FUSEDOPT_CUDA_EMULATOR)
inline const dlpack::DeviceType kCudaDevice =
    std::getenv("FUSEDOPT_EMULATED_GPUS") == nullptr ? dlpack::kCPU : dlpack::kCUDA;
#else
inline constexpr dlpack::DeviceType kCudaDevice = dlpack::kCUDA;
#endif

// What StepArgs (cuda/step.h) is told by the caller; pointers to device memory.
struct CudaOptions {
  bool norm = false, norm_only = false, skip_nonfinite = false;
  double max_norm = 0, clip_value = 0;
  const float* grad_scale = nullptr;
  const float* found_inf = nullptr;
  const double* squared_norm = nullptr;
  double* squared_norm_out = nullptr;
  float* grad_norm = nullptr;
  int64_t* skipped_steps = nullptr;
  uintptr_t stream = 0;
};

// Belongs to one optimizer, and to one device. Asks the source's host for a workspace, too:
// host.workspace_address(bytes) returns where bytes of zeros lie, the same on each call.
class CudaDriver {
 public:
  // Starts the step, and returns without waiting for it. Returns whether it was skipped, where the
  // host must know: it waits for the answer only when the plan has created state, which a skipped
  // step has to take back.
  bool step(Plan* plan, const CudaOptions& options);

  // Scales a list of gradients in place; with norm_only, takes their squared norm.
  void clip(const TableSource& source, const CudaOptions& options);

  // How often something was uploaded.
  int64_t uploads() const { return table_.uploads(); }

 private:
  const cuda::StepArgs& prepare(const TableSource& source, const CudaOptions& options);

  DeviceTable table_{cuda::kChunk};
  std::unique_ptr<cuda::StepArgs> args_;  // 32 KB, with the pointers into device memory
};

}  // namespace fusedopt::host
