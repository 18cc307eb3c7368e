#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/levels.h"

namespace regroup {

std::unique_ptr<Backend> make_avx512_bf16_backend(int threads) {
  return std::make_unique<CpuBackend>(CpuLevel::kAvx512Bf16, threads);
}

}  // namespace regroup
