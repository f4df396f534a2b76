// Runs the CUDA driver over a plan's table, or over a list of gradients.
//
// The static part of the table (rows without their gradients, chunks, layouts) lies in device
// memory, and is uploaded only when it differs from the last one. Gradient pointers and param
// groups travel as kernel arguments, or where they are too many are uploaded, too.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "cuda/launch.h"
#include "host/plan.h"

namespace fusedopt::host {

// The kind of device that the CUDA driver takes tensors of.
#if defined(FUSEDOPT_CUDA_EMULATOR)
inline constexpr dlpack::DeviceType kCudaDevice = dlpack::kCPU;
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

// A table, and whom to ask for memory on its device: host.upload(address, bytes, slot, device) and
// host.workspace(bytes, device) return addresses there.
struct CudaTable {
  TableView table;
  int device;
  PyObject* host;
  std::function<void()> before_python;  // called before Python code runs
};

// Belongs to one optimizer, and to one device.
class CudaDriver {
 public:
  // Starts the step, and returns without waiting for it. Returns whether it was skipped, where the
  // host must know: it waits for the answer only when the plan has created state, which a skipped
  // step has to take back.
  bool step(Plan* plan, const CudaOptions& options);

  // Scales a list of gradients in place; with norm_only, takes their squared norm.
  void clip(const CudaTable& table, const CudaOptions& options);

  // How often something was uploaded.
  int64_t uploads() const { return uploads_; }

 private:
  const cuda::StepArgs& prepare(const CudaTable& table, const CudaOptions& options);
  void refresh_table(const CudaTable& table);
  void refresh_words(const CudaTable& table);
  uintptr_t upload(const CudaTable& table, const void* from, size_t bytes, const char* slot);

  std::vector<Row> rows_;  // as uploaded
  std::vector<Layout> layouts_;
  std::vector<uint64_t> spilled_;
  int device_ = -1;
  int64_t uploads_ = 0;
  std::unique_ptr<cuda::StepArgs> args_;  // 32 KB, with the pointers into device memory
};

}  // namespace fusedopt::host
