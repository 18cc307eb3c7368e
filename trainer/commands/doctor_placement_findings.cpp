// How ranks lie on sockets and hosts: which GPU is whose, and which sums cross the network.
#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "trainer/commands/doctor_findings.h"

namespace regroup {
namespace {

// A GPU's copies and messages go through the socket that it hangs on.
std::vector<Finding> judge_gpus(const JobFacts& job) {
  const auto far = ranks_where(job, [](const RankFacts& rank) {
    return rank.device_node >= 0 && !rank.core_nodes.empty() &&
           std::find(rank.core_nodes.begin(), rank.core_nodes.end(), rank.device_node) ==
               rank.core_nodes.end();
  });
  if (far.empty()) return {};
  const RankFacts& first = job.ranks[static_cast<std::size_t>(far.front())];
  return {bad(
      "placement",
      fmt::format("{}: cores and GPU are on different sockets (rank {}: cores of NUMA node {}, GPU of {})",
                  ranks_text(far), far.front(), number_list(first.core_nodes), first.device_node),
      "what a GPU copies or sends crosses from socket to socket",
      first.launcher.name == "srun"
          ? "srun --distribution=block:block --cpu-bind=cores"
          : "mpirun --map-by ppr:RANKS:node:PE=THREADS --rank-by slot --bind-to core")};
}

// Each layer ends with a sum over a tensor-parallel group.
std::vector<Finding> judge_groups(const JobFacts& job) {
  const auto size = static_cast<std::size_t>(job.tensor_parallel);
  std::vector<int> split;
  for (std::size_t first = 0; first + size <= job.ranks.size(); first += size) {
    std::set<std::string> hosts;
    for (std::size_t rank = first; rank < first + size; ++rank) hosts.insert(job.ranks[rank].host);
    if (hosts.size() > 1) split.push_back(static_cast<int>(first / size));
  }
  if (split.empty()) return {};
  std::size_t most = 0;  // ranks of a host
  for (const Host& host : hosts_of(job)) most = std::max(most, host.ranks.size());
  const std::string found =
      fmt::format("{} of {} tensor-parallel groups span hosts, group {} with ranks {}-{} for one",
                  split.size(), job.ranks.size() / size, split.front(), split.front() * job.tensor_parallel,
                  (split.front() + 1) * job.tensor_parallel - 1);
  const std::string cost = "two sums or three of every layer, forward and backward, go over the network";
  if (size > most || most % size != 0) {
    return {bad("placement", found, cost,
                fmt::format("a --tensor-parallel that divides the {} ranks of a host", most))};
  }
  return {bad("placement", found, cost,
              job.ranks.front().launcher.name == "srun"
                  ? "srun --distribution=block:block, so that neighbouring ranks share a host"
                  : "mpirun --map-by slot --rank-by slot, so that neighbouring ranks share a host")};
}

}  // namespace

std::vector<Finding> judge_placement(const JobFacts& job) {
  std::vector<Finding> findings = judge_gpus(job);
  for (Finding& finding : judge_groups(job)) findings.push_back(std::move(finding));
  return findings;
}

}  // namespace regroup
