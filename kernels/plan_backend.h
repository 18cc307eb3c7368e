// A backend that computes nothing: run the same model code on it to learn what a step needs.
#pragma once

#include "kernels/backend.h"

namespace regroup {

// Hands out addresses without memory behind them, counts bytes and floating-point operations, touches no
// data. A memory plan is the high-water marks of the arenas after one step on this backend, so plan and run
// cannot differ.
class PlanBackend : public Backend {
 public:
  PlanBackend() = default;
  // Plans for `device`: works in its pieces.
  explicit PlanBackend(const Backend& device) : piece_elements_(device.piece_elements()) {}

  Buffer allocate(index_t bytes) override;
  void copy_from_host(const void*, Tensor) override {}
  void copy_to_host(Tensor, void*) override {}
  void synchronize() override {}
  std::string describe() const override { return "a memory plan"; }
  index_t piece_elements() const override { return piece_elements_; }

  index_t allocated() const { return allocated_; }  // bytes, so far

 private:
  void do_fill_zero(Tensor) override {}
  void do_copy(Tensor, Tensor) override {}
  void do_cast(Tensor, Tensor) override {}
  void do_add(Tensor, Tensor, Tensor) override {}
  void do_scale(Tensor, double) override {}
  void do_matmul(Tensor, Tensor, Tensor, MatmulOptions) override {}
  void do_rms_norm(Tensor, Tensor, Tensor, Tensor, double) override {}
  void do_rms_norm_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor) override {}
  void do_gated_gelu(Tensor, Tensor, const Dropout&) override {}
  void do_gated_gelu_backward(Tensor, Tensor, Tensor, const Dropout&) override {}
  void do_relu(Tensor, Tensor, const Dropout&) override {}
  void do_relu_backward(Tensor, Tensor, Tensor, const Dropout&) override {}
  void do_dropout_add(Tensor, Tensor, Tensor, const Dropout&) override {}
  void do_dropout_backward(Tensor, Tensor, const Dropout&) override {}
  void do_embedding(Tensor, Tensor, index_t, Tensor) override {}
  void do_embedding_backward(Tensor, Tensor, index_t, Tensor) override {}
  void do_relative_bias(Tensor, index_t, Tensor, const RelativeBiasOptions&) override {}
  void do_relative_bias_backward(Tensor, index_t, Tensor, const RelativeBiasOptions&) override {}
  void do_attention(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                    const AttentionOptions&) override {}
  void do_attention_backward(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                             Tensor, Tensor, const AttentionOptions&) override {}
  void do_cross_entropy_max(Tensor, Tensor) override {}
  void do_cross_entropy_sums(Tensor, Tensor, Tensor, Tensor, const CrossEntropyOptions&) override {}
  void do_cross_entropy_loss(Tensor, Tensor, Tensor, Tensor, const CrossEntropyOptions&) override {}
  void do_cross_entropy_backward(Tensor, Tensor, Tensor, Tensor, double, Tensor,
                                 const CrossEntropyOptions&) override {}
  void do_adafactor_statistics(std::span<const AdafactorSlot>, const AdafactorOptions&) override {}
  void do_adafactor_moments(std::span<const AdafactorSlot>, const AdafactorOptions&) override {}
  void do_adafactor_update(std::span<const AdafactorSlot>, const AdafactorOptions&) override {}
  void do_adamw_statistics(std::span<const AdamWSlot>) override {}
  void do_adamw_update(std::span<const AdamWSlot>, const AdamWOptions&) override {}

  index_t piece_elements_ = Backend::piece_elements();
  index_t allocated_ = 0;
};

}  // namespace regroup
