// The levels of x86-64.
#include "kernels/cpu/levels.h"

namespace regroup {

const std::vector<CpuLevel>& usable_cpu_levels() {
  // What the flags of kernels/CMakeLists.txt let the compiler use. libgcc also asks whether the operating
  // system keeps the registers.
  static const std::vector<CpuLevel> levels = [] {
    std::vector<CpuLevel> usable = {CpuLevel::kPortable};
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi") ||
        !__builtin_cpu_supports("bmi2")) {
      return usable;
    }
    usable.push_back(CpuLevel::kAvx2);
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512cd") || !__builtin_cpu_supports("avx512dq") ||
        !__builtin_cpu_supports("avx512vl")) {
      return usable;
    }
    usable.push_back(CpuLevel::kAvx512);
    if (__builtin_cpu_supports("avx512bf16")) usable.push_back(CpuLevel::kAvx512Bf16);
    return usable;
  }();
  return levels;
}

std::unique_ptr<Backend> make_cpu_backend(CpuLevel level, int threads) {
  switch (level) {
    case CpuLevel::kPortable:
      return make_portable_backend(threads);
    case CpuLevel::kAvx2:
      return make_avx2_backend(threads);
    case CpuLevel::kAvx512:
      return make_avx512_backend(threads);
    case CpuLevel::kAvx512Bf16:
      return make_avx512_bf16_backend(threads);
  }
  throw InternalError("unknown level");
}

}  // namespace regroup
