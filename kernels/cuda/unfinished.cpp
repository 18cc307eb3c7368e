#include "kernels/cuda/cuda_backend.h"

namespace regroup {
void CudaBackend::do_embedding(Tensor, Tensor, index_t, Tensor) {
  throw InternalError("do_embedding is unfinished");
}
void CudaBackend::do_embedding_backward(Tensor, Tensor, index_t, Tensor) {
  throw InternalError("do_embedding_backward is unfinished");
}
void CudaBackend::do_attention(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                               const AttentionOptions&) {
  throw InternalError("do_attention is unfinished");
}
void CudaBackend::do_attention_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, const AttentionOptions&) {
  throw InternalError("do_attention_backward is unfinished");
}
}  // namespace regroup
