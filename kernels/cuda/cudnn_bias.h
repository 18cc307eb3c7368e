// What stands between our arguments of attention and cuDNN's: the bias by diagonals and by elements, a mask
// of keys and sequence lengths.
#pragma once

#include "kernels/cuda/cuda_device.h"

namespace regroup {

// full[h, q, k] = bias[h, k - q + queries - 1] in bfloat16. bias float32 [H, queries + keys - 1].
void expand_bias(CudaDevice& device, Tensor bias, index_t queries, bfloat16* full);

// dbias[h, d] += sum of dfull[h, q, k] over the elements with k - q + queries - 1 = d, in float32, in an
// order fixed by the shape. dbias float32 [H, queries + keys - 1], dfull bfloat16 [H, queries, keys].
void sum_bias_gradient(CudaDevice& device, const bfloat16* dfull, index_t queries, Tensor dbias /* += */);

// query_lengths[b] = queries; key_lengths[b] = the number of keys that key_mask[b] shows, at least 1.
// key_mask int32 [B, K], each row nonzeros and then 0s.
void sequence_lengths(CudaDevice& device, Tensor key_mask, index_t queries, std::int32_t* query_lengths,
                      std::int32_t* key_lengths);

}  // namespace regroup
