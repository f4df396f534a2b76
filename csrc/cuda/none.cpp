// The CUDA driver of a build without CUDA.
#if !defined(FUSEDOPT_CUDA)
#include "cuda/launch.h"

namespace fusedopt::cuda {

std::string unavailable() { return "fusedopt was built without CUDA (nvcc was not found)"; }
std::string capabilities(std::vector<int>*) { return unavailable(); }
std::string unserved(RuleId, int) { return unavailable(); }
std::string unserved_clip(int) { return unavailable(); }
bool uses_several_devices() { return false; }
const char* archs() { return "none"; }
std::string launch(RuleId, const StepArgs&, int, uintptr_t) { return unavailable(); }
std::string launch_clip(const StepArgs&, int, uintptr_t) { return unavailable(); }
std::string read_skipped(const Workspace*, int, uintptr_t, bool*) { return unavailable(); }
int64_t launches() { return 0; }
std::string set_geometry(int, int) { return unavailable(); }

}  // namespace fusedopt::cuda
#endif
