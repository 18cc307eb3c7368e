// Whether a training step goes astray: a loss or gradient norm that is not finite, or a spike above the
// recent ones.
#pragma once

#include <optional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "kernels/dtype.h"
#include "parallel/process_group.h"

namespace regroup {

// Knows the steps so far by running statistics; a value, part of the run's state: a run that is resumed or
// rolled back judges as it did then. `threshold`: how many standard deviations above the recent mean is a
// spike; 0: nothing finite is. Below the mean nothing is a spike, and nothing finite is in the first
// kFewestSteps steps.
class Divergence {
 public:
  static constexpr index_t kWindow = 100;      // steps that the statistics remember, about
  static constexpr index_t kFewestSteps = 20;  // accepted, before anything is a spike
  static constexpr index_t kPatience = 10;     // bad steps in a row; see hopeless()

  // What is wrong, as a clause ("the loss is nan"); nothing where the step may go on.
  std::optional<std::string> judge_loss(double loss, double threshold) const;
  std::optional<std::string> judge_norm(double norm, double threshold) const;
  // The largest gradient norm that judge_norm() lets pass; infinity where no finite one is a spike.
  double largest_norm(double threshold) const;

  // A good step, which joins the statistics. Both finite.
  void accept(double loss, double norm);
  // A bad one, which does not.
  void reject() { rejected_in_a_row_ += 1; }
  index_t rejected_in_a_row() const { return rejected_in_a_row_; }
  // kPatience bad steps without a good one: these are no outliers, and leaving out more will not help.
  bool hopeless() const { return rejected_in_a_row_ >= kPatience; }

  bool operator==(const Divergence&) const = default;

 private:
  friend nlohmann::json to_json(const Divergence& divergence);
  friend Divergence divergence_from_json(const nlohmann::json& json);

  // Exponentially weighted; plain averages of the first kWindow values.
  struct Statistics {
    double mean = 0, variance = 0;

    void add(double value, double weight);
    double largest(double threshold) const;
    bool operator==(const Statistics&) const = default;
  };
  double largest_loss(double threshold) const;
  bool judges_spikes(double threshold) const { return threshold > 0 && steps_ >= kFewestSteps; }

  index_t steps_ = 0;  // accepted
  index_t rejected_in_a_row_ = 0;
  Statistics loss_, norm_;
};

// Judges one step by rank 0's numbers: sums over ranks may differ in their last bits, and all ranks must
// decide alike. Loss first, then norm; both are collective over `world`.
//
//   StepJudge judge(world, divergence, threshold);
//   if (judge.passes_loss(loss)) optimizer.update(..., [&](double norm) { return judge.passes_norm(norm); });
//   if (judge.problem()) divergence.reject(); else divergence.accept(judge.loss(), judge.norm());
class StepJudge {
 public:
  StepJudge(const ProcessGroup& world, const Divergence& divergence, double threshold)
      : world_(world), divergence_(divergence), threshold_(threshold) {}

  bool passes_loss(double loss) {
    loss_ = world_.broadcast(loss);
    problem_ = divergence_.judge_loss(loss_, threshold_);
    return !problem_;
  }
  bool passes_norm(double norm) {
    norm_ = world_.broadcast(norm);
    problem_ = divergence_.judge_norm(norm_, threshold_);
    return !problem_;
  }
  // Rank 0's.
  double loss() const { return loss_; }
  double norm() const { return norm_; }
  const std::optional<std::string>& problem() const { return problem_; }

 private:
  const ProcessGroup& world_;
  const Divergence& divergence_;
  double threshold_, loss_ = 0, norm_ = 0;
  std::optional<std::string> problem_;
};

// Keeps every bit.
nlohmann::json to_json(const Divergence& divergence);
// nlohmann::json::exception where a field is missing or of the wrong type.
Divergence divergence_from_json(const nlohmann::json& json);

}  // namespace regroup
