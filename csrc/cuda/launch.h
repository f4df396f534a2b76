// The CUDA driver as host code sees it: no CUDA header, no Python.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/step.h"
#include "rules/registry.h"

namespace fusedopt::cuda {

// Why no kernel can run on this machine, or "". Makes no context on a device.
std::string unavailable();

// The compute capability of each device, such as 90. "", or what failed. Makes no context.
std::string capabilities(std::vector<int>* of_devices);

// Why the kernel of a rule, or that of launch_clip, cannot run on a device, or "". It is loaded
// there, for which the device may have to become idle: call it without the GIL.
std::string unserved(RuleId rule, int device);
std::string unserved_clip(int device);

// Whether this process has launched on more than one device.
bool uses_several_devices();

// What was compiled, such as "80 90 100 120+PTX", or "none".
const char* archs();

// Starts a step, or its norm alone, on a stream of a device, and returns without waiting for it:
// "", or what failed. `stream` is a cudaStream_t. The current device stays as it is.
std::string launch(RuleId rule, const StepArgs& args, int device, uintptr_t stream);

// Starts the clipping of gradients in place (clip.cuh), likewise.
std::string launch_clip(const StepArgs& args, int device, uintptr_t stream);

// Waits for the stream, and tells whether the last step of a workspace was skipped.
std::string read_skipped(const Workspace* workspace, int device, uintptr_t stream, bool* skipped);

// How many kernels this process has started.
int64_t launches();

// Asks for a grid of so many blocks of so many threads (a power of two, at most kThreads); 0 is
// "what the device can hold". For tests and tuning.
std::string set_geometry(int blocks, int threads);

}  // namespace fusedopt::cuda
