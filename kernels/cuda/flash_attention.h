// FlashAttention-2 (Dao 2023) for bfloat16 on tensor cores (mma.sync), with T5's bias and its gradient inside
// the kernels. Sums, softmax and bias in float32; probabilities and their gradients are bfloat16 operands.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// bfloat16, a head size of at most 128 that is a multiple of 8, rows that begin at multiples of 16 bytes, and
// tiles that fit into the shared memory of the device's blocks.
bool flash_attention_supports(const CudaDevice& device, const AttentionCall& call);
bool flash_attention_supports(const CudaDevice& device, const AttentionCall& call,
                              const AttentionGradients& gradients);
void flash_attention_forward(CudaDevice& device, const AttentionCall& call);
void flash_attention_backward(CudaDevice& device, const AttentionCall& call,
                              const AttentionGradients& gradients);

}  // namespace regroup
