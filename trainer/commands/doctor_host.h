// The gathering half of --doctor: what a rank can tell of its host and its launcher.
#pragma once

#include <map>
#include <string>

#include "parallel/process_group.h"
#include "trainer/commands/doctor_facts.h"
#include "trainer/run/signals.h"

namespace regroup {

// The environment that this process was started with.
std::map<std::string, std::string> start_environment();

// Host, launcher, cores, threads, memory and limits of this process. `threads` is what it would use.
// What cannot be read stays at its default. Local.
RankFacts host_facts(const LauncherFacts& launcher, int threads);

// The NUMA node of a device on the PCI bus, "0000:3b:00.0"; -1 where the host does not tell.
int numa_node_of(const std::string& bus_id);

// What SIGUSR1 was sent to, or why it was not (JobFacts has the same members).
struct SignalTrial {
  std::string signalled, untested, forbidden;
  bool received = false;  // by this rank
};

// Sends SIGUSR1 the way a batch system would: to the launcher among this job's ancestors, to srun's step, or
// without a launcher to this process; and waits a few seconds for it on every rank. Sends none that would end
// the launcher or a program around a rank. `watch` is this rank's, and must outlive late arrivals;
// `environment` is for programs that are started. Collective.
SignalTrial try_signal(const ProcessGroup& world, const RankFacts& facts, const SignalWatch& watch,
                       const std::map<std::string, std::string>& environment);

}  // namespace regroup
