// What a launch of the CUDA driver is given. Plain data, known to host code and kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/table.h"

namespace fusedopt::cuda {

constexpr int kChunk = 1 << 14;   // elements
constexpr int kThreads = 256;     // of a block, at most
constexpr int kBlocksPerSM = 2;   // at least: a thread has up to 128 registers
constexpr int kMaxBlocks = 4096;  // of a grid

// Memory of one optimizer on one device, zeros at first.
struct Workspace {
  double partial[kMaxBlocks];  // each block's share of the squared norm
  uint32_t finished;           // blocks that have ended; 0 between launches
  uint32_t skipped;            // whether the last step was
};

// A kernel takes 32,764 bytes of arguments (toolkits and drivers before 12.1: 4 KiB). Gradient
// pointers and groups change from step to step, and travel there; nothing has to be copied before
// the launch.
constexpr size_t kSmallArgs = 4096, kLargeArgs = 32764;
constexpr int kLargeArgsSince = 12010;  // 12.1, as cudaDriverGetVersion says it
#if defined(FUSEDOPT_CUDA_SMALL_ARGS)
constexpr int kInlineWords = 480;
constexpr size_t kMaxArgs = kSmallArgs;
#else
constexpr int kInlineWords = 4000;
constexpr size_t kMaxArgs = kLargeArgs;
#endif

struct StepArgs {
  // The table, in device memory. Rows have no gradient there.
  Row* rows;
  const Layout* layouts;
  const ChunkRef* chunks;
  int32_t row_count;
  int32_t chunk_count;
  Workspace* workspace;

  const float* grad_scale;     // gradients are divided by it; null: 1
  const float* found_inf;      // not zero: the step is skipped; null: 0
  const double* squared_norm;  // of the scaled gradients, where already reduced; else null
  float* grad_norm;            // takes the total norm; may be null
  int64_t* skipped_steps;      // may be null
  double* squared_norm_out;    // norm_only: takes the squared norm

  double max_norm;
  double clip_value;
  bool norm;            // the total norm is asked for
  bool norm_only;       // and nothing else
  bool skip_nonfinite;  // a non-finite total norm makes the step a no-op

  // A word for each row's gradient, then the groups: in device memory, or else in `words`.
  const uint64_t* spilled;
  uint64_t words[kInlineWords];
};
static_assert(sizeof(StepArgs) <= kMaxArgs, "kInlineWords must leave room for the other arguments");

}  // namespace fusedopt::cuda
