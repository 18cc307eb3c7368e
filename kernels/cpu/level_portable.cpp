#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/levels.h"

namespace regroup {

std::unique_ptr<Backend> make_portable_backend(int threads) {
  return std::make_unique<CpuBackend>(CpuLevel::kPortable, threads);
}

}  // namespace regroup
