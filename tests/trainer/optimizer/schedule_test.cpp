#include "trainer/optimizer/schedule.h"

#include <cmath>

#include <gtest/gtest.h>

namespace regroup {
namespace {

using Kind = Schedule::Kind;

// references: T5's pretraining: 0.01 for 10,000 steps, 1e-3 at a million, 9.759e-4 after 5 % more.
TEST(Schedule, RsqrtIsThatOfT5) {
  const Schedule schedule{.kind = Kind::kRsqrt};
  EXPECT_EQ(learning_rate(schedule, 0), 0.01);
  EXPECT_EQ(learning_rate(schedule, 10000), 0.01);
  EXPECT_NEAR(learning_rate(schedule, 1000000), 1e-3, 1e-12);
  EXPECT_NEAR(learning_rate(schedule, 1050000), 9.759e-4, 1e-7);
}

TEST(Schedule, OthersRampAndEnd) {
  const Schedule constant{.kind = Kind::kConstant, .base = 2, .warmup = 4};
  EXPECT_EQ(learning_rate(constant, 0), 0.5);
  EXPECT_EQ(learning_rate(constant, 3), 2);
  EXPECT_EQ(learning_rate(constant, 100000), 2);
  const Schedule linear{.kind = Kind::kLinear, .base = 2, .warmup = 10, .total = 110};
  EXPECT_EQ(learning_rate(linear, 10), 2);
  EXPECT_EQ(learning_rate(linear, 60), 1);
  EXPECT_EQ(learning_rate(linear, 110), 0);
  EXPECT_EQ(learning_rate(linear, 200), 0);
  const Schedule cosine{.kind = Kind::kCosine, .base = 2, .warmup = 0, .total = 100};
  EXPECT_EQ(learning_rate(cosine, 0), 2);
  EXPECT_NEAR(learning_rate(cosine, 50), 1, 1e-15);
  EXPECT_NEAR(learning_rate(cosine, 100), 0, 1e-15);
}

TEST(Schedule, UnknownNamesAreRefused) {
  EXPECT_EQ(schedule_kind("cosine"), Kind::kCosine);
  EXPECT_THROW(schedule_kind("cosin"), UserError);
}

}  // namespace
}  // namespace regroup
