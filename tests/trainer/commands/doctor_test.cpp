#include <algorithm>
#include <numeric>
#include <regex>

#include <gtest/gtest.h>

#include "trainer/commands/doctor_facts.h"
#include "trainer/commands/doctor_findings.h"

namespace regroup {
namespace {

std::vector<int> cores(int first, int count) {
  std::vector<int> result(static_cast<std::size_t>(count));
  std::iota(result.begin(), result.end(), first);
  return result;
}

LauncherFacts mpirun(int ranks) { return {.name = "mpirun", .pmix = "4.2.2", .ranks = ranks}; }
LauncherFacts srun(int ranks) {
  return {.name = "srun", .pmix = "4.2.2", .ranks = ranks, .job = "7", .step = "0"};
}

// `hosts` hosts of 16 cores with four ranks of four threads, each on its own cores; nothing is wrong.
JobFacts healthy(int hosts = 2, const std::string& launcher = "mpirun") {
  JobFacts job{
      .transport = "MPI", .sum_rate = 2e9, .signalled = "mpirun (process 12)", .directory = "runs/a"};
  for (int host = 0; host < hosts; ++host) {
    for (int local = 0; local < 4; ++local) {
      RankFacts rank{.host = "node" + std::to_string(host + 1),
                     .launcher = launcher == "srun" ? srun(4 * hosts) : mpirun(4 * hosts),
                     .cores = cores(4 * local, 4),
                     .offered_cores = 16,
                     .threads = 4,
                     .signalled = true,
                     .clock = 1.7e9,
                     .memory = std::uint64_t{64} << 30,
                     .open_files = 1024,
                     .peak = 4e11};
      rank.directory = {.seen = true,
                        .renamed = true,
                        .locked_out = true,
                        .written = std::uint64_t{64} << 20,
                        .write_seconds = 0.5,
                        .flush_seconds = 0.01,
                        .free = std::uint64_t{1} << 40,
                        .filesystem = "lustre"};
      job.ranks.push_back(rank);
    }
  }
  return job;
}

std::vector<Finding> bad_ones(const JobFacts& job) {
  std::vector<Finding> findings = judge(job);
  std::erase_if(findings, [](const Finding& finding) { return finding.verdict != Verdict::kBad; });
  return findings;
}

// Exactly one bad finding, on `subject`, that says what was found and how to put it right.
void expect_bad(const JobFacts& job, const std::string& subject, const std::string& found,
                const std::string& fix) {
  const std::vector<Finding> findings = bad_ones(job);
  ASSERT_EQ(findings.size(), 1U) << (findings.empty() ? "" : findings[1].found);
  EXPECT_EQ(findings[0].subject, subject);
  EXPECT_TRUE(std::regex_search(findings[0].found, std::regex(found))) << findings[0].found;
  EXPECT_NE(findings[0].fix.find(fix), std::string::npos) << findings[0].fix;
  EXPECT_FALSE(findings[0].cost.empty());
}

// No bad finding, and on `subject` one with this verdict and text.
void expect_fair(const JobFacts& job, const std::string& subject, Verdict verdict, const std::string& found) {
  const std::vector<Finding> findings = judge(job);
  EXPECT_TRUE(bad_ones(job).empty()) << bad_ones(job)[0].found;
  EXPECT_TRUE(std::any_of(findings.begin(), findings.end(),
                          [&](const Finding& finding) {
                            return finding.subject == subject && finding.verdict == verdict &&
                                   std::regex_search(finding.found, std::regex(found));
                          }))
      << subject << ": " << found;
}

TEST(Doctor, HealthyJobHasNoBadFindings) {
  for (const char* launcher : {"mpirun", "srun"}) {
    const JobFacts job = healthy(2, launcher);
    EXPECT_TRUE(bad_ones(job).empty()) << bad_ones(job)[0].found;
  }
  expect_fair(healthy(), "map", Verdict::kFine, "8 ranks on 2 nodes, 4 each");
  expect_fair(healthy(), "cores", Verdict::kFine, "node1, node2: 4 ranks with 4 threads each.*on its own");
  expect_fair(healthy(), "launcher", Verdict::kFine, "mpirun, PMIx 4.2.2");
  expect_fair(healthy(), "directory", Verdict::kFine, "runs/a, lustre: 1.1 GB/s .* 10.0 ms");
}

TEST(Doctor, HostsThatAreAlikeAreOneFinding) {
  const JobFacts job = healthy(6);
  expect_fair(job, "cores", Verdict::kFine, "^node1, node2, node3, node4 and 2 more: ");
  EXPECT_EQ(judge_cores(job).size(), 1U);
}

// ---- Placement
// -----------------------------------------------------------------------------------------------------

// Two GPUs at each of two sockets; Slurm's default deals the ranks to the sockets in turn.
JobFacts on_two_sockets(const std::string& launcher, bool dealt_in_turn) {
  JobFacts job = healthy(1, launcher);
  for (std::size_t rank = 0; rank < job.ranks.size(); ++rank) {
    job.ranks[rank].device_node = static_cast<int>(rank / 2);
    job.ranks[rank].core_nodes = {static_cast<int>(dealt_in_turn ? rank % 2 : rank / 2)};
  }
  return job;
}

TEST(DoctorPlacement, GpusOfTheOtherSocket) {
  EXPECT_TRUE(judge_placement(on_two_sockets("srun", false)).empty());
  expect_bad(on_two_sockets("srun", true), "placement", "ranks 1-2: .*NUMA node 1, GPU of 0",
             "--distribution=block:block");
  expect_bad(on_two_sockets("mpirun", true), "placement", "ranks 1-2: ", "--rank-by slot");
  JobFacts unbound = on_two_sockets("srun", true);
  for (RankFacts& rank : unbound.ranks) rank.core_nodes = {0, 1};
  EXPECT_TRUE(judge_placement(unbound).empty());
}

TEST(DoctorPlacement, TensorParallelGroupsThatSpanHosts) {
  JobFacts job = healthy(2, "srun");
  job.tensor_parallel = 4;
  EXPECT_TRUE(judge_placement(job).empty());
  for (std::size_t rank = 0; rank < job.ranks.size(); ++rank) {
    job.ranks[rank].host = rank % 2 == 0 ? "node1" : "node2";  // cyclic
  }
  const auto placement = [&] { return judge_placement(job).at(0); };
  EXPECT_EQ(placement().found, "2 of 2 tensor-parallel groups span hosts, group 0 with ranks 0-3 for one");
  EXPECT_NE(placement().fix.find("--distribution=block:block"), std::string::npos) << placement().fix;
  job = healthy(2);
  job.tensor_parallel = 8;
  EXPECT_EQ(placement().fix, "a --tensor-parallel that divides the 4 ranks of a host");
}

// ---- Launcher
// ------------------------------------------------------------------------------------------------------

TEST(DoctorLauncher, FromTheEnvironment) {
  LauncherFacts facts = launcher_of({});
  EXPECT_EQ(facts.name, "");
  facts = launcher_of({{"OMPI_COMM_WORLD_SIZE", "4"},
                       {"OMPI_COMM_WORLD_RANK", "3"},
                       {"PMIX_NAMESPACE", "1761280001"},
                       {"PMIX_VERSION", "4.2.2rc2"}});
  EXPECT_EQ(facts.name, "mpirun");
  EXPECT_EQ(facts.ranks, 4);
  EXPECT_EQ(facts.process, 3);
  EXPECT_EQ(facts.pmix, "4.2.2rc2");
  facts = launcher_of({{"SLURM_JOB_ID", "7"},
                       {"SLURM_STEP_ID", "2"},
                       {"SLURM_STEP_NUM_TASKS", "8"},
                       {"SLURM_NTASKS", "8"},
                       {"SLURM_PROCID", "5"},
                       {"SLURM_CPUS_ON_NODE", "16"},
                       {"PMIX_NAMESPACE", "slurm.pmix.7.2"}});
  EXPECT_EQ(facts.name, "srun");
  EXPECT_EQ(facts.ranks, 8);
  EXPECT_EQ(facts.process, 5);
  EXPECT_EQ(facts.job, "7");
  EXPECT_EQ(facts.step, "2");
  EXPECT_EQ(facts.allocated_cores, 16);
  facts = launcher_of({{"PMI_SIZE", "4"}, {"PMI_RANK", "1"}});
  EXPECT_EQ(facts.name, "mpiexec");
  EXPECT_EQ(facts.ranks, 4);
}

TEST(DoctorLauncher, MpirunInsideASlurmStepIsMpirun) {
  // Its daemons on other nodes were started by srun, one a node.
  const LauncherFacts facts = launcher_of({{"SLURM_JOB_ID", "7"},
                                           {"SLURM_STEP_ID", "0"},
                                           {"SLURM_STEP_NUM_TASKS", "1"},
                                           {"OMPI_COMM_WORLD_SIZE", "8"},
                                           {"PMIX_NAMESPACE", "1761280001"}});
  EXPECT_EQ(facts.name, "mpirun");
  EXPECT_EQ(facts.ranks, 8);
  EXPECT_EQ(facts.job, "7");
}

JobFacts alone(const LauncherFacts& launcher) {
  JobFacts job = healthy(1);
  job.ranks.resize(1);
  job.ranks[0].launcher = launcher;
  job.ranks[0].offered_cores = 4;
  return job;
}

TEST(DoctorLauncher, RanksThatDoNotFindOneAnother) {
  expect_bad(alone(srun(4)), "launcher", "srun started 4 tasks, but each is alone", "srun --mpi=pmix");
  expect_bad(alone({.name = "mpiexec", .ranks = 4}), "launcher", "mpiexec started 4 tasks",
             "mpirun of the MPI");
  expect_bad(alone({.job = "7", .allocated_ranks = 4}), "launcher", "one rank alone in Slurm job 7.* 4 tasks",
             "srun --mpi=pmix");
  expect_fair(alone({}), "launcher", Verdict::kFine, "none");
  expect_fair(alone({.job = "7", .allocated_ranks = 1}), "launcher", Verdict::kFine, "none");
  expect_fair(alone(mpirun(1)), "launcher", Verdict::kFine, "mpirun");
}

// ---- Map
// -----------------------------------------------------------------------------------------------------------

TEST(DoctorMap, UnevenNodes) {
  JobFacts job = healthy();
  job.ranks.pop_back();
  job.ranks.pop_back();
  job.ranks[4].threads = job.ranks[5].threads = 8;
  job.ranks[4].cores = cores(0, 8);
  job.ranks[5].cores = cores(8, 8);
  expect_bad(job, "map", "node2 has 2, node1 has 4", "6 ranks, mpirun --map-by ppr:3:node");
  for (RankFacts& rank : job.ranks) rank.launcher = srun(6);
  expect_bad(job, "map", "node2 has 2, node1 has 4", "6 ranks, srun --ntasks-per-node=3");
}

TEST(DoctorMap, MemoryOfARank) {
  JobFacts job = healthy();
  job.rank_bytes = std::uint64_t{15} << 30;  // of 16 GiB
  expect_fair(job, "memory", Verdict::kFine, "node1, node2: 17.0 GB for each rank");
  job.rank_bytes = std::uint64_t{40} << 30;
  expect_bad(job, "memory", "alone take 42.9 GB", "--tensor-parallel 4");
  job.device = "cuda";
  job.transport = "NCCL 2.28";
  for (std::size_t i = 0; i < job.ranks.size(); ++i) job.ranks[i].device = std::to_string(i);
  EXPECT_TRUE(bad_ones(job).empty());
}

TEST(DoctorMap, ClocksAreANote) {
  JobFacts job = healthy();
  for (std::size_t rank = 4; rank < 8; ++rank) job.ranks[rank].clock += 1;
  for (const Finding& finding : judge(job)) EXPECT_NE(finding.subject, "clocks");
  for (std::size_t rank = 4; rank < 8; ++rank) job.ranks[rank].clock += 9;
  expect_fair(job, "clocks", Verdict::kNote, "node1 and node2 differ by 10 s");
}

// ---- Cores
// ---------------------------------------------------------------------------------------------------------

TEST(DoctorCores, ThreadsOfARankHeldToOneCore) {
  JobFacts job = healthy();
  for (std::size_t i = 0; i < job.ranks.size(); ++i) job.ranks[i].cores = {static_cast<int>(i % 4)};
  expect_bad(job, "cores", "node1, node2: 4 of 4 ranks .*4 threads on 1 core \\(core 0\\)",
             "mpirun --map-by ppr:4:node:PE=4 --bind-to core");
  EXPECT_NE(bad_ones(job)[0].cost.find("4.0 times"), std::string::npos);
  for (RankFacts& rank : job.ranks) rank.launcher = srun(8);
  expect_bad(job, "cores", "4 threads on 1 core",
             "srun --ntasks-per-node=4 --cpus-per-task=4 --cpu-bind=cores");
}

TEST(DoctorCores, MoreThreadsThanTheNodeHas) {
  JobFacts job = healthy();
  for (RankFacts& rank : job.ranks) {
    rank.cores = cores(0, 16);
    rank.threads = 8;
  }
  expect_bad(job, "cores", "32 threads on 16 cores \\(core 0-15\\)",
             "PE=4 --bind-to core ... trainer ... --threads 4");
  // More ranks than cores: no number of threads helps.
  for (RankFacts& rank : job.ranks) {
    rank.cores = cores(0, 2);
    rank.offered_cores = 2;
    rank.threads = 1;
  }
  expect_bad(job, "cores", "4 threads on 2 cores", "at most 2 ranks on a node");
}

TEST(DoctorCores, TwoRanksOnOneCoreWhileOthersIdle) {
  JobFacts job = healthy(1);
  for (RankFacts& rank : job.ranks) rank.cores = cores(0, 4);
  expect_bad(job, "cores", "16 threads on 4 cores \\(core 0-3\\)", "PE=4");
  job = healthy(1);
  job.ranks[1].cores = job.ranks[0].cores;
  expect_bad(job, "cores", "8 threads on 4 cores", "PE=4");
}

TEST(DoctorCores, UnboundRanksThatFitAreFine) {
  JobFacts job = healthy();
  for (RankFacts& rank : job.ranks) rank.cores = cores(0, 16);
  expect_fair(job, "cores", Verdict::kFine, "on 16 cores, not bound");
}

TEST(DoctorCores, IdleCores) {
  JobFacts job = healthy();
  for (std::size_t i = 0; i < job.ranks.size(); ++i) {
    job.ranks[i].cores = {static_cast<int>(i % 4)};
    job.ranks[i].threads = 1;
  }
  expect_bad(job, "cores", "4 threads on 16 cores: the others idle",
             "ppr:4:node:PE=4 --bind-to core ... trainer ... --threads 4");
  job.device = "cuda";  // where processors have little to do
  job.transport = "NCCL 2.28";
  for (std::size_t i = 0; i < job.ranks.size(); ++i) job.ranks[i].device = std::to_string(i);
  EXPECT_TRUE(bad_ones(job).empty());
  job = alone({});
  job.ranks[0].threads = 2;
  expect_bad(job, "cores", "2 threads on 4 cores", "--threads 4");
  job.ranks[0].threads = 3;
  EXPECT_TRUE(bad_ones(job).empty());
}

// ---- Signals
// -------------------------------------------------------------------------------------------------------

TEST(DoctorSignals, ThatDoNotArrive) {
  expect_fair(healthy(), "signals", Verdict::kFine, "SIGUSR1 to mpirun \\(process 12\\) reaches every rank");
  JobFacts job = healthy();
  job.ranks[3].signalled = job.ranks[5].signalled = false;
  expect_bad(job, "signals", "does not reach ranks 3, 5", "touch the file 'stop'");
  for (RankFacts& rank : job.ranks) rank.signalled = false;
  expect_bad(job, "signals", "does not reach any rank", "exec");
}

TEST(DoctorSignals, ThatWereNotSent) {
  JobFacts job = healthy();
  for (RankFacts& rank : job.ranks) rank.signalled = false;
  job.signalled = "";
  job.signals_untested = "the launcher runs on a node that has no rank";
  expect_fair(job, "signals", Verdict::kNote, "not tested: the launcher runs");
  job.signals_forbidden = "mpiexec (process 12) does not catch SIGUSR1";
  expect_bad(job, "signals", "mpiexec .* does not catch", "touch the file 'stop'");
  job.signals_forbidden = "";
  job.ranks[2].wrapper = "bash (process 13)";
  expect_bad(job, "signals", "SIGUSR1 would end bash .* rank 2", "exec");
}

// ---- Directory
// -----------------------------------------------------------------------------------------------------

TEST(DoctorDirectory, NotGivenOrNotUsable) {
  JobFacts job = healthy();
  job.directory = "";
  for (RankFacts& rank : job.ranks) rank.directory = {};
  expect_fair(job, "directory", Verdict::kNote, "not tested: no --run");
  job.directory = "runs/a";
  job.directory_error = "cannot create the directory runs/a: Read-only file system";
  expect_bad(job, "directory", "Read-only", "--run");
}

TEST(DoctorDirectory, NotShared) {
  JobFacts job = healthy();
  for (std::size_t rank = 4; rank < 8; ++rank) job.ranks[rank].directory = {};
  expect_bad(job, "directory", "ranks 4-7 \\(node2\\) do not see in runs/a what rank 0 \\(node1\\)",
             "all nodes share");
}

TEST(DoctorDirectory, FailuresLocksAndCaches) {
  JobFacts job = healthy();
  job.ranks[2].directory.error = "cannot write runs/a/x: Disk quota exceeded";
  expect_bad(job, "directory", "^rank 2: .*quota", "another --run");
  job = healthy();
  for (std::size_t rank = 4; rank < 8; ++rank) job.ranks[rank].directory.locked_out = false;
  expect_bad(job, "directory", "lock of rank 0 does not hold on ranks 4-7", "-o flock");
  job.ranks[0].directory.lock_error = "flock of lock: Function not implemented";
  for (RankFacts& rank : job.ranks) rank.directory.locked_out = true;
  expect_bad(job, "directory", "Function not implemented", "-o flock");
  job = healthy();
  job.ranks[7].directory.renamed = false;
  expect_fair(job, "directory", Verdict::kNote, "rank 7 still saw the old file");
}

TEST(DoctorDirectory, SlowOrFull) {
  JobFacts job = healthy();
  job.ranks[5].directory.flush_seconds = 1.5;
  expect_bad(job, "directory", "takes 1.5 s", "--save-every");
  job = healthy();
  job.checkpoint_bytes = 44000000000;
  job.kept_checkpoints = 2;
  EXPECT_TRUE(bad_ones(job).empty());
  job.ranks[0].directory.free = 100000000000;
  expect_bad(job, "directory", "100 GB are free; 3 checkpoints of 44.0 GB take 132 GB", "--keep-last");
  job = healthy();
  job.checkpoint_bytes = 44000000000;
  job.ranks[3].directory.write_seconds = 20;  // 8 x 64 MiB in 20 s
  expect_bad(job, "directory", "a checkpoint of 44.0 GB takes 27 minutes", "--signal");
}

// ---- Devices
// -------------------------------------------------------------------------------------------------------

TEST(DoctorDevice, SlowRank) {
  JobFacts job = healthy();
  job.ranks[6].peak = 0.75 * 4e11;
  EXPECT_TRUE(bad_ones(job).empty());
  job.ranks[6].peak = 0.5 * 4e11;
  expect_bad(job, "device", "rank 6 on node2 reaches 200 GFLOP/s, the median rank 400", "--exclude=node2");
}

TEST(DoctorDevice, Gpus) {
  JobFacts job = healthy();
  job.device = "cuda";
  job.transport = "NCCL 2.28";
  for (std::size_t i = 0; i < job.ranks.size(); ++i) {
    job.ranks[i].device = "GPU-" + std::to_string(i);
    job.ranks[i].devices = 4;
  }
  EXPECT_TRUE(bad_ones(job).empty());
  JobFacts staged = job;
  staged.transport = "MPI through host memory";
  expect_bad(staged, "device", "through host memory", "--collectives nccl");
  JobFacts shared = staged;
  for (RankFacts& rank : shared.ranks) rank.device = "GPU-0";
  expect_bad(shared, "device", "8 ranks share 1 GPU", "4 ranks on a node");
  for (RankFacts& rank : job.ranks) rank.devices = 8;
  expect_bad(job, "device", "node1, node2: 4 of 8 GPUs are used", "8 ranks a node");
  job.device_error = "there is no CUDA device";
  expect_bad(job, "device", "no CUDA device", "--device cpu");
}

// ---- Limits
// --------------------------------------------------------------------------------------------------------

TEST(DoctorLimits, OpenFilesLockedMemoryFileSize) {
  JobFacts job = healthy();
  job.ranks[1].open_files = 100;
  expect_bad(job, "limits", "rank 1 may open 100 files", "ulimit -n 65536");
  job = healthy();
  for (RankFacts& rank : job.ranks) rank.locked_memory = 65536;
  EXPECT_TRUE(bad_ones(job).empty());  // no RDMA
  for (RankFacts& rank : job.ranks) rank.infiniband = true;
  expect_bad(job, "limits", "ranks 0-7 may lock 65.5 kB", "ulimit -l unlimited");
  job = healthy();
  job.ranks[0].file_size = 1000000000;
  expect_bad(job, "limits", "rank 0 may write files of 1.0 GB", "ulimit -f unlimited");
  job.largest_file = 500000000;
  expect_fair(job, "limits", Verdict::kNote, "1.0 GB");
  job.largest_file = 2000000000;
  expect_bad(job, "limits", "1.0 GB", "ulimit -f unlimited");
}

TEST(DoctorModel, ThatCannotBeRead) {
  JobFacts job = healthy();
  job.model_error = "there is no checkpoint parent";
  expect_bad(job, "model", "no checkpoint parent", "");
}

// ---- Text
// ----------------------------------------------------------------------------------------------------------

TEST(DoctorText, Numbers) {
  EXPECT_EQ(number_list({}), "");
  EXPECT_EQ(number_list({0, 1, 2, 5, 7, 8}), "0-2, 5, 7-8");
  std::vector<int> even;
  for (int i = 0; i < 40; i += 2) even.push_back(i);
  EXPECT_EQ(number_list(even), "0, 2, 4, 6, 8, 10, 12, 14, ...");
  EXPECT_EQ(readable_bytes(12), "12 bytes");
  EXPECT_EQ(readable_bytes(1500), "1.5 kB");
  EXPECT_EQ(readable_bytes(2.5e13), "25.0 TB");
}

TEST(DoctorText, FactsTravelWhole) {
  RankFacts facts = healthy(1).ranks[2];
  facts.wrapper = "b\xff";  // not UTF-8
  facts.file_size = 123;
  const RankFacts back = rank_facts_from_json(to_json(facts));
  EXPECT_EQ(back.host, facts.host);
  EXPECT_EQ(back.cores, facts.cores);
  EXPECT_EQ(back.launcher.name, "mpirun");
  EXPECT_EQ(back.directory.free, facts.directory.free);
  EXPECT_EQ(back.file_size, 123U);
  EXPECT_EQ(back.open_files, 1024U);
  EXPECT_EQ(back.locked_memory, kNoLimit);
  EXPECT_EQ(back.peak, facts.peak);
  EXPECT_EQ(back.wrapper.front(), 'b');
}

}  // namespace
}  // namespace regroup
