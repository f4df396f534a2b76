// Splits the rows of a step into chunks, and chunks into tasks that threads take in turn.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "core/table.h"
#include "cpu/threads.h"

namespace fusedopt::cpu {

// A run of elements of one row that one thread takes at a time.
struct Chunk {
  int32_t row;
  int32_t count;
  int64_t begin;
};

// A multiple of every vector width and of 64 bytes in every dtype, so that chunks of an aligned
// tensor start on cache lines.
inline constexpr int32_t kChunkElements = 1 << 16;

struct Schedule {
  std::vector<Chunk> chunks;
  std::vector<int32_t> task_ends;  // a task is a run of chunks of about kChunkElements in all
  int threads = 1;

  Schedule(const std::vector<Row>& rows, int max_threads) {
    int64_t open = 0;
    for (size_t r = 0; r < rows.size(); ++r) {
      for (int64_t begin = 0; begin < rows[r].numel; begin += kChunkElements) {
        const int64_t count = std::min<int64_t>(kChunkElements, rows[r].numel - begin);
        if (open + count > kChunkElements) close_task(&open);
        chunks.push_back({static_cast<int32_t>(r), static_cast<int32_t>(count), begin});
        open += count;
      }
    }
    close_task(&open);
    const int allowed = allowed_threads(max_threads);
    const int tasks = static_cast<int>(std::min<size_t>(task_ends.size(), allowed));
    threads = std::max(tasks, 1);  // a step of one task stays on the calling thread
  }

  // One pass: every task once, by whichever thread is free, last task first if reversed. All
  // threads of a team call it with the same counter.
  template <class F>
  void for_chunks(std::atomic<int32_t>* next, bool reversed, F f) const {
    const int32_t tasks = static_cast<int32_t>(task_ends.size());
    for (int32_t taken; (taken = next->fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      const int32_t task = reversed ? tasks - 1 - taken : taken;
      for (int32_t c = task == 0 ? 0 : task_ends[task - 1]; c < task_ends[task]; ++c) f(c);
    }
  }

 private:
  void close_task(int64_t* open) {
    if (*open > 0) task_ends.push_back(static_cast<int32_t>(chunks.size()));
    *open = 0;
  }
};

}  // namespace fusedopt::cpu
