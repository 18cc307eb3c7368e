#include "trainer/commands/doctor_findings.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <set>

#include <fmt/ranges.h>

namespace regroup {
namespace {

std::string plural(std::size_t count, const char* word) {
  return fmt::format("{} {}{}", count, word, count == 1 ? "" : "s");
}

const RankFacts& facts_of(const JobFacts& job, int rank) {
  return job.ranks.at(static_cast<std::size_t>(rank));
}

// Findings of single hosts; those that are alike become one with the names of their hosts.
class HostFindings {
 public:
  void add(const Host& host, Finding finding) {
    const auto alike =
        std::find_if(groups_.begin(), groups_.end(), [&](const auto& g) { return g.finding == finding; });
    if (alike == groups_.end()) {
      groups_.push_back({.finding = std::move(finding), .hosts = {host.name}});
    } else {
      alike->hosts.push_back(host.name);
    }
  }
  std::vector<Finding> take() && {
    constexpr std::size_t kNamed = 4;
    std::vector<Finding> result;
    for (Group& group : groups_) {
      const std::size_t named = std::min(group.hosts.size(), kNamed);
      std::string where =
          fmt::format("{}", fmt::join(group.hosts.begin(), group.hosts.begin() + named, ", "));
      if (group.hosts.size() > named) where += fmt::format(" and {} more", group.hosts.size() - named);
      group.finding.found = fmt::format("{}: {}", where, group.finding.found);
      result.push_back(std::move(group.finding));
    }
    return result;
  }

 private:
  struct Group {
    Finding finding;
    std::vector<std::string> hosts;
  };
  std::vector<Group> groups_;
};

// How to start `ranks` ranks a host with `threads` cores each under this launcher.
std::string binding(const LauncherFacts& launcher, std::size_t ranks, int threads) {
  if (launcher.name == "mpirun" || launcher.name == "mpiexec") {
    return fmt::format("mpirun --map-by ppr:{}:node:PE={} --bind-to core", ranks, threads);
  }
  if (launcher.name == "srun") {
    return fmt::format("srun --ntasks-per-node={} --cpus-per-task={} --cpu-bind=cores", ranks, threads);
  }
  return {};
}

// ---- Cores
// ---------------------------------------------------------------------------------------------------------

struct HostCores {
  std::vector<int> united;  // cores that any rank may use
  int offered = 0;
  int threads = 0;         // of all ranks
  int most_threads = 0;    // of one rank
  int share = 1;           // cores a rank can have for itself
  double crowding = 0;     // most threads a core, over the sets of cores that ranks are held to
  std::vector<int> tight;  // that set
  bool apart = true;       // no two ranks may use the same core
};

HostCores cores_of(const JobFacts& job, const Host& host) {
  HostCores result;
  std::set<int> united;
  std::set<std::vector<int>> sets;
  std::size_t total = 0;
  for (const int rank : host.ranks) {
    const RankFacts& facts = facts_of(job, rank);
    united.insert(facts.cores.begin(), facts.cores.end());
    sets.insert(facts.cores);
    total += facts.cores.size();
    result.threads += facts.threads;
    result.most_threads = std::max(result.most_threads, facts.threads);
    result.offered = std::max(result.offered, facts.offered_cores);
  }
  result.united.assign(united.begin(), united.end());
  result.apart = total == united.size();
  result.offered = std::max(result.offered, static_cast<int>(united.size()));
  result.share = std::max(1, result.offered / static_cast<int>(host.ranks.size()));
  sets.insert(result.united);
  for (const std::vector<int>& set : sets) {
    int threads = 0;
    for (const int rank : host.ranks) {
      const std::vector<int>& cores = facts_of(job, rank).cores;
      if (std::includes(set.begin(), set.end(), cores.begin(), cores.end())) {
        threads += facts_of(job, rank).threads;
      }
    }
    const double crowding = threads / static_cast<double>(std::max<std::size_t>(set.size(), 1));
    if (crowding > result.crowding) {
      result.crowding = crowding;
      result.tight = set;
    }
  }
  return result;
}

// Binding and --threads that give every rank of the host cores of its own, as many as there are.
std::string cores_fix(const JobFacts& job, const Host& host, const HostCores& cores, int threads) {
  const std::string bound = binding(facts_of(job, host.ranks[0]).launcher, host.ranks.size(), threads);
  const std::string count = fmt::format("--threads {}", threads);
  std::string fix = bound.empty() ? count : bound;
  if (!bound.empty() && threads != cores.most_threads) fix += fmt::format(" ... trainer ... {}", count);
  if (static_cast<int>(host.ranks.size()) > cores.offered) {
    fix = fmt::format("start at most {} on a node", plural(static_cast<std::size_t>(cores.offered), "rank"));
  }
  return fix;
}

Finding judge_cores_of(const JobFacts& job, const Host& host) {
  const HostCores cores = cores_of(job, host);
  const std::string threads = plural(static_cast<std::size_t>(cores.most_threads), "thread");
  const int affordable = std::min(cores.most_threads, cores.share);
  std::vector<int> starved = host.ranks;
  std::erase_if(starved, [&](int rank) {
    return facts_of(job, rank).threads <= static_cast<int>(facts_of(job, rank).cores.size());
  });
  if (!starved.empty()) {
    const RankFacts& first = facts_of(job, starved[0]);
    return bad("cores",
               fmt::format("{} of {} have more threads than cores: {} on {} (core {})", starved.size(),
                           plural(host.ranks.size(), "rank"),
                           plural(static_cast<std::size_t>(first.threads), "thread"),
                           plural(first.cores.size(), "core"), number_list(first.cores)),
               fmt::format("threads take turns: a step takes {:.1f} times as long, or more",
                           first.threads / static_cast<double>(std::max<std::size_t>(first.cores.size(), 1))),
               cores_fix(job, host, cores, affordable));
  }
  if (cores.crowding > 1) {
    return bad("cores",
               fmt::format("ranks share cores: {:.0f} threads on {} (core {})",
                           cores.crowding * static_cast<double>(cores.tight.size()),
                           plural(cores.tight.size(), "core"), number_list(cores.tight)),
               fmt::format("threads take turns: a step takes {:.1f} times as long, or more", cores.crowding),
               cores_fix(job, host, cores, affordable));
  }
  if (job.device == "cpu" && cores.threads * 2 <= cores.offered) {
    return bad("cores",
               fmt::format("{} on {} cores: the others idle",
                           plural(static_cast<std::size_t>(cores.threads), "thread"), cores.offered),
               fmt::format("a step takes up to {:.1f} times as long as it could",
                           cores.offered / static_cast<double>(std::max(cores.threads, 1))),
               cores_fix(job, host, cores, cores.share));
  }
  return fine("cores", fmt::format("{} with {} each, on {}{}", plural(host.ranks.size(), "rank"), threads,
                                   plural(cores.united.size(), "core"),
                                   host.ranks.size() == 1 ? ""
                                   : cores.apart          ? ", each on its own"
                                                          : ", not bound"));
}

// ---- Hosts
// ---------------------------------------------------------------------------------------------------------

Finding judge_evenness(const JobFacts& job, const std::vector<Host>& hosts) {
  const auto fewer = [](const Host& a, const Host& b) { return a.ranks.size() < b.ranks.size(); };
  const auto [least, most] = std::minmax_element(hosts.begin(), hosts.end(), fewer);
  const std::size_t ranks = job.ranks.size();
  if (least->ranks.size() == most->ranks.size()) {
    const std::string each = hosts.size() == 1 ? "" : fmt::format(", {} each", hosts.front().ranks.size());
    return fine("map", fmt::format("{} on {}{}", plural(ranks, "rank"), plural(hosts.size(), "node"), each));
  }
  const std::size_t each = std::max<std::size_t>(ranks / hosts.size(), 1);
  const bool srun = job.ranks[0].launcher.name == "srun";
  return bad("map",
             fmt::format("nodes have different numbers of ranks: {} has {}, {} has {}", least->name,
                         least->ranks.size(), most->name, most->ranks.size()),
             "the nodes with fewer ranks wait at every sum for those with more",
             fmt::format("{} ranks, {}", each * hosts.size(),
                         srun ? fmt::format("srun --ntasks-per-node={}", each)
                              : fmt::format("mpirun --map-by ppr:{}:node", each)));
}

Finding judge_memory(const JobFacts& job, const Host& host) {
  const double available = static_cast<double>(facts_of(job, host.ranks[0]).memory);
  const double share = available / static_cast<double>(host.ranks.size());
  const double needed = static_cast<double>(job.rank_bytes);
  if (job.device == "cpu" && needed > share) {
    return bad("memory",
               fmt::format("{} for each rank; the model's parameters, gradients and moments alone take {}",
                           readable_bytes(share), readable_bytes(needed)),
               "the run ends for want of memory",
               fmt::format("more ranks a model and fewer a node: --tensor-parallel {} or more, on more nodes",
                           static_cast<int>(std::exp2(std::ceil(std::log2(needed / std::max(share, 1.0)))))));
  }
  // To two digits: else no two hosts were alike.
  const double unit = std::pow(10, std::floor(std::log10(std::max(share, 1.0))) - 1);
  return fine("memory", fmt::format("{} for each rank", readable_bytes(std::round(share / unit) * unit)));
}

void judge_clocks(const JobFacts& job, std::vector<Finding>& findings) {
  constexpr double kMost = 2;  // seconds
  const auto earlier = [](const RankFacts& a, const RankFacts& b) { return a.clock < b.clock; };
  const auto [first, last] = std::minmax_element(job.ranks.begin(), job.ranks.end(), earlier);
  if (last->clock - first->clock <= kMost) return;
  findings.push_back(
      note("clocks",
           fmt::format("the clocks of {} and {} differ by {:.0f} s: times of files and log lines mislead; "
                       "`chronyc makestep` on both",
                       first->host, last->host, last->clock - first->clock)));
}

}  // namespace

std::vector<Finding> judge(const JobFacts& job) {
  std::vector<Finding> findings;
  for (const auto& part : {judge_launcher, judge_hosts, judge_cores, judge_placement, judge_signals,
                           judge_directory, judge_devices, judge_limits}) {
    for (Finding& finding : part(job)) findings.push_back(std::move(finding));
  }
  return findings;
}

std::vector<Finding> judge_launcher(const JobFacts& job) {
  const LauncherFacts& launcher = job.ranks[0].launcher;
  const std::string pmix = launcher.pmix.empty() ? "" : fmt::format(", PMIx {}", launcher.pmix);
  const char* cost = "each process would run on its own, all in the same run directory";
  if (job.ranks.size() == 1 && launcher.ranks > 1) {
    const bool srun = launcher.name == "srun";
    return {bad("launcher",
                fmt::format("{} started {} tasks, but each is alone: they do not find one another{}",
                            launcher.name, launcher.ranks, pmix),
                cost,
                srun ? "srun --mpi=pmix (`srun --mpi=list` tells whether it is there), or mpirun in its place"
                     : "the mpirun of the MPI that this trainer was built with, Open MPI")};
  }
  if (job.ranks.size() == 1 && launcher.name.empty() && launcher.allocated_ranks > 1) {
    return {bad("launcher",
                fmt::format("one rank alone in Slurm job {}, which has {} tasks", launcher.job,
                            launcher.allocated_ranks),
                "the other tasks' nodes and cores idle",
                "srun --mpi=pmix trainer ..., or mpirun trainer ...")};
  }
  if (launcher.name.empty()) return {fine("launcher", "none, one rank")};
  const std::string job_name = launcher.job.empty() ? "" : fmt::format(", Slurm job {}", launcher.job);
  return {fine("launcher", launcher.name + pmix + job_name)};
}

std::vector<Finding> judge_hosts(const JobFacts& job) {
  const std::vector<Host> hosts = hosts_of(job);
  std::vector<Finding> findings = {judge_evenness(job, hosts)};
  HostFindings memory;
  for (const Host& host : hosts) memory.add(host, judge_memory(job, host));
  for (Finding& finding : std::move(memory).take()) findings.push_back(std::move(finding));
  judge_clocks(job, findings);
  if (!job.model_error.empty()) {
    findings.push_back(bad("model", job.model_error, "the run does not start", "put that right"));
  }
  return findings;
}

std::vector<Finding> judge_cores(const JobFacts& job) {
  HostFindings findings;
  for (const Host& host : hosts_of(job)) findings.add(host, judge_cores_of(job, host));
  return std::move(findings).take();
}

std::vector<Finding> judge_signals(const JobFacts& job) {
  const char* cost = "at the time limit the batch system ends the run before it has saved";
  const char* fix = "begin the last command of a script around the trainer with exec";
  const auto wrapped = ranks_where(job, [](const RankFacts& r) { return !r.wrapper.empty(); });
  if (!wrapped.empty()) {
    return {bad("signals",
                fmt::format("SIGUSR1 would end {}, which stands between the launcher and {}",
                            facts_of(job, wrapped[0]).wrapper, ranks_text(wrapped)),
                "the signal that asks for a checkpoint ends the job without one", fix)};
  }
  if (!job.signals_forbidden.empty()) {
    return {bad("signals", job.signals_forbidden, cost,
                "send SIGUSR1 to the ranks themselves, or touch the file 'stop' in the run directory")};
  }
  if (job.signalled.empty()) return {note("signals", "not tested: " + job.signals_untested)};
  const auto missed = ranks_where(job, [](const RankFacts& r) { return !r.signalled; });
  if (missed.empty()) {
    return {fine("signals", fmt::format("SIGUSR1 to {} reaches {}", job.signalled,
                                        job.ranks.size() == 1 ? "the rank" : "every rank"))};
  }
  return {bad("signals",
              fmt::format("SIGUSR1 to {} does not reach {}", job.signalled,
                          missed.size() == job.ranks.size() ? "any rank" : ranks_text(missed)),
              cost, fmt::format("{}; or touch the file 'stop' in the run directory", fix))};
}

std::vector<Finding> judge_devices(const JobFacts& job) {
  const std::size_t count = job.ranks.size();
  const std::string sums = count == 1 ? ""
                                      : fmt::format("{:.2f} GB/s for sums of 64 MiB over {} ranks ({})",
                                                    job.sum_rate * 1e-9, count, job.transport);
  if (!job.device_error.empty()) {
    return {bad("device", job.device_error, "the run does not start", "put that right, or --device cpu")};
  }
  std::vector<Finding> findings;
  std::vector<double> peaks;
  for (const RankFacts& rank : job.ranks) peaks.push_back(rank.peak);
  std::sort(peaks.begin(), peaks.end());
  const double median = (peaks[(count - 1) / 2] + peaks[count / 2]) / 2;
  constexpr double kSlow = 0.7;
  for (std::size_t rank = 0; rank < count; ++rank) {
    const RankFacts& facts = job.ranks[rank];
    if (facts.peak >= kSlow * median) continue;
    findings.push_back(bad("device",
                           fmt::format("rank {} on {} reaches {:.0f} GFLOP/s, the median rank {:.0f}", rank,
                                       facts.host, facts.peak * 1e-9, median * 1e-9),
                           fmt::format("all others wait for it: a step takes {:.1f} times as long",
                                       median / std::max(facts.peak, 1.0)),
                           fmt::format("look for other programs on {0} and for a slow clock, or leave it out "
                                       "(sbatch --exclude={0})",
                                       facts.host)));
  }
  std::set<std::string> devices;
  for (const RankFacts& rank : job.ranks) devices.insert(rank.device);
  const bool shared = job.device == "cuda" && devices.size() < count;
  if (shared) {
    findings.push_back(bad("device", fmt::format("{} ranks share {} GPUs", count, devices.size()),
                           "they take turns, and their tensors travel through host memory",
                           fmt::format("one rank a GPU: {} on a node",
                                       plural(static_cast<std::size_t>(job.ranks[0].devices), "rank"))));
  }
  if (job.device == "cuda" && count > 1 && !shared && !job.transport.starts_with("NCCL")) {
    findings.push_back(bad("device", "tensors travel through host memory (" + job.transport + ")",
                           "every sum crosses the host's links twice",
                           "a trainer built with NCCL, and --collectives nccl"));
  }
  HostFindings idle;
  for (const Host& host : hosts_of(job)) {
    const int seen = facts_of(job, host.ranks[0]).devices;
    // A rank that Slurm shows one GPU sees no other.
    if (job.device != "cuda" || seen <= static_cast<int>(host.ranks.size())) continue;
    idle.add(host, bad("device", fmt::format("{} of {} GPUs are used", host.ranks.size(), seen),
                       "the other GPUs idle", fmt::format("{} ranks a node, one a GPU", seen)));
  }
  for (Finding& finding : std::move(idle).take()) findings.push_back(std::move(finding));
  const std::string& level = job.ranks[0].cpu_level;
  const auto other = ranks_where(job, [&](const RankFacts& rank) { return rank.cpu_level != level; });
  if (!other.empty()) {
    findings.push_back(note(
        "device",
        fmt::format("processor level {} on {}, {} on rank 0: the same up to rounding at the speed of the "
                    "slowest; REGROUP_CPU_LEVEL=LEVEL makes them alike",
                    facts_of(job, other[0]).cpu_level, ranks_text(other), level)));
  }
  const bool cuda = job.device == "cuda";
  findings.push_back(
      fine("device", fmt::format("{}: {} matrix products at {:.0f} GFLOP/s a rank{}{}",
                                 cuda ? "GPUs" : fmt::format("processors: level {}", level), job.precision,
                                 median * 1e-9, sums.empty() ? "" : "; ", sums)));
  return findings;
}

std::vector<Finding> judge_limits(const JobFacts& job) {
  std::vector<Finding> findings;
  // Sockets to every other rank, and the files of a run.
  const std::uint64_t files = 2 * job.ranks.size() + 128;
  const auto few = ranks_where(job, [&](const RankFacts& r) { return r.open_files < files; });
  if (!few.empty()) {
    findings.push_back(bad("limits",
                           fmt::format("{} may open {} files; {} ranks need about {}", ranks_text(few),
                                       facts_of(job, few[0]).open_files, job.ranks.size(), files),
                           "the run ends when a connection or a file cannot be opened",
                           fmt::format("ulimit -n {}", std::max<std::uint64_t>(files, 65536))));
  }
  constexpr std::uint64_t kLeastLocked = std::uint64_t{1} << 30;
  const auto unlocked =
      ranks_where(job, [](const RankFacts& r) { return r.infiniband && r.locked_memory < kLeastLocked; });
  if (!unlocked.empty()) {
    findings.push_back(
        bad("limits",
            fmt::format("{} may lock {} of memory, and there is InfiniBand", ranks_text(unlocked),
                        readable_bytes(static_cast<double>(facts_of(job, unlocked[0]).locked_memory))),
            "InfiniBand needs locked memory: messages go the slow way, or fail",
            "ulimit -l unlimited: LimitMEMLOCK=infinity of slurmd, or /etc/security/limits.conf"));
  }
  const auto small = ranks_where(job, [](const RankFacts& r) { return r.file_size != kNoLimit; });
  if (!small.empty()) {
    const std::uint64_t limit = facts_of(job, small[0]).file_size;
    const std::string found = fmt::format("{} may write files of {} at most", ranks_text(small),
                                          readable_bytes(static_cast<double>(limit)));
    if (job.largest_file != 0 && limit >= job.largest_file) {
      findings.push_back(note("limits", found));
    } else {
      findings.push_back(
          bad("limits", found, "a checkpoint that is larger cannot be saved", "ulimit -f unlimited"));
    }
  }
  if (findings.empty())
    findings.push_back(fine("limits", "open files, file sizes and locked memory suffice"));
  return findings;
}

Finding fine(std::string subject, std::string found) {
  return {.subject = std::move(subject), .found = std::move(found)};
}

Finding note(std::string subject, std::string found) {
  return {.verdict = Verdict::kNote, .subject = std::move(subject), .found = std::move(found)};
}

Finding bad(std::string subject, std::string found, std::string cost, std::string fix) {
  return {.verdict = Verdict::kBad,
          .subject = std::move(subject),
          .found = std::move(found),
          .cost = std::move(cost),
          .fix = std::move(fix)};
}

std::vector<int> ranks_where(const JobFacts& job, const std::function<bool(const RankFacts&)>& condition) {
  std::vector<int> result;
  for (std::size_t rank = 0; rank < job.ranks.size(); ++rank) {
    if (condition(job.ranks[rank])) result.push_back(static_cast<int>(rank));
  }
  return result;
}

std::string ranks_text(const std::vector<int>& ranks) {
  return fmt::format("rank{} {}", ranks.size() == 1 ? "" : "s", number_list(ranks));
}

std::vector<Host> hosts_of(const JobFacts& job) {
  std::vector<Host> hosts;
  std::map<std::string, std::size_t> places;
  for (std::size_t rank = 0; rank < job.ranks.size(); ++rank) {
    const std::string& name = job.ranks[rank].host;
    const auto [place, is_new] = places.emplace(name, hosts.size());
    if (is_new) hosts.push_back({.name = name, .ranks = {}});
    hosts[place->second].ranks.push_back(static_cast<int>(rank));
  }
  return hosts;
}

std::string number_list(const std::vector<int>& numbers) {
  constexpr std::size_t kMostRuns = 8;
  std::vector<std::string> runs;
  for (std::size_t begin = 0; begin < numbers.size();) {
    std::size_t end = begin + 1;
    while (end < numbers.size() && numbers[end] == numbers[end - 1] + 1) ++end;
    if (runs.size() == kMostRuns) {
      runs.push_back("...");
      break;
    }
    runs.push_back(end - begin == 1 ? fmt::format("{}", numbers[begin])
                                    : fmt::format("{}-{}", numbers[begin], numbers[end - 1]));
    begin = end;
  }
  return fmt::format("{}", fmt::join(runs, ", "));
}

std::string readable_bytes(double bytes) {
  constexpr std::array<const char*, 5> kUnits = {"bytes", "kB", "MB", "GB", "TB"};
  std::size_t unit = 0;
  for (; bytes >= 1000 && unit + 1 < kUnits.size(); ++unit) bytes /= 1000;
  return fmt::format("{:.{}f} {}", bytes, unit == 0 || bytes >= 100 ? 0 : 1, kUnits[unit]);
}

}  // namespace regroup
