// All ranks take a step or leave it out together, whatever the last bits of their own sums say.
#include <cmath>

#include <gtest/gtest.h>

#include "trainer/run/divergence.h"

namespace regroup {
namespace {

constexpr double kThreshold = 6;

Divergence after_some_steps() {
  Divergence divergence;
  for (int step = 0; step < 40; ++step) divergence.accept(4 + 0.1 * (step % 3), 2 + 0.1 * (step % 2));
  return divergence;
}

// This rank's own number lies `steps` floating-point numbers beyond the largest that passes.
double beyond(double largest, int steps) {
  for (int i = 0; i < std::abs(steps); ++i) largest = std::nextafter(largest, steps > 0 ? INFINITY : 0);
  return largest;
}

TEST(StepJudge, RankZeroDecidesForAll) {
  const ProcessGroup world = ProcessGroup::world();
  const Divergence divergence = after_some_steps();
  const double largest = divergence.largest_norm(kThreshold);
  for (const int side : {1, -1}) {
    // Rank 0 is on one side of the border, the others on the other.
    const double own = beyond(largest, world.rank() == 0 ? side : -side);
    StepJudge judge(world, divergence, kThreshold);
    ASSERT_TRUE(judge.passes_loss(4));
    EXPECT_EQ(judge.passes_norm(own), side < 0) << "rank " << world.rank();
    EXPECT_EQ(judge.problem().has_value(), side > 0);
    EXPECT_EQ(judge.norm(), beyond(largest, side));
  }
}

TEST(StepJudge, ALossThatOnlyAnotherRankSeesIsNotJudged) {
  const ProcessGroup world = ProcessGroup::world();
  const Divergence divergence = after_some_steps();
  StepJudge judge(world, divergence, kThreshold);
  EXPECT_TRUE(judge.passes_loss(world.rank() == 0 ? 4.0 : NAN));
  EXPECT_EQ(judge.loss(), 4);
  EXPECT_FALSE(judge.passes_loss(world.rank() == 0 ? NAN : 4.0));
  EXPECT_TRUE(judge.problem());
}

}  // namespace
}  // namespace regroup
