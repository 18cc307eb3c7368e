#include "kernels/make_backend.h"

#include "kernels/cpu/cpu_backend.h"

namespace regroup {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == DeviceKind::kCuda) return make_cuda_backend(options);
  return std::make_unique<CpuBackend>(options.threads);
}

}  // namespace regroup
