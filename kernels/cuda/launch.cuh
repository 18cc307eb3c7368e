// How a kernel is started, and the shared memory it is started with.
#pragma once

#include <tuple>

#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Runs kernel(arguments...) on the device's stream; nothing where the grid has no blocks. The arguments are
// converted to the kernel's parameters.
template <class... Parameters, class... Arguments>
void launch(CudaDevice& device, const Grid& grid, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        device.launch(reinterpret_cast<const void*>(kernel), grid, pointers);
      },
      values);
}

// The block's dynamic shared memory (Grid::shared_bytes), aligned to 128 bytes.
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ __align__(128) unsigned char dynamic_shared_bytes[];
  return reinterpret_cast<T*>(dynamic_shared_bytes);
}

}  // namespace regroup
