// The op set on an NVIDIA GPU: cuBLASLt for products, cuDNN or our own kernels for attention, own kernels for
// the rest. Every op is issued on one stream and returns at once.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/bucket_tables.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/slot_table.h"

namespace regroup {

class AttentionChoice;  // attention_choice.h
class CublasLtMatmul;   // matmul.h

class CudaBackend final : public Backend {
 public:
  // On the visible GPU number `ordinal`. `deterministic`: BackendOptions.
  CudaBackend(int ordinal, bool deterministic);
  ~CudaBackend() override;
  CudaBackend(const CudaBackend&) = delete;
  CudaBackend& operator=(const CudaBackend&) = delete;

  Buffer allocate(index_t bytes) override;
  Buffer allocate_host(index_t bytes) override;
  void copy_from_host(const void* host, Tensor tensor) override;
  void copy_to_host(Tensor tensor, void* host) override;
  void synchronize() override;
  bool host_accessible() const override { return false; }
  std::optional<index_t> free_bytes() const override { return device_.free_bytes(); }
  std::string describe() const override { return device_.describe(); }
  std::string device_id() const override;
  std::string bus_id() const override;
  std::string tuning() const override;
  void set_tuning(const std::string& text) override;
  index_t piece_elements() const override { return index_t{1} << 28; }

  CudaDevice& device() { return device_; }

 private:
  void do_fill_zero(Tensor x) override;
  void do_copy(Tensor x, Tensor y) override;
  void do_cast(Tensor x, Tensor y) override;
  void do_add(Tensor a, Tensor b, Tensor y) override;
  void do_scale(Tensor x, double factor) override;
  void do_matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options) override;
  void do_rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon) override;
  void do_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms, Tensor residual_gradient,
                            Tensor dx, Tensor dw) override;
  void do_gated_gelu(Tensor x, Tensor y, const Dropout& dropout) override;
  void do_gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) override;
  void do_relu(Tensor x, Tensor y, const Dropout& dropout) override;
  void do_relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) override;
  void do_dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout) override;
  void do_dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout) override;
  void do_embedding(Tensor ids, Tensor table, index_t first_id, Tensor y) override;
  void do_embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable) override;
  void do_relative_bias(Tensor table, index_t queries, Tensor bias,
                        const RelativeBiasOptions& options) override;
  void do_relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable,
                                 const RelativeBiasOptions& options) override;
  void do_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                    Tensor log_sum_exp, const AttentionOptions& options) override;
  void do_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask,
                             Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk, Tensor dv, Tensor dbias,
                             const AttentionOptions& options) override;
  void do_cross_entropy_max(Tensor logits, Tensor row_max) override;
  void do_cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                             const CrossEntropyOptions& options) override;
  void do_cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss,
                             const CrossEntropyOptions& options) override;
  void do_cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums, double factor,
                                 Tensor dlogits, const CrossEntropyOptions& options) override;
  void do_adafactor_statistics(std::span<const AdafactorSlot> slots,
                               const AdafactorOptions& options) override;
  void do_adafactor_moments(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) override;
  void do_adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) override;
  void do_adamw_statistics(std::span<const AdamWSlot> slots) override;
  void do_adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options) override;

  CudaDevice device_;
  bool deterministic_;
  std::unique_ptr<CublasLtMatmul> matmul_;
  std::unique_ptr<AttentionChoice> attention_;
  BucketTables bucket_tables_;
  SlotTable adafactor_slots_, adamw_slots_;
};

}  // namespace regroup
