#include "trainer/optimizer/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace regroup {

double learning_rate(const Schedule& schedule, index_t step) {
  const auto at = static_cast<double>(step);
  const auto warmup = static_cast<double>(std::max<index_t>(1, schedule.warmup));
  if (schedule.kind == Schedule::Kind::kRsqrt) return schedule.base / std::sqrt(std::max(at, warmup));
  if (step < schedule.warmup) return schedule.base * (at + 1) / warmup;
  const double span = std::max(1.0, static_cast<double>(schedule.total - schedule.warmup));
  const double progress = std::clamp((at - static_cast<double>(schedule.warmup)) / span, 0.0, 1.0);
  switch (schedule.kind) {
    case Schedule::Kind::kLinear:
      return schedule.base * (1 - progress);
    case Schedule::Kind::kCosine:
      return schedule.base * (1 + std::cos(std::numbers::pi * progress)) / 2;
    default:
      return schedule.base;
  }
}

Schedule::Kind schedule_kind(const std::string& name) {
  if (name == "rsqrt") return Schedule::Kind::kRsqrt;
  if (name == "constant") return Schedule::Kind::kConstant;
  if (name == "linear") return Schedule::Kind::kLinear;
  if (name == "cosine") return Schedule::Kind::kCosine;
  const std::vector<std::string> names = {"rsqrt", "constant", "linear", "cosine"};
  throw UserError("schedule = {} is unknown{}; use rsqrt, constant, linear or cosine", name,
                  did_you_mean(name, names));
}

}  // namespace regroup
