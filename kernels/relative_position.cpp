#include <algorithm>
#include <cmath>

#include "kernels/backend.h"

namespace regroup {

index_t relative_position_bucket(index_t distance, bool bidirectional, index_t buckets,
                                 index_t max_distance) {
  index_t first = 0;
  index_t past = std::max(-distance, index_t{0});  // how far the key lies before the query
  if (bidirectional) {
    buckets /= 2;
    first = distance > 0 ? buckets : 0;
    past = std::abs(distance);
  }
  const index_t exact = buckets / 2;
  check(exact >= 1 && max_distance > exact, "{} buckets a direction do not reach to distance {}", buckets,
        max_distance);
  if (past < exact) return first + past;
  const double octaves = std::log(static_cast<double>(past) / static_cast<double>(exact)) /
                         std::log(static_cast<double>(max_distance) / static_cast<double>(exact));
  const auto beyond = static_cast<index_t>(octaves * static_cast<double>(buckets - exact));
  return first + std::min(exact + beyond, buckets - 1);
}

}  // namespace regroup
