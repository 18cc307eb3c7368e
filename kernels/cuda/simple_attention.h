// Attention by plain loops over tiles: every type, head size, shape and alignment. No tensor cores; sums in
// S = stat_t<T>, probabilities unrounded.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Whether the kernels can run this: a head must fit into shared memory.
bool simple_attention_supports(const CudaDevice& device, const AttentionCall& call);
void simple_attention_forward(CudaDevice& device, const AttentionCall& call);
void simple_attention_backward(CudaDevice& device, const AttentionCall& call,
                               const AttentionGradients& gradients);

}  // namespace regroup
