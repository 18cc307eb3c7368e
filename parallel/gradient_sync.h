// Summing gradients over ranks, each part as soon as backward is done with it.
#pragma once

#include <map>
#include <utility>
#include <vector>

#include "parallel/mesh.h"

namespace regroup {

// The gradient of a key or value projection with `kv_groups` groups.
struct KvGradient {
  Tensor gradient;
  index_t kv_groups = 0;
};

// Each KV replica saw only its own query heads: their k and v gradients are summed over the replica group.
// (The gradient of the projections' input is not: there each replica's share joins the tensor-parallel sum
// once.) Then all gradients are summed over data-parallel ranks.
class GradientSync {
 public:
  // `mesh` outlives it. `kv_gradients`: those whose groups have replicas.
  GradientSync(const Mesh& mesh, std::vector<KvGradient> kv_gradients)
      : mesh_(mesh), kv_gradients_(std::move(kv_gradients)) {}

  // The gradients that lie in `part`, dense, are those of the whole step on this rank: their sums begin, and
  // may run beside what is issued until finish(). Collective.
  void start(Tensor part) const {
    std::map<index_t, std::vector<Tensor>> by_groups;
    for (const KvGradient& kv : kv_gradients_) {
      if (overlaps(kv.gradient, part)) by_groups[kv.kv_groups].push_back(kv.gradient);
    }
    for (const auto& [groups, gradients] : by_groups) mesh_.kv_replicas(groups).all_reduce(gradients);
    mesh_.dp().start_all_reduce(part);
  }
  // What was started is summed for all that is issued from here on.
  void finish() const { mesh_.dp().finish(); }

 private:
  const Mesh& mesh_;
  std::vector<KvGradient> kv_gradients_;
};

}  // namespace regroup
