// The tensor table: what a driver is given of one optimizer step.
//
// Rows and groups are plain data that any driver (CPU threads, a CUDA kernel) can read.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/dtype.h"

namespace fusedopt {

inline constexpr int kMaxStates = 3;
inline constexpr int kOperands = 2 + kMaxStates;  // param, grad, states
enum Operand : int { kParam = 0, kGrad = 1, kState0 = 2 };

inline constexpr int kMaxHyper = 12;
inline constexpr int kMaxDims = 64;
inline constexpr int32_t kFlat = -1;

// One tensor. `layout` is kFlat when all operands lie dense in memory in the same order, so that
// element i of each belongs together; else it is an index into the table of layouts.
struct Row {
  void* data[kOperands];
  float* step;  // null for a rule without step counts
  int64_t numel;
  int32_t group;
  int32_t layout;

  DType dtype[kOperands];
  uint8_t variant;  // of the rule
  uint8_t states;   // how many state tensors are in use
  uint8_t first;    // 1 when the state was created for this step
  uint8_t loop;     // Loop of core/dispatch.h
};

// One param group: hyperparameters in the order of the rule's Hyper struct, which begins with lr.
struct Group {
  double hyper[kMaxHyper];
  void* lr;  // an lr that lies in device memory; else null
  DType lr_dtype;
  bool maximize;
};

// Strides (in elements) of the operands over the same dims, outermost first, adjacent dims that
// can be walked as one merged.
struct Layout {
  int ndim = 0;
  int64_t size[kMaxDims];
  int64_t stride[kOperands][kMaxDims];
};

// Elements [index * size, (index + 1) * size) of a row, for drivers that walk chunks of one size.
struct ChunkRef {
  int32_t row;
  int32_t index;
};

struct TableView {
  const std::vector<Row>& rows;
  const std::vector<Group>& groups;
  const std::vector<Layout>& layouts;
};

// What the driver does to each gradient element before the rule sees it:
// grad = clamp(grad * factor, -limit, limit). The factor carries unscaling, clip_coef and the sign
// of `maximize`; limit is infinity when clip_grad_value is off.
struct GradTransform {
  double factor;
  double limit;
  bool clamp;  // whether limit is finite
};

}  // namespace fusedopt
