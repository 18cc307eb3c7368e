#include "trainer/conversion/group_budget.h"

#include <limits>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "tests/trainer/formats/plain_file.h"

namespace regroup {
namespace {

struct Choice {
  double cost = std::numeric_limits<double>::infinity();
  index_t groups = 0;
};

// Of all combinations the one that costs least; of equal ones the one with fewer groups.
Choice best_of_all(const std::vector<GroupCosts>& sites, index_t budget, std::size_t from = 0) {
  if (from == sites.size()) return {.cost = 0, .groups = 0};
  Choice best;
  for (const auto& [groups, cost] : sites[from]) {
    if (groups > budget) continue;
    const Choice rest = best_of_all(sites, budget - groups, from + 1);
    const Choice whole = {.cost = cost + rest.cost, .groups = groups + rest.groups};
    if (whole.cost < best.cost || (whole.cost == best.cost && whole.groups < best.groups)) best = whole;
  }
  return best;
}

TEST(ChooseGroups, FindsWhatAllCombinationsHaveBest) {
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const Philox philox(seed, RandomPurpose::kTest);
    std::vector<GroupCosts> sites(5);
    for (std::size_t s = 0; s < sites.size(); ++s) {
      for (const index_t groups : {1, 2, 4, 8}) {
        // Whole numbers, so that sums are equal now and then; not always falling.
        sites[s][groups] = static_cast<double>(philox.below(12, 10 * s + static_cast<std::size_t>(groups)));
      }
    }
    for (index_t budget = 5; budget <= 42; ++budget) {
      const std::vector<index_t> chosen = choose_groups(sites, budget);
      ASSERT_EQ(chosen.size(), sites.size());
      double cost = 0;
      for (std::size_t s = 0; s < sites.size(); ++s) cost += sites[s].at(chosen[s]);
      const Choice best = best_of_all(sites, budget);
      EXPECT_EQ(cost, best.cost) << seed << ", " << budget;
      EXPECT_EQ(std::accumulate(chosen.begin(), chosen.end(), index_t{0}), best.groups)
          << seed << ", " << budget;
    }
  }
}

TEST(ChooseGroups, GivesGroupsToTheSiteThatLosesMost) {
  const std::vector<GroupCosts> sites = {{{1, 1.0}, {2, 0.9}, {4, 0.0}}, {{1, 5.0}, {2, 1.0}, {4, 0.0}}};
  EXPECT_EQ(choose_groups(sites, 2), (std::vector<index_t>{1, 1}));
  EXPECT_EQ(choose_groups(sites, 3), (std::vector<index_t>{1, 2}));
  EXPECT_EQ(choose_groups(sites, 4), (std::vector<index_t>{2, 2}));
  EXPECT_EQ(choose_groups(sites, 5), (std::vector<index_t>{1, 4}));
  EXPECT_EQ(choose_groups(sites, 100), (std::vector<index_t>{4, 4}));
}

TEST(ChooseGroups, RefusesTooFewGroups) {
  const std::vector<GroupCosts> sites = {{{1, 1.0}, {2, 0.0}}, {{2, 1.0}, {4, 0.0}}};
  EXPECT_EQ(choose_groups(sites, 3), (std::vector<index_t>{1, 2}));
  for (const index_t budget : {2, 1, 0, -1}) {
    EXPECT_THAT(
        test::refusal([&] { choose_groups(sites, budget); }),
        testing::HasSubstr(std::to_string(budget) + " key/value groups are too few for 2 attentions"));
  }
  EXPECT_TRUE(choose_groups({}, 0).empty());
}

}  // namespace
}  // namespace regroup
