#include <cmath>
#include <cstdio>
#include <vector>

#include "trainer/checkpoint/step_directory.h"
#include "trainer/commands/commands.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/metrics.h"
#include "trainer/run/progress.h"
#include "trainer/run/recovery.h"

namespace regroup {
namespace {

struct Row {
  std::string name, kind;
  ModelConfig config;
  index_t steps = 0;
  double before = NAN, after = NAN, parent = NAN, recovered = NAN, tokens_per_second = NAN;
};

std::string kind_of(const ModelConfig& config) {
  if (config.uneven()) return fmt::format("GQA-{} uneven", config.kv_groups);
  if (config.kv_groups == config.num_heads) return "MHA";
  return config.kv_groups == 1 ? "MQA" : fmt::format("GQA-{}", config.kv_groups);
}

Row row_of(const ProcessGroup& world, const std::filesystem::path& run) {
  const CheckpointSource source = find_checkpoint(world, run);
  world.run_together([&] {
    if (!source.state) throw UserError("{} is not a run of this program", run.string());
  });
  const RunState& state = *source.state;
  Row row{.name = run.filename().string(),
          .config = source.config,
          .steps = state.step - state.first_step,
          .before = state.converted_loss,
          .parent = state.parent_loss};
  row.kind = kind_of(row.config);
  MetricsHistory history;
  world.run_together([&] {
    const std::filesystem::path metrics = run / "metrics.jsonl";
    if (std::filesystem::exists(metrics)) history = read_metrics(metrics);  // --convert writes none
  });
  for (const EvaluationMetrics& evaluation : history.evaluations) {
    if (evaluation.name == "held-out") row.after = evaluation.loss;
    if (evaluation.name == "unigram") row.before = evaluation.loss;
  }
  row.recovered = recovered_share({.parent = row.parent, .converted = state.converted_loss}, row.after);
  double seconds = 0, tokens = 0;
  for (const StepMetrics& step : history.steps) {
    seconds += step.seconds_per_step;
    tokens += step.seconds_per_step * step.tokens_per_second;
  }
  if (seconds > 0) row.tokens_per_second = tokens / seconds;
  return row;
}

std::string loss(double value) { return std::isfinite(value) ? fmt::format("{:.4f}", value) : "-"; }

// Bytes that decoding keeps for one token of one sequence, bf16: keys and values of every decoder
// self-attention.
index_t cache_bytes(const ModelConfig& config) {
  index_t groups = 0;
  for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) groups += config.self_groups(layer);
  return groups * 2 * config.d_kv * 2;
}

}  // namespace

int report_command(const Options& options, const ProcessGroup& world, const Log&) {
  std::vector<Row> rows;
  for (const std::filesystem::path& run : options.runs) {
    world.run_together([&] {
      if (!std::filesystem::exists(run)) throw UserError("there is no run {}", run.string());
    });
    rows.push_back(row_of(world, run));
  }
  if (world.rank() != 0) return 0;
  fmt::print(
      "| run | attention | parameters | steps | held-out loss before | after | after - parent | recovered | "
      "KV "
      "bytes/token | "
      "tokens/s |\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (const Row& row : rows) {
    const std::string gap =
        std::isfinite(row.after - row.parent) ? fmt::format("{:+.4f}", row.after - row.parent) : "-";
    fmt::print(
        "| {} | {} | {} | {} | {} | {} | {} | {} | {} | {} |\n", row.name, row.kind,
        format_count(parameter_count(row.config)), row.steps, loss(row.before), loss(row.after), gap,
        std::isfinite(row.recovered) ? fmt::format("{:.1f} %", 100 * row.recovered) : "-",
        format_count(cache_bytes(row.config)),
        std::isfinite(row.tokens_per_second) ? format_count(std::llround(row.tokens_per_second)) : "-");
  }
  fmt::print(
      "\nBefore: of the parent run, what token frequencies alone give; of the others, the conversion without "
      "uptraining. Recovered: the share of what the conversion cost that uptraining has won back.\n");
  return 0;
}

}  // namespace regroup
