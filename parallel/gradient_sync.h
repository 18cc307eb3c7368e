// Summing gradients after the last micro-batch of a step.
#pragma once

#include <span>

#include "parallel/mesh.h"

namespace regroup {

// The gradient of a key or value projection with `kv_groups` groups.
struct KvGradient {
  Tensor gradient;
  index_t kv_groups = 0;
};

// Each KV replica saw only its own query heads: their k and v gradients are summed over the replica group.
// (The gradient of the projections' input is not: there each replica's share joins the tensor-parallel sum
// once.) Then all gradients, one flat tensor, are summed over data-parallel ranks.
inline void synchronise_gradients(const Mesh& mesh, Tensor all_gradients,
                                  std::span<const KvGradient> kv_gradients) {
  for (const KvGradient& kv : kv_gradients) mesh.kv_replicas(kv.kv_groups).all_reduce(kv.gradient);
  mesh.dp().all_reduce(all_gradients);
}

}  // namespace regroup
