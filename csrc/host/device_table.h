// The tensor table in the memory of a device.
//
// The static part (rows without their gradients, chunks, layouts) is uploaded only when it differs
// from the last one. Gradient pointers and param groups, which change from step to step, are words
// of their own: a driver takes them as kernel arguments, or has them uploaded, too.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "core/table.h"
#include "host/python.h"

namespace fusedopt::host {

// A table, and whom to ask for memory on its device: host.upload(address, bytes, slot)
// copies bytes there, and returns their address.
struct TableSource {
  TableView table;
  int device;
  PyObject* host;
  std::function<void()> before_python;  // called before Python code runs
};

class DeviceTable {
 public:
  explicit DeviceTable(int chunk) : chunk_(chunk) {}

  // Uploads the static part where it has changed, and returns whether it has.
  bool refresh(const TableSource& source);

  // The step that was run over the table has changed its rows on the device, too: their state is no
  // longer that of a first step.
  void end_first_step();

  // A word for each row's gradient pointer, then the groups.
  static size_t word_count(const TableView& table);
  static void write_words(const TableView& table, uint64_t* out);
  // The same in device memory, uploaded where they have changed.
  uintptr_t upload_words(const TableSource& source);

  // Addresses on the device, and how many.
  uintptr_t rows() const { return rows_at_; }
  uintptr_t layouts() const { return layouts_at_; }
  uintptr_t chunks() const { return chunks_at_; }
  int32_t row_count() const { return static_cast<int32_t>(rows_.size()); }
  int32_t chunk_count() const { return chunk_count_; }
  int device() const { return device_; }

  int64_t uploads() const { return uploads_; }  // so far

 private:
  uintptr_t upload(const TableSource& source, const void* from, size_t bytes, const char* slot);

  const int chunk_;        // elements
  std::vector<Row> rows_;  // as uploaded
  std::vector<Layout> layouts_;
  std::vector<uint64_t> words_, next_words_;  // as uploaded; those of this step
  uintptr_t rows_at_ = 0, layouts_at_ = 0, chunks_at_ = 0, words_at_ = 0;
  int32_t chunk_count_ = 0;
  int device_ = -1;
  int64_t uploads_ = 0;
};

}  // namespace fusedopt::host
