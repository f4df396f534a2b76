// Chooses the instruction-set level once, when it is first asked for.
#include "cpu/level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fusedopt::cpu {
namespace {

const Level& choose() {
  const char* asked = std::getenv("FUSEDOPT_CPU_LEVEL");
  const std::string wanted = asked == nullptr ? "" : asked;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && (wanted.empty() || wanted == kAvx512.name)) return kAvx512;
  if (avx2 && (wanted.empty() || wanted == kAvx2.name)) return kAvx2;
#endif
  if (wanted.empty() || wanted == kBaseline.name) return kBaseline;
  throw std::runtime_error("FUSEDOPT_CPU_LEVEL=" + wanted +
                           " is not a level that this machine runs (baseline, avx2, avx512)");
}

}  // namespace

const Level& level() {
  static const Level& chosen = choose();
  return chosen;
}

}  // namespace fusedopt::cpu
