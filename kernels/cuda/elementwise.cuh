// Kernels in which a thread reads and writes a few neighbouring elements and nothing else.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"

namespace regroup {

// Whether 16-byte accesses may begin at all of these addresses.
inline bool aligned(std::initializer_list<const void*> addresses) {
  bool result = true;
  for (const void* address : addresses)
    result = result && reinterpret_cast<std::uintptr_t>(address) % 16 == 0;
  return result;
}

// Whether rows of `columns` elements at these addresses may be accessed N elements, 16 bytes or more, at a
// time.
template <int N>
bool in_packs(index_t columns, std::initializer_list<const void*> addresses) {
  return columns % N == 0 && aligned(addresses);
}

// i / divisor, both not negative. 64-bit division is a subroutine; most sizes fit into 32.
__device__ inline index_t quotient(index_t i, index_t divisor) {
  if (((i | divisor) >> 32) == 0) return static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(divisor);
  return i / divisor;
}

// op.apply<M>(i) handles elements i .. i + M - 1, for all of [0, size): M = N, and 1 for what is left.
template <int N, class Op>
__global__ void map_kernel(Op op, index_t size) {
  const index_t begin = (index_t{blockIdx.x} * blockDim.x + threadIdx.x) * N;
  if (begin + N <= size) {
    op.template apply<N>(begin);
    return;
  }
  for (index_t i = begin; i < size; ++i) op.template apply<1>(i);
}

// Runs `op` over [0, size), N at a time where `packs` says that they may be accessed so.
template <int N, class Op>
void map(CudaDevice& device, const Op& op, index_t size, bool packs) {
  constexpr index_t kThreads = 256;
  if (packs) {
    const Grid grid{.blocks = block_count(size, N * kThreads), .threads = kThreads};
    launch(device, grid, map_kernel<N, Op>, op, size);
  } else {
    const Grid grid{.blocks = block_count(size, kThreads), .threads = kThreads};
    launch(device, grid, map_kernel<1, Op>, op, size);
  }
}

}  // namespace regroup
