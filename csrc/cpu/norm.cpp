// The total norm, and clipping of gradients in place, for the stand-alone clip functions.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/apply.h"
#include "cpu/level.h"
#include "cpu/schedule.h"

namespace fusedopt::cpu {

double squared_norm(const TableView& table, int threads) {
  const Schedule schedule(table.rows, threads);
  const Level& kernels = level();
  std::vector<double> partial(schedule.chunks.size());
  std::atomic<int32_t> next{0};
#pragma omp parallel num_threads(schedule.threads) if (schedule.threads > 1)
  schedule.for_chunks(&next, false, [&](int32_t c) {
    const Chunk& chunk = schedule.chunks[c];
    const Row& row = table.rows[chunk.row];
    const Layout* layout = row.layout == kFlat ? nullptr : &table.layouts[row.layout];
    partial[c] = kernels.squares(row, layout, chunk.begin, chunk.count);
  });
  double sum = 0;
  for (double p : partial) sum += p;
  return sum;
}

void scale_gradients(const TableView& table, double coef, double limit, int threads) {
  const Schedule schedule(table.rows, threads);
  const Level& kernels = level();
  std::atomic<int32_t> next{0};
#pragma omp parallel num_threads(schedule.threads) if (schedule.threads > 1)
  schedule.for_chunks(&next, true, [&](int32_t c) {
    const Chunk& chunk = schedule.chunks[c];
    const Row& row = table.rows[chunk.row];
    const Layout* layout = row.layout == kFlat ? nullptr : &table.layouts[row.layout];
    kernels.scale(row, layout, chunk.begin, chunk.count, coef, limit);
  });
}

}  // namespace fusedopt::cpu
