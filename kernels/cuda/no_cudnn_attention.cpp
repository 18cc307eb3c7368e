#include "kernels/cuda/cudnn_attention.h"

namespace regroup {

std::unique_ptr<CudnnAttention> make_cudnn_attention(CudaDevice&, bool) { return nullptr; }

}  // namespace regroup
