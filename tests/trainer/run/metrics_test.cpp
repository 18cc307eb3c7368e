#include "trainer/run/metrics.h"

#include <cmath>
#include <limits>
#include <string>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

// A run's deterministic fields as functions of the step; `moment` stands for the machine's timings.
StepMetrics metrics_at(std::int64_t step, double moment) {
  return {.step = step,
          .total_steps = 20,
          .loss = 10.0 / std::sqrt(static_cast<double>(step)),
          .z_loss = 1e-4 / 3.0 * static_cast<double>(step),
          .learning_rate = 0.01,
          .gradient_norm = 1.0 / static_cast<double>(step),
          .tokens_per_second = 1000 * moment,
          .share_of_peak = 0.4 / moment,
          .data_wait_share = 0.01 * moment,
          .seconds_per_step = moment,
          .samples = 8 * step};
}

StepMetrics without_timings(StepMetrics m) {
  m.tokens_per_second = m.share_of_peak = m.data_wait_share = m.seconds_per_step = 0;
  return m;
}

// Steps begin + 1 to end, with an evaluation every fifth.
void train(MetricsFile& file, std::int64_t begin, std::int64_t end, double moment) {
  for (std::int64_t step = begin + 1; step <= end; ++step) {
    file.write(metrics_at(step, moment));
    if (step % 5 == 0) {
      file.write(EvaluationMetrics{.step = step, .name = "held-out", .loss = 11.0 / 7.0, .tokens = 912});
    }
  }
}

class MetricsTest : public testing::Test {
 protected:
  test::TemporaryDirectory directory_;
  std::filesystem::path path_ = directory_ / "metrics.jsonl";
};

TEST_F(MetricsTest, EveryFieldReadsBackExactly) {
  const double inf = std::numeric_limits<double>::infinity();
  StepMetrics awkward = metrics_at(3, 0.1 + 0.2);
  awkward.loss = std::nextafter(5.0, 6.0);
  awkward.z_loss = 5e-324;
  awkward.gradient_norm = inf;
  awkward.learning_rate = -inf;
  awkward.share_of_peak = static_cast<double>(1.0F / 3.0F);
  awkward.samples = std::int64_t{1} << 60;
  const EvaluationMetrics evaluation = {.step = 3,
                                        .name = "held-out",
                                        .loss = std::numeric_limits<double>::max(),
                                        .tokens = 12345,
                                        .scores = {{"accuracy", 1.0 / 3.0}, {"rouge-1", 0.1}}};
  const EventMetrics event = {.step = 4,
                              .name = "resume",
                              .detail = "from \"a\\b\"\nat <here>",
                              .processor = "AMD EPYC",
                              .cpu_level = "avx2",
                              .precision = "fp32"};
  {
    MetricsFile file(path_);
    file.write(awkward);
    file.write(evaluation);
    file.write(event);
  }
  const MetricsHistory history = read_metrics(path_);
  ASSERT_EQ(history.steps.size(), 1U);
  EXPECT_EQ(history.steps[0], awkward);
  ASSERT_EQ(history.evaluations.size(), 1U);
  EXPECT_EQ(history.evaluations[0], evaluation);
  ASSERT_EQ(history.events.size(), 1U);
  EXPECT_EQ(history.events[0], event);
}

TEST_F(MetricsTest, LinesAreStrictJsonWithNaNAsAString) {
  StepMetrics metrics = metrics_at(1, 1);
  metrics.loss = std::numeric_limits<double>::quiet_NaN();
  MetricsFile(path_).write(metrics);
  const auto line = nlohmann::json::parse(read_text(path_));
  EXPECT_EQ(line.at("kind"), "train");
  EXPECT_EQ(line.at("step"), 1);
  EXPECT_EQ(line.at("loss"), "NaN");
  EXPECT_TRUE(std::isnan(read_metrics(path_).steps.at(0).loss));
}

TEST_F(MetricsTest, ALineIsInTheFileWhenWriteReturns) {
  MetricsFile file(path_);
  for (std::int64_t step = 1; step <= 3; ++step) {
    file.write(metrics_at(step, 1));
    EXPECT_EQ(read_metrics(path_).steps.size(), static_cast<std::size_t>(step));
    EXPECT_EQ(read_text(path_).back(), '\n');
  }
}

TEST_F(MetricsTest, AResumedRunsFileEqualsTheUninterruptedOne) {
  const auto whole_path = directory_ / "whole.jsonl";
  {
    MetricsFile whole(whole_path);
    train(whole, 0, 20, 1.0);
  }
  {  // Killed while writing step 13, its last checkpoint at 10; then at 14, between two lines; then finished.
    MetricsFile file(path_);
    train(file, 0, 12, 2.0);
  }
  write_text(path_, read_text(path_) + R"({"kind":"train","step":13,"lo)");
  {
    MetricsFile file(path_, 10);
    train(file, 10, 14, 3.0);
  }
  {
    MetricsFile file(path_, 10);
    train(file, 10, 20, 4.0);
  }
  const MetricsHistory whole = read_metrics(whole_path);
  const MetricsHistory resumed = read_metrics(path_);
  ASSERT_EQ(resumed.steps.size(), whole.steps.size());
  for (std::size_t i = 0; i < whole.steps.size(); ++i) {
    EXPECT_EQ(without_timings(resumed.steps[i]), without_timings(whole.steps[i]));
  }
  EXPECT_EQ(resumed.evaluations, whole.evaluations);
  EXPECT_EQ(whole.evaluations.size(), 4U);
}

TEST_F(MetricsTest, ATornLineOfAKeptStepIsCutOffWhereverItIsTorn) {
  const std::string first = R"({"kind":"train","step":1,"loss":1.5})"
                            "\n";
  const std::string second = R"({"kind":"train","step":2,"loss":1.25})";
  for (std::size_t length = 0; length <= second.size(); ++length) {  // all of it, but no newline, is torn too
    write_text(path_, first + second.substr(0, length));
    EXPECT_EQ(read_metrics(path_).steps.size(), 1U);
    MetricsFile(path_, 2).write(metrics_at(3, 1));
    const auto steps = read_metrics(path_).steps;
    ASSERT_EQ(steps.size(), 2U) << "torn after " << length << " bytes";
    EXPECT_EQ(steps[0].loss, 1.5);
    EXPECT_EQ(steps[1].step, 3);
  }
}

TEST_F(MetricsTest, AFreshStartEmptiesTheFileAndAResumeAtZeroKeepsStepZero) {
  {
    MetricsFile file(path_);
    file.write(EvaluationMetrics{.step = 0, .name = "parent", .loss = 4.25, .tokens = 10});
    train(file, 0, 3, 1.0);
  }
  { MetricsFile resumed(path_, 0); }
  EXPECT_EQ(read_metrics(path_).evaluations.size(), 1U);
  EXPECT_TRUE(read_metrics(path_).steps.empty());
  { MetricsFile fresh(path_); }
  EXPECT_EQ(std::filesystem::file_size(path_), 0U);
  MetricsFile missing(directory_ / "new.jsonl", 7);
  EXPECT_TRUE(std::filesystem::exists(directory_ / "new.jsonl"));
}

TEST_F(MetricsTest, ABadLineIsNamedAndUnknownFieldsAreSkipped) {
  const std::string good = R"({"kind":"train","step":1,"loss":2.5,"new_field":[1]})"
                           "\n"
                           R"({"kind":"x","step":1})"
                           "\n";
  write_text(path_, good);
  EXPECT_EQ(read_metrics(path_).steps.at(0).loss, 2.5);
  for (const std::string bad : {"not json\n", "[]\n", "{}\n",
                                R"({"kind":"train","step":"a"})"
                                "\n",
                                R"({"kind":"train","step":1,"loss":"high"})"
                                "\n"}) {
    write_text(path_, good + bad + good);
    try {
      read_metrics(path_);
      FAIL() << "accepted " << bad;
    } catch (const UserError& error) {
      EXPECT_NE(std::string(error.what()).find("metrics.jsonl:3:"), std::string::npos) << error.what();
    }
  }
}

TEST_F(MetricsTest, TextThatIsNotUtf8DoesNotCostTheRunItsMetrics) {
  MetricsFile(path_).write(EventMetrics{.step = 1, .name = "start", .detail = "caf\xE9"});
  EXPECT_EQ(read_metrics(path_).events.at(0).name, "start");
}

TEST_F(MetricsTest, UnwritableAndUnreadableFilesAreUserErrors) {
  EXPECT_THROW(MetricsFile(directory_ / "no/such/folder.jsonl"), UserError);
  EXPECT_THROW(read_metrics(directory_ / "missing.jsonl"), UserError);
  MetricsFile full("/dev/full");
  EXPECT_THROW(full.write(metrics_at(1, 1)), UserError);
}

}  // namespace
}  // namespace regroup
