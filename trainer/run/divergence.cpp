#include "trainer/run/divergence.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include <fmt/core.h>

#include "kernels/base/json.h"

namespace regroup {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
// Numbers that hardly vary have standard deviations that mean nothing: they count as at least this share of
// the mean.
constexpr double kSmallestDeviation = 1e-3;

std::optional<std::string> judge(const char* what, double value, double largest) {
  if (!std::isfinite(value)) return fmt::format("{} is {}", what, value);
  if (value > largest) {
    return fmt::format("{} of {:.4g} is a spike, above the {:.4g} that recent steps make likely", what, value,
                       largest);
  }
  return std::nullopt;
}

}  // namespace

void Divergence::Statistics::add(double value, double weight) {
  const double difference = value - mean;
  mean += weight * difference;
  const double spread = variance + weight * difference * difference;
  variance = (1 - weight) * std::min(spread, std::numeric_limits<double>::max());  // JSON has no infinity
}

double Divergence::Statistics::largest(double threshold) const {
  return mean + threshold * std::max(std::sqrt(variance), kSmallestDeviation * std::abs(mean));
}

double Divergence::largest_loss(double threshold) const {
  return judges_spikes(threshold) ? loss_.largest(threshold) : kInfinity;
}

double Divergence::largest_norm(double threshold) const {
  return judges_spikes(threshold) ? norm_.largest(threshold) : kInfinity;
}

std::optional<std::string> Divergence::judge_loss(double loss, double threshold) const {
  return judge("the loss", loss, largest_loss(threshold));
}

std::optional<std::string> Divergence::judge_norm(double norm, double threshold) const {
  return judge("the gradient's norm", norm, largest_norm(threshold));
}

void Divergence::accept(double loss, double norm) {
  steps_ += 1;
  rejected_in_a_row_ = 0;
  const double weight = 1 / static_cast<double>(std::min(steps_, kWindow));
  loss_.add(loss, weight);
  norm_.add(norm, weight);
}

nlohmann::json to_json(const Divergence& divergence) {
  const auto statistics = [](const Divergence::Statistics& s) {
    return nlohmann::json{{"mean", s.mean}, {"variance", s.variance}};
  };
  return {{"steps", divergence.steps_},
          {"rejected_in_a_row", divergence.rejected_in_a_row_},
          {"loss", statistics(divergence.loss_)},
          {"gradient_norm", statistics(divergence.norm_)}};
}

Divergence divergence_from_json(const nlohmann::json& json) {
  const auto statistics = [&json](const char* name) {
    const nlohmann::json& s = json.at(name);
    return Divergence::Statistics{.mean = s.at("mean").get<double>(),
                                  .variance = s.at("variance").get<double>()};
  };
  Divergence divergence;
  divergence.steps_ = json.at("steps").get<index_t>();
  divergence.rejected_in_a_row_ = json.at("rejected_in_a_row").get<index_t>();
  divergence.loss_ = statistics("loss");
  divergence.norm_ = statistics("gradient_norm");
  return divergence;
}

}  // namespace regroup
