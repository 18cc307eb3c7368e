#include "parallel/mesh.h"

#include <vector>

#include <fmt/ranges.h>

namespace regroup {
namespace {

std::vector<int> divisors(int n) {
  std::vector<int> result;
  for (int d = 1; d <= n; ++d) {
    if (n % d == 0) result.push_back(d);
  }
  return result;
}

// Ranks that share a group; InternalError where the groups do not lie evenly over the axis.
int replicas_of(index_t kv_groups, int tensor_parallel) {
  const bool even = kv_groups >= 1 && (kv_groups % tensor_parallel == 0 || tensor_parallel % kv_groups == 0);
  check(even, "{} key/value groups do not lie evenly over {} tensor-parallel ranks", kv_groups,
        tensor_parallel);
  return kv_groups >= tensor_parallel ? 1 : static_cast<int>(tensor_parallel / kv_groups);
}

}  // namespace

Layout complete_layout(Layout layout, int ranks) {
  const int tp = layout.tensor_parallel;
  if (tp < 1) throw UserError("tensor-parallel is {}; it must be at least 1", tp);
  if (layout.data_parallel < 0) {
    throw UserError("data-parallel is {}; it must be at least 1, or 0 for ranks / tensor-parallel",
                    layout.data_parallel);
  }
  if (layout.data_parallel == 0) {
    if (ranks % tp != 0) {
      throw UserError(
          "data-parallel x tensor-parallel = ranks: no data-parallel does it for tensor-parallel {} and {} "
          "ranks; a tensor-parallel of {} would",
          tp, ranks, fmt::join(divisors(ranks), ", "));
    }
    layout.data_parallel = ranks / tp;
  }
  const index_t needed = index_t{layout.data_parallel} * tp;
  if (needed != ranks) {
    throw UserError(
        "data-parallel x tensor-parallel = ranks: {} x {} = {}, but the job has {} ranks; start {} "
        "(mpirun -n {}) or change the layout",
        layout.data_parallel, tp, needed, ranks, needed, needed);
  }
  return layout;
}

Mesh::Mesh(const ProcessGroup& world, Layout layout, const std::vector<index_t>& kv_groups,
           const CommunicatorFactory& make)
    : layout_(layout), heartbeat_(world.shared_heartbeat()) {
  check(layout.ranks() == world.size(), "a mesh of {} x {} over {} ranks", layout.data_parallel,
        layout.tensor_parallel, world.size());
  const int tp_rank = world.rank() % layout.tensor_parallel;
  const int dp_rank = world.rank() / layout.tensor_parallel;
  const ProcessGroup tp_group = world.split(dp_rank, tp_rank);
  tp_ = make("tp", tp_group);
  dp_ = make("dp", world.split(tp_rank, dp_rank));
  self_ = make_plan_communicator("self", 0, 1);
  for (const index_t groups : kv_groups) {
    const int replicas = replicas_of(groups, layout.tensor_parallel);
    if (replicas == 1 || kv_replicas_.count(groups) != 0) continue;
    kv_replicas_[groups] =
        make(fmt::format("kv_replicas({})", groups), tp_group.split(tp_rank / replicas, tp_rank));
  }
}

Mesh Mesh::plan(Layout layout, int rank, const std::vector<index_t>& kv_groups) {
  check(0 <= rank && rank < layout.ranks(), "rank {} of a mesh of {} x {}", rank, layout.data_parallel,
        layout.tensor_parallel);
  const int tp_rank = rank % layout.tensor_parallel;
  Mesh mesh;
  mesh.layout_ = layout;
  mesh.tp_ = make_plan_communicator("tp", tp_rank, layout.tensor_parallel);
  mesh.dp_ = make_plan_communicator("dp", rank / layout.tensor_parallel, layout.data_parallel);
  mesh.self_ = make_plan_communicator("self", 0, 1);
  for (const index_t groups : kv_groups) {
    const int replicas = replicas_of(groups, layout.tensor_parallel);
    if (replicas == 1) continue;
    mesh.kv_replicas_[groups] =
        make_plan_communicator(fmt::format("kv_replicas({})", groups), tp_rank % replicas, replicas);
  }
  return mesh;
}

Communicator& Mesh::kv_replicas(index_t kv_groups) const {
  if (replicas_of(kv_groups, layout_.tensor_parallel) == 1) return *self_;
  const auto found = kv_replicas_.find(kv_groups);
  check(found != kv_replicas_.end(), "the mesh was made without {} key/value groups", kv_groups);
  return *found->second;
}

}  // namespace regroup
