#include "parallel/partition.h"

#include <gtest/gtest.h>

namespace regroup {
namespace {

// Over all tp ranks, each index of the dimension is held by exactly `replicas` ranks, and by exactly one
// whose replica is 0.
void expect_cover(const Partition& partition, const std::vector<index_t>& shape, int tp, int replicas) {
  const auto dim = static_cast<std::size_t>(partition.dim);
  std::vector<int> holders(static_cast<std::size_t>(shape[dim]));
  std::vector<int> writers(holders.size());
  for (int rank = 0; rank < tp; ++rank) {
    const Slice slice = local_slice(partition, shape, rank, tp);
    EXPECT_EQ(slice.dim, partition.dim);
    EXPECT_EQ(slice.replicas, replicas);
    for (index_t i = slice.begin; i < slice.end; ++i) {
      ++holders[static_cast<std::size_t>(i)];
      if (slice.replica == 0) ++writers[static_cast<std::size_t>(i)];
    }
    std::vector<index_t> expected = shape;
    expected[dim] = slice.end - slice.begin;
    EXPECT_EQ(local_shape(slice, shape), expected);
    EXPECT_EQ(slice.whole(shape), expected == shape);
  }
  EXPECT_EQ(holders, std::vector<int>(holders.size(), replicas));
  EXPECT_EQ(writers, std::vector<int>(holders.size(), 1));
}

TEST(Partition, ReplicatedIsHeldByAllAndWrittenByOne) {
  for (const int tp : {1, 2, 3, 4, 8}) expect_cover(Partition::replicated(), {5, 3}, tp, tp);
}

TEST(Partition, SplitCoversOnce) {
  for (const int tp : {1, 2, 4, 8}) {
    expect_cover(Partition::split(0), {16, 3}, tp, 1);
    expect_cover(Partition::split(1), {5, 24}, tp, 1);
    expect_cover(Partition::split(2), {5, 3, 8, 2}, tp, 1);
  }
}

TEST(Partition, KvGroupsCoverOnceOrAreReplicated) {
  for (const int tp : {1, 2, 4, 8}) {
    for (const index_t groups : {1, 2, 4, 8, 16}) {
      const int replicas = groups >= tp ? 1 : tp / static_cast<int>(groups);
      expect_cover(Partition::kv(groups), {groups * 6, 7}, tp, replicas);
    }
  }
}

TEST(Partition, KvRankHoldsTheGroupsOfItsQueryHeads) {
  constexpr index_t kHeads = 8;
  constexpr index_t kWidth = 6;
  for (const int tp : {1, 2, 4, 8}) {
    for (const index_t groups : {1, 2, 4, 8}) {
      for (int rank = 0; rank < tp; ++rank) {
        const Slice slice = local_slice(Partition::kv(groups), {groups * kWidth, 5}, rank, tp);
        for (index_t head = rank * kHeads / tp; head < (rank + 1) * kHeads / tp; ++head) {
          const index_t group = head / (kHeads / groups);
          EXPECT_LE(slice.begin, group * kWidth);
          EXPECT_GE(slice.end, (group + 1) * kWidth);
        }
        EXPECT_EQ(slice.replica, groups >= tp ? 0 : rank % (tp / groups));
      }
    }
  }
}

TEST(Partition, ScalarsAreWhole) {
  const Slice slice = local_slice(Partition::replicated(), {}, 1, 2);
  EXPECT_TRUE(slice.whole({}));
  EXPECT_EQ(slice.replica, 1);
  EXPECT_EQ(slice.replicas, 2);
  EXPECT_TRUE(local_shape(slice, {}).empty());
}

TEST(Partition, RefusesWhatDoesNotDivide) {
  EXPECT_THROW(local_slice(Partition::split(0), {10}, 0, 4), InternalError);
  EXPECT_THROW(local_slice(Partition::split(1), {10}, 0, 1), InternalError);
  EXPECT_THROW(local_slice(Partition::kv(3), {12}, 0, 2), InternalError);
  EXPECT_THROW(local_slice(Partition::kv(4), {6}, 0, 2), InternalError);
  EXPECT_THROW(local_slice(Partition::kv(0), {6}, 0, 2), InternalError);
  EXPECT_THROW(local_slice(Partition::split(0), {8}, 2, 2), InternalError);
}

}  // namespace
}  // namespace regroup
