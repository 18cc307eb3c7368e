#include "kernels/cuda/attention_shape.h"

namespace regroup {
namespace {

AttentionShape::Rows rows_of(const Tensor& t) { return {.sample = t.stride[0], .token = t.stride[1]}; }

std::string name_of(const char* tensor, const AttentionShape::Rows& rows) {
  return fmt::format(", {} {}/{}", tensor, rows.sample, rows.token);
}

}  // namespace

AttentionShape shape_of(const AttentionCall& call) {
  return {.batch = call.q[0],
          .queries = call.q[1],
          .keys = call.k[1],
          .heads = call.q[2],
          .groups = call.k[2],
          .channels = call.q[3],
          .q = rows_of(call.q),
          .k = rows_of(call.k),
          .v = rows_of(call.v),
          .out = rows_of(call.out),
          .bias = static_cast<bool>(call.bias),
          .causal = call.options.causal,
          .dropout = call.options.dropout_rate > 0,
          .padded = call.key_mask && call.options.padded_at_end,
          .scattered = call.key_mask && !call.options.padded_at_end};
}

AttentionShape shape_of(const AttentionCall& call, const AttentionGradients& gradients) {
  AttentionShape shape = shape_of(call);
  shape.backward = true;
  shape.dout = rows_of(gradients.dout);
  shape.dq = rows_of(gradients.dq);
  shape.dk = rows_of(gradients.dk);
  shape.dv = rows_of(gradients.dv);
  shape.dbias = static_cast<bool>(gradients.dbias);
  return shape;
}

std::string name_of(const AttentionShape& s) {
  std::string name = fmt::format(
      "{} of {} x {} queries, {} keys, {} heads, {} groups, {} channels{}{}{}{}{}{}",
      s.backward ? "backward" : "forward", s.batch, s.queries, s.keys, s.heads, s.groups, s.channels,
      s.bias ? ", bias" : "", s.causal ? ", causal" : "", s.dropout ? ", dropout" : "",
      s.padded ? ", padded" : "", s.scattered ? ", scattered" : "", s.dbias ? ", dbias" : "");
  name += name_of("q", s.q) + name_of("k", s.k) + name_of("v", s.v) + name_of("out", s.out);
  if (s.backward) {
    name += name_of("dout", s.dout) + name_of("dq", s.dq) + name_of("dk", s.dk) + name_of("dv", s.dv);
  }
  return name;
}

}  // namespace regroup
