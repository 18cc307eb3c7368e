// Ends a job that has come to a halt, with a line that says which rank holds it up.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/log.h"
#include "parallel/process_group.h"
#include "trainer/run/hang_board.h"

namespace regroup {

// Looks at the heartbeat of its rank from threads of its own, in two ways.
//
// Alone, from the start, without files: a rank without a beat for the timeout and some more ends its process.
// It cannot know whether a rank that it waits for is at work, so whatever takes long there beats on all
// ranks.
//
// With the others, from use_board() on. After `timeout` seconds without a beat a rank
// suspects a hang and says so on a HangBoard in the run directory; then every rank's watchdog, whatever its
// rank does, keeps reporting there. The job counts as hung when no rank has made progress for the timeout, or
// when the watchdog of one gives no report for the grace period (its process is stopped, its node is gone):
// a rank that works for hours while the others wait for it is no hang as long as it beats. One rank prints
// the verdict, and every rank's process ends at once with exit code kHung, so that the launcher takes the job
// down. No MPI is called: it belongs to the main thread.
//
// Where the board hangs, or refuses (the disk of the run directory is full), each rank is alone again, and
// the line says why. So a rank that waits that long for one at work then ends a job that was none: accepted,
// for the ranks have no other way to ask, such a job cannot save either, and its last checkpoint stays.
//
// From the last beat of any rank to the end of every process that is not stopped it takes at most bound()
// seconds, alone or not.
//
// Only time in which the process ran counts, so a job suspended as a whole (SIGSTOP to all ranks, a laptop
// that sleeps) goes on unharmed.
class Watchdog {
 public:
  // Called once, by a thread of the watchdog, to end the process; with "" where another rank has told.
  using End = std::function<void(const std::string& message)>;

  // Watches alone. A timeout of 0: nothing is watched, ever. Beats come from the heartbeat of `world`, which
  // outlives this. Not collective.
  Watchdog(const ProcessGroup& world, double timeout, const Log& log);
  // With a board from the start. Collective.
  Watchdog(const ProcessGroup& world, const std::filesystem::path& directory, double timeout, const Log& log);
  // One rank's, which runs at `place`. Not collective.
  Watchdog(const Heartbeat& heartbeat, RankPlace place, int rank, double timeout, End end);
  ~Watchdog();  // stops watching; waits for a file access under way
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

  // Called at most once. `directory` is shared by all ranks. Collective; what an earlier job left on the
  // board is removed. From then on ranks destroy their watchdogs at about the same time: one that is gone
  // gives no reports.
  void use_board(const ProcessGroup& world, const std::filesystem::path& directory);
  // Of ranks at `places`, this one's among them. Not collective.
  void use_board(std::vector<RankPlace> places, HangBoard board);

  // Seconds, for a timeout in seconds; infinite for 0.
  static double bound(double timeout);

 private:
  struct Seen {
    std::optional<HangReport> report;
    double age = 0;  // seconds since it was new
  };

  void watch(const std::stop_token& stop);
  void round();
  void judge();
  void watch_alone(const std::stop_token& stop);
  void end(const std::string& message);

  std::string alone_because() const;
  void board_fails(const std::string& how);

  const Heartbeat& heartbeat_;
  const RankPlace place_;
  const int rank_;
  const double timeout_;
  const End end_;

  // Of the thread that watches with the others.
  std::vector<RankPlace> places_;
  std::optional<HangBoard> board_;
  std::uint64_t beats_ = 0;
  HangReport own_;
  bool suspects_ = false, reports_ = false;  // as posted
  std::vector<Seen> seen_;                   // by rank, while it suspects

  mutable std::mutex mutex_;
  std::string board_fails_;  // "" before there is a board

  std::atomic<std::uint64_t> rounds_ = 0;  // that came to their end
  std::atomic<bool> ended_ = false;
  std::jthread watching_alone_, watching_;  // the latter ends first: a file access of it may hang
};

}  // namespace regroup
