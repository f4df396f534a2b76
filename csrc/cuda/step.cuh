// One optimizer step in one cooperative launch.
//
// A persistent grid walks the chunks of all rows. With a norm it walks them twice: pass 1 sums the
// squares, each block's share into its own slot; a grid barrier; every block adds the slots in the
// same order and derives clip_coef; pass 2 updates, backwards, so that the gradients that were read
// last are still in the L2 cache. Without a norm there is one pass and no barrier. The last block
// to end advances the step counts and writes the figures, so nothing of a step needs the host, and
// notes in the table that the state is no longer new.
#pragma once

#include <cooperative_groups.h>

#include "core/dispatch.h"
#include "cuda/reduce.cuh"
#include "cuda/update.cuh"

namespace fusedopt::cuda {

// What the first pass has decided, the same in every block.
struct Decision {
  double factor;  // of each gradient: unscaling and clip_coef
  double total_norm;
  bool skipped;
};

template <class Rule>
__device__ __noinline__ void prepare(const Row& row, const Group& group, double factor,
                                     double limit, PreparedPair<Rule>* out) {
  constexpr int kMembers = sizeof(Prepared<Rule, double>) / sizeof(double);
  static_assert(sizeof(Prepared<Rule, float>) == kMembers * sizeof(float));
  typename Rule::Hyper h;
  memcpy(&h, group.hyper, sizeof h);
  if (group.lr != nullptr) h.lr = load_any<double>(group.lr_dtype, group.lr, 0);
  const double step = row.step == nullptr ? 1.0 : *row.step + 1.0;
  out->f64 = {Rule::prepare(h, step, row.first != 0), group.maximize ? -factor : factor, limit};
  const double* from = reinterpret_cast<const double*>(&out->f64);
  float* to = reinterpret_cast<float*>(&out->f32);
  for (int i = 0; i < kMembers; ++i) to[i] = static_cast<float>(from[i]);
}

__device__ __forceinline__ const uint64_t* words(const StepArgs& a) {
  return a.spilled != nullptr ? a.spilled : a.words;
}
__device__ __forceinline__ void* grad_of(const StepArgs& a, int32_t row) {
  return reinterpret_cast<void*>(words(a)[row]);
}
__device__ __forceinline__ const Group& group_of(const StepArgs& a, int32_t group) {
  return reinterpret_cast<const Group*>(words(a) + a.row_count)[group];
}

__device__ __forceinline__ Chunk chunk_of(const StepArgs& a, int c) {
  const ChunkRef ref = a.chunks[c];
  const Row* row = &a.rows[ref.row];
  const int64_t begin = static_cast<int64_t>(ref.index) * kChunk;
  const int64_t left = row->numel - begin;
  return {row, grad_of(a, ref.row), begin, static_cast<int>(left < kChunk ? left : kChunk)};
}

__device__ __forceinline__ double block_squares(const StepArgs& a, double* scratch) {
  double sum = 0;
  for (int c = static_cast<int>(blockIdx.x); c < a.chunk_count; c += static_cast<int>(gridDim.x)) {
    sum += squares(chunk_of(a, c), a.layouts);
  }
  return block_sum(sum, scratch);
}

__device__ __forceinline__ double sum_of_partials(const StepArgs& a, double* scratch) {
  double sum = 0;
  for (int b = static_cast<int>(threadIdx.x); b < static_cast<int>(gridDim.x);
       b += static_cast<int>(blockDim.x))
    sum += __ldcg(&a.workspace->partial[b]);  // written by other blocks: not from this SM's cache
  return block_sum(sum, scratch);
}

__device__ __forceinline__ Decision decide(const StepArgs& a, double* scratch) {
  const double inverse_scale = a.grad_scale == nullptr ? 1.0 : 1.0 / *a.grad_scale;
  Decision d = {inverse_scale, 0, a.found_inf != nullptr && *a.found_inf != 0};
  if (!a.norm) return d;
  double squared;
  if (a.squared_norm != nullptr) {
    squared = *a.squared_norm;
  } else {
    const double mine = block_squares(a, scratch);
    if (threadIdx.x == 0) a.workspace->partial[blockIdx.x] = mine;
    cooperative_groups::this_grid().sync();
    squared = sum_of_partials(a, scratch);
  }
  d.total_norm = sqrt(squared) * inverse_scale;
  d.skipped = d.skipped || (a.skip_nonfinite && !isfinite(d.total_norm));
  const double coef = a.max_norm / (d.total_norm + 1e-6);
  d.factor = inverse_scale * (coef > 1 ? 1 : coef);  // a NaN stays, as in torch
  return d;
}

// Whether this block is the last of the grid to come here.
__device__ __forceinline__ bool is_last_block(const StepArgs& a, bool* shared) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();  // what this block has written is seen by the block that comes last
    *shared = atomicAdd(&a.workspace->finished, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  return *shared;
}

// Scalars are derived for so many chunks of a block at a time, one by each thread: bias corrections
// take microseconds, and a block of tiny tensors would pay them for each.
constexpr int kBatch = 32;

template <class Rule>
__device__ __forceinline__ void update_pass(const StepArgs& a, const Decision& d,
                                            PreparedPair<Rule>* batch) {
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const int mine = (a.chunk_count - block + blocks - 1) / blocks;  // chunks of this block
  for (int end = mine; end > 0; end -= kBatch) {
    const int size = end < kBatch ? end : kBatch;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < size; i += static_cast<int>(blockDim.x)) {
      const Row& row = a.rows[a.chunks[block + (end - 1 - i) * blocks].row];
      prepare(row, group_of(a, row.group), d.factor, a.clip_value, &batch[i]);
    }
    __syncthreads();
    for (int i = 0; i < size; ++i) {
      update_chunk<Rule>(chunk_of(a, block + (end - 1 - i) * blocks), a.layouts, &batch[i]);
    }
  }
}

template <class Rule>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM)
    step_kernel(const __grid_constant__ StepArgs a) {
  __shared__ double scratch[kThreads];
  __shared__ PreparedPair<Rule> batch[kBatch];
  __shared__ bool last;
  Decision d{};
  if (a.norm_only) {
    const double mine = block_squares(a, scratch);
    if (threadIdx.x == 0) a.workspace->partial[blockIdx.x] = mine;
  } else {
    d = decide(a, scratch);
    if (!d.skipped) update_pass<Rule>(a, d, batch);
  }
  if (!is_last_block(a, &last)) return;
  if (a.norm_only) {
    const double squared = sum_of_partials(a, scratch);
    if (threadIdx.x == 0) *a.squared_norm_out = squared;
  } else if (!d.skipped) {
    for (int r = static_cast<int>(threadIdx.x); r < a.row_count;
         r += static_cast<int>(blockDim.x)) {
      if (a.rows[r].step != nullptr) *a.rows[r].step += 1;
      if (a.rows[r].first != 0) a.rows[r].first = 0;  // so that the next step finds its table here
    }
  }
  if (threadIdx.x != 0) return;
  a.workspace->finished = 0;
  a.workspace->skipped = d.skipped;
  if (a.norm && a.grad_norm != nullptr) *a.grad_norm = static_cast<float>(d.total_norm);
  if (d.skipped && a.skipped_steps != nullptr) *a.skipped_steps += 1;
}

}  // namespace fusedopt::cuda
