// Ends a job that has come to a halt, with a line that says which rank holds it up.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "kernels/base/log.h"
#include "parallel/process_group.h"
#include "trainer/run/hang_board.h"

namespace regroup {

// Looks at the heartbeat of its rank from a thread of its own. After `timeout` seconds without a beat it
// suspects a hang and says so on a HangBoard in the run directory; then every rank's watchdog, whatever its
// rank does, keeps reporting there. The job counts as hung when no rank has made progress for the timeout, or
// when the watchdog of one gives no report for the grace period (its process is stopped, its node is gone):
// a rank that works for hours while the others wait for it is no hang as long as it beats. One rank prints
// the verdict, and every rank's process ends at once with exit code kHung, so that the launcher takes the job
// down. No MPI is called: it belongs to the main thread.
//
// From the last beat of any rank to the end of every process that is not stopped it takes at most bound()
// seconds. That holds where the file system hangs too: then each rank judges by itself.
//
// Only time in which the process ran counts, so a job suspended as a whole (SIGSTOP to all ranks, a laptop
// that sleeps) goes on unharmed.
class Watchdog {
 public:
  // Called once, by a thread of the watchdog, to end the process; with "" where another rank has told.
  using End = std::function<void(const std::string& message)>;

  // `directory` is shared by all ranks. A timeout of 0: nothing is watched. Beats come from the heartbeat of
  // `world`, which outlives this. Collective; what an earlier job left on the board is removed. Ranks destroy
  // their watchdogs at about the same time: one that is gone gives no reports.
  Watchdog(const ProcessGroup& world, const std::filesystem::path& directory, double timeout, const Log& log);
  // One rank's, among ranks at `places`. Not collective.
  Watchdog(const Heartbeat& heartbeat, std::vector<RankPlace> places, HangBoard board, int rank,
           double timeout, End end);
  ~Watchdog();  // stops watching; waits for a file access under way
  Watchdog(const Watchdog&) = delete;
  Watchdog& operator=(const Watchdog&) = delete;

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

  const Heartbeat& heartbeat_;
  std::vector<RankPlace> places_;
  HangBoard board_;
  int rank_;
  double timeout_;
  End end_;

  // Of the watching thread.
  std::uint64_t beats_ = 0;
  HangReport own_;
  bool suspects_ = false, reports_ = false;  // as posted
  std::vector<Seen> seen_;                   // by rank, while it suspects

  std::atomic<std::uint64_t> rounds_ = 0;  // that came to their end
  std::atomic<bool> ended_ = false;
  std::jthread watching_alone_, watching_;  // the latter ends first: a file access of it may hang
};

}  // namespace regroup
