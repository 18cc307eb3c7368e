// FlashAttention's forward by Hopper's warpgroup products.
#pragma once

#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// A device of compute capability 9.0, and what flash_attention_supports() asks.
bool wgmma_attention_supports(const CudaDevice& device, const AttentionCall& call);
void wgmma_attention_forward(CudaDevice& device, const AttentionCall& call);

}  // namespace regroup
