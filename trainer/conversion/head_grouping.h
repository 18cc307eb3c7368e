// Which heads form a group.
#pragma once

#include <span>
#include <vector>

#include "trainer/conversion/dense_matrix.h"

namespace regroup {

// A partition of heads into `groups` groups of one size that makes the sum of cost(i, j) over pairs of a
// group small: heads join greedily, then pairs of heads change places while that helps. cost: symmetric
// [heads, heads]. The heads of a group, one group behind the other; groups and heads within ascend. Never
// worse than neighbours together.
std::vector<index_t> group_heads(const Matrix& cost, index_t groups);

// The sum above.
double grouping_cost(const Matrix& cost, std::span<const index_t> order, index_t groups);

}  // namespace regroup
