#include "trainer/commands/doctor_host.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <optional>
#include <sched.h>
#include <spawn.h>
#include <sstream>
#include <sys/resource.h>
#include <sys/wait.h>
#include <system_error>
#include <thread>
#include <unistd.h>

#include <fmt/format.h>

namespace regroup {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kSignalPatience{5}, kProgramPatience{10};

std::string host_name() {
  std::array<char, 256> name{};
  gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::vector<int> cores_of_process(pid_t pid) {
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  std::vector<int> cores;
  if (sched_getaffinity(pid, sizeof(allowed), &allowed) != 0) return cores;
  for (int core = 0; core < CPU_SETSIZE; ++core) {
    if (CPU_ISSET(static_cast<unsigned>(core), &allowed)) cores.push_back(core);
  }
  return cores;
}

// A list such as "0-3,8" of the kernel's.
std::vector<int> numbers_of(const std::string& list) {
  std::vector<int> numbers;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');) {
    int first = 0, last = 0;
    char dash = 0;
    std::istringstream range(part);
    if (!(range >> first)) continue;
    if (!(range >> dash >> last)) last = first;
    for (int number = first; number <= last; ++number) numbers.push_back(number);
  }
  return numbers;
}

// The NUMA nodes that any of the cores belongs to, ascending.
std::vector<int> nodes_of(const std::vector<int>& cores) {
  std::vector<int> nodes;
  std::error_code ignored;
  for (const auto& entry : fs::directory_iterator("/sys/devices/system/node", ignored)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with("node")) continue;
    std::string list;
    std::getline(std::ifstream(entry.path() / "cpulist") >> std::ws, list);
    const std::vector<int> own = numbers_of(list);
    const auto belongs = [&](int core) { return std::find(own.begin(), own.end(), core) != own.end(); };
    if (std::any_of(cores.begin(), cores.end(), belongs)) nodes.push_back(std::atoi(name.c_str() + 4));
  }
  std::sort(nodes.begin(), nodes.end());
  return nodes;
}

std::uint64_t limit_of(decltype(RLIMIT_NOFILE) resource) {
  struct rlimit limit {};
  if (getrlimit(resource, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return kNoLimit;
  return limit.rlim_cur;
}

// The number after "NAME:" in a file of /proc; 0 where there is none.
std::uint64_t proc_number(const fs::path& file, const std::string& name, int base = 10) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);) {
    if (!line.starts_with(name + ":")) continue;
    std::istringstream value(line.substr(name.size() + 1));
    value >> std::setbase(base);
    std::uint64_t number = 0;
    value >> number;
    return number;
  }
  return 0;
}

// Memory that the host has free or the control groups of this process allow, whichever is less.
std::uint64_t available_memory() {
  std::uint64_t least = proc_number("/proc/meminfo", "MemAvailable") * 1024;
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    if (!line.starts_with("0::")) continue;
    for (fs::path group = line.substr(3); group.has_relative_path(); group = group.parent_path()) {
      std::ifstream file(fs::path("/sys/fs/cgroup") / group.relative_path() / "memory.max");
      if (std::uint64_t limit = 0; file >> limit) least = std::min(least, limit);  // "max" is no number
    }
  }
  return least;
}

// ---- Ancestors
// -----------------------------------------------------------------------------------------------------

struct Process {
  pid_t pid = 0, parent = 0;
  std::string name;
  bool survives = false;  // catches, ignores or blocks SIGUSR1
  bool catches = false;
  std::string text() const { return fmt::format("{} (process {})", name, pid); }
};

std::optional<Process> process_of(pid_t pid) {
  const fs::path folder = fmt::format("/proc/{}", pid);
  Process process{.pid = pid};
  std::ifstream name(folder / "comm");
  if (!std::getline(name, process.name)) return std::nullopt;
  const fs::path status = folder / "status";
  process.parent = static_cast<pid_t>(proc_number(status, "PPid"));
  const std::uint64_t bit = std::uint64_t{1} << (SIGUSR1 - 1);
  process.catches = (proc_number(status, "SigCgt", 16) & bit) != 0;
  process.survives = process.catches || (proc_number(status, "SigIgn", 16) & bit) != 0 ||
                     (proc_number(status, "SigBlk", 16) & bit) != 0;
  return process;
}

bool is_launcher(const std::string& name) {
  return name.starts_with("mpirun") || name.starts_with("mpiexec") || name == "prterun" || name == "prun" ||
         name == "orterun";
}

// What starts the ranks of a node on behalf of the launcher.
bool is_daemon(const std::string& name) {
  return name == "orted" || name == "prted" || name == "slurmstepd" || name == "hydra_pmi_proxy";
}

// The processes above this one as far as the launcher or its daemon, which is the last; empty where there is
// neither.
std::vector<Process> ancestors() {
  std::vector<Process> found;
  for (pid_t pid = getppid(); pid > 1;) {
    const std::optional<Process> process = process_of(pid);
    if (!process) return {};
    found.push_back(*process);
    if (is_launcher(process->name) || is_daemon(process->name)) return found;
    pid = process->parent;
  }
  return {};
}

// ---- Signals
// -------------------------------------------------------------------------------------------------------

// Runs a program with this environment and waits for its end; "" or what went wrong.
std::string run_program(std::vector<std::string> words,
                        const std::map<std::string, std::string>& environment) {
  std::vector<std::string> settings;
  for (const auto& [name, value] : environment) settings.push_back(name + "=" + value);
  const auto pointers = [](std::vector<std::string>& texts) {
    std::vector<char*> result;
    for (std::string& text : texts) result.push_back(text.data());
    result.push_back(nullptr);
    return result;
  };
  // It is a process of this step too: the signal that it sends must not end it.
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGUSR1);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK);
  posix_spawnattr_setsigmask(&attributes, &blocked);
  pid_t pid = 0;
  const int failure = posix_spawnp(&pid, words[0].c_str(), nullptr, &attributes, pointers(words).data(),
                                   pointers(settings).data());
  posix_spawnattr_destroy(&attributes);
  if (failure != 0) return fmt::format("{}: {}", words[0], std::generic_category().message(failure));
  const auto end = Clock::now() + kProgramPatience;
  for (int status = 0;;) {
    const pid_t ended = waitpid(pid, &status, WNOHANG);
    if (ended != 0) {
      return ended == pid && status == 0 ? "" : fmt::format("{} failed with status {}", words[0], status);
    }
    if (Clock::now() > end) break;
    std::this_thread::sleep_for(milliseconds(20));
  }
  kill(pid, SIGKILL);
  waitpid(pid, nullptr, 0);
  return fmt::format("{} came to no end in {} s", words[0], kProgramPatience.count());
}

std::string send_to(pid_t pid) {
  return kill(pid, SIGUSR1) == 0 ? "" : std::generic_category().message(errno);
}

// Sends the signal from rank `sender` and tells all ranks how that went.
void send(const ProcessGroup& world, int sender, const std::string& target, SignalTrial& trial,
          const std::function<std::string()>& action) {
  const std::string failure = world.broadcast(world.rank() == sender ? action() : "", sender);
  if (failure.empty()) {
    trial.signalled = target;
  } else {
    trial.untested = fmt::format("{} could not be signalled: {}", target, failure);
  }
}

void signal_mpirun(const ProcessGroup& world, SignalTrial& trial) {
  const std::vector<Process> above = ancestors();
  const bool found = !above.empty() && is_launcher(above.back().name);
  const std::string mine =
      found ? fmt::format("{}{}", above.back().catches ? '+' : '-', above.back().text()) : "";
  const std::vector<std::string> launchers = world.all_gather(mine);
  const auto first =
      std::find_if(launchers.begin(), launchers.end(), [](const std::string& text) { return !text.empty(); });
  if (first == launchers.end()) {
    trial.untested = "the launcher runs on a node that has no rank";
    return;
  }
  const std::string target = first->substr(1);
  if (first->front() == '-') {
    trial.forbidden = fmt::format("{} does not catch SIGUSR1, and passes it on to no rank", target);
    return;
  }
  send(world, static_cast<int>(first - launchers.begin()), target, trial,
       [&above] { return send_to(above.back().pid); });
}

}  // namespace

std::map<std::string, std::string> start_environment() {
  std::map<std::string, std::string> result;
  std::ifstream in("/proc/self/environ", std::ios::binary);
  for (std::string setting; std::getline(in, setting, '\0');) {
    const std::size_t equals = setting.find('=');
    if (equals != std::string::npos) result.emplace(setting.substr(0, equals), setting.substr(equals + 1));
  }
  return result;
}

int numa_node_of(const std::string& bus_id) {
  int node = -1;
  if (!bus_id.empty()) std::ifstream(fs::path("/sys/bus/pci/devices") / bus_id / "numa_node") >> node;
  return node;
}

RankFacts host_facts(const LauncherFacts& launcher, int threads) {
  RankFacts facts{.host = host_name(),
                  .launcher = launcher,
                  .cores = cores_of_process(0),
                  .threads = threads,
                  .memory = available_memory(),
                  .open_files = limit_of(RLIMIT_NOFILE),
                  .locked_memory = limit_of(RLIMIT_MEMLOCK),
                  .file_size = limit_of(RLIMIT_FSIZE)};
  std::error_code ignored;
  const fs::directory_iterator adapters("/sys/class/infiniband", ignored);
  facts.infiniband = !ignored && adapters != fs::directory_iterator();
  facts.core_nodes = nodes_of(facts.cores);
  facts.offered_cores = static_cast<int>(facts.cores.size());
  const std::vector<Process> above = launcher.name.empty() ? std::vector<Process>() : ancestors();
  if (above.empty()) return facts;
  for (auto process = above.begin(); process + 1 != above.end(); ++process) {
    if (!process->survives) facts.wrapper = process->text();
  }
  const int reachable = static_cast<int>(cores_of_process(above.back().pid).size());
  facts.offered_cores = std::max(facts.offered_cores, reachable);
  if (launcher.allocated_cores > 0) facts.offered_cores = std::min(reachable, launcher.allocated_cores);
  return facts;
}

SignalTrial try_signal(const ProcessGroup& world, const RankFacts& facts, const SignalWatch& watch,
                       const std::map<std::string, std::string>& environment) {
  SignalTrial trial;
  const std::vector<std::string> wrappers = world.all_gather(facts.wrapper);
  const bool wrapped =
      std::any_of(wrappers.begin(), wrappers.end(), [](const std::string& name) { return !name.empty(); });
  const LauncherFacts& launcher = facts.launcher;
  if (wrapped) {
    trial.untested = "a program around the ranks would be ended";
  } else if (launcher.name.empty()) {
    send(world, 0, "this process", trial, [] { return send_to(getpid()); });
  } else if (launcher.name == "srun") {
    const std::string step = fmt::format("{}.{}", launcher.job, launcher.step);
    send(world, 0, fmt::format("step {} (scancel)", step), trial, [&] {
      return run_program({"scancel", "--signal=USR1", step}, environment);
    });
  } else {
    signal_mpirun(world, trial);
  }
  if (trial.signalled.empty()) return trial;
  const auto end = Clock::now() + kSignalPatience;
  while (watch.received() != SIGUSR1 && Clock::now() < end) std::this_thread::sleep_for(milliseconds(10));
  trial.received = watch.received() == SIGUSR1;
  return trial;
}

}  // namespace regroup
