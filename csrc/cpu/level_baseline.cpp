// The CPU kernels for the instruction set that the compiler targets by default.
#include "cpu/level.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace fusedopt::cpu {
namespace {
#include "cpu/kernels.h"
}  // namespace

#define FUSEDOPT_LEVEL kBaseline
#define FUSEDOPT_LEVEL_NAME "baseline"
#include "cpu/level_table.h"

}  // namespace fusedopt::cpu
