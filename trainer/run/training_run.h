// One training run, from its first step or from its newest checkpoint to its last step.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "kernels/base/log.h"
#include "trainer/checkpoint/step_directory.h"
#include "trainer/optimizer/optimizer.h"
#include "trainer/optimizer/schedule.h"
#include "trainer/options.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/model_runner.h"
#include "trainer/run/run_reporter.h"
#include "trainer/run/signals.h"

namespace regroup {

// Exit code after a signal: saved, run the same command again.
inline constexpr int kStoppedBySignal = 75;

// --pretrain and --uptrain. Every member is collective over the world.
class TrainingRun {
 public:
  // Finds the run's checkpoint or the parent, and refuses what cannot work, before memory is touched.
  // UserErrors are the same on every rank.
  TrainingRun(const Options& options, const ProcessGroup& world, const Log& log);

  // 0: the last step is done and saved. kStoppedBySignal: SIGTERM, SIGUSR1 or SIGINT came, and everything is
  // saved.
  int run();

 private:
  void decide_start();
  void decide_layout();
  nlohmann::ordered_json identity() const;
  void build();
  void load();
  void convert_parent();
  void train_step();
  double held_out_loss(ModelRunner& runner);
  void evaluate(std::string name);
  void save();
  bool uptraining() const { return options_.mode == Mode::kUptrain; }
  index_t steps_done() const { return state_.step - state_.first_step; }

  const Options& options_;
  const ProcessGroup& world_;
  const Log& log_;
  SignalWatch signals_;
  CheckpointStore checkpoints_;
  std::optional<index_t> resumed_;          // step of the checkpoint that is continued
  std::optional<CheckpointSource> parent_;  // of a fresh uptraining
  RunState state_;
  ModelConfig config_;
  index_t total_steps_ = 0;
  Schedule schedule_;
  Layout layout_;
  index_t micro_batch_ = 0;

  std::optional<Corpus> corpus_;
  std::optional<Samples> training_, heldout_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<Optimizer> optimizer_;
  std::unique_ptr<BatchStream> batches_;
  std::unique_ptr<RunReporter> reporter_;
  std::vector<Batch> micro_batches_;
  double flops_per_step_ = 0, peak_flops_ = 0;  // of all ranks
  bool stop_requested_ = false;
};

}  // namespace regroup
