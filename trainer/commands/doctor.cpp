#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <unistd.h>

#include "kernels/make_backend.h"
#include "kernels/matmul_peak.h"
#include "trainer/commands/commands.h"
#include "trainer/commands/doctor_directory.h"
#include "trainer/commands/doctor_findings.h"
#include "trainer/commands/doctor_host.h"
#include "trainer/exit_code.h"
#include "trainer/formats/file_plan.h"
#include "trainer/model/parameters.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/model_options.h"
#include "trainer/run/rank_device.h"
#include "trainer/run/watchdog.h"

namespace regroup {
namespace {

// The model of the run, where the options name one. Collective.
std::optional<ModelConfig> model_of(const Options& options, const ProcessGroup& world) {
  if (!options.init_from.empty()) return find_checkpoint(world, options.init_from).config;
  constexpr std::array<const char*, 6> kSizes = {"model", "d-model", "d-kv", "d-ff", "heads", "layers"};
  const bool named = std::any_of(kSizes.begin(), kSizes.end(),
                                 [&](const char* name) { return options.given.contains(name); });
  if (!named) return std::nullopt;
  std::optional<ModelConfig> config;
  world.run_together([&] { config = pretrained_config(options, ModelConfig().vocab_size); });
  return config;
}

void note_sizes(const Options& options, const ProcessGroup& world, JobFacts& job) {
  const std::optional<ModelConfig> config = model_of(options, world);
  if (!config) return;
  const auto parameters = static_cast<std::uint64_t>(parameter_count(*config));
  constexpr std::uint64_t kFloat = sizeof(float);
  const std::uint64_t moments = options.optimizer == "adamw" ? 2 * kFloat : 0;  // Adafactor's are small
  const auto weight = static_cast<std::uint64_t>(size_of(compute_dtype(options)));
  job.largest_file = std::min(parameters * std::max(kFloat, moments), FileOptions().max_file_bytes);
  job.checkpoint_bytes = parameters * (kFloat + moments);
  job.kept_checkpoints = static_cast<std::uint64_t>(options.keep_last);
  const auto shares = static_cast<std::uint64_t>(std::max(options.layout.tensor_parallel, 1));
  job.rank_bytes = parameters * (kFloat + weight + kFloat + moments) / shares;  // masters, weights, gradients
}

// FLOP/s of this rank while all compute. What is slow only once (another program's moment) is measured again.
double measure_peak(const ProcessGroup& world, Backend& backend, DType dtype) {
  constexpr int kRounds = 5;
  constexpr double kAlike = 0.8;
  double best = 0;
  for (int round = 0; round < kRounds; ++round) {
    world.barrier();
    best = std::max(best, measure_matmul_peak(backend, dtype));
    std::array<double, 2> extremes = {best, -best};
    world.all_reduce(extremes, ReduceOp::kMax);
    if (-extremes[1] >= kAlike * extremes[0]) break;
  }
  return best;
}

void try_device(const Options& options, const ProcessGroup& world, const Log& log, RankFacts& facts,
                JobFacts& job) {
  facts.devices = options.device == "cuda" ? cuda_device_count() : 0;
  const RankDevice device = open_device(options, world, log);
  Backend& backend = *device.backend;
  facts.device = backend.device_id();
  facts.device_node = numa_node_of(backend.bus_id());
  facts.cpu_level = processor_level(options);
  facts.peak = measure_peak(world, backend, compute_dtype(options));
  if (world.size() == 1) return;
  const auto all = device.communicators("all", world);
  job.transport = all->transport();
  job.sum_rate = measure_all_reduce(backend, *all);
  if (options.layout.tensor_parallel == 1) return;  // the one axis is that of all ranks
  Layout layout;
  world.run_together([&] { layout = complete_layout(options.layout, world.size()); });
  const Mesh mesh(world, layout, {}, device.communicators);
  log_links(backend, mesh, log);
}

// Runs `check`; an error that every rank has is text, and the report goes on. Another ends the job.
template <class Check>
std::string failure_on_all(Check&& check) {
  try {
    check();
  } catch (const Error& error) {
    if (!error.on_every_rank()) throw;
    return error.what();
  }
  return "";
}

constexpr double kPatience = 120;  // seconds for a check that hangs, on a dead file system or link

// Where the watchdogs meet: not in the run directory, which is on trial. They make it when a check hangs;
// those of other hosts are then without reports, and end by themselves.
std::filesystem::path board_directory(const ProcessGroup& world) {
  std::error_code ignored;
  const auto now = std::chrono::system_clock::now().time_since_epoch().count();
  return std::filesystem::temp_directory_path(ignored) /
         world.broadcast(fmt::format("regroup-doctor-{}-{}", getpid(), now));
}

JobFacts examine(const Options& options, const ProcessGroup& world,
                 const std::map<std::string, std::string>& environment, const SignalWatch& watch,
                 const Log& log) {
  const Watchdog watchdog(world, board_directory(world), std::min(options.hang_timeout, kPatience), log);
  JobFacts job{.device = options.device,
               .tensor_parallel = options.layout.tensor_parallel,
               .precision = options.precision,
               .directory = options.run.string()};
  const ProcessGroup host = world.split_by_host();
  RankFacts facts = host_facts(launcher_of(environment), threads_of(options.threads, host.size()));
  world.barrier();
  facts.clock = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();

  log.info("signals ...");  // so that it is clear where a check hangs
  const SignalTrial signals = try_signal(world, facts, watch, environment);
  facts.signalled = signals.received;
  job.signalled = signals.signalled;
  job.signals_untested = signals.untested;
  job.signals_forbidden = signals.forbidden;

  if (!options.run.empty()) {
    log.info("run directory ...");
    const DirectoryTrial trial = try_directory(world, options.run);
    facts.directory = trial.facts;
    job.directory_error = trial.error;
  }
  log.info("device and links ...");
  job.device_error = failure_on_all([&] { try_device(options, world, log, facts, job); });
  job.model_error = failure_on_all([&] { note_sizes(options, world, job); });
  for (const std::string& text : world.all_gather(to_json(facts))) {
    job.ranks.push_back(rank_facts_from_json(text));
  }
  return job;
}

// Prints the findings; whether a run would suffer.
bool report(const std::vector<Finding>& findings, bool prints) {
  const auto is_bad = [](const Finding& finding) { return finding.verdict == Verdict::kBad; };
  const auto count = std::count_if(findings.begin(), findings.end(), is_bad);
  if (!prints) return count > 0;
  for (const Finding& finding : findings) {
    const char* verdict = finding.verdict == Verdict::kFine ? "ok" : is_bad(finding) ? "BAD" : "note";
    fmt::print("{:<5} {:<10} {}\n", verdict, finding.subject, finding.found);
    if (!finding.cost.empty()) fmt::print("{:16} costs: {}\n", "", finding.cost);
    if (!finding.fix.empty()) fmt::print("{:16} fix: {}\n", "", finding.fix);
  }
  if (count == 0) {
    fmt::print("nothing found that a run would suffer from\n");
  } else {
    fmt::print("a run would suffer: {} to put right\n",
               count == 1 ? "one thing" : fmt::format("{} things", count));
  }
  return count > 0;
}

}  // namespace

int doctor_command(const Options& options, const ProcessGroup& world, const Log& log) {
  const SignalWatch watch;  // to the end: a signal may come late
  const std::map<std::string, std::string> environment = start_environment();
  const LauncherFacts launcher = launcher_of(environment);
  if (world.size() == 1 && (launcher.ranks > 1 || launcher.allocated_ranks > 1)) {
    // Each of the processes comes here by itself: they would disturb each other's measurements.
    const JobFacts alone{.ranks = {RankFacts{.launcher = launcher}}};
    if (report(judge_launcher(alone), launcher.process == 0)) return kUserFailure;
  }
  const JobFacts job = examine(options, world, environment, watch, log);
  return report(judge(job), world.rank() == 0) ? kUserFailure : kDone;
}

}  // namespace regroup
