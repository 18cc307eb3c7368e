// Watchdogs of several ranks in one process: what they end, whom they name, and what they leave alone.
#include "trainer/run/watchdog.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <fcntl.h>
#include <fstream>
#include <memory>
#include <mutex>
#include <sys/stat.h>
#include <unistd.h>

#include <gtest/gtest.h>

#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using Milliseconds = std::chrono::milliseconds;

constexpr double kTimeout = 0.4;  // a tick is then 0.05 s
// Time for many timeouts where nothing may happen, and for one where something must, on a busy machine.
constexpr auto kManyTimeouts = Milliseconds(2000);
constexpr auto kBound = std::chrono::seconds(60);

class WatchdogTest : public testing::Test {
 protected:
  // The ranks' watchdogs; those from rank `stopped` on have none.
  void start(int ranks, std::optional<int> stopped = std::nullopt, double timeout = kTimeout) {
    std::vector<RankPlace> places;
    for (int r = 0; r < ranks; ++r) {
      places.push_back({.host = fmt::format("node{}", r), .pid = 100 + r});
      hearts_.emplace_back();
    }
    for (int rank = 0; rank < ranks; ++rank) {
      if (rank >= stopped.value_or(ranks)) continue;
      const auto r = static_cast<std::size_t>(rank);
      watchdogs_.push_back(alone(hearts_[r], places[r], rank, timeout));
      watchdogs_.back()->use_board(places, board(rank));
    }
  }
  HangBoard board(int rank) const { return {folder_.path() / "run" / "hang", rank}; }
  std::unique_ptr<Watchdog> alone(const Heartbeat& heart, const RankPlace& place, int rank,
                                  double timeout = kTimeout) {
    return std::make_unique<Watchdog>(heart, place, rank, timeout,
                                      [this](const std::string& message) { note(message); });
  }
  void note(const std::string& message) {
    const std::lock_guard lock(mutex_);
    ends_.push_back(message);
    changed_.notify_all();
  }
  // The messages of the ranks that ended once `count` have, those that were silent left out.
  std::vector<std::string> messages_of(std::size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kBound, [&] { return ends_.size() >= count; }));
    std::vector<std::string> told = ends_;
    std::erase(told, "");
    return told;
  }
  std::size_t ends() {
    const std::lock_guard lock(mutex_);
    return ends_.size();
  }
  // Beats of a rank as long as it lives.
  static std::jthread beating(Heartbeat& heartbeat) {
    return std::jthread([&heartbeat](const std::stop_token& stop) {
      while (!stop.stop_requested()) {
        heartbeat.beat("saving");
        std::this_thread::sleep_for(Milliseconds(5));
      }
    });
  }
  // Files and folders that are left on the board.
  std::size_t left() const {
    std::size_t count = 0;
    std::error_code none;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder_.path() / "run", none)) {
      count += entry.is_regular_file() ? 1 : 0;
    }
    return count;
  }

  test::TemporaryDirectory folder_;
  std::deque<Heartbeat> hearts_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::string> ends_;
  std::vector<std::unique_ptr<Watchdog>> watchdogs_;  // go first
};

TEST_F(WatchdogTest, OneLineNamesTheRankThatWaitsForNobodyAndAllEnd) {
  start(3);
  for (Heartbeat& heart : hearts_) heart.set_step(7);
  hearts_[1].beat("reading a batch");
  const Heartbeat::Wait first(hearts_[0], "dp all_reduce"), third(hearts_[2], "dp all_reduce");
  const std::vector<std::string> told = messages_of(3);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("hangs: rank 1 on node1 (process 101), at step 7 in 'reading a batch', has not"),
            std::string::npos)
      << told[0];
}

TEST_F(WatchdogTest, OneLineNamesTheRankThatIsStopped) {
  start(3, /*stopped=*/2);
  const Heartbeat::Wait first(hearts_[0], "tp all_reduce"), second(hearts_[1], "tp all_reduce");
  const std::vector<std::string> told = messages_of(2);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("hangs: rank 2 on node2 (process 102) gives no sign of life"), std::string::npos)
      << told[0];
  EXPECT_NE(told[0].find("in tp all_reduce"), std::string::npos) << told[0];
}

TEST_F(WatchdogTest, ARankOfItsOwnIsWatchedToo) {
  start(1);
  hearts_[0].beat("evaluating");
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("in 'evaluating', has not come any further"), std::string::npos) << told[0];
}

TEST_F(WatchdogTest, AReportThatIsLeftFromBeforeIsNoSignOfLife) {
  HangBoard board(folder_.path() / "run" / "hang", 1);
  std::filesystem::create_directories(board.folder());
  board.report({.number = 400, .still = 0, .state = {.operation = "saving"}}, {});
  start(2, /*stopped=*/1);
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("rank 1 on node1 (process 101) gives no sign of life"), std::string::npos)
      << told[0];
}

TEST_F(WatchdogTest, BeatsKeepAJobAlive) {
  start(2);
  const std::jthread first = beating(hearts_[0]), second = beating(hearts_[1]);
  std::this_thread::sleep_for(kManyTimeouts);
  EXPECT_EQ(ends(), 0U);
}

TEST_F(WatchdogTest, OneThatBeatsKeepsThoseAliveThatWaitForIt) {
  start(3);
  {
    const Heartbeat::Wait first(hearts_[0], "barrier"), third(hearts_[2], "barrier");
    const std::jthread second = beating(hearts_[1]);
    std::this_thread::sleep_for(kManyTimeouts);
    EXPECT_EQ(ends(), 0U);
    EXPECT_GT(left(), 0U) << "they suspected something";
  }
  // Suspicions are withdrawn when it goes on, and nothing is left of them.
  std::vector<std::jthread> all;
  for (Heartbeat& heart : hearts_) all.push_back(beating(heart));
  const auto end = std::chrono::steady_clock::now() + kBound;
  while (left() > 0 && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(Milliseconds(10));
  EXPECT_EQ(left(), 0U);
  EXPECT_EQ(ends(), 0U);
}

TEST_F(WatchdogTest, AFileSystemThatRefusesDoesNotHideAHang) {
  std::ofstream(folder_.path() / "run") << "a file where the run directory should be";
  start(1);
  hearts_[0].set_step(3);
  hearts_[0].beat("saving");
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("rank 0 on node0 (process 100) has made no progress"), std::string::npos) << told[0];
  EXPECT_NE(told[0].find("at step 3 in 'saving'"), std::string::npos) << told[0];
  EXPECT_NE(told[0].find("refuses: cannot "), std::string::npos) << told[0];
}

TEST_F(WatchdogTest, AloneItEndsARankThatDoesNotMove) {
  hearts_.emplace_back();
  hearts_[0].beat("checking a checkpoint");
  const Heartbeat::Wait wait(hearts_[0], "all_gather");
  watchdogs_.push_back(alone(hearts_[0], {.host = "node0", .pid = 100}, 0));
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("hangs: rank 0 on node0 (process 100) has made no progress"), std::string::npos)
      << told[0];
  EXPECT_NE(told[0].find("at step 0 in all_gather of 'checking a checkpoint'. The job is ended"),
            std::string::npos)
      << told[0];
  EXPECT_EQ(left(), 0U);
}

TEST_F(WatchdogTest, AloneItLeavesARankThatBeats) {
  hearts_.emplace_back();
  const std::jthread beats = beating(hearts_[0]);
  watchdogs_.push_back(alone(hearts_[0], {}, 0));
  std::this_thread::sleep_for(2 * kManyTimeouts);
  EXPECT_EQ(ends(), 0U);
}

TEST_F(WatchdogTest, AFirstReportHasTwiceTheTimeOfALaterOne) {
  constexpr double kLongTimeout = 2;  // a tick is 0.1 s: 1.5 s from report to report
  start(2, /*stopped=*/1, kLongTimeout);
  const auto end = std::chrono::steady_clock::now() + kBound;
  while (left() == 0 && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(Milliseconds(5));
  std::this_thread::sleep_for(Milliseconds(2200));
  HangBoard late = board(1);
  for (std::uint64_t number = 1; number < 100; ++number) {
    late.report({.number = number, .state = {.operation = "saving"}}, {});
    std::this_thread::sleep_for(Milliseconds(20));
  }
  EXPECT_EQ(ends(), 0U);
}

TEST_F(WatchdogTest, SilentRanksAreWaitedForAtTheSameTime) {
  const auto begin = std::chrono::steady_clock::now();
  start(40, /*stopped=*/1);
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("and 35 more give no sign of life"), std::string::npos) << told[0];
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  EXPECT_LT(took.count(), Watchdog::bound(kTimeout));
}

TEST_F(WatchdogTest, AFileAccessThatDoesNotEndDoesNotHideAHang) {
  const HangBoard board(folder_.path() / "run" / "hang", 0);
  std::filesystem::create_directories(board.folder());
  // Whoever opens it for reading waits for a writer.
  const std::filesystem::path report = board.folder() / "rank-00001.json";
  ASSERT_EQ(::mkfifo(report.c_str(), 0600), 0);
  start(2, /*stopped=*/1);
  const Heartbeat::Wait wait(hearts_[0], "dp all_reduce");
  const std::vector<std::string> told = messages_of(1);
  ASSERT_EQ(told.size(), 1U);
  EXPECT_NE(told[0].find("rank 0 on node0 (process 100) has made no progress"), std::string::npos) << told[0];
  EXPECT_NE(told[0].find("in dp all_reduce of 'starting'"), std::string::npos) << told[0];
  const int writer = ::open(report.c_str(), O_WRONLY);  // lets the reader go
  EXPECT_GE(writer, 0);
  ::close(writer);
  watchdogs_.clear();
}

TEST_F(WatchdogTest, WatchesNothingWithATimeoutOfZeroOrOnceItIsGone) {
  start(1);
  watchdogs_.clear();
  const std::unique_ptr<Watchdog> never = alone(hearts_[0], {}, 0, /*timeout=*/0);
  never->use_board({{}}, board(0));
  std::this_thread::sleep_for(kManyTimeouts);
  EXPECT_EQ(ends(), 0U);
  EXPECT_EQ(left(), 0U);
}

TEST_F(WatchdogTest, EndsItsWatchAtOnceWhateverTheTimeout) {
  const auto begin = std::chrono::steady_clock::now();
  hearts_.emplace_back();
  {
    Watchdog watchdog(hearts_[0], {}, 0, 1e6, [](auto&) {});
    watchdog.use_board({{}}, board(0));
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, Milliseconds(4000)) << "a tick is 5 s";
}

TEST_F(WatchdogTest, TheBoundIsTheTimeoutAndSomeMore) {
  EXPECT_GT(Watchdog::bound(600), 750);
  EXPECT_LT(Watchdog::bound(600), 775);
  EXPECT_EQ(Watchdog::bound(0), std::numeric_limits<double>::infinity());
}

TEST(HangBoardTest, AReportReplacesTheOneBeforeAndLeavesNothingElse) {
  const test::TemporaryDirectory folder;
  HangBoard own(folder / "hang", 3);
  const HangBoard other(folder / "hang", 0);
  own.suspect();
  EXPECT_EQ(other.report_of(3), std::nullopt);
  for (const std::uint64_t number : {1U, 2U}) {
    own.report({.number = number}, {.host = "node0", .pid = 1});
    const std::optional<HangReport> report = other.report_of(3);
    ASSERT_TRUE(report.has_value());
    EXPECT_EQ(report->number, number);
  }
  const std::filesystem::directory_iterator files(folder / "hang");
  EXPECT_EQ(std::distance(begin(files), end(files)), 2);
  own.withdraw_suspicion();
  own.withdraw_report();
  EXPECT_FALSE(std::filesystem::exists(folder / "hang"));
}

TEST(HangBoardTest, TheVerdictIsClaimedOnce) {
  const test::TemporaryDirectory folder;
  HangBoard first(folder / "hang", 0), second(folder / "hang", 1);
  EXPECT_FALSE(first.notices().judged);
  EXPECT_TRUE(first.notices().suspicious.empty());
  second.suspect();
  first.suspect();
  EXPECT_EQ(first.notices().suspicious, (std::vector<int>{0, 1}));
  EXPECT_TRUE(second.claim_verdict("it hangs"));
  EXPECT_FALSE(first.claim_verdict("it hangs"));
  EXPECT_TRUE(first.notices().judged);
}

}  // namespace
}  // namespace regroup
