#include "kernels/base/host.h"

#include <array>
#include <fstream>
#include <unistd.h>

namespace regroup {

std::string host_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
}

std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const std::size_t name = line.starts_with("model name") ? line.find(": ") : std::string::npos;
    if (name != std::string::npos) return line.substr(name + 2);
  }
  return "unknown";
}

}  // namespace regroup
