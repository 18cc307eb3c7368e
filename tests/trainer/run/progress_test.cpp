#include "trainer/run/progress.h"

#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <string>

#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

StepMetrics example() {
  return {.step = 120,
          .total_steps = 1000,
          .loss = 5.4321,
          .learning_rate = 1e-2,
          .gradient_norm = 0.532,
          .tokens_per_second = 2345.4,
          .share_of_peak = 0.412,
          .data_wait_share = 0.001,
          .seconds_per_step = 0.8};
}

TEST(FormatTest, Durations) {
  EXPECT_EQ(format_duration(0), "0.0s");
  EXPECT_EQ(format_duration(3.24), "3.2s");
  EXPECT_EQ(format_duration(59.94), "59.9s");
  EXPECT_EQ(format_duration(59.96), "1m00s");
  EXPECT_EQ(format_duration(723), "12m03s");
  EXPECT_EQ(format_duration(3599.9), "59m59s");
  EXPECT_EQ(format_duration(3600), "1h00m");
  EXPECT_EQ(format_duration(3725), "1h02m");
  EXPECT_EQ(format_duration(86399), "23h59m");
  EXPECT_EQ(format_duration(2 * 86400 + 4 * 3600 + 59), "2d04h");
  EXPECT_EQ(format_duration(400.0 * 86400), "400d00h");
  for (const double bad : {-1.0, kNaN, kInfinity, 1e300}) EXPECT_EQ(format_duration(bad), "--");
}

TEST(FormatTest, Counts) {
  EXPECT_EQ(format_count(0), "0");
  EXPECT_EQ(format_count(999), "999");
  EXPECT_EQ(format_count(1000), "1,000");
  EXPECT_EQ(format_count(1234567), "1,234,567");
  EXPECT_EQ(format_count(-123), "-123");
  EXPECT_EQ(format_count(-123456), "-123,456");
  EXPECT_EQ(format_count(std::numeric_limits<std::int64_t>::min()), "-9,223,372,036,854,775,808");
}

TEST(FormatTest, NumbersKeepTheirWidth) {
  EXPECT_EQ(format_number(5.4321, 6), "5.4321");
  EXPECT_EQ(format_number(10.37349, 6), "10.373");
  EXPECT_EQ(format_number(9.99999, 6), "10.000");
  EXPECT_EQ(format_number(123456.4, 6), "123456");
  EXPECT_EQ(format_number(1234567, 6), " 1e+06");
  EXPECT_EQ(format_number(-0.5, 5), "-0.50");
  EXPECT_EQ(format_number(kNaN, 6), "   nan");
  EXPECT_EQ(format_number(-kInfinity, 6), "  -inf");
}

TEST(FormatTest, ProgressLine) {
  EXPECT_EQ(format_progress(example(), 723),
            "step  120/1000  loss 5.4321  lr 1.00e-02  |g| 0.532    2,345 tok/s  41.2% of peak  data  0.1%  "
            "ETA 12m03s");
}

TEST(FormatTest, ProgressLinesHaveOneWidth) {
  const std::size_t width = format_progress(example(), 723).size();
  StepMetrics other = example();
  other.step = 1;
  other.loss = 10.4;
  other.learning_rate = 3.3e-5;
  other.gradient_norm = 1234.5;
  other.tokens_per_second = 812345;
  other.share_of_peak = kNaN;
  other.data_wait_share = 0.999;
  EXPECT_EQ(format_progress(other, std::nullopt).size(), width);
  other.loss = other.gradient_norm = kNaN;
  other.tokens_per_second = kInfinity;
  EXPECT_EQ(format_progress(other, 1).size(), width);
}

TEST(TimeToGoTest, IsTheRecentMeanWithoutTheFirstStep) {
  TimeToGo time_to_go(2);
  EXPECT_EQ(time_to_go.seconds(10), std::nullopt);
  time_to_go.add_step(100);
  EXPECT_EQ(time_to_go.seconds(10), std::nullopt);
  time_to_go.add_step(1);
  EXPECT_EQ(time_to_go.seconds(10), 10.0);
  time_to_go.add_step(2);
  EXPECT_EQ(time_to_go.seconds(10), 15.0);
  time_to_go.add_step(4);  // the 1 has left the window
  EXPECT_EQ(time_to_go.seconds(10), 30.0);
  EXPECT_EQ(time_to_go.seconds(-1), 0.0);
}

// What a Progress prints for steps first to last of `total`.
std::string printed(ProgressOptions options, std::int64_t first, std::int64_t last, std::int64_t total) {
  const test::TemporaryDirectory directory;
  const auto path = directory / "out";
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> stream(std::fopen(path.c_str(), "w"), std::fclose);
  {
    Progress progress(stream.get(), options);
    for (std::int64_t step = first; step <= last; ++step) {
      StepMetrics metrics = example();
      metrics.step = step;
      metrics.total_steps = total;
      progress.step(metrics);
    }
    progress.end_line();
  }
  return read_text(path);
}

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t n = 0;
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part, at + part.size())) ++n;
  return n;
}

TEST(ProgressTest, PlainLinesAtTheFirstEachNthAndTheLastStep) {
  const std::string text = printed({.every = 10}, 3, 25, 25);
  EXPECT_EQ(count(text, "\n"), 4U);
  for (const char* step : {"step  3/25", "step 10/25", "step 20/25", "step 25/25"})
    EXPECT_EQ(count(text, step), 1U);
  EXPECT_EQ(text.find('\r'), std::string::npos);
  EXPECT_EQ(text.find('\x1b'), std::string::npos);
  EXPECT_EQ(count(text, "ETA --"), 1U);
  EXPECT_EQ(count(text, "ETA 12.0s"), 1U) << "at step 10: 15 steps of 0.8 s";
  EXPECT_EQ(count(printed({.every = 0}, 1, 3, 3), "\n"), 3U) << "an interval of 0 is one of 1";
}

TEST(ProgressTest, OnATerminalTheLineIsRewrittenInPlaceAndEndedOnce) {
  const std::string text = printed({.terminal = true, .every = 10}, 1, 5, 25);
  EXPECT_EQ(count(text, "\r"), 5U);
  EXPECT_EQ(count(text, "\n"), 1U);
  EXPECT_EQ(text.back(), '\n');
  EXPECT_EQ(count(text, "\x1b[?7l"), count(text, "\x1b[?7h")) << "wrapping is switched on again";
  EXPECT_EQ(printed({.terminal = true}, 1, 0, 25), "") << "nothing printed, no line to end";
}

}  // namespace
}  // namespace regroup
