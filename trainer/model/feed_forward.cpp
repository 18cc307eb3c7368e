#include "trainer/model/feed_forward.h"

#include "parallel/tensor_parallel.h"

namespace regroup {

FeedForward::FeedForward(const ParameterStore& store, const std::string& prefix, index_t site, int tp_rank)
    : kind_(store.config().feed_forward),
      norm_(store, prefix + "layer_norm.weight"),
      wi_(kind_ == FeedForwardKind::kRelu ? store.parameter(prefix + "DenseReluDense.wi.weight")
                                          : store.pack(prefix + "DenseReluDense.wi_0.weight", 2)),
      wo_(store.parameter(prefix + "DenseReluDense.wo.weight")),
      site_(site),
      d_ff_(store.config().d_ff),
      first_column_(tp_rank * wo_.weight[1]) {}

Dropout FeedForward::hidden_dropout(const Step& step, index_t length) const {
  return step.dropout(site_, length, d_ff_, first_column_);
}

void FeedForward::forward(Step& step, Tensor x, Tensor y, index_t length, Saved& saved) const {
  saved.normalised = norm_.forward(step, x, saved.norm);
  saved.inner = step.saved.allocate(x.dtype, {x[0], wi_.weight[0]});
  saved.hidden = step.saved.allocate(x.dtype, {x[0], wo_.weight[1]});
  step.backend.matmul(saved.normalised, wi_.weight, saved.inner, {.transpose_b = true});
  if (kind_ == FeedForwardKind::kRelu) {
    step.backend.relu(saved.inner, saved.hidden, hidden_dropout(step, length));
  } else {
    step.backend.gated_gelu(saved.inner, saved.hidden, hidden_dropout(step, length));
  }
  if (!y) return;
  const Arena::Frame frame(step.scratch);
  const Tensor projected = step.scratch.allocate(x.dtype, {x[0], x[1]});
  step.backend.matmul(saved.hidden, wo_.weight, projected, {.transpose_b = true});
  leave_row_parallel(step.mesh, projected);
  step.backend.dropout_add(x, projected, y, step.dropout(site_ + 1, length, x[1]));
}

void FeedForward::backward(Step& step, Tensor gradient, index_t length, const Saved& saved) const {
  const Arena::Frame frame(step.scratch);
  Tensor dprojected = gradient;
  if (step.dropout_rate > 0) {
    dprojected = step.scratch.allocate(gradient.dtype, {gradient[0], gradient[1]});
    step.backend.dropout_backward(gradient, dprojected, step.dropout(site_ + 1, length, gradient[1]));
  }
  const Tensor dhidden = step.scratch.allocate(gradient.dtype, {saved.hidden[0], saved.hidden[1]});
  const Tensor dinner = step.scratch.allocate(gradient.dtype, {saved.inner[0], saved.inner[1]});
  const Tensor dnormalised = step.scratch.allocate(gradient.dtype, {gradient[0], gradient[1]});
  step.backend.matmul(dprojected, saved.hidden, wo_.gradient, {.transpose_a = true, .accumulate = true});
  step.backend.matmul(dprojected, wo_.weight, dhidden);
  if (kind_ == FeedForwardKind::kRelu) {
    step.backend.relu_backward(dhidden, saved.inner, dinner, hidden_dropout(step, length));
  } else {
    step.backend.gated_gelu_backward(dhidden, saved.inner, dinner, hidden_dropout(step, length));
  }
  step.backend.matmul(dinner, saved.normalised, wi_.gradient, {.transpose_a = true, .accumulate = true});
  step.backend.matmul(dinner, wi_.weight, dnormalised);
  enter_column_parallel_backward(step.mesh, dnormalised);
  norm_.backward(step, dnormalised, gradient, saved.norm);
}

}  // namespace regroup
