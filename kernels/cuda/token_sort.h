// Tokens by id, for sums over all tokens of an id.
#pragma once

#include "kernels/cuda/cuda_device.h"

namespace regroup {

// A token in sorted order. Tokens of one id follow each other as they did before.
struct alignas(8) SortedToken {
  std::uint32_t row;    // id - first_id, or `rows` where that is outside [0, rows)
  std::uint32_t token;  // its number
};

// Scratch that sort_tokens() needs.
index_t token_sort_bytes(index_t tokens);

// Sorts ids [tokens] (on the device) by row. A stable radix sort in integers, 8 bits a pass: the same result
// whatever runs first. The result lies in `scratch`, which holds token_sort_bytes(tokens) on the device.
const SortedToken* sort_tokens(CudaDevice& device, const std::int32_t* ids, index_t tokens, index_t first_id,
                               index_t rows, std::byte* scratch);

}  // namespace regroup
