#include "trainer/run/run_reporter.h"

#include <cmath>
#include <unistd.h>

#include "trainer/run/loss_plot.h"
#include "trainer/run/recovery.h"

namespace regroup {

RunReporter::RunReporter(const std::filesystem::path& run, std::optional<std::int64_t> resume_step,
                         std::int64_t progress_every)
    : metrics_(run / "metrics.jsonl", resume_step),
      tensorboard_(run / "tensorboard", resume_step),
      progress_(stderr, {.terminal = ::isatty(::fileno(stderr)) != 0, .every = progress_every}) {}

void RunReporter::step(const StepMetrics& metrics) {
  metrics_.write(metrics);
  tensorboard_.scalar("train/loss", metrics.step, metrics.loss);
  tensorboard_.scalar("train/learning_rate", metrics.step, metrics.learning_rate);
  tensorboard_.scalar("train/gradient_norm", metrics.step, metrics.gradient_norm);
  tensorboard_.scalar("speed/tokens_per_second", metrics.step, metrics.tokens_per_second);
  tensorboard_.scalar("speed/share_of_peak", metrics.step, metrics.share_of_peak);
  progress_.step(metrics);
}

void RunReporter::evaluation(const EvaluationMetrics& metrics) {
  metrics_.write(metrics);
  tensorboard_.scalar("evaluation/" + metrics.name, metrics.step, metrics.loss);
  for (const auto& [name, value] : metrics.scores) {
    tensorboard_.scalar("evaluation/" + name, metrics.step, value);
  }
}

void RunReporter::event(const EventMetrics& metrics) { metrics_.write(metrics); }

namespace {

void plot_losses(const std::filesystem::path& run, const MetricsHistory& history) {
  LossPlot plot{.title = run.filename().string()};
  PlotSeries training{.name = "training", .style = PlotStyle::kSmoothed};
  PlotSeries heldout{.name = "held-out", .style = PlotStyle::kMarkers};
  for (const StepMetrics& step : history.steps) {
    training.points.push_back({static_cast<double>(step.step), step.loss});
  }
  for (const EvaluationMetrics& evaluation : history.evaluations) {
    if (evaluation.name == "held-out" || evaluation.name == "converted") {
      heldout.points.push_back({static_cast<double>(evaluation.step), evaluation.loss});
    } else {
      plot.references.push_back({evaluation.name, evaluation.loss});
    }
  }
  plot.series = {training, heldout};
  write_loss_plot(run / "loss.svg", plot);
}

// From the losses, not from what the lines say of it: older runs did not write it.
void plot_recovery(const std::filesystem::path& run, const MetricsHistory& history, double until_recovered) {
  ConversionGap gap;
  PlotSeries recovered{.name = "recovered", .style = PlotStyle::kMarkers};
  for (const EvaluationMetrics& evaluation : history.evaluations) {
    if (evaluation.name == "parent") gap.parent = evaluation.loss;
    if (evaluation.name == "converted") gap.converted = evaluation.loss;
    if (evaluation.name != "held-out" && evaluation.name != "converted") continue;
    recovered.points.push_back({static_cast<double>(evaluation.step), recovered_share(gap, evaluation.loss)});
  }
  if (!std::isfinite(gap.nats())) return;  // no uptraining
  LossPlot plot{.title = run.filename().string(),
                .y_label = "share of the gap to the parent",
                .series = {recovered},
                .references = {{"parent", 1}},
                .rising = true};
  if (until_recovered > 0) plot.references.push_back({"target", until_recovered});
  write_loss_plot(run / "recovery.svg", plot);
}

}  // namespace

void plot_run(const std::filesystem::path& run, double until_recovered) {
  const MetricsHistory history = read_metrics(run / "metrics.jsonl");
  plot_losses(run, history);
  plot_recovery(run, history, until_recovered);
}

}  // namespace regroup
