#include "kernels/cuda/cuda_backend.h"

namespace regroup {
void CudaBackend::do_attention(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                               const AttentionOptions&) {
  throw InternalError("do_attention is unfinished");
}
void CudaBackend::do_attention_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, const AttentionOptions&) {
  throw InternalError("do_attention_backward is unfinished");
}
}  // namespace regroup
