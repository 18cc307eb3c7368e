#include "kernels/make_backend.h"

#include "kernels/cpu/levels.h"

namespace regroup {

std::unique_ptr<Backend> make_backend(const BackendOptions& options) {
  if (options.device == DeviceKind::kCuda) return make_cuda_backend(options);
  return make_cpu_backend(options.cpu_level.value_or(highest_cpu_level()), options.threads);
}

}  // namespace regroup
