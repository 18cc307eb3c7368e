#include "kernels/cuda/cuda_backend.h"

namespace regroup {
void CudaBackend::do_embedding(Tensor, Tensor, index_t, Tensor) {
  throw InternalError("do_embedding is unfinished");
}
void CudaBackend::do_embedding_backward(Tensor, Tensor, index_t, Tensor) {
  throw InternalError("do_embedding_backward is unfinished");
}
void CudaBackend::do_relative_bias(Tensor, index_t, Tensor, const RelativeBiasOptions&) {
  throw InternalError("do_relative_bias is unfinished");
}
void CudaBackend::do_relative_bias_backward(Tensor, index_t, Tensor, const RelativeBiasOptions&) {
  throw InternalError("do_relative_bias_backward is unfinished");
}
void CudaBackend::do_attention(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                               const AttentionOptions&) {
  throw InternalError("do_attention is unfinished");
}
void CudaBackend::do_attention_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                                        Tensor, Tensor, Tensor, Tensor, const AttentionOptions&) {
  throw InternalError("do_attention_backward is unfinished");
}
void CudaBackend::do_cross_entropy_max(Tensor, Tensor) {
  throw InternalError("do_cross_entropy_max is unfinished");
}
void CudaBackend::do_cross_entropy_sums(Tensor, Tensor, Tensor, Tensor, const CrossEntropyOptions&) {
  throw InternalError("do_cross_entropy_sums is unfinished");
}
void CudaBackend::do_cross_entropy_loss(Tensor, Tensor, Tensor, Tensor, const CrossEntropyOptions&) {
  throw InternalError("do_cross_entropy_loss is unfinished");
}
void CudaBackend::do_cross_entropy_backward(Tensor, Tensor, Tensor, Tensor, double, Tensor,
                                            const CrossEntropyOptions&) {
  throw InternalError("do_cross_entropy_backward is unfinished");
}
void CudaBackend::do_adafactor_statistics(std::span<const AdafactorSlot>, const AdafactorOptions&) {
  throw InternalError("do_adafactor_statistics is unfinished");
}
void CudaBackend::do_adafactor_moments(std::span<const AdafactorSlot>, const AdafactorOptions&) {
  throw InternalError("do_adafactor_moments is unfinished");
}
void CudaBackend::do_adafactor_update(std::span<const AdafactorSlot>, const AdafactorOptions&) {
  throw InternalError("do_adafactor_update is unfinished");
}
void CudaBackend::do_adamw_statistics(std::span<const AdamWSlot>) {
  throw InternalError("do_adamw_statistics is unfinished");
}
void CudaBackend::do_adamw_update(std::span<const AdamWSlot>, const AdamWOptions&) {
  throw InternalError("do_adamw_update is unfinished");
}
}  // namespace regroup
