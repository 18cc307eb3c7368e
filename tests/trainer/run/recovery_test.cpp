#include "trainer/run/recovery.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "tests/trainer/run/temporary_directory.h"
#include "trainer/run/metrics.h"
#include "trainer/run/run_reporter.h"
#include "trainer/run/run_state.h"

namespace regroup {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

TEST(RecoveredShare, IsTheShareOfTheGap) {
  const ConversionGap gap{.parent = 4, .converted = 6};
  EXPECT_EQ(recovered_share(gap, 6), 0);
  EXPECT_EQ(recovered_share(gap, 4.5), 0.75);
  EXPECT_EQ(recovered_share(gap, 4), 1);
  EXPECT_EQ(recovered_share(gap, 3), 1.5) << "better than the parent";
  EXPECT_EQ(recovered_share(gap, 8), -1) << "worse than the conversion alone";
}

TEST(RecoveredShare, OfANilGapIsAllOrNothing) {
  for (const double converted : {3.5, 4.0, 4.0003}) {
    const ConversionGap gap{.parent = 4, .converted = converted};
    EXPECT_TRUE(gap.nil());
    EXPECT_EQ(recovered_share(gap, converted), 1) << "right after the conversion";
    EXPECT_EQ(recovered_share(gap, 3), 1);
    EXPECT_EQ(recovered_share(gap, 4.0003), 1);
    EXPECT_EQ(recovered_share(gap, 4.0005), 0) << "training has lost what the conversion kept";
  }
  EXPECT_FALSE((ConversionGap{.parent = 4, .converted = 4.0005}.nil()));
}

TEST(RecoveredShare, OfWhatIsNotFiniteIsNaN) {
  for (const double odd : {kNaN, kInfinity, -kInfinity}) {
    EXPECT_TRUE(std::isnan(recovered_share({.parent = odd, .converted = 6}, 5)));
    EXPECT_TRUE(std::isnan(recovered_share({.parent = 4, .converted = odd}, 5)));
    EXPECT_TRUE(std::isnan(recovered_share({.parent = 4, .converted = 6}, odd)));
    EXPECT_TRUE(std::isnan(recovered_share({.parent = 4, .converted = 4}, odd)));
  }
  EXPECT_TRUE(std::isnan(recovered_share({}, 5)));
  EXPECT_FALSE(recovered_share({}, 5) >= 0.5) << "no run ends by it";
}

TEST(RecoveredShare, IsDescribed) {
  EXPECT_EQ(describe_recovered({.parent = 4, .converted = 6}, 0.935), "93.5 % of the gap recovered");
  EXPECT_EQ(describe_recovered({.parent = 4, .converted = 6}, -0.25), "-25.0 % of the gap recovered");
  EXPECT_EQ(describe_recovered({.parent = 4, .converted = 4.004}, 0.5),
            "50.0 % of the gap recovered (the conversion lost only 0.0040 nats)");
  EXPECT_EQ(describe_recovered({.parent = 4, .converted = 4}, 1),
            "as good as the parent, and the conversion had lost nothing");
  EXPECT_EQ(describe_recovered({.parent = 4, .converted = 4}, 0),
            "worse than the parent, though the conversion had lost nothing");
}

// A run that is resumed decides by the very number that the run before it had.
TEST(RecoveredShare, IsKeptByTheRunsState) {
  RunState state;
  state.recovered = 1.0 / 3;
  state.recovered_step = 820;
  const auto again = [](const nlohmann::json& json) {
    return run_state_from_json(nlohmann::json::parse(json.dump()), "trainer.json");
  };
  EXPECT_EQ(again(to_json(state)).recovered, state.recovered);
  EXPECT_EQ(again(to_json(state)).recovered_step, 820);
  EXPECT_TRUE(std::isnan(again(to_json(RunState())).recovered));
}

TEST(RecoveredShare, IsUnknownToOldCheckpoints) {
  RunState state;
  state.recovered = 0.5;
  state.recovered_step = 3;
  nlohmann::json old = to_json(state);
  ASSERT_EQ(old.erase("recovered") + old.erase("recovered_step"), 2U);
  const RunState read = run_state_from_json(old, "trainer.json");
  EXPECT_TRUE(std::isnan(read.recovered));
  EXPECT_EQ(read.recovered_step, 0);
  nlohmann::json wrong = to_json(state);
  wrong["recovered"] = "much";
  EXPECT_THROW(run_state_from_json(wrong, "trainer.json"), UserError);
}

class RecoveryPlot : public testing::Test {
 protected:
  void write(const std::vector<EvaluationMetrics>& evaluations) const {
    MetricsFile file(folder_ / "metrics.jsonl");
    for (const EvaluationMetrics& evaluation : evaluations) file.write(evaluation);
  }
  std::string drawn() const { return read_text(folder_ / "recovery.svg"); }

  const test::TemporaryDirectory folder_;
};

TEST_F(RecoveryPlot, BeginsAtTheConversionAndHasTheTarget) {
  write({{.step = 60, .name = "parent", .loss = 4},
         {.step = 60, .name = "converted", .loss = 6},
         {.step = 70, .name = "held-out", .loss = 4.5}});
  plot_run(folder_.path(), 0.75);
  EXPECT_TRUE(std::filesystem::exists(folder_ / "loss.svg"));
  for (const char* text : {">recovered<", ">parent 1.000<", ">target 0.750<", "share of the gap"}) {
    EXPECT_NE(drawn().find(text), std::string::npos) << text;
  }
  plot_run(folder_.path(), 0);
  EXPECT_EQ(drawn().find("target"), std::string::npos);
}

TEST_F(RecoveryPlot, IsNotDrawnOfAPretraining) {
  write({{.step = 0, .name = "unigram", .loss = 6}, {.step = 70, .name = "held-out", .loss = 4.5}});
  plot_run(folder_.path(), 0);
  EXPECT_TRUE(std::filesystem::exists(folder_ / "loss.svg"));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "recovery.svg"));
}

}  // namespace
}  // namespace regroup
