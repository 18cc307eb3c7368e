// THE OP SET. Every numeric operation of the system is declared here, once: its formula, shapes and types.
//
// Conventions. Inputs first, then outputs, options last. Gradients of parameters are added to (`+=`),
// gradients of activations are written (`=`). T is the compute type (bfloat16, float32 or float64), S =
// stat_dtype(T) the type of statistics, losses and parameter gradients. Tensors are dense unless "rows may be
// strided" is said. Shapes:
//   N tokens (batch x length)   B batch   Q query length   K key length   D d_model   F d_ff   C head size
//   (d_kv) H query heads of this rank   G key/value groups of this rank, G | H   V vocabulary of this rank
// The public members check shapes, types and overlap (InternalError on a breach: callers are code, not
// users), count floating-point operations, and call the device's private do_*(). Nothing here allocates,
// except allocate().
#pragma once

#include <optional>
#include <span>

#include "kernels/base/random.h"
#include "kernels/tensor.h"

namespace regroup {

struct MatmulOptions {
  bool transpose_a = false;
  bool transpose_b = false;
  bool accumulate = false;  // c += a b instead of c = a b
};

// Elementwise dropout of a [rows, columns] matrix that is a part of a global one: element (r, c) is kept, and
// divided by (1 - rate), where the random word at counter ((first_row + r) * columns + first_column + c) says
// so. The mask is a function of the key and global coordinates only; it is never stored.
struct Dropout {
  double rate = 0;  // 0: identity
  Philox key;
  index_t first_row = 0;
  index_t first_column = 0;
  index_t columns = 0;  // of the global matrix
};

struct AttentionOptions {
  bool causal = false;  // query i sees keys <= i
  // The caller's word that every key_mask[b] is one or more nonzeros, then 0s. Changes no result; more
  // kernels can do it.
  bool padded_at_end = false;
  // Dropout of probabilities: element ((first_sample + b) * heads + first_head + h, i, j) of the global
  // [samples * heads, Q, K] array of probabilities.
  double dropout_rate = 0;
  Philox dropout_key;
  index_t first_sample = 0;
  index_t first_head = 0;
  index_t heads = 0;  // of the whole model
};

struct RelativeBiasOptions {
  bool bidirectional = true;
  index_t max_distance = 128;
};

struct CrossEntropyOptions {
  index_t first_vocabulary_id = 0;  // global id of this rank's column 0
  double z_loss = 0;                // coefficient of log(Z)^2
};

// One parameter as the optimizer ops see it: this rank's slice as a matrix [R, C] (a vector is [1, C]).
struct AdafactorSlot {
  Tensor weight;    // S [R, C], master
  Tensor gradient;  // S [R, C]
  // Factored: the state (row [R], column [C], type S) and this step's sums (float64 [R], [C]).
  Tensor row, column, row_sums, column_sums;
  // Not factored: the full second moment, S [R, C]; the four above are empty.
  Tensor second_moment;
  // float64 [4]: sum of w^2, of g^2, of (g^2 / estimate), of row. Over this slice; the caller makes them
  // global.
  Tensor totals;
  index_t global_rows = 0, global_columns = 0;
};

struct AdafactorOptions {
  double beta2 = 0;  // decay of the second moments at this step
  double learning_rate = 0;
  double epsilon_gradient = 1e-30;  // T5X epsilon1
  double epsilon_parameter = 1e-3;  // T5X epsilon2: least rms(w)
  double clipping_threshold = 1.0;
};

struct AdamWSlot {
  Tensor weight, gradient, first_moment, second_moment;  // S, equal shapes
  Tensor totals;                                         // float64 [4], as above; [0], [1] used
  index_t global_size = 0;
  bool decay = true;
};

struct AdamWOptions {
  double learning_rate = 0;
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0;
  index_t step = 1;           // 1-based, for bias correction
  bool scale_by_rms = false;  // multiply the update by max(epsilon_parameter, rms(w)), as Adafactor does
  double epsilon_parameter = 1e-3;
};

class Backend {
 public:
  virtual ~Backend() = default;

  // ---- memory
  // Zeroed memory of the device, aligned to 64 bytes. UserError where there is not enough.
  virtual Buffer allocate(index_t bytes) = 0;
  // Memory of the host that copies to and from the device are fastest with, aligned to 64 bytes.
  virtual Buffer allocate_host(index_t bytes) { return allocate(bytes); }
  // Between host memory and the device, in the order of the ops. Dense tensors; `host` has at least
  // tensor.bytes(). On return of copy_from_host() `host` may be written again; on return of copy_to_host() it
  // holds the tensor.
  virtual void copy_from_host(const void* host, Tensor tensor) = 0;
  virtual void copy_to_host(Tensor tensor, void* host) = 0;
  // Whether the host may read and write tensors of this device itself.
  virtual bool host_accessible() const { return true; }
  // Bytes that allocate() may still give; nothing where the device does not know.
  virtual std::optional<index_t> free_bytes() const { return std::nullopt; }
  // The device in words, for the log.
  virtual std::string describe() const = 0;
  // Whether the device multiplies bfloat16 in hardware. Where it does not, products of bfloat16 are made of
  // float32 ones and slower than those.
  virtual bool multiplies_bfloat16() const { return true; }
  // The same for two backends on one device with memory of its own, and for no others; empty on the CPU.
  virtual std::string device_id() const { return {}; }
  // Where the device is on the host's PCI bus, as the kernel writes it, "0000:3b:00.0"; empty on the CPU.
  virtual std::string bus_id() const { return {}; }
  // The most elements of an intermediate that is made and used in pieces: large enough for fast products,
  // small enough for the device's memory and caches.
  virtual index_t piece_elements() const { return index_t{1} << 24; }
  // What was chosen by measuring so far, as text for set_tuning() of a backend on the same kind of device:
  // with the same choices ops give the same bits. Empty where nothing is measured.
  virtual std::string tuning() const { return {}; }
  // UserError where the text is none of tuning()'s; choices of another device or library are ignored.
  virtual void set_tuning(const std::string& /*text*/) {}
  // Waits until everything issued has been done.
  virtual void synchronize() = 0;

  void fill_zero(Tensor x);
  void copy(Tensor x, Tensor y);           // y = x, same type and shape; rows may be strided
  void cast(Tensor x, Tensor y);           // y = x in y's type
  void add(Tensor a, Tensor b, Tensor y);  // y = a + b in float32 (S); y may be a or b
  void scale(Tensor x, double factor);     // x *= factor

  // ---- matrix product
  // c = op(a) op(b) (+ c): op(a) [M, K], op(b) [K, N], c [M, N]; rows may be strided. a and b of one type T,
  // c of type T or S(T). Accumulates in S.
  void matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options = {});

  // ---- RMSNorm (Zhang and Sennrich 2019; T5 layer_norm: no mean, no bias)
  // r = (mean_d(x^2) + epsilon)^-1/2; y = w x r.  x, y T [N, D]; w T [D]; inverse_rms S [N] is for backward.
  void rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon);
  // dx = residual_gradient + r (w dy - x r^2 mean_d(w dy x));  dw += sum_n dy x r.
  // residual_gradient T [N, D] may be empty (0) and may be dx itself; dw S [D].
  void rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms, Tensor residual_gradient,
                         Tensor dx, Tensor dw /* += */);

  // ---- gated GELU (Shazeer 2020, T5 1.1)
  // y = dropout(gelu(x[:, :F]) * x[:, F:]), gelu the tanh form. x T [N, 2F], y T [N, F].
  void gated_gelu(Tensor x, Tensor y, const Dropout& dropout);
  // dx T [N, 2F] from dy T [N, F] and the x of forward.
  void gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout);

  // ---- ReLU (T5 1.0)
  // y = dropout(max(x, 0)). x, y T [N, F].
  void relu(Tensor x, Tensor y, const Dropout& dropout);
  // dx T [N, F] from dy T [N, F] and the x of forward; 0 where x is 0.
  void relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout);

  // ---- residual and dropout
  // y = residual + dropout(x); residual may be empty (0). All T [N, D]; y may be residual or x.
  void dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout);
  // dx = dropout mask * dy / (1 - rate); dx may be dy.
  void dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout);

  // ---- embedding
  // y[n] = table[ids[n] - first_id] where that row is in this rank's table, else 0. ids int32 [N]; table T
  // [V, D].
  void embedding(Tensor ids, Tensor table, index_t first_id, Tensor y);
  // dtable[ids[n] - first_id] += dy[n], in an order that is a function of the ids alone. dtable S [V, D].
  void embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable /* += */);

  // ---- relative position bias (T5)
  // bias[h, k - q + Q - 1] = table[bucket(k - q), h]. table T [buckets, H]; bias S [H, Q + K - 1]. bucket():
  // relative_position_bucket(), below.
  void relative_bias(Tensor table, index_t queries, Tensor bias, const RelativeBiasOptions& options);
  // dtable[bucket(d), h] += dbias[h, d + Q - 1]. dtable S [buckets, H].
  void relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable /* += */,
                              const RelativeBiasOptions& options);

  // ---- grouped-query attention (Ainslie et al. 2023)
  // For query head h and its group g = h / (H / G):
  //   s_ij = q_i . k_j + bias[h, j - i + Q - 1], no 1/sqrt(C);
  //   s_ij = -inf where key_mask[b, j] == 0 or (causal and j > i);
  //   p = softmax_j(s);  out_i = sum_j dropout(p)_ij v_j.
  // A query that sees no key gives 0. q, out T [B, Q, H, C]; k, v T [B, K, G, C] (each [.., heads, C] row may
  // be a part of a wider row: strides of dims 0 and 1 are free, heads and C dense); bias S [H, Q + K - 1] or
  // empty; key_mask int32 [B, K] or empty; log_sum_exp S [B, H, Q] is for backward (of a query without keys:
  // +inf). Never materialises more than a tile or one head's scores (cuDNN's backward keeps all heads').
  void attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out, Tensor log_sum_exp,
                 const AttentionOptions& options);
  // dq, dk, dv as q, k, v (strided alike); dbias S [H, Q + K - 1] or empty. Probabilities are recomputed from
  // log_sum_exp. No gradient may lie in an input. The order of every sum is fixed by shapes alone.
  void attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                          Tensor log_sum_exp, Tensor dq, Tensor dk, Tensor dv, Tensor dbias /* += */,
                          const AttentionOptions& options);

  // ---- cross-entropy over a vocabulary split by columns
  // Three local pieces; between them the caller reduces over the ranks that share the vocabulary.
  // row_max[n] = max_v logits[n, v]. logits S [N, V]; row_max S [N].
  void cross_entropy_max(Tensor logits, Tensor row_max);
  // sums[0, n] = sum_v exp(logits[n, v] - row_max[n]); sums[1, n] = logits[n, target] - row_max[n] where the
  // target is one of this rank's columns, else 0. targets int32 [N] (0 = padding: no loss); sums S [2, N].
  void cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                          const CrossEntropyOptions& options);
  // With logZ = row_max + log(sums[0]), of the tokens whose target is not padding:
  // loss[0] += sum_n (log sums[0, n] - sums[1, n]);  loss[1] += z_loss sum_n logZ_n^2.  loss float64 [2].
  void cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss /* += */,
                          const CrossEntropyOptions& options);
  // dlogits[n, v] = factor ((1 + 2 z_loss logZ_n) softmax - [v is the target]); 0 for padding. dlogits T [N,
  // V].
  void cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums, double factor,
                              Tensor dlogits, const CrossEntropyOptions& options);

  // ---- optimizer
  // Adafactor (Shazeer and Stern 2018) as T5X has it, in three passes with the caller's sums over ranks in
  // between.
  // 1. totals[0] = sum w^2, totals[1] = sum g^2; factored: row_sums = sum_c (g^2 + e1), column_sums = sum_r
  // (g^2 + e1).
  void adafactor_statistics(std::span<const AdafactorSlot> slots, const AdafactorOptions& options);
  // 2. row = b2 row + (1 - b2) row_sums / global_columns, column likewise; or second_moment = b2 v + (1 -
  // b2)(g^2 + e1);
  //    totals[2] = sum g^2 / (row column) or sum g^2 / v; totals[3] = sum row (0 where not factored).
  void adafactor_moments(std::span<const AdafactorSlot> slots, const AdafactorOptions& options);
  // 3. With m = totals[3] / global_rows (1 where not factored), u = g sqrt(m / (row column)) or g / sqrt(v),
  //    rms(u) = sqrt(m totals[2] / size):  w -= lr max(e2, rms(w)) u / max(1, rms(u) / clipping_threshold).
  void adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options);

  // AdamW (Loshchilov and Hutter 2019). totals[0] = sum w^2, totals[1] = sum g^2.
  void adamw_statistics(std::span<const AdamWSlot> slots);
  // m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr s (m^ / (sqrt(v^) + eps)) + lr weight_decay w,
  // with the usual bias corrections and s = max(epsilon_parameter, rms(w)) if scale_by_rms else 1.
  void adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options);

  // Floating-point operations issued so far: 2 M N K a product; attention counts its products over the
  // visible (causal: lower-triangular) scores, without what backward recomputes; elementwise work is not
  // counted.
  double flops() const { return flops_; }

 private:
  virtual void do_fill_zero(Tensor x) = 0;
  virtual void do_copy(Tensor x, Tensor y) = 0;
  virtual void do_cast(Tensor x, Tensor y) = 0;
  virtual void do_add(Tensor a, Tensor b, Tensor y) = 0;
  virtual void do_scale(Tensor x, double factor) = 0;
  virtual void do_matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options) = 0;
  virtual void do_rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon) = 0;
  virtual void do_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms,
                                    Tensor residual_gradient, Tensor dx, Tensor dw) = 0;
  virtual void do_gated_gelu(Tensor x, Tensor y, const Dropout& dropout) = 0;
  virtual void do_gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) = 0;
  virtual void do_relu(Tensor x, Tensor y, const Dropout& dropout) = 0;
  virtual void do_relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) = 0;
  virtual void do_dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout) = 0;
  virtual void do_dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout) = 0;
  virtual void do_embedding(Tensor ids, Tensor table, index_t first_id, Tensor y) = 0;
  virtual void do_embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable) = 0;
  virtual void do_relative_bias(Tensor table, index_t queries, Tensor bias,
                                const RelativeBiasOptions& options) = 0;
  virtual void do_relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable,
                                         const RelativeBiasOptions& options) = 0;
  virtual void do_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                            Tensor log_sum_exp, const AttentionOptions& options) = 0;
  virtual void do_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask,
                                     Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk, Tensor dv,
                                     Tensor dbias, const AttentionOptions& options) = 0;
  virtual void do_cross_entropy_max(Tensor logits, Tensor row_max) = 0;
  virtual void do_cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                     const CrossEntropyOptions& options) = 0;
  virtual void do_cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss,
                                     const CrossEntropyOptions& options) = 0;
  virtual void do_cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                         double factor, Tensor dlogits,
                                         const CrossEntropyOptions& options) = 0;
  virtual void do_adafactor_statistics(std::span<const AdafactorSlot> slots,
                                       const AdafactorOptions& options) = 0;
  virtual void do_adafactor_moments(std::span<const AdafactorSlot> slots,
                                    const AdafactorOptions& options) = 0;
  virtual void do_adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) = 0;
  virtual void do_adamw_statistics(std::span<const AdamWSlot> slots) = 0;
  virtual void do_adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options) = 0;

  double flops_ = 0;
};

// T5's bucket of the distance key - query (HF _relative_position_bucket, golden values in tests).
index_t relative_position_bucket(index_t distance, bool bidirectional, index_t buckets, index_t max_distance);

}  // namespace regroup
