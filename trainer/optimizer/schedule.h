// The learning rate as a function of the step.
#pragma once

#include <string>

#include "kernels/dtype.h"

namespace regroup {

// rsqrt: base / sqrt(max(step, warmup)), T5's (t5x utils.create_learning_rate_scheduler, factors "constant *
// rsqrt_decay": flat until `warmup`, there is no ramp). The others ramp linearly over `warmup` steps up to
// `base`, then: constant; linear: down to 0 at `total`; cosine: base (1 + cos(pi x)) / 2 down to 0 at
// `total`.
struct Schedule {
  enum class Kind { kRsqrt, kConstant, kLinear, kCosine };
  Kind kind = Kind::kRsqrt;
  double base = 1.0;
  index_t warmup = 10000;  // steps
  index_t total = 0;       // last step + 1; linear and cosine only
};

// At 0-based step `step`.
double learning_rate(const Schedule& schedule, index_t step);

// "rsqrt", "constant", "linear", "cosine". UserError for another name.
Schedule::Kind schedule_kind(const std::string& name);

}  // namespace regroup
