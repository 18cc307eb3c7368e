#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include <fmt/ranges.h>

#include "trainer/checkpoint/step_directory.h"
#include "trainer/commands/commands.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/metrics.h"
#include "trainer/run/progress.h"
#include "trainer/run/recovery.h"

namespace regroup {
namespace {

struct Row {
  std::string name, kind, pooling, machine;  // empty: not converted; not told
  bool converted = false;
  index_t cache_bytes = 0, steps = 0;
  double before = NAN, after = NAN, parent = NAN, recovered = NAN, tokens_per_second = NAN;
};

std::string kind_of(const ModelConfig& config) {
  if (config.uneven()) return fmt::format("GQA-{} uneven", config.kv_groups);
  if (config.kv_groups == config.num_heads) return "MHA";
  return config.kv_groups == 1 ? "MQA" : fmt::format("GQA-{}", config.kv_groups);
}

// Bytes that decoding keeps for one token of one sequence, bf16: keys and values of every decoder
// self-attention.
index_t cache_bytes_of(const ModelConfig& config) {
  index_t groups = 0;
  for (index_t layer = 0; layer < config.num_decoder_layers; ++layer) groups += config.self_groups(layer);
  return groups * 2 * config.d_kv * 2;
}

// On what a run computes, and in which precision, as its newest start tells.
std::string machine_of(const MetricsHistory& history) {
  std::string machine;
  for (const EventMetrics& event : history.events) {
    if (event.processor.empty()) continue;
    machine = event.processor;
    if (!event.cpu_level.empty()) machine += ", " + event.cpu_level;
    machine += ", " + event.precision;
  }
  return machine;
}

Row row_of(const ProcessGroup& world, const std::filesystem::path& run) {
  const CheckpointSource source = find_checkpoint(world, run);
  world.run_together([&] {
    if (!source.state) throw UserError("{} is not a run of this program", run.string());
  });
  const RunState& state = *source.state;
  Row row{.name = run.filename().string(),
          .kind = kind_of(source.config),
          .converted = !state.conversion.is_null(),
          .cache_bytes = cache_bytes_of(source.config),
          .steps = state.step - state.first_step,
          .before = state.converted_loss,
          .parent = state.parent_loss};
  if (row.converted) row.pooling = state.conversion.value("pooling", "");
  MetricsHistory history;
  world.run_together([&] {
    const std::filesystem::path metrics = run / "metrics.jsonl";
    if (std::filesystem::exists(metrics)) history = read_metrics(metrics);  // --convert writes none
  });
  for (const EvaluationMetrics& evaluation : history.evaluations) {
    if (evaluation.name == "held-out") row.after = evaluation.loss;
    if (evaluation.name == "unigram") row.before = evaluation.loss;
  }
  row.machine = machine_of(history);
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

// With its sign, but for what rounds to nothing.
std::string difference(double value) {
  if (!std::isfinite(value)) return "-";
  constexpr double kHalfADigit = 5e-5;
  return std::abs(value) < kHalfADigit ? "0.0000" : fmt::format("{:+.4f}", value);
}

std::vector<std::string> cells_of(const Row& row) {
  const double lost = (std::isfinite(row.after) ? row.after : row.before) - row.parent;
  return {row.name,
          row.kind,
          row.pooling.empty() ? "-" : row.pooling,
          format_count(row.cache_bytes),
          fmt::format("{}", row.steps),
          loss(row.before),
          loss(row.after),
          difference(lost),
          std::isfinite(row.recovered) ? fmt::format("{:.1f} %", 100 * row.recovered) : "-",
          std::isfinite(row.tokens_per_second) ? format_count(std::llround(row.tokens_per_second)) : "-"};
}

// Markdown whose columns a terminal shows one below the other. The first row is the title; the first `texts`
// columns are words, the others numbers.
void print_table(const std::vector<std::vector<std::string>>& rows, std::size_t texts) {
  std::vector<std::size_t> widths(rows.front().size());
  for (const auto& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  const auto print_row = [&](const std::vector<std::string>& row) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      const std::string padding(widths[i] - row[i].size(), ' ');
      fmt::print("| {} ", i < texts ? row[i] + padding : padding + row[i]);
    }
    fmt::print("|\n");
  };
  print_row(rows.front());
  for (std::size_t i = 0; i < widths.size(); ++i) {
    fmt::print("|{}{}", std::string(widths[i] + 1, '-'), i < texts ? '-' : ':');
  }
  fmt::print("|\n");
  std::for_each(rows.begin() + 1, rows.end(), print_row);
}

// "Trained on AMD EPYC 7B13, avx2, fp32: parent, gqa-2.", a line for each kind of machine.
void print_machines(const std::vector<Row>& rows) {
  std::map<std::string, std::vector<std::string>> runs;
  for (const Row& row : rows) {
    if (!row.machine.empty()) runs[row.machine].push_back(row.name);
  }
  for (const auto& [machine, names] : runs) {
    fmt::print("\nTrained on {}: {}.\n", machine, fmt::join(names, ", "));
  }
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
  // Parents first, then from the largest cache to the smallest.
  std::stable_sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
    return std::tuple(a.converted, -a.cache_bytes) < std::tuple(b.converted, -b.cache_bytes);
  });
  std::vector<std::vector<std::string>> table = {{"run", "attention", "pooling", "KV bytes", "steps",
                                                  "before", "after", "- parent", "recovered", "tokens/s"}};
  for (const Row& row : rows) table.push_back(cells_of(row));
  print_table(table, /*texts=*/3);
  print_machines(rows);
  fmt::print(
      "\nHeld-out loss before and after the steps: before them a parent has what token frequencies alone\n"
      "give, a converted model what its conversion gives. \"- parent\" is the newest loss less the "
      "parent's;\n"
      "\"recovered\" the share of what the conversion cost that uptraining has won back; \"KV bytes\" what\n"
      "decoding keeps for a token.\n");
  return 0;
}

}  // namespace regroup
