#include "kernels/backend.h"

#include <algorithm>

#include "kernels/op_check.h"

namespace regroup {
namespace {

void check_dropout(const OpCheck& op, const Dropout& dropout, index_t columns) {
  op.that(dropout.rate >= 0 && dropout.rate < 1, "the dropout rate must be in [0, 1)");
  if (dropout.rate == 0) return;
  op.that(dropout.first_row >= 0 && dropout.first_column >= 0 &&
              dropout.first_column + columns <= dropout.columns,
          "dropout's global matrix does not hold these columns");
}

// Scores that are computed: pairs of a query and a key it may see.
double visible_scores(index_t queries, index_t keys, bool causal) {
  const auto q = static_cast<double>(queries);
  const auto k = static_cast<double>(keys);
  if (!causal) return q * k;
  const double triangle = std::min(q, k);
  return triangle * (triangle + 1) / 2 + (q - triangle) * k;
}

// [tokens, heads, C] rows: strides of the first two dimensions are free.
void check_heads(const OpCheck& op, const char* name, const Tensor& t, const Tensor& q, index_t length,
                 index_t heads) {
  op.rows(name, t, q.dtype, {q[0], length, heads, q[3]});
  op.that(t.stride[2] == t[3] && t.stride[3] == 1, "heads and channels of a token must lie side by side");
}

struct AttentionOperands {
  const Tensor &q, &k, &v, &bias, &key_mask, &out, &log_sum_exp;
};

void check_attention(const OpCheck& op, const AttentionOperands& a, const AttentionOptions& options) {
  op.floating(4);
  op.that(a.k.rank == 4 && a.k[2] > 0 && a.q[2] % a.k[2] == 0,
          "k must have four dimensions and a number of groups that divides the query heads");
  const index_t queries = a.q[1], heads = a.q[2], keys = a.k[1];
  const DType statistic = stat_dtype(a.q.dtype);
  check_heads(op, "q", a.q, a.q, queries, heads);
  check_heads(op, "k", a.k, a.q, keys, a.k[2]);
  check_heads(op, "v", a.v, a.q, keys, a.k[2]);
  check_heads(op, "out", a.out, a.q, queries, heads);
  op.optional("bias", a.bias, statistic, {heads, queries + keys - 1});
  op.optional("key_mask", a.key_mask, DType::kInt32, {a.q[0], keys});
  op.is("log_sum_exp", a.log_sum_exp, statistic, {a.q[0], heads, queries});
  op.that(options.dropout_rate >= 0 && options.dropout_rate < 1, "the dropout rate must be in [0, 1)");
  op.that(options.dropout_rate == 0 || options.first_head + heads <= options.heads,
          "dropout's global heads do not hold these heads");
}

// 2 operations for each of `products` products over the visible scores.
double attention_flops(const Tensor& q, const Tensor& k, bool causal, double products) {
  return 2 * products * static_cast<double>(q[0] * q[2] * q[3]) * visible_scores(q[1], k[1], causal);
}

// The shapes that the pieces of cross-entropy share.
void check_tokens(const OpCheck& op, DType statistic, index_t tokens, const Tensor& row_max,
                  const Tensor& targets, const Tensor& sums) {
  op.is("row_max", row_max, statistic, {tokens});
  op.is("targets", targets, DType::kInt32, {tokens});
  op.is("sums", sums, statistic, {2, tokens});
}

void check_slot(const OpCheck& op, const AdafactorSlot& slot) {
  op.floating(2);
  op.dense();
  const DType type = slot.weight.dtype;
  const index_t rows = slot.weight[0], columns = slot.weight[1];
  op.is("gradient", slot.gradient, type, {rows, columns});
  op.is("totals", slot.totals, DType::kFloat64, {4});
  op.apart("weight", slot.weight, "gradient", slot.gradient);
  op.that(slot.global_rows >= rows && slot.global_columns >= columns,
          "the global matrix is smaller than its slice");
  if (slot.second_moment) {
    op.is("second_moment", slot.second_moment, type, {rows, columns});
    op.that(!slot.row && !slot.column && !slot.row_sums && !slot.column_sums,
            "a slot is factored or has a full second moment, not both");
    return;
  }
  op.is("row", slot.row, type, {rows});
  op.is("column", slot.column, type, {columns});
  op.is("row_sums", slot.row_sums, DType::kFloat64, {rows});
  op.is("column_sums", slot.column_sums, DType::kFloat64, {columns});
}

void check_slot(const OpCheck& op, const AdamWSlot& slot) {
  op.floating(slot.weight.rank);
  op.dense();
  for (const Tensor* t : {&slot.gradient, &slot.first_moment, &slot.second_moment}) {
    op.that(
        *t && t->dtype == slot.weight.dtype && t->rank == slot.weight.rank && t->shape == slot.weight.shape,
        "the gradient or a moment is missing or of another type or shape");
    op.dense("gradient or moment", *t);
    op.apart("weight", slot.weight, "gradient or moment", *t);
  }
  op.is("totals", slot.totals, DType::kFloat64, {4});
  op.that(slot.global_size >= slot.weight.numel(), "the global tensor is smaller than its slice");
}

template <class Slot>
void check_slots(const char* name, std::span<const Slot> slots) {
  for (const Slot& slot : slots) check_slot(OpCheck(name, "weight", slot.weight), slot);
}

}  // namespace

void Backend::fill_zero(Tensor x) {
  const OpCheck op("fill_zero", "x", x);
  op.that(static_cast<bool>(x), "x is missing");
  op.dense();
  do_fill_zero(x);
}

void Backend::copy(Tensor x, Tensor y) {
  const OpCheck op("copy", "x", x);
  op.that(x && y && x.dtype == y.dtype && x.rank == y.rank && x.shape == y.shape,
          "y is missing or of another type or shape");
  op.apart("y", y, "x", x);
  do_copy(x, y);
}

void Backend::cast(Tensor x, Tensor y) {
  const OpCheck op("cast", "x", x);
  op.floating(x.rank);
  op.that(y && y.dtype != DType::kInt32 && x.rank == y.rank && x.shape == y.shape,
          "y is missing, of another shape, or not of a floating-point type");
  op.dense();
  op.dense("y", y);
  op.apart("y", y, "x", x);
  do_cast(x, y);
}

void Backend::add(Tensor a, Tensor b, Tensor y) {
  const OpCheck op("add", "a", a);
  op.floating(a.rank);
  op.that(b && y && a.dtype == b.dtype && a.dtype == y.dtype && a.shape == b.shape && a.shape == y.shape &&
              a.rank == b.rank && a.rank == y.rank,
          "b or y is missing or of another type or shape");
  op.dense();
  op.dense("b", b);
  op.dense("y", y);
  op.apart_or_same("y", y, "a", a);
  op.apart_or_same("y", y, "b", b);
  do_add(a, b, y);
}

void Backend::scale(Tensor x, double factor) {
  const OpCheck op("scale", "x", x);
  op.floating(x.rank);
  op.dense();
  do_scale(x, factor);
}

void Backend::matmul(Tensor a, Tensor b, Tensor c, MatmulOptions options) {
  const OpCheck op("matmul", "a", a);
  op.floating(2);
  const index_t m = a[options.transpose_a ? 1 : 0], k = a[options.transpose_a ? 0 : 1];
  op.that(b.rank == 2, "b is not a matrix");
  const index_t n = b[options.transpose_b ? 0 : 1];
  op.rows("a", a, a.dtype, {a[0], a[1]});
  if (options.transpose_b) op.rows("b (transposed)", b, a.dtype, {n, k});
  if (!options.transpose_b) op.rows("b", b, a.dtype, {k, n});
  op.rows("c", c, c.dtype == a.dtype ? a.dtype : stat_dtype(a.dtype), {m, n});
  op.apart("c", c, "a", a);
  op.apart("c", c, "b", b);
  flops_ += 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k);
  do_matmul(a, b, c, options);
}

void Backend::rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon) {
  const OpCheck op("rms_norm", "x", x);
  op.floating(2);
  op.dense();
  op.is("weight", weight, x.dtype, {x[1]});
  op.is("y", y, x.dtype, {x[0], x[1]});
  op.is("inverse_rms", inverse_rms, stat_dtype(x.dtype), {x[0]});
  op.apart("y", y, "x", x);
  op.apart("y", y, "weight", weight);
  do_rms_norm(x, weight, y, inverse_rms, epsilon);
}

void Backend::rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms,
                                Tensor residual_gradient, Tensor dx, Tensor dw) {
  const OpCheck op("rms_norm_backward", "x", x);
  op.floating(2);
  op.dense();
  op.is("dy", dy, x.dtype, {x[0], x[1]});
  op.is("weight", weight, x.dtype, {x[1]});
  op.is("inverse_rms", inverse_rms, stat_dtype(x.dtype), {x[0]});
  op.optional("residual_gradient", residual_gradient, x.dtype, {x[0], x[1]});
  op.is("dx", dx, x.dtype, {x[0], x[1]});
  op.is("dw", dw, stat_dtype(x.dtype), {x[1]});
  op.apart("dx", dx, "dy", dy);
  op.apart("dx", dx, "x", x);
  op.apart_or_same("dx", dx, "residual_gradient", residual_gradient);
  op.apart("dw", dw, "weight", weight);
  do_rms_norm_backward(dy, x, weight, inverse_rms, residual_gradient, dx, dw);
}

void Backend::gated_gelu(Tensor x, Tensor y, const Dropout& dropout) {
  const OpCheck op("gated_gelu", "x", x);
  op.floating(2);
  op.dense();
  op.that(x[1] % 2 == 0, "x must have gate and value columns side by side");
  op.is("y", y, x.dtype, {x[0], x[1] / 2});
  op.apart("y", y, "x", x);
  check_dropout(op, dropout, y[1]);
  do_gated_gelu(x, y, dropout);
}

void Backend::gated_gelu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  const OpCheck op("gated_gelu_backward", "x", x);
  op.floating(2);
  op.dense();
  op.that(x[1] % 2 == 0, "x must have gate and value columns side by side");
  op.is("dy", dy, x.dtype, {x[0], x[1] / 2});
  op.is("dx", dx, x.dtype, {x[0], x[1]});
  op.apart("dx", dx, "dy", dy);
  op.apart("dx", dx, "x", x);
  check_dropout(op, dropout, dy[1]);
  do_gated_gelu_backward(dy, x, dx, dropout);
}

void Backend::relu(Tensor x, Tensor y, const Dropout& dropout) {
  const OpCheck op("relu", "x", x);
  op.floating(2);
  op.dense();
  op.is("y", y, x.dtype, {x[0], x[1]});
  op.apart("y", y, "x", x);
  check_dropout(op, dropout, x[1]);
  do_relu(x, y, dropout);
}

void Backend::relu_backward(Tensor dy, Tensor x, Tensor dx, const Dropout& dropout) {
  const OpCheck op("relu_backward", "x", x);
  op.floating(2);
  op.dense();
  op.is("dy", dy, x.dtype, {x[0], x[1]});
  op.is("dx", dx, x.dtype, {x[0], x[1]});
  op.apart("dx", dx, "dy", dy);
  op.apart("dx", dx, "x", x);
  check_dropout(op, dropout, x[1]);
  do_relu_backward(dy, x, dx, dropout);
}

void Backend::dropout_add(Tensor residual, Tensor x, Tensor y, const Dropout& dropout) {
  const OpCheck op("dropout_add", "x", x);
  op.floating(2);
  op.dense();
  op.optional("residual", residual, x.dtype, {x[0], x[1]});
  op.is("y", y, x.dtype, {x[0], x[1]});
  op.apart_or_same("y", y, "x", x);
  op.apart_or_same("y", y, "residual", residual);
  check_dropout(op, dropout, x[1]);
  do_dropout_add(residual, x, y, dropout);
}

void Backend::dropout_backward(Tensor dy, Tensor dx, const Dropout& dropout) {
  const OpCheck op("dropout_backward", "dy", dy);
  op.floating(2);
  op.dense();
  op.is("dx", dx, dy.dtype, {dy[0], dy[1]});
  op.apart_or_same("dx", dx, "dy", dy);
  check_dropout(op, dropout, dy[1]);
  do_dropout_backward(dy, dx, dropout);
}

void Backend::embedding(Tensor ids, Tensor table, index_t first_id, Tensor y) {
  const OpCheck op("embedding", "table", table);
  op.floating(2);
  op.dense();
  op.is("ids", ids, DType::kInt32, {ids[0]});
  op.is("y", y, table.dtype, {ids[0], table[1]});
  op.apart("y", y, "table", table);
  do_embedding(ids, table, first_id, y);
}

void Backend::embedding_backward(Tensor ids, Tensor dy, index_t first_id, Tensor dtable) {
  const OpCheck op("embedding_backward", "dy", dy);
  op.floating(2);
  op.dense();
  op.is("ids", ids, DType::kInt32, {dy[0]});
  op.is("dtable", dtable, stat_dtype(dy.dtype), {dtable[0], dy[1]});
  op.apart("dtable", dtable, "dy", dy);
  do_embedding_backward(ids, dy, first_id, dtable);
}

void Backend::relative_bias(Tensor table, index_t queries, Tensor bias, const RelativeBiasOptions& options) {
  const OpCheck op("relative_bias", "table", table);
  op.floating(2);
  op.dense();
  op.is("bias", bias, stat_dtype(table.dtype), {table[1], bias[1]});
  op.that(queries > 0 && queries <= bias[1], "the bias has no room for the queries");
  do_relative_bias(table, queries, bias, options);
}

void Backend::relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable,
                                     const RelativeBiasOptions& options) {
  const OpCheck op("relative_bias_backward", "dbias", dbias);
  op.floating(2);
  op.dense();
  op.is("dtable", dtable, stat_dtype(dbias.dtype), {dtable[0], dbias[0]});
  op.that(dbias.dtype == stat_dtype(dbias.dtype), "dbias must be of the type of statistics");
  op.that(queries > 0 && queries <= dbias[1], "the bias has no room for the queries");
  do_relative_bias_backward(dbias, queries, dtable, options);
}

void Backend::attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                        Tensor log_sum_exp, const AttentionOptions& options) {
  const OpCheck op("attention", "q", q);
  check_attention(op, {q, k, v, bias, key_mask, out, log_sum_exp}, options);
  op.apart("out", out, "q", q);
  op.apart("out", out, "k", k);
  op.apart("out", out, "v", v);
  flops_ += attention_flops(q, k, options.causal, 2);  // q k^T, p v
  do_attention(q, k, v, bias, key_mask, out, log_sum_exp, options);
}

void Backend::attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask,
                                 Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk, Tensor dv,
                                 Tensor dbias, const AttentionOptions& options) {
  const OpCheck op("attention_backward", "q", q);
  check_attention(op, {q, k, v, bias, key_mask, out, log_sum_exp}, options);
  check_heads(op, "dout", dout, q, q[1], q[2]);
  check_heads(op, "dq", dq, q, q[1], q[2]);
  check_heads(op, "dk", dk, q, k[1], k[2]);
  check_heads(op, "dv", dv, q, k[1], k[2]);
  op.optional("dbias", dbias, stat_dtype(q.dtype), {q[2], q[1] + k[1] - 1});
  for (const Tensor& gradient : {dq, dk, dv}) {
    for (const Tensor& input : {q, k, v, out, dout}) op.apart("a gradient", gradient, "an input", input);
  }
  flops_ += attention_flops(q, k, options.causal, 4);  // dv = p^T do, dp = do v^T, dq = ds k, dk = ds^T q
  do_attention_backward(dout, q, k, v, bias, key_mask, out, log_sum_exp, dq, dk, dv, dbias, options);
}

void Backend::cross_entropy_max(Tensor logits, Tensor row_max) {
  const OpCheck op("cross_entropy_max", "logits", logits);
  op.floating(2);
  op.is("logits", logits, stat_dtype(logits.dtype), {logits[0], logits[1]});
  op.is("row_max", row_max, logits.dtype, {logits[0]});
  do_cross_entropy_max(logits, row_max);
}

void Backend::cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                 const CrossEntropyOptions& options) {
  const OpCheck op("cross_entropy_sums", "logits", logits);
  op.floating(2);
  op.is("logits", logits, stat_dtype(logits.dtype), {logits[0], logits[1]});
  check_tokens(op, logits.dtype, logits[0], row_max, targets, sums);
  do_cross_entropy_sums(logits, row_max, targets, sums, options);
}

void Backend::cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss,
                                 const CrossEntropyOptions& options) {
  const OpCheck op("cross_entropy_loss", "row_max", row_max);
  op.floating(1);
  check_tokens(op, stat_dtype(row_max.dtype), row_max[0], row_max, targets, sums);
  op.is("loss", loss, DType::kFloat64, {2});
  do_cross_entropy_loss(row_max, targets, sums, loss, options);
}

void Backend::cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                     double factor, Tensor dlogits, const CrossEntropyOptions& options) {
  const OpCheck op("cross_entropy_backward", "logits", logits);
  op.floating(2);
  op.is("logits", logits, stat_dtype(logits.dtype), {logits[0], logits[1]});
  check_tokens(op, logits.dtype, logits[0], row_max, targets, sums);
  op.that(dlogits.dtype != DType::kInt32 && stat_dtype(dlogits.dtype) == logits.dtype,
          "dlogits must be of a compute type whose statistics are of the type of logits");
  op.is("dlogits", dlogits, dlogits.dtype, {logits[0], logits[1]});
  op.apart_or_same("dlogits", dlogits, "logits", logits);
  do_cross_entropy_backward(logits, row_max, targets, sums, factor, dlogits, options);
}

void Backend::adafactor_statistics(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  check_slots("adafactor_statistics", slots);
  do_adafactor_statistics(slots, options);
}

void Backend::adafactor_moments(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  check_slots("adafactor_moments", slots);
  do_adafactor_moments(slots, options);
}

void Backend::adafactor_update(std::span<const AdafactorSlot> slots, const AdafactorOptions& options) {
  check_slots("adafactor_update", slots);
  do_adafactor_update(slots, options);
}

void Backend::adamw_statistics(std::span<const AdamWSlot> slots) {
  check_slots("adamw_statistics", slots);
  do_adamw_statistics(slots);
}

void Backend::adamw_update(std::span<const AdamWSlot> slots, const AdamWOptions& options) {
  check_slots("adamw_update", slots);
  do_adamw_update(slots, options);
}

}  // namespace regroup
