// What this processor runs, and what a process is kept to.
#include <algorithm>

#include <fmt/ranges.h>

#include "kernels/base/error.h"
#include "kernels/cpu/onednn_matmul.h"
#include "kernels/cpu_level.h"

namespace regroup {
namespace {

std::vector<std::string_view> names_of(const std::vector<CpuLevel>& levels) {
  std::vector<std::string_view> names;
  for (const CpuLevel level : levels) names.push_back(name_of(level));
  return names;
}

}  // namespace

bool processor_multiplies_bfloat16(CpuLevel level) {
  return level >= CpuLevel::kAvx512Bf16 && OneDnnMatmul::multiplies_bfloat16();
}

CpuLevel highest_cpu_level() { return usable_cpu_levels().back(); }

void limit_cpu_level(CpuLevel level) {
  const std::vector<CpuLevel>& usable = usable_cpu_levels();
  if (std::find(usable.begin(), usable.end(), level) == usable.end()) {
    throw UserError("this processor does not run the level {}; use one of {}", name_of(level),
                    fmt::join(names_of(usable), ", "));
  }
  limit_onednn(level);
}

}  // namespace regroup
