// The op set on the host: oneDNN for products, OpenMP for the rest. Compiled once a level (cpu_level.h); code
// outside this folder gets it from make_backend().
#pragma once

#include <cstddef>
#include <memory>

#include "kernels/backend.h"
#include "kernels/cpu_level.h"

namespace regroup {

class OneDnnMatmul;

class CpuBackend : public Backend {
 public:
  // `level`: what this build of the class was compiled for. `threads` for every op; 0: OMP_NUM_THREADS, or
  // all cores this process may run on.
  CpuBackend(CpuLevel level, int threads);
  ~CpuBackend() override;
  CpuBackend(const CpuBackend&) = delete;
  CpuBackend& operator=(const CpuBackend&) = delete;

  Buffer allocate(index_t bytes) override;
  // In huge pages, where the system has them: what disks and networks move in fewer pieces.
  Buffer allocate_host(index_t bytes) override;
  void copy_from_host(const void* host, Tensor tensor) override;
  void copy_to_host(Tensor tensor, void* host) override;
  void synchronize() override {}
  std::string describe() const override;
  bool multiplies_bfloat16() const override { return multiplies_bfloat16_; }

 private:
  Buffer allocate_aligned(index_t bytes, std::size_t alignment) const;
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

  // Uninitialised memory for the op being run, 64-byte aligned, valid until the next call. Kept between ops;
  // grows where an op needs more than any before it, which is in the first step.
  std::byte* workspace(index_t bytes);

  CpuLevel level_;
  int threads_;
  bool multiplies_bfloat16_;
  std::unique_ptr<OneDnnMatmul> matmul_;
  Buffer workspace_;
};

}  // namespace regroup
