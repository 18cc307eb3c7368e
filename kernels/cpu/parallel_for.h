// Threads over fixed blocks: what a block is never depends on how many threads there are, so neither does any
// result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/dtype.h"

namespace regroup {

inline index_t divide_up(index_t a, index_t b) { return (a + b - 1) / b; }

// Rows per block so that a block has at least `least_elements` and there are at most 64 blocks: enough for
// the cores of a socket, few enough for a partial sum per block. A function of the shape only.
inline index_t rows_per_block(index_t rows, index_t columns, index_t least_elements = index_t{1} << 14) {
  constexpr index_t kMaxBlocks = 64;
  return std::max(
      {index_t{1}, divide_up(rows, kMaxBlocks), divide_up(least_elements, std::max(columns, index_t{1}))});
}

// Calls body(begin, end) for [0, size) cut into blocks of `block`; at the same time for up to `threads` of
// them. The body must not throw.
template <class Body>
void parallel_for(int threads, index_t size, index_t block, Body&& body) {
  const index_t blocks = divide_up(size, block);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1 && blocks > 1)
  for (index_t i = 0; i < blocks; ++i) body(i * block, std::min(size, (i + 1) * block));
}

}  // namespace regroup
