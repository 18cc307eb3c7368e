// metrics.jsonl: what a run measured, one JSON object a line, for scripts and for the loss plot.
#pragma once

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace regroup {

// One optimizer step. step, total_steps, loss, z_loss, learning_rate, gradient_norm and samples are functions
// of the run (config, seed, corpus, initial checkpoint); the others depend on the machine and the moment.
struct StepMetrics {
  std::int64_t step = 0;         // the step just done, counted from 1 over the whole run
  std::int64_t total_steps = 0;  // the step at which the run ends
  double loss = 0;               // token cross-entropy in nats, mean over the batch's non-pad targets
  double z_loss = 0;             // the z-loss term, same mean
  double learning_rate = 0;
  double gradient_norm = 0;      // global, before any clipping
  double tokens_per_second = 0;  // input and target tokens, all ranks together
  double share_of_peak = 0;      // model FLOP/s over the measured matmul peak, 0..1; NaN where not measured
  double data_wait_share = 0;    // share of the step spent waiting for its batch, 0..1
  double seconds_per_step = 0;
  std::int64_t samples = 0;  // consumed since the run's start, this step's included

  bool operator==(const StepMetrics&) const = default;
};

// One evaluation after `step` steps (0: before the first).
struct EvaluationMetrics {
  std::int64_t step = 0;
  std::string name;                           // what was evaluated: "held-out", "parent", "converted", a task
  double loss = 0;                            // nats a token
  std::int64_t tokens = 0;                    // targets the mean was taken over
  std::map<std::string, double> scores = {};  // others by name, for example "accuracy"

  bool operator==(const EvaluationMetrics&) const = default;
};

// Something that happened: "start", "resume", "checkpoint", "signal", "finish".
struct EventMetrics {
  std::int64_t step = 0;
  std::string name;
  std::string detail;
  // Of "start" and "resume": what rank 0 computes on, the level of its instruction set ("avx2", ...), and the
  // type of its products. Empty: not told, and not in the file.
  std::string processor = {}, cpu_level = {}, precision = {};

  bool operator==(const EventMetrics&) const = default;
};

// The append-only file. A line is {"kind": "train" | "evaluation" | "event", "step": N, <the struct's
// fields>}; a number reads back as the double it was, NaN and infinities are the strings "NaN", "Infinity",
// "-Infinity". Each line reaches the operating system before the call returns, so a killed process leaves at
// most one torn last line.
//
// A step's lines belong in the file before its checkpoint is committed: then a run resumed from that
// checkpoint, as often as it may be, ends with the train and evaluation lines of the uninterrupted run (up to
// its timings).
//
// Errors: as those of kernels/base/file.h where it cannot be written; UserError naming file and line where it
// is not a metrics file.
class MetricsFile {
 public:
  // Without `resume_step` the file starts empty. With it, lines of later steps and a torn last line are cut
  // off and the rest is kept; a missing file starts empty.
  explicit MetricsFile(std::filesystem::path path, std::optional<std::int64_t> resume_step = std::nullopt);

  void write(const StepMetrics& metrics);
  void write(const EvaluationMetrics& metrics);
  void write(const EventMetrics& metrics);

 private:
  void append(std::string_view line);

  std::filesystem::path path_;
  std::ofstream file_;
};

// A whole metrics file, by kind, in the order of its lines.
struct MetricsHistory {
  std::vector<StepMetrics> steps;
  std::vector<EvaluationMetrics> evaluations;
  std::vector<EventMetrics> events;
};

// Reads `path`. A torn last line (a run still going, or killed) is left out, fields that are missing keep
// their default and fields and kinds not known here are skipped. UserError naming file and line for any other
// line that is not a metrics line.
MetricsHistory read_metrics(const std::filesystem::path& path);

}  // namespace regroup
