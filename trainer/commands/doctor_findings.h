// The judgement of --doctor: from facts to findings. Pure.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "trainer/commands/doctor_facts.h"

namespace regroup {

enum class Verdict { kFine, kNote, kBad };

struct Finding {
  Verdict verdict = Verdict::kFine;
  std::string subject;  // "cores", "signals", ...: one word
  std::string found;
  std::string cost;  // of kBad: what a run would suffer
  std::string fix;   // of kBad: the flag or command that helps

  bool operator==(const Finding&) const = default;
};

Finding fine(std::string subject, std::string found);
Finding note(std::string subject, std::string found);
Finding bad(std::string subject, std::string found, std::string cost, std::string fix);

// The findings on a job, in the order of the report. What several hosts or ranks have alike is one finding.
std::vector<Finding> judge(const JobFacts& job);

// The parts of judge().
std::vector<Finding> judge_launcher(const JobFacts& job);
std::vector<Finding> judge_hosts(const JobFacts& job);  // how ranks lie on hosts, memory, clocks
std::vector<Finding> judge_cores(const JobFacts& job);
// Of GPUs and their ranks' cores, and of tensor-parallel groups and hosts. Nothing where all is well.
std::vector<Finding> judge_placement(const JobFacts& job);
std::vector<Finding> judge_signals(const JobFacts& job);
std::vector<Finding> judge_directory(const JobFacts& job);
std::vector<Finding> judge_devices(const JobFacts& job);
std::vector<Finding> judge_limits(const JobFacts& job);

// The ranks of each host, hosts in the order of their first rank.
struct Host {
  std::string name;
  std::vector<int> ranks;
};
std::vector<Host> hosts_of(const JobFacts& job);

// The ranks for which the condition holds.
std::vector<int> ranks_where(const JobFacts& job, const std::function<bool(const RankFacts&)>& condition);

// "rank 3", "ranks 0-3, 8".
std::string ranks_text(const std::vector<int>& ranks);

// Whole numbers in ascending order as "0-3, 8"; of many runs of numbers the first few.
std::string number_list(const std::vector<int>& numbers);

// Bytes as "1.5 GB".
std::string readable_bytes(double bytes);

}  // namespace regroup
