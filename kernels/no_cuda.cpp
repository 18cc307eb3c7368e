// The CUDA half of make_backend.h in a build without CUDA.
#include "kernels/make_backend.h"

namespace regroup {

int cuda_device_count() { return 0; }

std::unique_ptr<Backend> make_cuda_backend(const BackendOptions&) {
  throw UserError(
      "this trainer was built without CUDA; build it where CMake finds nvcc, cuBLASLt, cuDNN and NCCL, or "
      "use "
      "--device cpu");
}

}  // namespace regroup
