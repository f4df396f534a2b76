// The machine around the emulated GPU: devices, driver, contexts, and the part of the runtime that
// asks for them. tests/cuda_emulator/machine.py changes it, and reads what was called.
#pragma once

#include "cuda_runtime.h"

#define CUDART_VERSION 13000

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720
};
enum cudaDeviceAttr {
  cudaDevAttrCooperativeLaunch,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaMemcpyKind { cudaMemcpyDeviceToHost };
enum { cudaEnableDefault = 0 };
using cudaStream_t = struct CUstream_st*;
struct cudaFuncAttributes {};

namespace cuda_emulator {

inline std::mutex machine;
inline std::condition_variable machine_changed;
// By name and device (0 for those of the machine): devices, driver, runtime, capability,
// cooperative, image (whether kernels were compiled for the device), and "wait load", "wait launch"
// and "wait synchronize": such a call waits until it is 0 again.
inline std::map<std::pair<std::string, int>, int> settings;
inline std::set<int> contexts;
inline std::string calls;
inline thread_local int current_device = 0;

inline int setting(const char* name, int device, int otherwise) {
  const std::lock_guard lock(machine);
  const auto found = settings.find({name, device});
  return found == settings.end() ? otherwise : found->second;
}

inline void log(const std::string& call) {
  const std::lock_guard lock(machine);
  calls += call + "\n";
}

inline int device_count() { return setting("devices", 0, 1); }

// What a call does that works on the current device: the first one makes a context there.
inline void use_device() {
  const std::lock_guard lock(machine);
  if (contexts.insert(current_device).second)
    calls += "context " + std::to_string(current_device) + "\n";
}

inline void wait_for_device(const std::string& call, const std::string& details = "") {
  std::unique_lock lock(machine);
  calls += call + details + "\n";
  const auto free = [&] { return settings[{"wait " + call, 0}] == 0; };
  if (!machine_changed.wait_for(lock, std::chrono::seconds(10), free)) calls += "stuck\n";
}

// cuDevicePrimaryCtxGetState
inline int primary_context_state(int device, unsigned*, int* active) {
  const std::lock_guard lock(machine);
  *active = static_cast<int>(contexts.count(device));
  return 0;
}

}  // namespace cuda_emulator

#define FUSEDOPT_EMULATOR_EXPORT extern "C" __attribute__((visibility("default"), used))

FUSEDOPT_EMULATOR_EXPORT void cuda_emulator_set(const char* name, int device, int value) {
  const std::lock_guard lock(cuda_emulator::machine);
  cuda_emulator::settings[{name, device}] = value;
  cuda_emulator::machine_changed.notify_all();
}
// A new machine, on which nothing was called.
FUSEDOPT_EMULATOR_EXPORT void cuda_emulator_reset() {
  const std::lock_guard lock(cuda_emulator::machine);
  cuda_emulator::settings.clear();
  cuda_emulator::contexts.clear();
  cuda_emulator::current_device = 0;
  cuda_emulator::calls.clear();
  cuda_emulator::machine_changed.notify_all();
}
FUSEDOPT_EMULATOR_EXPORT void cuda_emulator_clear() {
  const std::lock_guard lock(cuda_emulator::machine);
  cuda_emulator::calls.clear();
}
FUSEDOPT_EMULATOR_EXPORT int cuda_emulator_has_context(int device) {
  const std::lock_guard lock(cuda_emulator::machine);
  return static_cast<int>(cuda_emulator::contexts.count(device));
}
// The calls since then, a line each, into `text` of `size` bytes.
FUSEDOPT_EMULATOR_EXPORT void cuda_emulator_calls(char* text, int size) {
  const std::lock_guard lock(cuda_emulator::machine);
  std::snprintf(text, static_cast<size_t>(size), "%s", cuda_emulator::calls.c_str());
}

inline const char* cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    default:
      return "invalid launch configuration";
  }
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) {
  return *version = cuda_emulator::setting("driver", 0, CUDART_VERSION), cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int* version) {
  return *version = cuda_emulator::setting("runtime", 0, CUDART_VERSION), cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  return *count = cuda_emulator::device_count(), cudaSuccess;
}
FUSEDOPT_EMULATOR_EXPORT cudaError_t cudaGetDevice(int* device) {
  return *device = cuda_emulator::current_device, cudaSuccess;
}
FUSEDOPT_EMULATOR_EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= cuda_emulator::device_count()) return cudaErrorInvalidDevice;
  cuda_emulator::log("set " + std::to_string(device));
  cuda_emulator::current_device = device;
  cuda_emulator::use_device();  // since CUDA 12
  return cudaSuccess;
}
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned,
                                                    unsigned long long) {
  if (std::string(name) == "cuDevicePrimaryCtxGetState")
    *function = reinterpret_cast<void*>(cuda_emulator::primary_context_state);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  using cuda_emulator::setting;
  const int capability = setting("capability", device, 90);
  if (attribute == cudaDevAttrCooperativeLaunch) *value = setting("cooperative", device, 1);
  if (attribute == cudaDevAttrMultiProcessorCount) *value = cuda_emulator::kProcessors;
  if (attribute == cudaDevAttrComputeCapabilityMajor) *value = capability / 10;
  if (attribute == cudaDevAttrComputeCapabilityMinor) *value = capability % 10;
  return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  cuda_emulator::use_device();
  cuda_emulator::wait_for_device("load");
  const bool compiled = cuda_emulator::setting("image", cuda_emulator::current_device, 1) != 0;
  return compiled ? cudaSuccess : cudaErrorNoKernelImageForDevice;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  cuda_emulator::use_device();
  return *blocks = 1, cudaSuccess;
}
template <class Argument>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Argument), dim3 blocks, dim3 threads,
                                        void** arguments, size_t, cudaStream_t stream) {
  if (blocks.x == 0 || threads.x == 0) return cudaErrorInvalidConfiguration;
  if (blocks.x > cuda_emulator::kProcessors) return cudaErrorCooperativeLaunchTooLarge;
  cuda_emulator::use_device();
  cuda_emulator::wait_for_device("launch", " " + std::to_string(cuda_emulator::current_device) +
                                               " on " +
                                               std::to_string(reinterpret_cast<uintptr_t>(stream)));
  cuda_emulator::run_grid(kernel, blocks.x, threads.x,
                          static_cast<std::remove_const_t<Argument>*>(arguments[0]));
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind,
                                   cudaStream_t) {
  cuda_emulator::use_device();
  std::memcpy(to, from, n);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) {
  cuda_emulator::wait_for_device("synchronize");
  return cudaSuccess;
}
