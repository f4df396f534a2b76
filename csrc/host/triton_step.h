// Hands a plan's table to the Triton kernels (triton_kernels/), which Python code launches.
#pragma once

#include "host/device_table.h"
#include "host/plan.h"

namespace fusedopt::host {

// Belongs to one optimizer, and to one device.
class TritonDriver {
 public:
  explicit TritonDriver(int chunk) : table_(chunk) {}

  // Brings the table to the device, and calls
  //   host.launch(rows, layouts, chunks, words, row_count, chunk_count, kinds, may_take_back):
  // addresses, numbers, the distinct kinds of rows as a sorted tuple (docs/triton.md), and whether
  // the plan has created state, which a skipped step has to take back: only then it needs to know.
  // Returns what launch returned: whether the step was skipped.
  bool launch(Plan* plan);

  int64_t uploads() const { return table_.uploads(); }

 private:
  DeviceTable table_;
  Ref kinds_;
};

}  // namespace fusedopt::host
