#include "trainer/run/divergence.h"

#include <cmath>
#include <limits>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "kernels/base/random.h"
#include "trainer/run/run_state.h"

namespace regroup {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double noise(index_t step, std::uint64_t stream) {
  return Philox(1, RandomPurpose::kTest, stream).normal(static_cast<std::uint64_t>(step));
}

// Steps with losses of mean 4 and deviation 0.1, norms of mean 2 and deviation 0.3.
void accept_steps(Divergence& divergence, index_t count) {
  for (index_t step = 0; step < count; ++step)
    divergence.accept(4 + 0.1 * noise(step, 0), 2 + 0.3 * noise(step, 1));
}

TEST(Divergence, WhatIsNotFiniteIsBadAtOnceAndAtAnyThreshold) {
  const Divergence fresh;
  for (const double threshold : {0.0, 6.0}) {
    EXPECT_EQ(fresh.judge_loss(kNan, threshold), "the loss is nan");
    EXPECT_EQ(fresh.judge_loss(kInfinity, threshold), "the loss is inf");
    EXPECT_EQ(fresh.judge_norm(kNan, threshold), "the gradient's norm is nan");
    EXPECT_EQ(fresh.judge_norm(kInfinity, threshold), "the gradient's norm is inf");
    EXPECT_FALSE(fresh.judge_loss(1e30, threshold));
    EXPECT_FALSE(fresh.judge_norm(1e30, threshold));
    EXPECT_EQ(fresh.largest_norm(threshold), kInfinity);
  }
}

TEST(Divergence, ASpikeIsSoManyDeviationsAboveTheMean) {
  Divergence divergence;
  accept_steps(divergence, 1000);
  EXPECT_FALSE(divergence.judge_loss(4.4, 6));
  EXPECT_TRUE(divergence.judge_loss(4.9, 6));
  EXPECT_FALSE(divergence.judge_loss(4.9, 12));
  EXPECT_FALSE(divergence.judge_loss(0.1, 6)) << "lower is no spike";
  EXPECT_FALSE(divergence.judge_norm(3, 6));
  EXPECT_TRUE(divergence.judge_norm(5, 6));
  EXPECT_NEAR(divergence.largest_norm(6), 2 + 6 * 0.3, 0.5);
  EXPECT_NEAR(divergence.largest_norm(10), 2 + 10 * 0.3, 0.8);
  const double largest = divergence.largest_norm(6);
  EXPECT_FALSE(divergence.judge_norm(largest, 6));
  EXPECT_TRUE(divergence.judge_norm(std::nextafter(largest, kInfinity), 6));
  EXPECT_EQ(divergence.judge_loss(400, 6)->substr(0, 27), "the loss of 400 is a spike,");
  // Threshold 0: only what is not finite.
  EXPECT_FALSE(divergence.judge_loss(1e30, 0));
  EXPECT_EQ(divergence.largest_norm(0), kInfinity);
}

TEST(Divergence, TheFirstStepsAreNotJudged) {
  Divergence divergence;
  accept_steps(divergence, Divergence::kFewestSteps - 1);
  EXPECT_FALSE(divergence.judge_loss(1e6, 6));
  EXPECT_EQ(divergence.largest_norm(6), kInfinity);
  divergence.accept(4, 2);
  EXPECT_TRUE(divergence.judge_loss(1e6, 6));
  EXPECT_LT(divergence.largest_norm(6), 10);
}

TEST(Divergence, StatisticsFollowTheRun) {
  Divergence divergence;
  accept_steps(divergence, 200);
  // The loss falls for good: what was usual before is a spike now.
  for (index_t step = 0; step < 10 * Divergence::kWindow; ++step)
    divergence.accept(2 + 0.1 * noise(step, 2), 1 + 0.1 * noise(step, 3));
  EXPECT_FALSE(divergence.judge_loss(2.3, 6));
  EXPECT_TRUE(divergence.judge_loss(4, 6));
  EXPECT_TRUE(divergence.judge_norm(2.5, 6));
}

TEST(Divergence, NumbersThatHardlyVaryHaveNoSpikesOfRounding) {
  Divergence divergence;
  for (index_t step = 0; step < 100; ++step) divergence.accept(4, 2);
  EXPECT_FALSE(divergence.judge_loss(4.0001, 6));
  EXPECT_TRUE(divergence.judge_loss(4.1, 6));
}

TEST(Divergence, BadStepsAreForgottenButCounted) {
  Divergence divergence;
  accept_steps(divergence, 100);
  const double largest = divergence.largest_norm(6);
  for (index_t i = 0; i < Divergence::kPatience; ++i) {
    EXPECT_FALSE(divergence.hopeless());
    divergence.reject();
  }
  EXPECT_TRUE(divergence.hopeless());
  EXPECT_EQ(divergence.rejected_in_a_row(), Divergence::kPatience);
  EXPECT_EQ(divergence.largest_norm(6), largest);
  divergence.accept(4, 2);
  EXPECT_EQ(divergence.rejected_in_a_row(), 0);
}

TEST(Divergence, HugeNumbersStayFinite) {
  Divergence divergence;
  for (index_t step = 0; step < 50; ++step) divergence.accept(step % 2 == 0 ? 1e308 : 1, 1e300);
  const Divergence again = divergence_from_json(nlohmann::json::parse(to_json(divergence).dump()));
  EXPECT_EQ(again, divergence);
  EXPECT_FALSE(std::isnan(divergence.largest_norm(6)));
}

// A run that is resumed at any step judges as the one that went on.
TEST(Divergence, ARunStateKeepsEveryBit) {
  RunState state;
  state.identity = nlohmann::json::object();
  for (index_t step = 0; step < 300; ++step) {
    if (step % 7 == 3) state.divergence.reject();
    const std::string text = to_json(state).dump();
    const RunState again = run_state_from_json(nlohmann::json::parse(text), "trainer.json");
    ASSERT_EQ(again.divergence, state.divergence) << "step " << step;
    ASSERT_EQ(again.divergence.largest_norm(6), state.divergence.largest_norm(6));
    state.divergence.accept(4 + 0.1 * noise(step, 0), std::exp(noise(step, 1)));
  }
}

TEST(Divergence, AnOlderRunStateStartsAfresh) {
  nlohmann::json json = to_json(RunState{});
  ASSERT_TRUE(json.contains("divergence"));
  json.erase("divergence");
  EXPECT_EQ(run_state_from_json(json, "trainer.json").divergence, Divergence{});
  json["divergence"] = {{"steps", 3}};
  EXPECT_THROW(run_state_from_json(json, "trainer.json"), UserError);
}

}  // namespace
}  // namespace regroup
