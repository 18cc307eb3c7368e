// How many key/value groups each attention gets out of a common budget.
#pragma once

#include <map>
#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// One attention's choices: groups -> what it loses with so many.
using GroupCosts = std::map<index_t, double>;

// The choice of each site that makes the sum of losses least with at most `budget` groups together, exactly
// (dynamic programming over the budget); of equal sums the one with fewer groups. UserError where even the
// smallest choices exceed the budget.
std::vector<index_t> choose_groups(const std::vector<GroupCosts>& sites, index_t budget);

}  // namespace regroup
