// One training run, from its first step or from its newest checkpoint to its last step.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "kernels/base/log.h"
#include "trainer/exit_code.h"
#include "trainer/optimizer/optimizer.h"
#include "trainer/optimizer/schedule.h"
#include "trainer/options.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/model_runner.h"
#include "trainer/run/parent_conversion.h"
#include "trainer/run/recovery.h"
#include "trainer/run/run_directory.h"
#include "trainer/run/run_reporter.h"
#include "trainer/run/run_saver.h"
#include "trainer/run/signals.h"
#include "trainer/run/watchdog.h"

namespace regroup {

// --pretrain and --uptrain. Every member is collective over the world.
class TrainingRun {
 public:
  // Finds the run's checkpoint or the parent, and refuses what cannot work, before memory is touched.
  // UserErrors are the same on every rank.
  TrainingRun(const Options& options, const ProcessGroup& world, const Log& log);

  // kDone: the last step is done and saved, or the share of the conversion's gap that --until-recovered asks
  // for is recovered and that step saved. kStopped: SIGTERM, SIGUSR1, SIGINT or the stop file came, and
  // everything is saved. kNoProgress: --restart-budget starts came to nothing. A start that ends with a
  // UserError before its first step does not count among them.
  int run();

  // What was asked for, and what was inherited from the parent or the run being resumed.
  const Options& options() const { return options_; }

 private:
  bool uptraining() const { return options_.mode == Mode::kUptrain; }
  bool resuming() const { return resumed_step_.has_value(); }
  void choose_start();
  void find_start();
  std::optional<std::string> take_up(index_t step);
  void decide();
  nlohmann::json identity() const;
  void plan_conversion();
  void continue_conversion();
  void prepare();
  void fit_micro_batch();
  void build();
  std::vector<TensorSet> tensor_sets() const;
  std::optional<std::string> load();
  void note_processor_level();
  void convert_parent();
  EventMetrics start_event() const;
  bool start();
  int train();
  bool fall_back(const std::optional<std::string>& damage);
  void make_batches();
  void train_step();
  LossSums forward_and_backward(double targets);
  void update(const LossSums& sums, double began, double waited);
  void diverged(const std::string& reason);
  void roll_back(const std::string& reason);
  std::filesystem::path tuning_file() const;
  void take_up_tuning();
  void keep_tuning();
  LossSums held_out(ModelRunner& runner);
  ConversionGap gap() const { return {.parent = state_.parent_loss, .converted = state_.converted_loss}; }
  void evaluate();
  void note_recovered();
  bool recovered() const;
  void save();
  void saved(const SavedStep& step);
  bool complete() const;
  void tell_complete() const;
  int stop();
  void note(const std::string& event, const std::string& detail);

  Options options_;  // with what was inherited
  const ProcessGroup& world_;
  const Log& log_;
  Watchdog watchdog_;  // looks on from the first member's making to the last one's end
  SignalWatch signals_;
  RunDirectory directory_;
  std::optional<index_t> resumed_step_;     // of the checkpoint that is continued
  ParentConversion conversion_;             // of a fresh uptraining, until its weights are loaded
  std::optional<CheckpointSource> source_;  // that checkpoint, or the parent of a fresh uptraining
  RunState state_;
  ModelConfig config_;
  index_t total_steps_ = 0;
  Schedule schedule_;
  Layout layout_;
  index_t micro_batch_ = 0;

  std::map<std::string, std::string> taken_along_;  // small files of the source's that every checkpoint gets
  std::optional<Corpus> corpus_;
  std::optional<Samples> training_, heldout_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<Mesh> mesh_;
  std::unique_ptr<ModelRunner> runner_;
  std::unique_ptr<Optimizer> optimizer_;
  std::string kept_tuning_;
  std::unique_ptr<RunSaver> saver_;  // its writing is waited for while the watchdog looks on
  std::unique_ptr<BatchStream> batches_;
  std::unique_ptr<RunReporter> reporter_;  // rank 0
  std::vector<Batch> micro_batches_;
  double flops_per_step_ = 0, peak_flops_ = 0;  // of all ranks
  bool stop_requested_ = false;
  bool counted_ = false;   // of this start, until its first step is done: whether it is noted
  index_t rollbacks_ = 0;  // since the last save
};

}  // namespace regroup
