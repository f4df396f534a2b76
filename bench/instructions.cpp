// One step of the CPU driver on one tensor, for callgrind to count:
//   instructions RULE DTYPE NUMEL CLIP, such as: instructions adamw float32 65536 1
// tests/test_instructions.py builds and runs it.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "core/dispatch.h"
#include "cpu/apply.h"

namespace {

using namespace fusedopt;

void fill(DType dtype, std::vector<unsigned char>* memory, int64_t numel) {
  for (int64_t i = 0; i < numel; ++i) {
    const float value = 0.01f * static_cast<float>(i % 97 + 1);
    if (dtype == DType::kFloat32) {
      std::memcpy(memory->data() + 4 * i, &value, 4);
    } else {  // bfloat16: the upper half of a float32
      std::memcpy(memory->data() + 2 * i, reinterpret_cast<const unsigned char*>(&value) + 2, 2);
    }
  }
}

template <class Rule>
void describe(Row* row, Group* group, const std::vector<double>& hyper) {
  std::copy(hyper.begin(), hyper.end(), group->hyper);
  typename Rule::Hyper values;
  static_assert(sizeof(values) % sizeof(double) == 0, "hyperparameters are doubles");
  std::memcpy(&values, group->hyper, sizeof(values));
  row->variant = static_cast<uint8_t>(Rule::variant(values));
  row->states = static_cast<uint8_t>(Rule::states(row->variant));
}

}  // namespace

int main(int count, char** argument) {
  if (count != 5) {
    std::fprintf(stderr, "usage: instructions RULE DTYPE NUMEL CLIP\n");
    return 2;
  }
  const bool adamw = std::strcmp(argument[1], "adamw") == 0;
  const DType dtype = std::strcmp(argument[2], "float32") == 0 ? DType::kFloat32 : DType::kBFloat16;
  const int64_t numel = std::atoll(argument[3]);

  Row row{};
  Group group{};
  if (adamw) {
    describe<AdamW>(&row, &group, {1e-3, 0.9, 0.999, 1e-8, 1e-2, 0, 1});
  } else {
    describe<Sgd>(&row, &group, {1e-3, 0.9, 0, 1e-2, 0});
  }
  std::vector<std::vector<unsigned char>> memory(kOperands);
  for (int k = 0; k < kState0 + row.states; ++k) {
    memory[k].resize(numel * 4);
    fill(dtype, &memory[k], numel);
    row.data[k] = memory[k].data();
    row.dtype[k] = dtype;
  }
  float step = 1;
  row.step = &step;
  row.numel = numel;
  row.layout = kFlat;
  row.loop = choose_loop(row);

  const std::vector<Row> rows{row};
  const std::vector<Group> groups{group};
  const std::vector<Layout> layouts;
  cpu::StepOptions options;
  options.norm = std::atoi(argument[4]) != 0;
  options.max_norm = options.norm ? 1.0 : options.max_norm;
  const RuleId rule = adamw ? RuleId::kAdamW : RuleId::kSgd;
  const cpu::StepResult result = cpu::apply(rule, {rows, groups, layouts}, options);
  return std::isfinite(result.total_norm) ? 0 : 1;
}
