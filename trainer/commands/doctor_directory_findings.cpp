// What the trial of the run directory says about a run.
#include <algorithm>

#include <fmt/format.h>

#include "trainer/commands/doctor_findings.h"

namespace regroup {
namespace {

struct Trial {
  double rate = 0;     // bytes/s of all ranks together, flushed
  double slowest = 0;  // seconds of a small flush
  std::uint64_t written = 0, free = kNoLimit;
};

Trial summary_of(const JobFacts& job) {
  Trial trial;
  double seconds = 0;
  for (const RankFacts& rank : job.ranks) {
    trial.written += rank.directory.written;
    seconds = std::max(seconds, rank.directory.write_seconds);
    trial.slowest = std::max(trial.slowest, rank.directory.flush_seconds);
    trial.free = std::min(trial.free, rank.directory.free);
  }
  trial.rate = static_cast<double>(trial.written) / std::max(seconds, 1e-6);
  return trial;
}

// What makes the directory unfit, whatever its speed.
std::vector<Finding> judge_use(const JobFacts& job) {
  std::vector<Finding> findings;
  const auto directory_of = [&](const std::vector<int>& ranks) -> const DirectoryFacts& {
    return job.ranks[static_cast<std::size_t>(ranks.front())].directory;
  };
  const auto failed = ranks_where(job, [](const RankFacts& r) { return !r.directory.error.empty(); });
  if (!failed.empty()) {
    findings.push_back(bad("directory", ranks_text(failed) + ": " + directory_of(failed).error,
                           "no checkpoint can be saved there", "put that right, or give another --run"));
  }
  const auto stale = ranks_where(job, [](const RankFacts& r) {
    return r.directory.error.empty() && r.directory.seen && !r.directory.renamed;
  });
  if (!stale.empty()) {
    findings.push_back(
        note("directory",
             fmt::format("{} still saw the old file seconds after a rename replaced it: wait a minute "
                         "before a run starts again on other nodes",
                         ranks_text(stale))));
  }
  const auto lockless = ranks_where(job, [](const RankFacts& r) { return !r.directory.lock_error.empty(); });
  if (!lockless.empty()) {
    findings.push_back(bad("directory",
                           fmt::format("{}: {}", ranks_text(lockless), directory_of(lockless).lock_error),
                           "a run does not start without a lock on its directory",
                           "mount the file system with locks (Lustre: -o flock, NFS: version 4)"));
  }
  const auto unlocked = ranks_where(job, [](const RankFacts& r) {
    return r.directory.seen && r.directory.lock_error.empty() && !r.directory.locked_out;
  });
  if (!unlocked.empty()) {
    findings.push_back(
        bad("directory", fmt::format("a lock of rank 0 does not hold on {}", ranks_text(unlocked)),
            "two jobs on one run directory are not kept apart",
            "mount the file system with locks for all nodes (Lustre: -o flock, NFS: version 4)"));
  }
  return findings;
}

std::vector<Finding> judge_speed_and_space(const JobFacts& job, const Trial& trial) {
  std::vector<Finding> findings;
  constexpr double kSlowFlush = 1;         // seconds
  constexpr double kSlowCheckpoint = 600;  // seconds
  if (trial.slowest > kSlowFlush) {
    findings.push_back(bad("directory", fmt::format("flushing a small file takes {:.1f} s", trial.slowest),
                           "every checkpoint flushes several files and directories",
                           "another file system for --run, or a larger --save-every"));
  }
  const double checkpoint = static_cast<double>(job.checkpoint_bytes);
  const double seconds = checkpoint / trial.rate;
  if (seconds > kSlowCheckpoint) {
    findings.push_back(
        bad("directory",
            fmt::format("a checkpoint of {} takes {:.0f} minutes at {}/s", readable_bytes(checkpoint),
                        seconds / 60, readable_bytes(trial.rate)),
            "as much time before the limit must be kept for the last one",
            "a faster file system for --run; more time before the limit (--signal of sbatch)"));
  }
  const double needed = checkpoint * static_cast<double>(job.kept_checkpoints + 1);
  if (static_cast<double>(trial.free) < needed) {
    findings.push_back(bad(
        "directory",
        fmt::format("{} are free; {} checkpoints of {} take {}",
                    readable_bytes(static_cast<double>(trial.free)), job.kept_checkpoints + 1,
                    readable_bytes(checkpoint), readable_bytes(needed)),
        "the disk is full in the middle of the run", "make room, a smaller --keep-last, or another --run"));
  }
  return findings;
}

}  // namespace

std::vector<Finding> judge_directory(const JobFacts& job) {
  if (job.directory.empty()) return {note("directory", "not tested: no --run is given")};
  if (!job.directory_error.empty()) {
    return {bad("directory", job.directory_error, "the run does not start",
                "give a --run that every node may write to")};
  }
  const auto blind =
      ranks_where(job, [](const RankFacts& r) { return r.directory.error.empty() && !r.directory.seen; });
  if (!blind.empty()) {
    return {bad("directory",
                fmt::format("{} ({}) do not see in {} what rank 0 ({}) writes there", ranks_text(blind),
                            job.ranks[static_cast<std::size_t>(blind.front())].host, job.directory,
                            job.ranks[0].host),
                "checkpoints would be torn into pieces, one on each node",
                "a --run on a file system that all nodes share")};
  }
  std::vector<Finding> findings = judge_use(job);
  const Trial trial = summary_of(job);
  if (trial.written == 0) return findings;
  for (Finding& finding : judge_speed_and_space(job, trial)) findings.push_back(std::move(finding));
  const std::string& filesystem = job.ranks[0].directory.filesystem;
  findings.push_back(
      fine("directory",
           fmt::format("{}{}{}: {}/s written and flushed by all ranks at once, a small file "
                       "flushed in {:.1f} ms at most, {} free",
                       job.directory, filesystem.empty() ? "" : ", ", filesystem, readable_bytes(trial.rate),
                       trial.slowest * 1e3, readable_bytes(static_cast<double>(trial.free)))));
  return findings;
}

}  // namespace regroup
