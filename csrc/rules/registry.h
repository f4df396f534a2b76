// The one list of rules. A driver expands FUSEDOPT_RULES to compile each of them.
#pragma once

#include "rules/adamw.h"
#include "rules/sgd.h"

#define FUSEDOPT_RULES(X) \
  X(AdamW)                \
  X(Sgd)

namespace fusedopt {

enum class RuleId : int {
#define FUSEDOPT_ENUM(Rule) k##Rule,
  FUSEDOPT_RULES(FUSEDOPT_ENUM)
#undef FUSEDOPT_ENUM
      kCount
};

inline constexpr int kRules = static_cast<int>(RuleId::kCount);

}  // namespace fusedopt
