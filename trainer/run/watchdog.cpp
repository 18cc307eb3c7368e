#include "trainer/run/watchdog.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <unistd.h>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/host.h"
#include "trainer/exit_code.h"

namespace regroup {
namespace {

// How often a rank looks at its heartbeat and at the board.
double tick_of(double timeout) { return std::clamp(timeout / 20, 0.05, 5.0); }
// Network file systems may show a change a minute late: so long may a rank be without a new report, and twice
// as long without its first, for it has to see the suspicion before.
double grace_of(double timeout) { return 15 * tick_of(timeout); }
double first_grace_of(double timeout) { return 2 * grace_of(timeout); }

// So many of the ranks that suspect a hang read all reports: one would do, but it may itself be stopped.
constexpr std::ptrdiff_t kJudges = 4;
// Between the line of the rank that tells and the end of the others: for the launcher to pass it on.
constexpr unsigned kFarewellSeconds = 2;

// False where it was woken by a request to stop.
bool sleep(const std::stop_token& stop, double seconds) {
  std::mutex mutex;
  std::condition_variable_any never;
  std::unique_lock lock(mutex);
  never.wait_for(lock, stop, std::chrono::duration<double>(seconds), [] { return false; });
  return !stop.stop_requested();
}

std::vector<RankPlace> gather_places(const ProcessGroup& world) {
  std::vector<RankPlace> places;
  for (const std::string& host : world.all_gather(host_name())) places.push_back({.host = host});
  const auto pids = world.all_gather(std::vector{static_cast<std::uint64_t>(::getpid())});
  for (std::size_t r = 0; r < places.size(); ++r) places[r].pid = static_cast<std::int64_t>(pids[r].at(0));
  return places;
}

// A folder of this job alone: a network file system may show what an earlier one has left a while longer.
HangBoard make_board(const ProcessGroup& world, const std::filesystem::path& directory) {
  const std::filesystem::path boards = directory / "hang";
  world.run_on(0, [&] { std::filesystem::remove_all(boards); });
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const std::string job = world.broadcast(fmt::format("{}-{}", now.count(), ::getpid()));
  return {boards / job, world.rank()};
}

// Ends the process, whatever its main thread, MPI or the file system are stuck in.
void end_process(const Log& log, const std::string& message) {
  ::alarm(5 + kFarewellSeconds);  // kills the process where even printing blocks
  if (message.empty()) {
    ::sleep(kFarewellSeconds);
  } else {
    log.error("{}", message);
  }
  ::_exit(kHung);
}

}  // namespace

Watchdog::Watchdog(const ProcessGroup& world, double timeout, const Log& log)
    : Watchdog(world.heartbeat(), {.host = host_name(), .pid = ::getpid()}, world.rank(), timeout,
               [log](const std::string& message) { end_process(log, message); }) {}

Watchdog::Watchdog(const ProcessGroup& world, const std::filesystem::path& directory, double timeout,
                   const Log& log)
    : Watchdog(world, timeout, log) {
  use_board(world, directory);
}

Watchdog::Watchdog(const Heartbeat& heartbeat, RankPlace place, int rank, double timeout, End end)
    : heartbeat_(heartbeat), place_(std::move(place)), rank_(rank), timeout_(timeout), end_(std::move(end)) {
  if (timeout_ <= 0) return;
  watching_alone_ = std::jthread([this](const std::stop_token& stop) { watch_alone(stop); });
}

Watchdog::~Watchdog() = default;

void Watchdog::use_board(const ProcessGroup& world, const std::filesystem::path& directory) {
  std::vector<RankPlace> places = gather_places(world);
  use_board(std::move(places), make_board(world, directory));
}

void Watchdog::use_board(std::vector<RankPlace> places, HangBoard board) {
  check(!board_, "a watchdog has one board");
  places_ = std::move(places);
  board_.emplace(std::move(board));
  if (timeout_ <= 0) return;
  board_fails("does not answer: its file system may be down");  // for as long as a round lasts
  watching_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
}

double Watchdog::bound(double timeout) {
  constexpr double kAFewSeconds = 15;
  return timeout > 0 ? timeout + first_grace_of(timeout) + kAFewSeconds
                     : std::numeric_limits<double>::infinity();
}

void Watchdog::end(const std::string& message) {
  if (!ended_.exchange(true)) end_(message);
}

void Watchdog::watch(const std::stop_token& stop) {
  while (!ended_ && sleep(stop, tick_of(timeout_))) {
    try {
      round();
      board_fails("does not answer: its file system may be down");
      ++rounds_;
    } catch (const std::exception& error) {
      // A file system that refuses is no hang. If it goes on and there is one, watch_alone() ends it.
      board_fails(fmt::format("refuses: {}", error.what()));
    }
  }
  if (ended_) return;
  try {
    if (suspects_) board_->withdraw_suspicion();
    if (reports_) board_->withdraw_report();
  } catch (const std::exception&) {
    // The next job removes them.
  }
}

void Watchdog::round() {
  own_.state = heartbeat_.state();
  own_.number += 1;
  // By ticks, not by the clock: the process may have been stopped in between.
  own_.still = own_.state.beats == beats_ ? own_.still + tick_of(timeout_) : 0;
  beats_ = own_.state.beats;
  const bool suspects = own_.still >= timeout_;
  if (suspects && !suspects_) {
    board_->suspect();
    suspects_ = true;
    seen_.assign(places_.size(), {});
  }
  if (!suspects && suspects_) {
    board_->withdraw_suspicion();
    suspects_ = false;
  }
  const HangBoard::Notices notices = board_->notices();
  if (notices.judged) return end("");
  if (!notices.suspicious.empty()) {
    board_->report(own_, place_);
    reports_ = true;
  } else if (reports_) {
    board_->withdraw_report();
    reports_ = false;
  }
  const auto place = std::find(notices.suspicious.begin(), notices.suspicious.end(), rank_);
  if (suspects_ && place - notices.suspicious.begin() < kJudges) judge();
}

void Watchdog::judge() {
  std::vector<std::optional<HangReport>> reports;
  bool one_may_come = false;
  for (std::size_t rank = 0; rank < places_.size(); ++rank) {
    Seen& seen = seen_[rank];
    const bool mine = static_cast<int>(rank) == rank_;
    const auto report = mine ? own_ : board_->report_of(static_cast<int>(rank));
    if (report && (!seen.report || seen.report->number != report->number)) {
      seen = {.report = report};
    } else {
      seen.age += tick_of(timeout_);
    }
    const bool silent = seen.age >= (seen.report ? grace_of(timeout_) : first_grace_of(timeout_));
    one_may_come = one_may_come || (!silent && !seen.report);
    reports.push_back(silent ? std::nullopt : seen.report);
  }
  if (one_may_come) return;
  const std::string verdict = hang_verdict(places_, reports, timeout_);
  if (verdict.empty()) return;
  end(board_->claim_verdict(verdict) ? verdict : "");
}

void Watchdog::board_fails(const std::string& how) {
  const std::lock_guard lock(mutex_);
  board_fails_ = fmt::format(", and {} {}", board_->folder().string(), how);
}

std::string Watchdog::alone_because() const {
  const std::lock_guard lock(mutex_);
  return board_fails_;
}

// Without files and without the others: before there is a board, and in case the file system is what hangs:
// the main thread, or the file accesses of watch(), or both.
void Watchdog::watch_alone(const std::stop_token& stop) {
  const double tick = tick_of(timeout_);
  // Rank 0 first: where all have the same to say, the launcher ends the others meanwhile.
  const double limit = timeout_ + first_grace_of(timeout_) + std::min(5.0, 0.1 * rank_);
  std::uint64_t beats = 0, rounds = 0;
  double still = 0;
  while (!ended_ && sleep(stop, tick)) {
    const Heartbeat::State state = heartbeat_.state();
    still = state.beats == beats && rounds_ == rounds ? still + tick : 0;
    beats = state.beats;
    rounds = rounds_;
    if (still < limit) continue;
    return end(fmt::format(
        "the job hangs: rank {} on {} (process {}) has made no progress in {:.0f} s, at step {} in {}'{}'{}. "
        "The job is ended, and the same command resumes a run from its last checkpoint",
        rank_, place_.host, place_.pid, still, state.step,
        state.waits_in.empty() ? "" : state.waits_in + " of ", state.operation, alone_because()));
  }
}

}  // namespace regroup
