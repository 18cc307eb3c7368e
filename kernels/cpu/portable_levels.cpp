// The one level of any other architecture.
#include "kernels/cpu/levels.h"

namespace regroup {

const std::vector<CpuLevel>& usable_cpu_levels() {
  static const std::vector<CpuLevel> levels = {CpuLevel::kPortable};
  return levels;
}

std::unique_ptr<Backend> make_cpu_backend(CpuLevel level, int threads) {
  check(level == CpuLevel::kPortable, "this architecture has no level {}", name_of(level));
  return make_portable_backend(threads);
}

}  // namespace regroup
