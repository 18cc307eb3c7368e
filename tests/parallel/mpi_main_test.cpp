// Tests that fail on purpose, to see that the ranks agree (tests/parallel/CMakeLists.txt).
#include <gtest/gtest.h>

#include "parallel/process_group.h"

namespace regroup {
namespace {

bool last_rank() {
  const ProcessGroup world = ProcessGroup::world();
  return world.rank() == world.size() - 1;
}

TEST(Verdict, PassesBefore) { EXPECT_GE(ProcessGroup::world().size(), 2); }

TEST(Verdict, FailsOnTheLastRank) { EXPECT_FALSE(last_rank()); }

TEST(Verdict, SkipsOnTheLastRank) {
  if (last_rank()) GTEST_SKIP() << "on purpose";
}

TEST(Verdict, PassesAfter) { SUCCEED(); }

}  // namespace
}  // namespace regroup
