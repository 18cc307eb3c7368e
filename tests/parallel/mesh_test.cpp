#include "parallel/mesh.h"

#include <gtest/gtest.h>

namespace regroup {
namespace {

const std::vector<index_t> kGroups = {1, 2, 4, 8};

std::string refusal(Layout layout, int ranks) {
  try {
    complete_layout(layout, ranks);
  } catch (const UserError& error) {
    return error.what();
  }
  return "";
}

TEST(CompleteLayout, FillsDataParallel) {
  const Layout layout = complete_layout({.data_parallel = 0, .tensor_parallel = 4}, 12);
  EXPECT_EQ(layout.data_parallel, 3);
  EXPECT_EQ(layout.tensor_parallel, 4);
  EXPECT_EQ(layout.ranks(), 12);
  EXPECT_EQ(complete_layout({.data_parallel = 2, .tensor_parallel = 3}, 6).ranks(), 6);
}

TEST(CompleteLayout, RefusesWithTheEquationAndWhatWouldDo) {
  EXPECT_EQ(
      refusal({.data_parallel = 0, .tensor_parallel = 4}, 6),
      "data-parallel x tensor-parallel = ranks: no data-parallel does it for tensor-parallel 4 and 6 ranks; "
      "a tensor-parallel of 1, 2, 3, 6 would");
  EXPECT_EQ(
      refusal({.data_parallel = 2, .tensor_parallel = 4}, 6),
      "data-parallel x tensor-parallel = ranks: 2 x 4 = 8, but the job has 6 ranks; start 8 (mpirun -n 8) or "
      "change the layout");
  EXPECT_EQ(
      refusal({.data_parallel = 1 << 20, .tensor_parallel = 1 << 20}, 1),
      "data-parallel x tensor-parallel = ranks: 1048576 x 1048576 = 1099511627776, but the job has 1 ranks; "
      "start 1099511627776 (mpirun -n 1099511627776) or change the layout");
  EXPECT_EQ(refusal({.data_parallel = 1, .tensor_parallel = 0}, 1),
            "tensor-parallel is 0; it must be at least 1");
  EXPECT_EQ(refusal({.data_parallel = -1, .tensor_parallel = 1}, 1),
            "data-parallel is -1; it must be at least 1, or 0 for ranks / tensor-parallel");
}

// The ranks (of the world) that a communicator reaches, as a bit mask.
std::int32_t members(Communicator& communicator, int world_rank) {
  std::int32_t mask = 1 << world_rank;
  communicator.all_reduce(Tensor(&mask, DType::kInt32, {1}));
  return mask;
}

TEST(Mesh, CoordinatesAndGroupsForEveryLayout) {
  const ProcessGroup world = ProcessGroup::world();
  for (const int tp : {1, 2, 4}) {
    if (world.size() % tp != 0) continue;
    const Layout layout = complete_layout({.data_parallel = 0, .tensor_parallel = tp}, world.size());
    const Mesh mesh(world, layout, kGroups);
    EXPECT_EQ(mesh.tp_rank(), world.rank() % tp);
    EXPECT_EQ(mesh.dp_rank(), world.rank() / tp);
    EXPECT_EQ(mesh.tp_size(), tp);
    EXPECT_EQ(mesh.dp_size(), world.size() / tp);
    std::int32_t tp_members = 0;
    std::int32_t dp_members = 0;
    for (int r = 0; r < world.size(); ++r) {
      if (r / tp == world.rank() / tp) tp_members |= 1 << r;
      if (r % tp == world.rank() % tp) dp_members |= 1 << r;
    }
    EXPECT_EQ(members(mesh.tp(), world.rank()), tp_members);
    EXPECT_EQ(members(mesh.dp(), world.rank()), dp_members);
    for (const index_t groups : kGroups) {
      std::int32_t replicas = 0;
      for (int r = 0; r < world.size(); ++r) {
        const bool same_tp_group = r / tp == world.rank() / tp;
        // The group that tp rank t holds first: floor(t G / tp); with G >= tp no other rank holds it.
        const bool same_kv_group = (r % tp) * groups / tp == (world.rank() % tp) * groups / tp;
        if (same_tp_group && same_kv_group) replicas |= 1 << r;
      }
      Communicator& communicator = mesh.kv_replicas(groups);
      EXPECT_EQ(communicator.size(), groups >= tp ? 1 : tp / groups);
      EXPECT_EQ(members(communicator, world.rank()), replicas) << "tp " << tp << " G " << groups;
    }
  }
}

TEST(Mesh, ItsCommunicatorsAreWaitsOfTheWorldsHeartbeat) {
  const ProcessGroup world = ProcessGroup::world();
  const Mesh mesh(world, {.data_parallel = 1, .tensor_parallel = world.size()}, {1});
  EXPECT_EQ(&mesh.heartbeat(), &world.heartbeat());
  const std::uint64_t before = mesh.heartbeat().state().waits;
  float value = 1;
  const Tensor x(&value, DType::kFloat32, {1});
  mesh.tp().all_reduce(x);
  mesh.tp().broadcast(x, 0);
  mesh.tp().start_all_reduce(x);
  mesh.tp().finish();
  mesh.kv_replicas(1).all_reduce(x);
  mesh.dp().all_reduce(x);  // one rank: nobody to wait for
  mesh.dp().finish();
  EXPECT_EQ(mesh.heartbeat().state().waits - before, world.size() == 1 ? 0U : 5U);
}

TEST(Mesh, PlanSeesWhatTheRankWouldSee) {
  const ProcessGroup world = ProcessGroup::world();
  const Layout layout = {.data_parallel = 1, .tensor_parallel = world.size()};
  const Mesh mesh(world, layout, kGroups);
  const Mesh plan = Mesh::plan(layout, world.rank(), kGroups);
  EXPECT_EQ(plan.tp_rank(), mesh.tp_rank());
  EXPECT_EQ(plan.dp_rank(), mesh.dp_rank());
  EXPECT_EQ(plan.layout().ranks(), mesh.layout().ranks());
  for (const index_t groups : kGroups) {
    EXPECT_EQ(plan.kv_replicas(groups).size(), mesh.kv_replicas(groups).size());
    EXPECT_EQ(plan.kv_replicas(groups).rank(), mesh.kv_replicas(groups).rank());
  }
  const Mesh large = Mesh::plan({.data_parallel = 16, .tensor_parallel = 8}, 77, {2});
  EXPECT_EQ(large.tp_rank(), 5);
  EXPECT_EQ(large.dp_rank(), 9);
  EXPECT_EQ(large.kv_replicas(2).size(), 4);
  EXPECT_EQ(large.kv_replicas(2).rank(), 1);
}

TEST(Mesh, RefusesWhatIsNotEven) {
  EXPECT_THROW(Mesh::plan({.data_parallel = 1, .tensor_parallel = 4}, 0, {3}), InternalError);
  EXPECT_THROW(Mesh::plan({.data_parallel = 1, .tensor_parallel = 4}, 0, {6}), InternalError);
  EXPECT_THROW(Mesh::plan({.data_parallel = 1, .tensor_parallel = 4}, 4, {}), InternalError);
  const Mesh mesh = Mesh::plan({.data_parallel = 1, .tensor_parallel = 4}, 0, {1});
  EXPECT_THROW(mesh.kv_replicas(2), InternalError);
}

}  // namespace
}  // namespace regroup
