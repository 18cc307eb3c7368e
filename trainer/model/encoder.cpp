#include "trainer/model/encoder.h"

#include "trainer/model/recompute.h"

namespace regroup {
namespace {

// Dropout sites of the encoder; a layer has kSitesOfLayer, from kFirstLayerSite on.
constexpr index_t kEmbeddingSite = 0, kOutputSite = 1, kFirstLayerSite = 16, kSitesOfLayer = 8;

}  // namespace

EncoderLayer::EncoderLayer(const ParameterStore& store, index_t layer, int tp_rank, int tp_size)
    : attention_(store, fmt::format("encoder.block.{}.layer.0.", layer),
                 AttentionShape::of(store.config(), store.config().encoder_kv_groups,
                                    kFirstLayerSite + kSitesOfLayer * layer, tp_rank, tp_size),
                 /*causal=*/false),
      feed_forward_(store, fmt::format("encoder.block.{}.layer.1.", layer),
                    kFirstLayerSite + kSitesOfLayer * layer + 2, tp_rank) {}

void EncoderLayer::forward(Step& step, Tensor x, Tensor y, Saved& saved, const Context& context) const {
  saved.middle = step.saved.allocate(x.dtype, {x[0], x[1]});
  attention_.forward(step, x, saved.middle, context.batch, context.key_mask, context.position,
                     saved.attention);
  feed_forward_.forward(step, saved.middle, y, x[0] / context.batch, saved.feed_forward);
}

void EncoderLayer::backward(Step& step, Tensor gradient, const Saved& saved, const Context& context) const {
  feed_forward_.backward(step, gradient, gradient[0] / context.batch, saved.feed_forward);
  attention_.backward(step, gradient, context.batch, context.key_mask, context.position, saved.attention);
}

Encoder::Encoder(const ParameterStore& store, int tp_rank, int tp_size)
    : embedding_(store, tp_rank),
      relative_position_(store, "encoder.block.0.layer.0.", /*bidirectional=*/true),
      final_norm_(store, "encoder.final_layer_norm.weight") {
  for (index_t layer = 0; layer < store.config().num_layers; ++layer) {
    layers_.emplace_back(store, layer, tp_rank, tp_size);
  }
}

Tensor Encoder::forward(Step& step, Tensor ids, Saved& saved, bool training) const {
  const index_t batch = ids[0], length = ids[1];
  saved.context = {
      .batch = batch, .key_mask = ids, .position = relative_position_.forward(step, length, training)};
  saved.inputs.resize(layers_.size() + 1);
  saved.layers.resize(layers_.size());
  const DType dtype = embedding_.dtype();
  for (Tensor& input : saved.inputs) input = step.saved.allocate(dtype, {batch * length, embedding_.width()});
  embedding_.forward(step, ids.reshape({batch * length}), saved.inputs[0], length, kEmbeddingSite);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    forward_layer(step, layers_[i], saved.inputs[i], saved.inputs[i + 1], saved.layers[i], saved.context);
  }
  const Tensor out = final_norm_.forward(step, saved.inputs.back(), saved.final_norm);
  if (step.dropout_rate > 0)
    step.backend.dropout_add({}, out, out, step.dropout(kOutputSite, length, out[1]));
  return out;
}

void Encoder::backward(Step& step, Tensor ids, Tensor gradient, const Saved& saved) const {
  const Arena::Frame frame(step.scratch);
  const index_t length = ids[1];
  if (step.dropout_rate > 0) {
    step.backend.dropout_backward(gradient, gradient, step.dropout(kOutputSite, length, gradient[1]));
  }
  const Tensor dx = step.scratch.allocate(gradient.dtype, {gradient[0], gradient[1]});
  final_norm_.backward_into(step, gradient, dx, saved.final_norm);
  step.backend.fill_zero(saved.context.position.gradient);
  for (std::size_t i = layers_.size(); i-- > 0;) {
    backward_layer(step, layers_[i], saved.inputs[i], dx, saved.layers[i], saved.context);
  }
  relative_position_.backward(step, length, saved.context.position);
  embedding_.backward(step, ids.reshape({ids.numel()}), dx, length, kEmbeddingSite);
}

}  // namespace regroup
