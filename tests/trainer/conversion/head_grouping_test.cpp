#include "trainer/conversion/head_grouping.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "tests/trainer/conversion/matrices.h"

namespace regroup {
namespace {

Matrix random_cost(const std::string& name, index_t heads) {
  const Matrix x = test::random_matrix(name, heads, heads);
  Matrix cost(heads, heads);
  for (index_t i = 0; i < heads; ++i) {
    for (index_t j = 0; j < i; ++j) cost(i, j) = cost(j, i) = std::abs(x(i, j));
  }
  return cost;
}

// Of all partitions into `groups` groups of one size.
double least_cost(const Matrix& cost, index_t groups) {
  std::vector<index_t> order(static_cast<std::size_t>(cost.rows));
  std::iota(order.begin(), order.end(), index_t{0});
  double least = std::numeric_limits<double>::infinity();
  do {
    least = std::min(least, grouping_cost(cost, order, groups));
  } while (std::next_permutation(order.begin() + 1, order.end()));  // the first head stays first
  return least;
}

void expect_partition(const std::vector<index_t>& order, index_t heads, index_t groups) {
  std::vector<index_t> sorted = order;
  std::sort(sorted.begin(), sorted.end());
  std::vector<index_t> all(static_cast<std::size_t>(heads));
  std::iota(all.begin(), all.end(), index_t{0});
  EXPECT_EQ(sorted, all);
  const auto size = order.size() / static_cast<std::size_t>(groups);
  for (std::size_t at = 0; at < order.size(); at += size) {
    EXPECT_TRUE(std::is_sorted(order.begin() + static_cast<std::ptrdiff_t>(at),
                               order.begin() + static_cast<std::ptrdiff_t>(at + size)));
    EXPECT_TRUE(at == 0 || order[at - size] < order[at]);  // by their first heads
  }
}

std::vector<index_t> neighbours(index_t heads) {
  std::vector<index_t> order(static_cast<std::size_t>(heads));
  std::iota(order.begin(), order.end(), index_t{0});
  return order;
}

TEST(GroupingCost, IsTheSumOverPairsOfAGroup) {
  const Matrix cost = random_cost("cost", 6);
  const std::vector<index_t> order = {0, 3, 4, 1, 2, 5};
  EXPECT_DOUBLE_EQ(grouping_cost(cost, order, 2),
                   cost(0, 3) + cost(0, 4) + cost(3, 4) + cost(1, 2) + cost(1, 5) + cost(2, 5));
  EXPECT_DOUBLE_EQ(grouping_cost(cost, order, 3), cost(0, 3) + cost(4, 1) + cost(2, 5));
  EXPECT_EQ(grouping_cost(cost, order, 6), 0);
}

TEST(GroupHeads, IsNeverWorseThanNeighboursAndNearTheBestOfAllPartitions) {
  int cases = 0, best = 0;
  for (int seed = 0; seed < 20; ++seed) {
    for (const auto& [heads, groups] : {std::pair<index_t, index_t>{6, 2}, {6, 3}, {8, 2}, {8, 4}}) {
      const Matrix cost = random_cost("random " + std::to_string(seed), heads);
      const std::vector<index_t> order = group_heads(cost, groups);
      expect_partition(order, heads, groups);
      const double found = grouping_cost(cost, order, groups);
      EXPECT_LE(found, grouping_cost(cost, neighbours(heads), groups) * (1 + 1e-12));
      const double least = least_cost(cost, groups);
      EXPECT_GE(found, least * (1 - 1e-12));
      ++cases;
      if (found <= least * (1 + 1e-12)) ++best;
    }
  }
  EXPECT_GE(best * 2, cases);  // exact more often than not, without any structure to find
}

TEST(GroupHeads, FindsAPlantedPartition) {
  for (const auto& [heads, groups] : {std::pair<index_t, index_t>{6, 2}, {8, 4}, {16, 4}, {64, 8}, {12, 1}}) {
    // Head h belongs to the group (5 h) mod groups, with noise; heads of one group cost little.
    Matrix cost = random_cost("planted", heads);
    const auto group_of = [g = groups](index_t head) { return (5 * head + head / g) % g; };
    std::vector<index_t> expected;
    for (index_t i = 0; i < heads; ++i) {
      for (index_t j = 0; j < heads; ++j) {
        if (i != j) cost(i, j) = 0.1 * cost(i, j) + (group_of(i) == group_of(j) ? 0 : 10);
      }
      if (std::find(expected.begin(), expected.end(), i) != expected.end()) continue;
      for (index_t j = i; j < heads; ++j) {
        if (group_of(i) == group_of(j)) expected.push_back(j);
      }
    }
    ASSERT_EQ(std::ssize(expected), heads);
    EXPECT_EQ(group_heads(cost, groups), expected) << heads << " heads";
  }
}

TEST(GroupHeads, TakesEqualAndExtremeCosts) {
  EXPECT_EQ(group_heads(Matrix(8, 8), 4), neighbours(8));  // nothing to choose by: neighbours
  EXPECT_EQ(group_heads(random_cost("all apart", 6), 6), neighbours(6));
  EXPECT_EQ(group_heads(random_cost("all together", 6), 1), neighbours(6));
  EXPECT_EQ(group_heads(Matrix(1, 1), 1), neighbours(1));
  for (const double scale : {1e-30, 1e30}) {
    Matrix cost = random_cost("scaled", 8);
    for (double& value : cost.values) value *= scale;
    expect_partition(group_heads(cost, 2), 8, 2);
  }
  EXPECT_THROW(group_heads(Matrix(8, 8), 3), InternalError);
}

TEST(GroupHeads, AlwaysGivesTheSame) {
  const Matrix cost = random_cost("again", 16);
  const std::vector<index_t> order = group_heads(cost, 4);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(group_heads(cost, 4), order);
}

}  // namespace
}  // namespace regroup
