// Starts the kernels: grid, device and errors.
#include "cuda/launch.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

#include "cuda/clip.cuh"

namespace fusedopt::cuda {
namespace {

using Kernel = void (*)(const StepArgs);

std::atomic<int64_t> launch_count{0};
std::atomic<uint64_t> launched_on{0};  // a bit for each device
int asked_blocks = 0, asked_threads = 0;

std::string failed(const char* call, cudaError_t error) {
  cudaGetLastError();  // the error is ours: a later call of somebody else must not find it
  return std::string(call) + ": " + cudaGetErrorString(error);
}

#define FUSEDOPT_TRY(call)                                                                   \
  do {                                                                                       \
    if (const cudaError_t error = (call); error != cudaSuccess) return failed(#call, error); \
  } while (false)

// Whether this process has a context on a device. To make one costs hundreds of MB of its memory.
bool has_context(int device) {
  using GetState = int (*)(int device, unsigned* flags, int* active);
  static const GetState get_state = [] {
    const char* const name = "cuDevicePrimaryCtxGetState";
    void* found = nullptr;
#if CUDART_VERSION >= 12050
    const cudaError_t error =
        cudaGetDriverEntryPointByVersion(name, &found, 7000, cudaEnableDefault);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(name, &found, cudaEnableDefault);
#endif
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess ? reinterpret_cast<GetState>(found) : nullptr;
  }();
  unsigned flags = 0;
  int active = 0;
  return get_state != nullptr && get_state(device, &flags, &active) == 0 && active != 0;
}

// Makes a device the current one while it lives. A thread that has used no device yet is said to be
// on device 0; it is brought back there only where that makes no context. Torch's guard, which
// callers hold around a step, remembers the device of such a thread instead.
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
    if (changed_ && has_context(before_)) cudaSetDevice(before_);
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
  static std::vector<Known> known;
  static std::mutex mutex;  // the GIL is not always held here
  const std::lock_guard lock(mutex);
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
  if (device < 64) launched_on |= uint64_t{1} << device;
  return "";
}

std::string unserved_kernel(Kernel kernel, int device) {
  DeviceGuard guard;
  if (std::string error = guard.enter(device); !error.empty()) return error;
  cudaFuncAttributes attributes;
  FUSEDOPT_TRY(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel)));
  int blocks = 0;
  return resident_blocks(kernel, device, kThreads, &blocks);
}

std::string version_text(int version) {  // 12010 is 12.1
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

std::string unavailable() {
  int driver = 0, runtime = 0, count = 0;
  FUSEDOPT_TRY(cudaDriverGetVersion(&driver));
  FUSEDOPT_TRY(cudaRuntimeGetVersion(&runtime));
  if (driver == 0) return "there is no NVIDIA driver";
  // A driver serves the minor versions of its major version, too, but not all that they can do.
  int needed = runtime / 1000 * 1000;
  if (sizeof(StepArgs) > kSmallArgs) needed = std::max(needed, kLargeArgsSince);
  if (driver < needed)
    return "the NVIDIA driver is for CUDA " + version_text(driver) + ", and the kernels need " +
           version_text(needed) + " (built with " + version_text(runtime) + ")";
  FUSEDOPT_TRY(cudaGetDeviceCount(&count));
  return count > 0 ? "" : "there is no CUDA device";
}

std::string capabilities(std::vector<int>* of_devices) {
  int count = 0;
  FUSEDOPT_TRY(cudaGetDeviceCount(&count));
  for (int device = 0; device < count; ++device) {
    int major = 0, minor = 0;
    FUSEDOPT_TRY(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    FUSEDOPT_TRY(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    of_devices->push_back(10 * major + minor);
  }
  return "";
}

std::string unserved(RuleId rule, int device) {
  switch (rule) {
#define FUSEDOPT_UNSERVED(Rule) \
  case RuleId::k##Rule:         \
    return unserved_kernel(step_kernel<Rule>, device);
    FUSEDOPT_RULES(FUSEDOPT_UNSERVED)
#undef FUSEDOPT_UNSERVED
    case RuleId::kCount:
      break;
  }
  return "no such rule";
}

std::string unserved_clip(int device) { return unserved_kernel(clip_kernel, device); }

bool uses_several_devices() {
  const uint64_t used = launched_on;
  return (used & (used - 1)) != 0;
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
