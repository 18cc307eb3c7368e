#include "data/sample_order.h"

#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

TEST(SampleOrder, VisitsEveryWindowOnceAnEpoch) {
  for (const std::int64_t windows : {1, 2, 3, 17, 1000, 4097}) {
    const SampleOrder order(5, windows);
    std::vector<std::vector<std::int64_t>> epochs;
    for (std::int64_t epoch = 0; epoch < 3; ++epoch) {
      std::vector<std::int64_t> visited;
      for (std::int64_t i = 0; i < windows; ++i) visited.push_back(order(epoch * windows + i));
      const std::set<std::int64_t> distinct(visited.begin(), visited.end());
      EXPECT_EQ(static_cast<std::int64_t>(distinct.size()), windows);
      EXPECT_EQ(*distinct.begin(), 0);
      EXPECT_EQ(*distinct.rbegin(), windows - 1);
      epochs.push_back(visited);
    }
    if (windows >= 17) {
      EXPECT_NE(epochs[0], epochs[1]);
      EXPECT_NE(epochs[1], epochs[2]);
    }
  }
}

TEST(SampleOrder, IsAFunctionOfTheSeed) {
  const SampleOrder one(5, 1000);
  const SampleOrder same(5, 1000);
  const SampleOrder other(6, 1000);
  int equal = 0;
  for (std::int64_t n = 0; n < 2000; ++n) {
    EXPECT_EQ(one(n), same(n));
    equal += one(n) == other(n);
  }
  EXPECT_LT(equal, 20);  // 2 expected of 2000 by chance
}

TEST(SampleOrder, ReachesFarSamplesWithoutMemory) {
  const SampleOrder order(1, std::int64_t{1} << 40);
  EXPECT_LT(order((std::int64_t{1} << 50) + 12345), std::int64_t{1} << 40);
  EXPECT_THROW(order(-1), InternalError);
  EXPECT_THROW(SampleOrder(1, 0), InternalError);
}

}  // namespace
}  // namespace regroup
