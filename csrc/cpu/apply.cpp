// One optimizer step on the CPU: norm, clip_coef, update and step counts in one parallel region.
//
// Bytes per element of AdamW in float32: 28 (param, two moments read and written, grad read), and 4
// more for the norm. The norm pass walks the chunks forwards and the update backwards, so that the
// gradients read last are still in the cache.
#include "cpu/apply.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "core/fetch.h"
#include "cpu/level.h"
#include "cpu/schedule.h"

namespace fusedopt::cpu {
namespace {

// The scalars of each row: rows with equal hyperparameters, step and first-touch share one entry,
// so that bias corrections are taken once for a whole model.
template <class Rule>
class ScalarsTable {
 public:
  ScalarsTable(const TableView& table) : index_(table.rows.size()) {
    const double* last_hyper = nullptr;
    double last_step = -1;
    int last_first = -1;
    for (size_t r = 0; r < table.rows.size(); ++r) {
      const Row& row = table.rows[r];
      const double* hyper = table.groups[row.group].hyper;
      const double step = (row.step == nullptr ? 0.0 : *row.step) + 1;
      if (step != last_step || row.first != last_first || last_hyper == nullptr ||
          (hyper != last_hyper && std::memcmp(hyper, last_hyper, sizeof(double) * kMaxHyper))) {
        typename Rule::Hyper h;
        std::memcpy(&h, hyper, sizeof h);
        entries_.push_back(rounded(Rule::prepare(h, step, row.first != 0)));
      }
      last_hyper = hyper;
      last_step = step;
      last_first = row.first;
      index_[r] = static_cast<int32_t>(entries_.size() - 1);
    }
  }

  const ScalarsPair<Rule>* operator[](int32_t row) const { return &entries_[index_[row]]; }

 private:
  using Wide = typename Rule::template Scalars<double>;
  using Single = typename Rule::template Scalars<float>;
  static constexpr size_t kMembers = sizeof(Wide) / sizeof(double);
  static_assert(sizeof(Single) == kMembers * sizeof(float), "Scalars<T> has members of T alone");

  static ScalarsPair<Rule> rounded(const Wide& wide) {
    double from[kMembers];
    float to[kMembers];
    std::memcpy(from, &wide, sizeof wide);
    std::copy(from, from + kMembers, to);
    ScalarsPair<Rule> pair{{}, wide};
    std::memcpy(&pair.f32, to, sizeof to);
    return pair;
  }

  std::vector<ScalarsPair<Rule>> entries_;
  std::vector<int32_t> index_;
};

// Small tensors lie anywhere: no hardware foresees where the next begins.
void ask_for_row(const TableView& table, int32_t row) {
  if (row >= static_cast<int32_t>(table.rows.size())) return;
  const Row& ahead = table.rows[row];
  for (int k = 0; k < kState0 + ahead.states; ++k) fetch(ahead.data[k]);
}

template <class Rule, RuleId kRule>
StepResult apply_rule(const TableView& table, const StepOptions& options) {
  static_assert(sizeof(typename Rule::Hyper) <= sizeof(double) * kMaxHyper);
  const Schedule schedule(table.rows, options.threads);
  const ScalarsTable<Rule> scalars(table);
  const Level& kernels = level();
  const double inverse_scale = 1.0 / options.grad_scale;
  const bool given = options.squared_norm >= 0 || std::isnan(options.squared_norm);
  const bool count_squares = options.norm && !given;
  std::vector<double> partial(count_squares ? schedule.chunks.size() : 0);
  std::atomic<int32_t> next_norm{0}, next_update{0};
  StepResult result;
  double factor = inverse_scale;

  const auto row_of = [&](const Chunk& chunk, const Layout** layout) -> const Row& {
    const Row& row = table.rows[chunk.row];
    *layout = row.layout == kFlat ? nullptr : &table.layouts[row.layout];
    return row;
  };
  const auto norm_pass = [&] {
    schedule.for_chunks(&next_norm, false, [&](int32_t c) {
      const Chunk& chunk = schedule.chunks[c];
      const Layout* layout;
      const Row& row = row_of(chunk, &layout);
      partial[c] = kernels.squares(row, layout, chunk.begin, chunk.count);
    });
  };
  // Partial sums are added in the order of the chunks: the same bits for any number of threads.
  const auto decide = [&] {
    result.skipped = options.found_inf;
    if (!options.norm) return;
    double sum = given ? options.squared_norm : 0;
    for (double p : partial) sum += p;
    result.total_norm = std::sqrt(sum) * inverse_scale;
    result.skipped |= options.skip_nonfinite && !std::isfinite(result.total_norm);
    const double coef = options.max_norm / (result.total_norm + 1e-6);
    factor = inverse_scale * (coef > 1 ? 1 : coef);  // a NaN stays, as in torch
  };
  const auto update_pass = [&] {
    if (result.skipped) return;
    schedule.for_chunks(&next_update, count_squares, [&](int32_t c) {
      const Chunk& chunk = schedule.chunks[c];
      ask_for_row(table, chunk.row + 4);
      const Layout* layout;
      const Row& row = row_of(chunk, &layout);
      const bool maximize = table.groups[row.group].maximize;
      const GradTransform transform = {maximize ? -factor : factor, options.clip_value,
                                       std::isfinite(options.clip_value)};
      kernels.update[static_cast<int>(kRule)](row, layout, chunk.begin, chunk.count, transform,
                                              scalars[chunk.row]);
    });
  };

  if (schedule.threads == 1) {
    if (count_squares) norm_pass();
    decide();
    update_pass();
  } else {
    const FloatingMode mode = FloatingMode::of_this_thread();
#pragma omp parallel num_threads(schedule.threads)
    {
      const InFloatingMode as_caller(mode);
      if (count_squares) {
        norm_pass();
#pragma omp barrier
      }
#pragma omp single
      decide();
      update_pass();
    }
  }
  if (!result.skipped)
    for (const Row& row : table.rows)
      if (row.step != nullptr) *row.step += 1;
  return result;
}

}  // namespace

StepResult apply(RuleId rule, const TableView& table, const StepOptions& options) {
  switch (rule) {
#define FUSEDOPT_APPLY(Rule) \
  case RuleId::k##Rule:      \
    return apply_rule<Rule, RuleId::k##Rule>(table, options);
    FUSEDOPT_RULES(FUSEDOPT_APPLY)
#undef FUSEDOPT_APPLY
    case RuleId::kCount:
      break;
  }
  return {};
}

}  // namespace fusedopt::cpu
