#include "kernels/cuda/cuda_backend.h"

namespace regroup {
void CudaBackend::do_fill_zero(Tensor) { throw InternalError("do_fill_zero is unfinished"); }
void CudaBackend::do_copy(Tensor, Tensor) { throw InternalError("do_copy is unfinished"); }
void CudaBackend::do_cast(Tensor, Tensor) { throw InternalError("do_cast is unfinished"); }
void CudaBackend::do_add(Tensor, Tensor, Tensor) { throw InternalError("do_add is unfinished"); }
void CudaBackend::do_rms_norm(Tensor, Tensor, Tensor, Tensor, double) {
  throw InternalError("do_rms_norm is unfinished");
}
void CudaBackend::do_rms_norm_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) {
  throw InternalError("do_rms_norm_backward is unfinished");
}
void CudaBackend::do_gated_gelu(Tensor, Tensor, const Dropout&) {
  throw InternalError("do_gated_gelu is unfinished");
}
void CudaBackend::do_gated_gelu_backward(Tensor, Tensor, Tensor, const Dropout&) {
  throw InternalError("do_gated_gelu_backward is unfinished");
}
void CudaBackend::do_dropout_add(Tensor, Tensor, Tensor, const Dropout&) {
  throw InternalError("do_dropout_add is unfinished");
}
void CudaBackend::do_dropout_backward(Tensor, Tensor, const Dropout&) {
  throw InternalError("do_dropout_backward is unfinished");
}
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
