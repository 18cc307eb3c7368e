// What --doctor finds out about a job. Gathered on the ranks (doctor_host.h, doctor_directory.h), judged
// without touching anything (doctor_findings.h).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace regroup {

constexpr std::uint64_t kNoLimit = UINT64_MAX;

// How a process was started, as its environment tells.
struct LauncherFacts {
  std::string name;         // "mpirun" (Open MPI's), "srun", "mpiexec" (another MPI's); "" for none
  std::string pmix;         // the version of PMIx between launcher and rank; "" where it does not say
  int ranks = 0;            // that the launcher started; 0: it does not say
  std::string job;          // Slurm's; "" outside
  std::string step;         // Slurm's, of srun
  int allocated_ranks = 0;  // tasks of the Slurm allocation; 0: it does not say
  int allocated_cores = 0;  // of the Slurm allocation on this node; 0: it does not say
  int process = 0;          // the number of this process among those ranks, or of the task
};

// From the environment that the process was started with: Open MPI adds to it at its start.
LauncherFacts launcher_of(const std::map<std::string, std::string>& environment);

// What a rank saw of the run directory.
struct DirectoryFacts {
  std::string error;          // what failed here, with its reason; "" for nothing
  bool seen = false;          // the file that rank 0 wrote
  bool renamed = false;       // the file that took its place by a rename
  bool locked_out = false;    // a lock that another process (or descriptor) holds is refused here
  std::string lock_error;     // where locks do not work at all
  std::uint64_t written = 0;  // bytes, by all ranks at once
  double write_seconds = 0;   // for them, flushed to the disk
  double flush_seconds = 0;   // of a small file: the slowest of a few
  std::uint64_t free = 0;     // bytes
  std::string filesystem;     // "nfs", "lustre", ...; "" for one not known by name
};

struct RankFacts {
  std::string host;
  LauncherFacts launcher;
  std::vector<int> cores;       // that it may run on
  std::vector<int> core_nodes;  // the NUMA nodes of these; empty where the host does not tell
  int offered_cores = 0;        // of this host, to all ranks of the job: what the launcher itself may use
  int threads = 1;
  std::string wrapper;  // a program between launcher and rank that SIGUSR1 would end; "" for none
  bool signalled = false;
  double clock = 0;          // seconds since 1970, all ranks at one moment
  std::uint64_t memory = 0;  // bytes available on the host, to all its ranks
  std::uint64_t open_files = kNoLimit, locked_memory = kNoLimit, file_size = kNoLimit;  // limits
  bool infiniband = false;
  std::string cpu_level;  // of the processor; "" on a GPU
  double peak = 0;        // FLOP/s of a matrix product, all ranks at once
  std::string device;     // id of the GPU
  int devices = 0;        // GPUs that it sees
  int device_node = -1;   // the NUMA node of its GPU; -1: not known
  DirectoryFacts directory;
};

// For the way between ranks.
std::string to_json(const RankFacts& facts);
RankFacts rank_facts_from_json(const std::string& text);

struct JobFacts {
  std::vector<RankFacts> ranks;  // by rank

  std::string device = "cpu";  // or cuda, as asked for
  int tensor_parallel = 1;
  std::string precision;     // of products
  std::string device_error;  // why it could not be opened; "": it could
  std::string transport;     // of tensors between ranks
  double sum_rate = 0;       // bytes/s of a sum of 64 MiB over all ranks; 0 for a world of one

  std::string signalled;          // what SIGUSR1 was sent to, "mpirun (process 12)"; "" where it was not
  std::string signals_untested;   // why not, where that is no fault
  std::string signals_forbidden;  // why not, where the signal would have ended the job

  std::string directory;        // --run; "" where it was not given
  std::string directory_error;  // why rank 0 cannot use it

  std::string model_error;             // why the options name no model; "": they do, or nothing was said
  std::uint64_t checkpoint_bytes = 0;  // of one; 0: the model is not known
  std::uint64_t largest_file = 0;      // of it
  std::uint64_t rank_bytes = 0;        // the least memory of a rank; 0: the model is not known
  std::uint64_t kept_checkpoints = 0;  // --keep-last
};

}  // namespace regroup
