#include "parallel/process_group.h"

#include <array>
#include <functional>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>

#include <gtest/gtest.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// What `work` throws, as its kind and message; "" where it throws nothing.
std::string thrown_by(const std::function<void()>& work) {
  try {
    work();
  } catch (const UserError& error) {
    return std::string("user: ") + error.what();
  } catch (const SystemError& error) {
    return std::string("system: ") + error.what();
  } catch (const InternalError& error) {
    return std::string("internal: ") + error.what();
  }
  return "";
}

TEST(ProcessGroup, SplitOrdersByKey) {
  const ProcessGroup world = ProcessGroup::world();
  // Even and odd ranks, each backwards.
  const ProcessGroup part = world.split(world.rank() % 2, -world.rank());
  const int parity = world.rank() % 2;
  const int members = (world.size() - parity + 1) / 2;
  EXPECT_EQ(part.size(), members);
  EXPECT_EQ(part.rank(), members - 1 - world.rank() / 2);
  const ProcessGroup copy = part;
  copy.barrier();
  EXPECT_EQ(copy.rank(), part.rank());
}

TEST(ProcessGroup, SplitByHostKeepsTheWholeOfOneHost) {
  const ProcessGroup world = ProcessGroup::world();
  const ProcessGroup host = world.split_by_host();
  EXPECT_EQ(host.size(), world.size());  // the tests run on one host
  EXPECT_EQ(host.rank(), world.rank());
}

TEST(ProcessGroup, EveryCollectiveIsAWaitOfTheOneHeartbeat) {
  const ProcessGroup world = ProcessGroup::world();
  const Heartbeat& heartbeat = world.heartbeat();
  EXPECT_EQ(heartbeat.state().beats, 0U);
  std::uint64_t waits = 0;
  const auto expect_one_more = [&](const char* what) {
    EXPECT_EQ(heartbeat.state().waits, ++waits) << what;
    EXPECT_EQ(heartbeat.state().waits_in, "") << what << " is over";
  };
  const ProcessGroup part = world.split(0, world.rank());
  expect_one_more("split");
  EXPECT_EQ(&part.heartbeat(), &heartbeat);
  EXPECT_EQ(&world.split_by_host().heartbeat(), &heartbeat);
  expect_one_more("split_by_host");
  part.barrier();
  expect_one_more("barrier");
  std::array<double, 1> real = {1};
  world.all_reduce(real, ReduceOp::kSum);
  expect_one_more("all_reduce of real numbers");
  std::array<std::uint64_t, 1> whole = {1};
  part.all_reduce(whole, ReduceOp::kSum);
  expect_one_more("all_reduce of whole numbers");
  world.all_gather("a");
  expect_one_more("all_gather of texts");
  world.all_gather(std::vector<std::uint64_t>{1});
  expect_one_more("all_gather of numbers");
  world.broadcast("b");
  expect_one_more("broadcast");
}

TEST(ProcessGroup, AllReduce) {
  const ProcessGroup world = ProcessGroup::world();
  const double rank = world.rank();
  const double size = world.size();
  std::array<double, 3> sum = {rank, 1, -rank};
  world.all_reduce(sum, ReduceOp::kSum);
  EXPECT_EQ(sum, (std::array<double, 3>{size * (size - 1) / 2, size, -size * (size - 1) / 2}));
  std::array<double, 2> max = {rank, -rank};
  world.all_reduce(max, ReduceOp::kMax);
  EXPECT_EQ(max, (std::array<double, 2>{size - 1, 0}));
  std::array<std::uint64_t, 2> min = {std::uint64_t(world.rank()) + 5,
                                      std::numeric_limits<std::uint64_t>::max()};
  world.all_reduce(min, ReduceOp::kMin);
  EXPECT_EQ(min, (std::array<std::uint64_t, 2>{5, std::numeric_limits<std::uint64_t>::max()}));
  world.all_reduce(std::span<double>(), ReduceOp::kSum);
}

TEST(ProcessGroup, AllGatherKeepsTheOrderOfRanksAndEmptyOnes) {
  const ProcessGroup world = ProcessGroup::world();
  const auto text_of = [](int rank) {
    return std::string(static_cast<std::size_t>(rank) * 3, char('a' + rank));
  };
  const auto texts = world.all_gather(text_of(world.rank()));
  const auto lists = world.all_gather(
      std::vector<std::uint64_t>(static_cast<std::size_t>(world.size() - 1 - world.rank()), 7));
  ASSERT_EQ(texts.size(), static_cast<std::size_t>(world.size()));
  ASSERT_EQ(lists.size(), static_cast<std::size_t>(world.size()));
  for (int rank = 0; rank < world.size(); ++rank) {
    const auto r = static_cast<std::size_t>(rank);
    EXPECT_EQ(texts[r], text_of(rank));
    EXPECT_EQ(lists[r], std::vector<std::uint64_t>(static_cast<std::size_t>(world.size() - 1 - rank), 7));
  }
  EXPECT_EQ(world.all_gather(std::string()),
            std::vector<std::string>(static_cast<std::size_t>(world.size())));
}

TEST(ProcessGroup, BroadcastFromEveryRoot) {
  const ProcessGroup world = ProcessGroup::world();
  for (int root = 0; root < world.size(); ++root) {
    const std::string text = std::string("zero\0inside ", 12) + std::to_string(root);
    EXPECT_EQ(world.broadcast(world.rank() == root ? text : "another", root), text);
    EXPECT_EQ(world.broadcast(world.rank() == root ? "" : "another", root), "");
  }
}

TEST(ProcessGroup, RunOnRaisesTheRootsErrorOnEveryRank) {
  const ProcessGroup world = ProcessGroup::world();
  const int root = world.size() - 1;
  int runs = 0;
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [&] { ++runs; }); }), "");
  EXPECT_EQ(runs, world.rank() == root ? 1 : 0);
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw UserError("no directory {}", "x"); }); }),
            "user: no directory x");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw SystemError("fsync"); }); }), "system: fsync");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw InternalError("{}", "{braces}"); }); }),
            "internal: {braces}");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw std::runtime_error("library"); }); }),
            "system: library");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw std::bad_alloc(); }); }).substr(0, 6), "user: ");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw 1; }); }),
            "internal: an exception of unknown type");
  EXPECT_EQ(thrown_by([&] { world.run_on(root, [] { throw UserError("{}", ""); }); }), "user: ");
}

TEST(ProcessGroup, RunTogetherRaisesTheLowestRanksErrorAndNamesTheRank) {
  const ProcessGroup world = ProcessGroup::world();
  const int first = (world.size() - 1) / 2;
  int runs = 0;
  EXPECT_EQ(thrown_by([&] { world.run_together([&] { ++runs; }); }), "");
  EXPECT_EQ(runs, 1);
  const auto fail_from_first = [&] {
    if (world.rank() >= first) throw UserError("rank {}", world.rank());
  };
  EXPECT_EQ(thrown_by([&] { world.run_together(fail_from_first); }),
            world.size() == 1 ? "user: rank 0" : fmt::format("user: on rank {}: rank {}", first, first));
}

TEST(ProcessGroup, RunTogetherNamesNoRankWhereAllFailAlike) {
  const ProcessGroup world = ProcessGroup::world();
  EXPECT_EQ(thrown_by([&] { world.run_together([] { throw SystemError("disk"); }); }), "system: disk");
}

TEST(ProcessGroup, MarksWhatEveryRankThrows) {
  const ProcessGroup world = ProcessGroup::world();
  try {
    world.run_on(0, [] { throw UserError("x"); });
    FAIL();
  } catch (const Error& error) {
    EXPECT_TRUE(error.on_every_rank());
  }
}

}  // namespace
}  // namespace regroup
