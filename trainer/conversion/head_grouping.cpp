#include "trainer/conversion/head_grouping.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/base/error.h"

namespace regroup {
namespace {

using Groups = std::vector<std::vector<index_t>>;

// Cost of `head` with the members of a group but `but`.
double cost_in(const Matrix& cost, index_t head, const std::vector<index_t>& group, index_t but) {
  double sum = 0;
  for (const index_t member : group) {
    if (member != but && member != head) sum += cost(head, member);
  }
  return sum;
}

// Each group begins with the first head that is left, and takes the cheapest ones.
Groups greedy(const Matrix& cost, index_t groups) {
  const auto size = static_cast<std::size_t>(cost.rows / groups);
  std::vector<index_t> left(static_cast<std::size_t>(cost.rows));
  std::iota(left.begin(), left.end(), index_t{0});
  Groups result;
  while (!left.empty()) {
    std::vector<index_t> group = {left.front()};
    left.erase(left.begin());
    while (group.size() < size) {
      const auto best = std::min_element(left.begin(), left.end(), [&](index_t a, index_t b) {
        return cost_in(cost, a, group, -1) < cost_in(cost, b, group, -1);
      });
      group.push_back(*best);
      left.erase(best);
    }
    result.push_back(std::move(group));
  }
  return result;
}

Groups neighbours(index_t heads, index_t groups) {
  Groups result(static_cast<std::size_t>(groups));
  for (index_t h = 0; h < heads; ++h) result[static_cast<std::size_t>(h / (heads / groups))].push_back(h);
  return result;
}

// Lets two heads of different groups change places while that lowers the cost.
void improve(const Matrix& cost, Groups& groups) {
  const double least = 1e-12 * (1 + std::sqrt(cost.squared_norm()));  // against endless rounding
  for (bool better = true; better;) {
    better = false;
    for (std::size_t a = 0; a < groups.size(); ++a) {
      for (std::size_t b = a + 1; b < groups.size(); ++b) {
        for (index_t& x : groups[a]) {
          for (index_t& y : groups[b]) {
            const double before = cost_in(cost, x, groups[a], x) + cost_in(cost, y, groups[b], y);
            const double after = cost_in(cost, y, groups[a], x) + cost_in(cost, x, groups[b], y);
            if (after >= before - least) continue;
            std::swap(x, y);
            better = true;
          }
        }
      }
    }
  }
}

std::vector<index_t> flattened(Groups groups) {
  for (auto& group : groups) std::sort(group.begin(), group.end());
  std::sort(groups.begin(), groups.end());
  std::vector<index_t> order;
  for (const auto& group : groups) order.insert(order.end(), group.begin(), group.end());
  return order;
}

}  // namespace

double grouping_cost(const Matrix& cost, std::span<const index_t> order, index_t groups) {
  const auto size = order.size() / static_cast<std::size_t>(groups);
  double sum = 0;
  for (std::size_t i = 0; i < order.size(); ++i) {
    for (std::size_t j = i + 1; j < (i / size + 1) * size; ++j) sum += cost(order[i], order[j]);
  }
  return sum;
}

std::vector<index_t> group_heads(const Matrix& cost, index_t groups) {
  check(cost.rows == cost.columns && groups >= 1 && cost.rows % groups == 0, "{} heads in {} groups",
        cost.rows, groups);
  std::vector<index_t> best;
  double least = std::numeric_limits<double>::infinity();
  for (Groups start : {neighbours(cost.rows, groups), greedy(cost, groups)}) {
    improve(cost, start);
    const std::vector<index_t> order = flattened(std::move(start));
    const double sum = grouping_cost(cost, order, groups);
    if (sum < least) best = order;
    least = std::min(sum, least);
  }
  return best;
}

}  // namespace regroup
