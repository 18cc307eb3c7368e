#include "trainer/run/watchdog.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <unistd.h>
#include <utility>

#include "trainer/exit_code.h"

namespace regroup {
namespace {

// How often a rank looks at its heartbeat and at the board.
double tick_of(double timeout) { return std::clamp(timeout / 20, 0.05, 5.0); }
// How long a rank may be without a new report. Network file systems may show a change a minute late.
double grace_of(double timeout) { return 15 * tick_of(timeout); }

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

std::string host_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
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

Watchdog::Watchdog(const ProcessGroup& world, const std::filesystem::path& directory, double timeout,
                   const Log& log)
    : Watchdog{world.heartbeat(),
               gather_places(world),
               make_board(world, directory),
               world.rank(),
               timeout,
               [log](const std::string& message) { end_process(log, message); }} {}  // braces: in this order

Watchdog::Watchdog(const Heartbeat& heartbeat, std::vector<RankPlace> places, HangBoard board, int rank,
                   double timeout, End end)
    : heartbeat_(heartbeat),
      places_(std::move(places)),
      board_(std::move(board)),
      rank_(rank),
      timeout_(timeout),
      end_(std::move(end)) {
  if (timeout_ <= 0) return;
  watching_ = std::jthread([this](const std::stop_token& stop) { watch(stop); });
  watching_alone_ = std::jthread([this](const std::stop_token& stop) { watch_alone(stop); });
}

Watchdog::~Watchdog() = default;

double Watchdog::bound(double timeout) {
  constexpr double kAFewSeconds = 15;
  return timeout > 0 ? timeout + grace_of(timeout) + kAFewSeconds : std::numeric_limits<double>::infinity();
}

void Watchdog::end(const std::string& message) {
  if (!ended_.exchange(true)) end_(message);
}

void Watchdog::watch(const std::stop_token& stop) {
  while (!ended_ && sleep(stop, tick_of(timeout_))) {
    try {
      round();
      ++rounds_;
    } catch (const std::exception&) {
      // A file system that refuses is no hang. If it goes on and there is one, watch_alone() ends it.
    }
  }
  if (ended_) return;
  try {
    if (suspects_) board_.withdraw_suspicion();
    if (reports_) board_.withdraw_report();
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
    board_.suspect();
    suspects_ = true;
    seen_.assign(places_.size(), {});
  }
  if (!suspects && suspects_) {
    board_.withdraw_suspicion();
    suspects_ = false;
  }
  const HangBoard::Notices notices = board_.notices();
  if (notices.judged) return end("");
  if (!notices.suspicious.empty()) {
    board_.report(own_, places_[static_cast<std::size_t>(rank_)]);
    reports_ = true;
  } else if (reports_) {
    board_.withdraw_report();
    reports_ = false;
  }
  const auto place = std::find(notices.suspicious.begin(), notices.suspicious.end(), rank_);
  if (suspects_ && place - notices.suspicious.begin() < kJudges) judge();
}

void Watchdog::judge() {
  std::vector<std::optional<HangReport>> reports;
  for (std::size_t rank = 0; rank < places_.size(); ++rank) {
    Seen& seen = seen_[rank];
    const bool mine = static_cast<int>(rank) == rank_;
    const auto report = mine ? own_ : board_.report_of(static_cast<int>(rank));
    if (report && (!seen.report || seen.report->number != report->number)) {
      seen = {.report = report};
    } else {
      seen.age += tick_of(timeout_);
    }
    const bool silent = seen.age >= grace_of(timeout_);
    if (!silent && !seen.report) return;  // it may yet come
    reports.push_back(silent ? std::nullopt : seen.report);
  }
  const std::string verdict = hang_verdict(places_, reports, timeout_);
  if (verdict.empty()) return;
  end(board_.claim_verdict(verdict) ? verdict : "");
}

// Without files and without the others, in case the file system is what hangs: the main thread, or the file
// accesses of watch(), or both.
void Watchdog::watch_alone(const std::stop_token& stop) {
  const double tick = tick_of(timeout_);
  // Rank 0 first: where all have the same to say, the launcher ends the others meanwhile.
  const double limit = timeout_ + grace_of(timeout_) + std::min(5.0, 0.1 * rank_);
  std::uint64_t beats = 0, rounds = 0;
  double still = 0;
  while (!ended_ && sleep(stop, tick)) {
    const Heartbeat::State state = heartbeat_.state();
    still = state.beats == beats && rounds_ == rounds ? still + tick : 0;
    beats = state.beats;
    rounds = rounds_;
    if (still < limit) continue;
    const RankPlace& place = places_[static_cast<std::size_t>(rank_)];
    return end(fmt::format(
        "the job hangs: rank {} on {} (process {}) has made no progress in {:.0f} s, at step {} in {}'{}', "
        "and "
        "{} does not answer: its file system may be down. The job is ended, and the same command resumes "
        "from its last checkpoint",
        rank_, place.host, place.pid, still, state.step,
        state.waits_in.empty() ? "" : state.waits_in + " of ", state.operation, board_.folder().string()));
  }
}

}  // namespace regroup
