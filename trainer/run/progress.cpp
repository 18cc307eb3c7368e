#include "trainer/run/progress.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include <fmt/format.h>

namespace regroup {

std::string format_duration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "--";
  if (seconds < 59.95) return fmt::format("{:.1f}s", seconds);
  if (seconds > 1e12) return "--";
  const auto whole = static_cast<std::int64_t>(std::max(seconds, 60.0));
  if (whole < 3600) return fmt::format("{}m{:02}s", whole / 60, whole % 60);
  if (whole < 86400) return fmt::format("{}h{:02}m", whole / 3600, whole / 60 % 60);
  return fmt::format("{}d{:02}h", whole / 86400, whole / 3600 % 24);
}

std::string format_count(std::int64_t count) {
  std::string digits = fmt::format("{}", count);
  const std::size_t first = count < 0 ? 1 : 0;
  for (std::size_t at = digits.size(); at > first + 3;) digits.insert(at -= 3, 1, ',');
  return digits;
}

std::string format_number(double value, int width) {
  if (!std::isfinite(value)) return fmt::format("{:>{}}", value, width);
  for (int decimals = width - 2; decimals >= 0; --decimals) {
    const std::string text = fmt::format("{:.{}f}", value, decimals);
    if (text.size() <= static_cast<std::size_t>(width)) return fmt::format("{:>{}}", text, width);
  }
  return fmt::format("{:>{}.0e}", value, width);
}

std::string format_progress(const StepMetrics& m, std::optional<double> seconds_to_go) {
  const auto percent = [](double share) {
    return std::isfinite(share) ? fmt::format("{:4.1f}%", 100 * share) : std::string("  -- ");
  };
  const std::string total = fmt::format("{}", m.total_steps);
  const std::string speed = std::isfinite(m.tokens_per_second)
                                ? format_count(std::llround(m.tokens_per_second))
                                : std::string("--");
  return fmt::format(
      "step {:>{}}/{}  loss {}  lr {:8.2e}  |g| {}  {:>7} tok/s  {} of peak  data {}  ETA {:<6}", m.step,
      total.size(), total, format_number(m.loss, 6), m.learning_rate, format_number(m.gradient_norm, 5),
      speed, percent(m.share_of_peak), percent(m.data_wait_share),
      seconds_to_go ? format_duration(*seconds_to_go) : "--");
}

void TimeToGo::add_step(double seconds) {
  if (!std::exchange(first_done_, true)) return;
  recent_.push_back(seconds);
  if (recent_.size() > window_) recent_.pop_front();
}

std::optional<double> TimeToGo::seconds(std::int64_t steps_to_go) const {
  if (recent_.empty()) return std::nullopt;
  const double sum = std::accumulate(recent_.begin(), recent_.end(), 0.0);
  return sum / static_cast<double>(recent_.size()) *
         static_cast<double>(std::max<std::int64_t>(steps_to_go, 0));
}

Progress::~Progress() { end_line(); }

void Progress::step(const StepMetrics& metrics) {
  time_to_go_.add_step(metrics.seconds_per_step);
  const bool first = !std::exchange(seen_any_, true);
  const bool due = first || metrics.step >= metrics.total_steps ||
                   metrics.step % std::max<std::int64_t>(options_.every, 1) == 0;
  if (!options_.terminal && !due) return;

  const std::string line = format_progress(metrics, time_to_go_.seconds(metrics.total_steps - metrics.step));
  if (options_.terminal) {
    // Without automatic margins (?7l) a narrow window cuts the line instead of wrapping it; [K clears what is
    // left.
    fmt::print(stream_, "\r\x1b[?7l{}\x1b[K\x1b[?7h", line);
    line_open_ = true;
  } else {
    fmt::print(stream_, "{}\n", line);
  }
  std::fflush(stream_);
}

void Progress::end_line() {
  if (!std::exchange(line_open_, false)) return;
  std::fputc('\n', stream_);
  std::fflush(stream_);
}

}  // namespace regroup
