// The watchdogs of a job's own ranks.
#include <fstream>

#include <gtest/gtest.h>

#include "tests/trainer/run/temporary_directory.h"
#include "trainer/run/watchdog.h"

namespace regroup {
namespace {

class WatchdogOfRanks : public testing::Test {
 protected:
  WatchdogOfRanks() {
    if (world_.rank() == 0) own_.emplace();
    folder_ = world_.broadcast(own_ ? own_->path().string() : "");
  }
  ~WatchdogOfRanks() override { world_.barrier(); }

  ProcessGroup world_ = ProcessGroup::world();
  std::optional<test::TemporaryDirectory> own_;  // rank 0
  std::filesystem::path folder_;
};

TEST_F(WatchdogOfRanks, RemoveWhatAnEarlierJobLeftAndLeaveNothing) {
  world_.run_on(0, [this] {
    std::filesystem::create_directories(folder_ / "hang" / "earlier");
    std::ofstream(folder_ / "hang" / "earlier" / "verdict") << "it hangs";
  });
  const Watchdog watchdog(world_, folder_, 600, Log(world_.rank()));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "hang"));
}

TEST_F(WatchdogOfRanks, LetAJobWorkThatDoesManyTimesTheTimeoutOfCollectives) {
  {
    const Watchdog watchdog(world_, folder_, 0.5, Log(world_.rank()));
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(2500);
    std::array<std::uint64_t, 1> late = {0};
    while (late[0] == 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      late[0] = std::chrono::steady_clock::now() < end ? 0 : 1;
      world_.all_reduce(late, ReduceOp::kMax);
    }
  }
  world_.barrier();
  EXPECT_FALSE(std::filesystem::exists(folder_ / "hang"));
}

}  // namespace
}  // namespace regroup
