#include "kernels/base/heartbeat.h"

#include <thread>

#include <gtest/gtest.h>

namespace regroup {
namespace {

TEST(Heartbeat, SaysWhatWasNotedLast) {
  Heartbeat heartbeat;
  EXPECT_EQ(heartbeat.state().beats, 0U);
  EXPECT_EQ(heartbeat.state().operation, "starting");
  heartbeat.set_step(12);
  heartbeat.beat("reading a batch");
  heartbeat.beat("forward and backward");
  const Heartbeat::State state = heartbeat.state();
  EXPECT_EQ(state.beats, 2U);
  EXPECT_EQ(state.waits, 0U);
  EXPECT_EQ(state.step, 12);
  EXPECT_EQ(state.operation, "forward and backward");
  EXPECT_EQ(state.waits_in, "");
}

TEST(Heartbeat, AWaitBeginsAndEndsWithABeatAndKeepsTheOperation) {
  Heartbeat heartbeat;
  heartbeat.beat("saving");
  {
    const Heartbeat::Wait wait(heartbeat, "barrier");
    EXPECT_EQ(heartbeat.state().waits_in, "barrier");
    EXPECT_EQ(heartbeat.state().operation, "saving");
    EXPECT_EQ(heartbeat.state().beats, 2U);
  }
  EXPECT_EQ(heartbeat.state().waits_in, "");
  EXPECT_EQ(heartbeat.state().operation, "saving");
  EXPECT_EQ(heartbeat.state().beats, 3U);
  EXPECT_EQ(heartbeat.state().waits, 1U);
}

TEST(Heartbeat, OfNestedWaitsTheInnermostIsNamed) {
  Heartbeat heartbeat;
  const Heartbeat::Wait outer(heartbeat, "a collective write");
  {
    const Heartbeat::Wait inner(heartbeat, "all_gather");
    EXPECT_EQ(heartbeat.state().waits_in, "all_gather");
  }
  EXPECT_EQ(heartbeat.state().waits_in, "a collective write");
  EXPECT_EQ(heartbeat.state().waits, 2U);
}

TEST(Heartbeat, CountsWaitsWithinAStep) {
  Heartbeat heartbeat;
  { const Heartbeat::Wait wait(heartbeat, "all_to_all"); }
  { const Heartbeat::Wait wait(heartbeat, "all_to_all"); }
  EXPECT_EQ(heartbeat.state().waits, 2U);
  const std::uint64_t beats = heartbeat.state().beats;
  heartbeat.set_step(3);
  EXPECT_EQ(heartbeat.state().waits, 0U);
  EXPECT_EQ(heartbeat.state().beats, beats) << "beats are never taken back";
  { const Heartbeat::Wait wait(heartbeat, "all_reduce"); }
  EXPECT_EQ(heartbeat.state().waits, 1U);
}

TEST(Heartbeat, MayBeReadWhileItIsWritten) {
  Heartbeat heartbeat;
  std::jthread writer([&heartbeat](const std::stop_token& stop) {
    while (!stop.stop_requested()) {
      heartbeat.beat("a");
      heartbeat.beat("an operation with a name too long for the string itself");
      const Heartbeat::Wait wait(heartbeat, "barrier");
    }
  });
  std::uint64_t last = 0;
  for (int i = 0; i < 10000; ++i) {
    const Heartbeat::State state = heartbeat.state();
    ASSERT_GE(state.beats, last);
    ASSERT_TRUE(state.operation == "starting" || state.operation == "a" || state.operation.size() > 50U)
        << state.operation;
    ASSERT_TRUE(state.waits_in.empty() || state.waits_in == "barrier") << state.waits_in;
    last = state.beats;
  }
}

}  // namespace
}  // namespace regroup
