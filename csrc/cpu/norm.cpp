// The total norm, and clipping of gradients in place, for the stand-alone clip functions.
#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/apply.h"
#include "cpu/level.h"
#include "cpu/schedule.h"

namespace fusedopt::cpu {
namespace {

template <class F>
void in_team(const Schedule& schedule, bool reversed, F f) {
  std::atomic<int32_t> next{0};
  if (schedule.threads == 1) return schedule.for_chunks(&next, reversed, f);
  const FloatingMode mode = FloatingMode::of_this_thread();
#pragma omp parallel num_threads(schedule.threads)
  {
    const InFloatingMode as_caller(mode);
    schedule.for_chunks(&next, reversed, f);
  }
}

}  // namespace

double squared_norm(const TableView& table, int threads) {
  const Schedule schedule(table.rows, threads);
  const Level& kernels = level();
  std::vector<double> partial(schedule.chunks.size());
  in_team(schedule, false, [&](int32_t c) {
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
  in_team(schedule, true, [&](int32_t c) {
    const Chunk& chunk = schedule.chunks[c];
    const Row& row = table.rows[chunk.row];
    const Layout* layout = row.layout == kFlat ? nullptr : &table.layouts[row.layout];
    kernels.scale(row, layout, chunk.begin, chunk.count, coef, limit);
  });
}

}  // namespace fusedopt::cpu
