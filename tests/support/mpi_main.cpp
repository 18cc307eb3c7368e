#include "tests/support/mpi_main.h"

#include <array>
#include <chrono>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <thread>
#include <unistd.h>
#include <utility>

#include <fmt/core.h>
#include <gtest/gtest.h>

#include "parallel/process_group.h"

namespace regroup::test {
namespace {

// Failures of the ranks that have no other printer.
class FailurePrinter final : public testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}

 private:
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    const char* file = result.file_name() == nullptr ? "?" : result.file_name();
    fmt::print(stderr, "[rank {}] {}:{}: Failure\n{}\n", rank_, file, result.line_number(), result.message());
  }

  int rank_;
};

// One verdict a test. Its messages travel in a group of their own, apart from those of the tests.
class VerdictOverRanks final : public testing::EmptyTestEventListener {
 public:
  explicit VerdictOverRanks(ProcessGroup group) : group_(std::move(group)) {}

 private:
  void OnTestEnd(const testing::TestInfo& test) override {
    const testing::TestResult& result = *test.result();
    std::array<std::uint64_t, 2> ranks = {result.Failed() ? 1U : 0U, result.Skipped() ? 1U : 0U};
    group_.all_reduce(ranks, ReduceOp::kSum);
    const auto [failed, skipped] = ranks;
    if (failed > 0 && !result.Failed()) ADD_FAILURE() << "failed on " << failed << " other rank(s)";
    if (failed == 0 && skipped != 0 && skipped != static_cast<std::uint64_t>(group_.size())) {
      ADD_FAILURE() << "skipped on " << skipped << " of " << group_.size() << " ranks";
    }
  }

  ProcessGroup group_;
};

// The rank given by --hang-rank, or -1.
int hanging_rank(int argc, char** argv) {
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::string(argv[i]) == "--hang-rank") return std::stoi(argv[i + 1]);
  }
  return -1;
}

void wait_for_debugger(int rank) {
  fmt::print(stderr, "rank {} is process {}: attach a debugger and set `waiting` to false\n", rank,
             ::getpid());
  for (volatile bool waiting = true; waiting;) std::this_thread::sleep_for(std::chrono::milliseconds(100));
}

void set_listeners(const ProcessGroup& world) {
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (world.rank() != 0) {
    const std::unique_ptr<testing::TestEventListener> printer(
        listeners.Release(listeners.default_result_printer()));
    const std::unique_ptr<testing::TestEventListener> xml(
        listeners.Release(listeners.default_xml_generator()));
    listeners.Append(std::make_unique<FailurePrinter>(world.rank()).release());
  }
  // Last: its failures must come after the printers are in place (GoogleTest, "Extending by handling
  // events").
  listeners.Append(std::make_unique<VerdictOverRanks>(world.split(0, world.rank())).release());
}

}  // namespace

int run_tests_on_ranks(int argc, char** argv) {
  const MpiEnvironment mpi;
  const ProcessGroup world = ProcessGroup::world();
  try {
    testing::InitGoogleTest(&argc, argv);
    GTEST_FLAG_SET(catch_exceptions, world.size() == 1);
    if (hanging_rank(argc, argv) == world.rank()) wait_for_debugger(world.rank());
    set_listeners(world);
    std::array<std::uint64_t, 1> failed = {RUN_ALL_TESTS() == 0 ? 0U : 1U};
    world.all_reduce(failed, ReduceOp::kMax);
    return static_cast<int>(failed[0]);
  } catch (const std::exception& error) {
    const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
    fmt::print(stderr, "[rank {}] {}.{}: exception: {}\n", world.rank(), test ? test->test_suite_name() : "",
               test ? test->name() : "", error.what());
    std::fflush(nullptr);
    mpi.abort(1);
  }
}

}  // namespace regroup::test

int main(int argc, char** argv) { return regroup::test::run_tests_on_ranks(argc, argv); }
