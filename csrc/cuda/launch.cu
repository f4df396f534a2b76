// Starts the kernels: grid, device and errors.
#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <vector>

#include "cuda/clip.cuh"

namespace fusedopt::cuda {
namespace {

using Kernel = void (*)(const StepArgs);

int64_t launch_count = 0;
int asked_blocks = 0, asked_threads = 0;

std::string failed(const char* call, cudaError_t error) {
  cudaGetLastError();  // the error is ours: a later call of somebody else must not find it
  return std::string(call) + ": " + cudaGetErrorString(error);
}

#define FUSEDOPT_TRY(call)                                                                   \
  do {                                                                                       \
    if (const cudaError_t error = (call); error != cudaSuccess) return failed(#call, error); \
  } while (false)

// Makes a device the current one while it lives.
class DeviceGuard {
 public:
  std::string enter(int device) {
    FUSEDOPT_TRY(cudaGetDevice(&before_));
    if (before_ == device) return "";
    FUSEDOPT_TRY(cudaSetDevice(device));
    changed_ = true;
    return "";
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }

 private:
  int before_ = 0;
  bool changed_ = false;
};

// Blocks of a grid that all run at once on the current device: only then a grid barrier ends.
std::string resident_blocks(Kernel kernel, int device, int threads, int* blocks) {
  struct Known {
    Kernel kernel;
    int device, threads, blocks;
  };
  static std::vector<Known> known;  // used under the GIL
  for (const Known& k : known) {
    if (k.kernel == kernel && k.device == device && k.threads == threads) {
      *blocks = k.blocks;
      return "";
    }
  }
  int processors = 0, per_processor = 0, cooperative = 0;
  FUSEDOPT_TRY(cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device));
  if (!cooperative) return "the device has no cooperative launch";
  FUSEDOPT_TRY(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  FUSEDOPT_TRY(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, threads, 0));
  *blocks = std::min(processors * per_processor, kMaxBlocks);
  if (*blocks < 1) return "the kernel does not fit on the device";
  known.push_back({kernel, device, threads, *blocks});
  return "";
}

std::string launch_kernel(Kernel kernel, const StepArgs& args, int device, uintptr_t stream) {
  DeviceGuard guard;
  if (std::string error = guard.enter(device); !error.empty()) return error;
  const int threads = asked_threads > 0 ? asked_threads : kThreads;
  int blocks = 0;
  if (std::string error = resident_blocks(kernel, device, threads, &blocks); !error.empty())
    return error;
  if (asked_blocks > 0) blocks = std::min(blocks, asked_blocks);
  blocks = std::max(1, std::min(blocks, args.chunk_count));
  void* arguments[] = {const_cast<StepArgs*>(&args)};
  FUSEDOPT_TRY(cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, 0,
                                           reinterpret_cast<cudaStream_t>(stream)));
  ++launch_count;
  return "";
}

}  // namespace

std::string unavailable() {
  int count = 0;
  FUSEDOPT_TRY(cudaGetDeviceCount(&count));
  return count > 0 ? "" : "there is no CUDA device";
}

const char* archs() { return FUSEDOPT_CUDA_ARCHS; }

std::string launch(RuleId rule, const StepArgs& args, int device, uintptr_t stream) {
  switch (rule) {
#define FUSEDOPT_LAUNCH(Rule) \
  case RuleId::k##Rule:       \
    return launch_kernel(step_kernel<Rule>, args, device, stream);
    FUSEDOPT_RULES(FUSEDOPT_LAUNCH)
#undef FUSEDOPT_LAUNCH
    case RuleId::kCount:
      break;
  }
  return "no such rule";
}

std::string launch_clip(const StepArgs& args, int device, uintptr_t stream) {
  return launch_kernel(clip_kernel, args, device, stream);
}

std::string read_skipped(const Workspace* workspace, int device, uintptr_t stream, bool* skipped) {
  DeviceGuard guard;
  if (std::string error = guard.enter(device); !error.empty()) return error;
  uint32_t value = 0;
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  FUSEDOPT_TRY(
      cudaMemcpyAsync(&value, &workspace->skipped, sizeof value, cudaMemcpyDeviceToHost, on));
  FUSEDOPT_TRY(cudaStreamSynchronize(on));
  *skipped = value != 0;
  return "";
}

int64_t launches() { return launch_count; }

std::string set_geometry(int blocks, int threads) {
  if (blocks < 0 || blocks > kMaxBlocks)
    return "blocks must be from 0 to " + std::to_string(kMaxBlocks);
  if (threads < 0 || threads > kThreads || (threads & (threads - 1)) != 0)
    return "threads must be 0 or a power of two up to " + std::to_string(kThreads);
  asked_blocks = blocks;
  asked_threads = threads;
  return "";
}

}  // namespace fusedopt::cuda
