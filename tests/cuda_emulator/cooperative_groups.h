// The grid barrier of the emulated GPU.
#pragma once

#include "cuda_runtime.h"

namespace cooperative_groups {

struct grid_group {
  void sync() const { cuda_emulator::wait(cuda_emulator::Wait::kGrid); }
};
inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
