#include "trainer/conversion/group_budget.h"

#include <algorithm>
#include <limits>

#include "kernels/base/error.h"

namespace regroup {

std::vector<index_t> choose_groups(const std::vector<GroupCosts>& sites, index_t budget) {
  constexpr double kImpossible = std::numeric_limits<double>::infinity();
  const auto width = static_cast<std::size_t>(std::max<index_t>(budget, 0)) + 1;
  // least[b]: of the sites so far with exactly b groups; taken[s][b]: the last site's choice there.
  std::vector<double> least(width, kImpossible);
  least[0] = 0;
  std::vector<std::vector<index_t>> taken;
  for (const GroupCosts& site : sites) {
    std::vector<double> next(width, kImpossible);
    std::vector<index_t>& choice = taken.emplace_back(width, 0);
    for (const auto& [groups, cost] : site) {
      for (auto b = static_cast<std::size_t>(groups); b < width; ++b) {
        const double sum = least[b - static_cast<std::size_t>(groups)] + cost;
        if (sum >= next[b]) continue;
        next[b] = sum;
        choice[b] = groups;
      }
    }
    least = std::move(next);
  }
  auto at = static_cast<std::size_t>(std::min_element(least.begin(), least.end()) - least.begin());
  if (least[at] == kImpossible) {
    throw UserError("{} key/value groups are too few for {} attentions", budget, sites.size());
  }
  std::vector<index_t> result(sites.size());
  for (std::size_t s = sites.size(); s-- > 0;) {
    result[s] = taken[s][at];
    at -= static_cast<std::size_t>(result[s]);
  }
  return result;
}

}  // namespace regroup
