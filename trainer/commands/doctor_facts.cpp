#include "trainer/commands/doctor_facts.h"

#include <cstdlib>

#include "kernels/base/json.h"

namespace regroup {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(LauncherFacts, name, pmix, ranks, job, step, allocated_ranks,
                                   allocated_cores, process)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(DirectoryFacts, error, seen, renamed, locked_out, lock_error, written,
                                   write_seconds, flush_seconds, free, filesystem)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(RankFacts, host, launcher, cores, core_nodes, offered_cores, threads,
                                   wrapper, signalled, clock, memory, open_files, locked_memory, file_size,
                                   infiniband, cpu_level, peak, device, devices, device_node, directory)

LauncherFacts launcher_of(const std::map<std::string, std::string>& environment) {
  const auto text = [&](const char* name) {
    const auto found = environment.find(name);
    return found == environment.end() ? std::string() : found->second;
  };
  const auto number = [&](const char* name) { return std::atoi(text(name).c_str()); };
  LauncherFacts facts{.pmix = text("PMIX_VERSION"),
                      .job = text("SLURM_JOB_ID"),
                      .allocated_ranks = number("SLURM_NTASKS"),
                      .allocated_cores = number("SLURM_CPUS_ON_NODE"),
                      .process = number("SLURM_PROCID")};
  // mpirun's daemons on other nodes are a step of srun's too, and so are all ranks where mpirun is called
  // within one: what is nearest to the rank tells.
  const std::string step = text("SLURM_STEP_ID");
  const bool slurm_serves = text("PMIX_NAMESPACE").starts_with("slurm.");
  if (number("OMPI_COMM_WORLD_SIZE") > 0 && !slurm_serves) {
    facts.name = "mpirun";
    facts.ranks = number("OMPI_COMM_WORLD_SIZE");
    facts.process = number("OMPI_COMM_WORLD_RANK");
  } else if (!step.empty()) {
    facts.name = "srun";
    facts.step = step;
    facts.ranks = number("SLURM_STEP_NUM_TASKS");
  } else if (number("PMI_SIZE") > 0) {
    facts.name = "mpiexec";
    facts.ranks = number("PMI_SIZE");
    facts.process = number("PMI_RANK");
  }
  return facts;
}

std::string to_json(const RankFacts& facts) {
  // Names of hosts and reasons of the system may be in any encoding.
  return json_text_of_any_bytes(nlohmann::json(facts));
}

RankFacts rank_facts_from_json(const std::string& text) { return parse_json(text).get<RankFacts>(); }

}  // namespace regroup
