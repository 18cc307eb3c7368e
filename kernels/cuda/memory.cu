#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/dropout.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/ptx.cuh"

namespace regroup {
namespace {

template <class T>
__global__ void scale_kernel(T* x, index_t size, stat_t<T> factor) {
  const index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < size) x[i] = rounded<T>(widen(x[i]) * factor);
}

}  // namespace

void CudaBackend::do_scale(Tensor x, double factor) {
  dispatch(x.dtype, [&]<class T>() {
    constexpr index_t kThreads = 256;
    const Grid grid{.blocks = static_cast<unsigned>((x.numel() + kThreads - 1) / kThreads),
                    .threads = kThreads};
    launch(device_, grid, scale_kernel<T>, x.as<T>(), x.numel(), factor);
  });
}

}  // namespace regroup
