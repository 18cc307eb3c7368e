// Kernels over all slots of an optimizer at once: the slots are cut into tiles, and a block handles a tile.
#pragma once

#include <type_traits>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {

constexpr unsigned kTileThreads = 256;
constexpr index_t kFlatTile = 32768;  // elements of a tile of a slot without rows and columns

// The slot that holds `number` where slot i begins at number entries[i].*first, those before it lower.
template <auto first, class Entry>
__device__ index_t find_slot(const Entry* entries, index_t slots, index_t number) {
  index_t low = 0, high = slots - 1;
  while (low < high) {
    const index_t middle = (low + high + 1) / 2;
    if (entries[middle].*first <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// Calls body(std::integral_constant<int, M>(), i) for this thread's elements i .. i + M - 1 of the flat tile
// number `tile` of [0, size): M = N, and 1 for what is left.
template <int N, class Body>
__device__ void for_flat_tile(index_t tile, index_t size, Body body) {
  const index_t begin = tile * kFlatTile, end = size < begin + kFlatTile ? size : begin + kFlatTile;
#pragma unroll 4
  for (index_t i = begin + index_t{threadIdx.x} * N; i < end; i += index_t{kTileThreads} * N) {
    if (i + N <= end) {
      body(std::integral_constant<int, N>(), i);
    } else {
      for (index_t rest = i; rest < end; ++rest) body(std::integral_constant<int, 1>(), rest);
    }
  }
}

// The sums of w^2 and g^2 over a flat tile, in thread 0.
template <int N, class S>
__device__ double2 flat_squares(const S* w, const S* g, index_t tile, index_t size) {
  S of_w = 0, of_g = 0;
  for_flat_tile<N>(tile, size, [&](auto pack, index_t i) {
    S x[pack()], y[pack()];
    load_values(w + i, x);
    load_values(g + i, y);
#pragma unroll
    for (int j = 0; j < pack(); ++j) {
      of_w += x[j] * x[j];
      of_g += y[j] * y[j];
    }
  });
  return double2{block_sum(static_cast<double>(of_w)), block_sum(static_cast<double>(of_g))};
}

// The sum of the partial sums of `count` tiles, in all threads.
__device__ inline double2 sum_tiles(const double2* of_tile, index_t count) {
  double2 sum{0, 0};
#pragma unroll 4
  for (index_t tile = threadIdx.x; tile < count; tile += kTileThreads) {
    sum.x += of_tile[tile].x;
    sum.y += of_tile[tile].y;
  }
  return double2{block_sum(sum.x), block_sum(sum.y)};
}

}  // namespace regroup
