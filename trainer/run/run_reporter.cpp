#include "trainer/run/run_reporter.h"

#include <unistd.h>

#include "trainer/run/loss_plot.h"

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
}

void RunReporter::event(const EventMetrics& metrics) { metrics_.write(metrics); }

void plot_run(const std::filesystem::path& run) {
  const MetricsHistory history = read_metrics(run / "metrics.jsonl");
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

}  // namespace regroup
