#include "trainer/model/attention.h"

#include <algorithm>

#include "parallel/tensor_parallel.h"
#include "trainer/model/attention_probe.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

// The heads [first, first + count) of rows that hold `columns / C` heads, as [B, L, count, C].
Tensor heads_of(Tensor rows, index_t batch, index_t first, index_t count, index_t d_kv) {
  return rows.slice(1, first * d_kv, (first + count) * d_kv).reshape({batch, rows[0] / batch, count, d_kv});
}

AttentionOptions options_of(const Step& step, const AttentionShape& shape, bool causal) {
  return {.causal = causal,
          .padded_at_end = true,  // as batches are made
          .dropout_rate = step.dropout_rate,
          .dropout_key = step.dropout_key.child(static_cast<std::uint64_t>(shape.site)),
          .first_sample = step.first_sample,
          .first_head = shape.first_head,
          .heads = shape.model_heads};
}

// The place of the attention whose parameters begin with `prefix` in attention_sites().
index_t site_of(const ModelConfig& config, const std::string& prefix) {
  const std::vector<AttentionSite> sites = attention_sites(config);
  const auto found = std::find_if(sites.begin(), sites.end(),
                                  [&prefix](const AttentionSite& site) { return site.prefix == prefix; });
  check(found != sites.end(), "{} is not an attention of the model", prefix);
  return found - sites.begin();
}

// y = x + dropout(sum over tp of out W_o^T).
void leave(Step& step, Tensor x, Tensor out, const Parameter& o, Tensor y, index_t batch, index_t site) {
  const Arena::Frame frame(step.scratch);
  const Tensor projected = step.scratch.allocate(x.dtype, {x[0], x[1]});
  step.backend.matmul(out, o.weight, projected, {.transpose_b = true});
  leave_row_parallel(step.mesh, projected);
  step.backend.dropout_add(x, projected, y, step.dropout(site, x[0] / batch, x[1]));
}

// dout = (dropout mask * gradient) W_o; dW_o += ... Returns dout T [N, H C] in scratch.
Tensor leave_backward(Step& step, Tensor gradient, Tensor out, const Parameter& o, index_t batch,
                      index_t site) {
  const Tensor dout = step.scratch.allocate(gradient.dtype, {out[0], out[1]});
  Tensor dprojected = gradient;
  if (step.dropout_rate > 0) {
    dprojected = step.scratch.allocate(gradient.dtype, {gradient[0], gradient[1]});
    step.backend.dropout_backward(gradient, dprojected, step.dropout(site, gradient[0] / batch, gradient[1]));
  }
  step.backend.matmul(dprojected, out, o.gradient, {.transpose_a = true, .accumulate = true});
  step.backend.matmul(dprojected, o.weight, dout);
  return dout;
}

// The product y = x W^T backwards: dW += dy^T x; returns dy W, T [N, D] in scratch, this rank's share.
Tensor column_parallel_backward(Step& step, Tensor dy, Tensor x, const Parameter& w) {
  step.backend.matmul(dy, x, w.gradient, {.transpose_a = true, .accumulate = true});
  const Tensor dx = step.scratch.allocate(x.dtype, {x[0], x[1]});
  step.backend.matmul(dy, w.weight, dx);
  return dx;
}

}  // namespace

AttentionShape AttentionShape::of(const ModelConfig& config, index_t kv_groups, index_t site, int tp_rank,
                                  int tp_size) {
  const index_t heads = config.num_heads / tp_size;
  return {.heads = heads,
          .groups = std::max<index_t>(1, kv_groups / tp_size),
          .d_kv = config.d_kv,
          .model_heads = config.num_heads,
          .first_head = heads * tp_rank,
          .site = site};
}

SelfAttention::SelfAttention(const ParameterStore& store, const std::string& prefix,
                             const AttentionShape& shape, bool causal)
    : shape_(shape),
      site_(site_of(store.config(), prefix + "SelfAttention.")),
      causal_(causal),
      norm_(store, prefix + "layer_norm.weight"),
      qkv_(store.pack(prefix + "SelfAttention.q.weight", 3)),
      o_(store.parameter(prefix + "SelfAttention.o.weight")) {}

void SelfAttention::forward(Step& step, Tensor x, Tensor y, index_t batch, Tensor key_mask,
                            const PositionBias& position, Saved& saved) const {
  const auto& [heads, groups, d_kv, model_heads, first_head, site] = shape_;
  saved.normalised = norm_.forward(step, x, saved.norm);
  saved.qkv = step.saved.allocate(x.dtype, {x[0], (heads + 2 * groups) * d_kv});
  saved.out = step.saved.allocate(x.dtype, {x[0], heads * d_kv});
  saved.log_sum_exp = step.saved.allocate(stat_dtype(x.dtype), {batch, heads, x[0] / batch});
  step.backend.matmul(saved.normalised, qkv_.weight, saved.qkv, {.transpose_b = true});
  if (step.probe != nullptr) {
    step.probe->observe(step, {.site = site_,
                               .batch = batch,
                               .query_input = saved.normalised,
                               .key_input = saved.normalised,
                               .q = heads_of(saved.qkv, batch, 0, heads, d_kv),
                               .k = heads_of(saved.qkv, batch, heads, groups, d_kv),
                               .bias = position.bias,
                               .key_mask = key_mask,
                               .options = options_of(step, shape_, causal_)});
  }
  step.backend.attention(
      heads_of(saved.qkv, batch, 0, heads, d_kv), heads_of(saved.qkv, batch, heads, groups, d_kv),
      heads_of(saved.qkv, batch, heads + groups, groups, d_kv), position.bias, key_mask,
      heads_of(saved.out, batch, 0, heads, d_kv), saved.log_sum_exp, options_of(step, shape_, causal_));
  leave(step, x, saved.out, o_, y, batch, site + 1);
}

void SelfAttention::backward(Step& step, Tensor gradient, index_t batch, Tensor key_mask,
                             const PositionBias& position, const Saved& saved) const {
  const auto& [heads, groups, d_kv, model_heads, first_head, site] = shape_;
  const Arena::Frame frame(step.scratch);
  const Tensor dout = leave_backward(step, gradient, saved.out, o_, batch, site + 1);
  const Tensor dqkv = step.scratch.allocate(gradient.dtype, {saved.qkv[0], saved.qkv[1]});
  step.backend.attention_backward(
      heads_of(dout, batch, 0, heads, d_kv), heads_of(saved.qkv, batch, 0, heads, d_kv),
      heads_of(saved.qkv, batch, heads, groups, d_kv),
      heads_of(saved.qkv, batch, heads + groups, groups, d_kv), position.bias, key_mask,
      heads_of(saved.out, batch, 0, heads, d_kv), saved.log_sum_exp, heads_of(dqkv, batch, 0, heads, d_kv),
      heads_of(dqkv, batch, heads, groups, d_kv), heads_of(dqkv, batch, heads + groups, groups, d_kv),
      position.gradient, options_of(step, shape_, causal_));
  const Tensor dnormalised = column_parallel_backward(step, dqkv, saved.normalised, qkv_);
  enter_column_parallel_backward(step.mesh, dnormalised);
  norm_.backward(step, dnormalised, gradient, saved.norm);
}

CrossAttention::CrossAttention(const ParameterStore& store, const std::string& prefix,
                               const AttentionShape& shape)
    : shape_(shape),
      site_(site_of(store.config(), prefix + "EncDecAttention.")),
      norm_(store, prefix + "layer_norm.weight"),
      q_(store.parameter(prefix + "EncDecAttention.q.weight")),
      kv_(store.pack(prefix + "EncDecAttention.k.weight", 2)),
      o_(store.parameter(prefix + "EncDecAttention.o.weight")) {}

void CrossAttention::forward(Step& step, Tensor x, Tensor memory, Tensor y, index_t batch, Tensor key_mask,
                             Saved& saved) const {
  const auto& [heads, groups, d_kv, model_heads, first_head, site] = shape_;
  saved.normalised = norm_.forward(step, x, saved.norm);
  saved.q = step.saved.allocate(x.dtype, {x[0], heads * d_kv});
  saved.kv = step.saved.allocate(x.dtype, {memory[0], 2 * groups * d_kv});
  saved.out = step.saved.allocate(x.dtype, {x[0], heads * d_kv});
  saved.log_sum_exp = step.saved.allocate(stat_dtype(x.dtype), {batch, heads, x[0] / batch});
  step.backend.matmul(saved.normalised, q_.weight, saved.q, {.transpose_b = true});
  step.backend.matmul(memory, kv_.weight, saved.kv, {.transpose_b = true});
  if (step.probe != nullptr) {
    step.probe->observe(step, {.site = site_,
                               .batch = batch,
                               .query_input = saved.normalised,
                               .key_input = memory,
                               .q = heads_of(saved.q, batch, 0, heads, d_kv),
                               .k = heads_of(saved.kv, batch, 0, groups, d_kv),
                               .bias = {},
                               .key_mask = key_mask,
                               .options = options_of(step, shape_, /*causal=*/false)});
  }
  step.backend.attention(heads_of(saved.q, batch, 0, heads, d_kv), heads_of(saved.kv, batch, 0, groups, d_kv),
                         heads_of(saved.kv, batch, groups, groups, d_kv), {}, key_mask,
                         heads_of(saved.out, batch, 0, heads, d_kv), saved.log_sum_exp,
                         options_of(step, shape_, /*causal=*/false));
  leave(step, x, saved.out, o_, y, batch, site + 1);
}

void CrossAttention::backward(Step& step, Tensor gradient, Tensor memory, Tensor memory_gradient,
                              index_t batch, Tensor key_mask, const Saved& saved) const {
  const auto& [heads, groups, d_kv, model_heads, first_head, site] = shape_;
  const Arena::Frame frame(step.scratch);
  const Tensor dout = leave_backward(step, gradient, saved.out, o_, batch, site + 1);
  const Tensor dq = step.scratch.allocate(gradient.dtype, {saved.q[0], saved.q[1]});
  const Tensor dkv = step.scratch.allocate(gradient.dtype, {saved.kv[0], saved.kv[1]});
  step.backend.attention_backward(
      heads_of(dout, batch, 0, heads, d_kv), heads_of(saved.q, batch, 0, heads, d_kv),
      heads_of(saved.kv, batch, 0, groups, d_kv), heads_of(saved.kv, batch, groups, groups, d_kv), {},
      key_mask, heads_of(saved.out, batch, 0, heads, d_kv), saved.log_sum_exp,
      heads_of(dq, batch, 0, heads, d_kv), heads_of(dkv, batch, 0, groups, d_kv),
      heads_of(dkv, batch, groups, groups, d_kv), {}, options_of(step, shape_, /*causal=*/false));
  step.backend.matmul(dkv, memory, kv_.gradient, {.transpose_a = true, .accumulate = true});
  step.backend.matmul(dkv, kv_.weight, memory_gradient, {.accumulate = true});
  const Tensor dnormalised = column_parallel_backward(step, dq, saved.normalised, q_);
  enter_column_parallel_backward(step.mesh, dnormalised);
  norm_.backward(step, dnormalised, gradient, saved.norm);
}

}  // namespace regroup
