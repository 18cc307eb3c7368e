#include "tests/support/devices.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>

namespace regroup::test {

std::string name_of(DeviceKind device) { return device == DeviceKind::kCuda ? "cuda" : "cpu"; }

std::string test_name(DeviceKind device, const std::string& what) {
  std::string name = name_of(device) + '_' + what;
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  return name;
}

namespace {

std::optional<CpuLevel> limited_cpu_level() {
  const char* const name = std::getenv("REGROUP_CPU_LEVEL");
  if (name == nullptr) return std::nullopt;
  const CpuLevel level = cpu_level_from_string(name);
  limit_cpu_level(level);
  return level;
}

}  // namespace

std::unique_ptr<Backend> make_test_backend(DeviceKind device, int threads) {
  static const std::optional<CpuLevel> level = limited_cpu_level();
  return make_backend({.device = device, .threads = threads, .cpu_level = level, .deterministic = true});
}

std::vector<std::unique_ptr<Backend>> backends_of_equal_bits(DeviceKind device) {
  std::vector<std::unique_ptr<Backend>> backends;
  for (const int threads : {1, 2, 5}) backends.push_back(make_test_backend(device, threads));
  return backends;
}

}  // namespace regroup::test
