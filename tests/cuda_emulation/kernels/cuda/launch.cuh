// Twin of the header of this name for the emulation. How a kernel is started, and the shared memory it is
// started with.
#pragma once

#include <functional>
#include <tuple>

#include "kernels/cuda/cuda_device.h"
#include "tests/cuda_emulation/machine.h"

namespace regroup {

// The emulated cudaLaunchKernel() takes one argument: a std::function that runs a thread.
template <class... Parameters, class... Arguments>
void launch(CudaDevice& device, const Grid& grid, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (grid.blocks.x == 0 || grid.blocks.y == 0 || grid.blocks.z == 0) return;
  const std::tuple<Parameters...> values(static_cast<Parameters>(arguments)...);
  std::function<void()> thread = [kernel, values] { std::apply(kernel, values); };
  void* pointers[] = {&thread};
  device.launch(reinterpret_cast<const void*>(kernel), grid, pointers);
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::dynamic_shared());
}

}  // namespace regroup
