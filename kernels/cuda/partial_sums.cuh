// The second step of a sum whose first step left one partial sum a block.
#pragma once

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {

// sums[c] += sum_b partial[b, c]: warp w of a block adds up b = w, w + 32, ..., then the warps follow in
// their order. A block owns 32 columns.
template <class S>
__global__ void __launch_bounds__(kWarpThreads* kWarpThreads)
    add_partial_rows_kernel(const S* partial, index_t count, index_t columns, S* sums) {
  __shared__ S of_warp[kWarpThreads][kWarpThreads];
  const unsigned lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const index_t column = index_t{blockIdx.x} * kWarpThreads + lane;
  S sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (index_t b = warp; b < count; b += kWarpThreads) sum += partial[b * columns + column];
  }
  of_warp[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kWarpThreads; ++w) sum += of_warp[w][lane];
  sums[column] += sum;
}

// partial [count, columns] and sums [columns] on the device.
template <class S>
void add_partial_rows(CudaDevice& device, const S* partial, index_t count, index_t columns, S* sums) {
  const Grid grid{.blocks = block_count(columns, kWarpThreads), .threads = kWarpThreads * kWarpThreads};
  launch(device, grid, add_partial_rows_kernel<S>, partial, count, columns, sums);
}

}  // namespace regroup
