// What a run tells its user: progress line, metrics.jsonl, TensorBoard, and the plot at its end. Rank 0 only.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include "trainer/run/metrics.h"
#include "trainer/run/progress.h"
#include "trainer/run/tensorboard.h"

namespace regroup {

class RunReporter {
 public:
  // Into `run`/metrics.jsonl and `run`/tensorboard/. `resume_step`: of the checkpoint being
  // continued.
  RunReporter(const std::filesystem::path& run, std::optional<std::int64_t> resume_step,
              std::int64_t progress_every);

  void step(const StepMetrics& metrics);
  void evaluation(const EvaluationMetrics& metrics);
  void event(const EventMetrics& metrics);
  // Ends a progress line that is being rewritten in place, so that something else can be printed.
  void end_line() { progress_.end_line(); }

 private:
  MetricsFile metrics_;
  TensorBoard tensorboard_;
  Progress progress_;
};

// Draws `run`/loss.svg from everything in its metrics.jsonl and, of an uptraining, `run`/recovery.svg: the
// share of the conversion's gap that was recovered, with a line at `until_recovered` (0: none).
void plot_run(const std::filesystem::path& run, double until_recovered);

}  // namespace regroup
