// The one line that says how a run is getting on.
#pragma once

#include <cstdint>
#include <cstdio>
#include <deque>
#include <optional>
#include <string>
#include <string_view>

#include "trainer/run/metrics.h"

namespace regroup {

// "0.5s", "42.0s", "12m03s", "1h02m", "2d04h"; "--" where not finite or negative. Rounded down from a minute
// on.
std::string format_duration(double seconds);

// With thousands separators: 1234567 -> "1,234,567", -1234 -> "-1,234".
std::string format_count(std::int64_t count);

// `value` in at most `width` characters, with as many decimals as fit (width - 2 for values below 10);
// exponential notation from 10^width on, "nan" and "inf" as they are; padded on the left to `width`.
std::string format_number(double value, int width);

// step  120/1000  loss 5.4321  lr 1.00e-02  |g| 0.532    2,345 tok/s  41.2% of peak  data  0.1%  ETA 12m03s
// Columns keep their width from step to step. An unknown share of peak or time to go is "--".
std::string format_progress(const StepMetrics& metrics, std::optional<double> seconds_to_go);

// Seconds to go from the mean of the last `window` steps' durations. The first step given is left out: it
// pays for whatever is set up on first use.
class TimeToGo {
 public:
  explicit TimeToGo(std::size_t window = 20) : window_(window) {}
  void add_step(double seconds);
  // nullopt until a second step was added.
  std::optional<double> seconds(std::int64_t steps_to_go) const;

 private:
  std::size_t window_;
  bool first_done_ = false;
  std::deque<double> recent_;
};

struct ProgressOptions {
  bool terminal = false;   // whether the stream is a terminal: isatty(fileno(stream))
  std::int64_t every = 1;  // otherwise: a line each so many steps
};

// Prints progress lines to `stream` (not owned; standard error in a run). On a terminal each step rewrites
// the line in place, cut at the window's edge; elsewhere a plain line is printed at the first step seen, at
// each multiple of `every` and at the last.
class Progress {
 public:
  Progress(std::FILE* stream, ProgressOptions options) : stream_(stream), options_(options) {}
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void step(const StepMetrics& metrics);
  // Ends a line being rewritten in place. To be called before anything else is printed.
  void end_line();

 private:
  std::FILE* stream_;
  ProgressOptions options_;
  TimeToGo time_to_go_;
  bool seen_any_ = false;
  bool line_open_ = false;
};

}  // namespace regroup
