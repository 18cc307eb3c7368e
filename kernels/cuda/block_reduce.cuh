// Sums and maxima over the threads of a warp or a block, in an order fixed by the number of threads.
#pragma once

#include <cmath>
#include <limits>

#include "kernels/dtype.h"

namespace regroup {

constexpr int kWarpThreads = 32;
constexpr unsigned kWholeWarp = 0xFFFFFFFFU;

// Over the 32 lanes, in all of them.
template <class S>
__device__ S warp_sum(S x) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kWholeWarp, x, distance);
  }
  return x;
}
template <class S>
__device__ S warp_max(S x) {
#pragma unroll
  for (int distance = kWarpThreads / 2; distance > 0; distance /= 2) {
    const S other = __shfl_xor_sync(kWholeWarp, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

// One value of each warp, given by its lane 0, to lane `warp` of every warp; `none` to the other lanes.
// Called by all threads of a one-dimensional block of whole warps.
template <class S>
__device__ S exchange_warps(S x, S none) {
  __shared__ S of_warp[kWarpThreads];
  const unsigned lane = threadIdx.x % kWarpThreads;
  __syncthreads();  // the last call's values have been read
  if (lane == 0) of_warp[threadIdx.x / kWarpThreads] = x;
  __syncthreads();
  return lane < blockDim.x / kWarpThreads ? of_warp[lane] : none;
}

// Over the block, in all its threads.
template <class S>
__device__ S block_sum(S x) {
  return warp_sum(exchange_warps(warp_sum(x), S{0}));
}
template <class S>
__device__ S block_max(S x) {
  return warp_max(exchange_warps(warp_max(x), -std::numeric_limits<S>::infinity()));
}

}  // namespace regroup
