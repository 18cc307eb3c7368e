#include "trainer/model/decoder.h"

#include "parallel/tensor_parallel.h"
#include "trainer/model/recompute.h"

namespace regroup {
namespace {

// Dropout sites of the decoder, apart from the encoder's.
constexpr index_t kDecoderSites = index_t{1} << 20;
constexpr index_t kEmbeddingSite = kDecoderSites, kOutputSite = kDecoderSites + 1;

index_t first_site(index_t layer) { return kDecoderSites + 16 + 8 * layer; }

}  // namespace

DecoderLayer::DecoderLayer(const ParameterStore& store, index_t layer, int tp_rank, int tp_size)
    : self_(store, fmt::format("decoder.block.{}.layer.0.", layer),
            AttentionShape::of(store.config(), store.config().self_groups(layer), first_site(layer), tp_rank,
                               tp_size),
            /*causal=*/true),
      cross_(store, fmt::format("decoder.block.{}.layer.1.", layer),
             AttentionShape::of(store.config(), store.config().cross_groups(layer), first_site(layer) + 2,
                                tp_rank, tp_size)),
      feed_forward_(store, fmt::format("decoder.block.{}.layer.2.", layer), first_site(layer) + 4, tp_rank) {}

void DecoderLayer::forward(Step& step, Tensor x, Tensor y, Saved& saved, const Context& context) const {
  saved.after_self = step.saved.allocate(x.dtype, {x[0], x[1]});
  saved.after_cross = step.saved.allocate(x.dtype, {x[0], x[1]});
  self_.forward(step, x, saved.after_self, context.batch, {}, context.position, saved.self);
  cross_.forward(step, saved.after_self, context.memory, saved.after_cross, context.batch,
                 context.memory_mask, saved.cross);
  feed_forward_.forward(step, saved.after_cross, y, x[0] / context.batch, saved.feed_forward);
}

void DecoderLayer::backward(Step& step, Tensor gradient, const Saved& saved, const Context& context) const {
  feed_forward_.backward(step, gradient, gradient[0] / context.batch, saved.feed_forward);
  cross_.backward(step, gradient, context.memory, context.memory_gradient, context.batch, context.memory_mask,
                  saved.cross);
  self_.backward(step, gradient, context.batch, {}, context.position, saved.self);
}

Decoder::Decoder(const ParameterStore& store, int tp_rank, int tp_size)
    : embedding_(store, tp_rank),
      relative_position_(store, "decoder.block.0.layer.0.", /*bidirectional=*/false),
      final_norm_(store, "decoder.final_layer_norm.weight") {
  for (index_t layer = 0; layer < store.config().num_decoder_layers; ++layer) {
    layers_.emplace_back(store, layer, tp_rank, tp_size);
  }
}

Tensor Decoder::forward(Step& step, Tensor ids, Tensor memory, Tensor memory_mask, Saved& saved,
                        bool training) const {
  const index_t batch = ids[0], length = ids[1];
  saved.context = {.batch = batch,
                   .memory = memory,
                   .memory_mask = memory_mask,
                   .memory_gradient = {},
                   .position = relative_position_.forward(step, length, training)};
  saved.inputs.resize(layers_.size() + 1);
  saved.layers.resize(layers_.size());
  for (Tensor& input : saved.inputs) input = step.saved.allocate(memory.dtype, {batch * length, memory[1]});
  embedding_.forward(step, ids.reshape({batch * length}), saved.inputs[0], length, kEmbeddingSite);
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    forward_layer(step, layers_[i], saved.inputs[i], saved.inputs[i + 1], saved.layers[i], saved.context);
  }
  const Tensor out = final_norm_.forward(step, saved.inputs.back(), saved.final_norm);
  if (step.dropout_rate > 0)
    step.backend.dropout_add({}, out, out, step.dropout(kOutputSite, length, out[1]));
  return out;
}

void Decoder::backward(Step& step, Tensor ids, Tensor gradient, Tensor memory_gradient,
                       const Saved& saved) const {
  const Arena::Frame frame(step.scratch);
  const index_t length = ids[1];
  DecoderLayer::Context context = saved.context;
  context.memory_gradient = memory_gradient;
  step.backend.fill_zero(memory_gradient);
  step.backend.fill_zero(context.position.gradient);
  if (step.dropout_rate > 0) {
    step.backend.dropout_backward(gradient, gradient, step.dropout(kOutputSite, length, gradient[1]));
  }
  const Tensor dx = step.scratch.allocate(gradient.dtype, {gradient[0], gradient[1]});
  final_norm_.backward_into(step, gradient, dx, saved.final_norm);
  for (std::size_t i = layers_.size(); i-- > 0;) {
    backward_layer(step, layers_[i], saved.inputs[i], dx, saved.layers[i], context);
  }
  enter_column_parallel_backward(step.mesh, memory_gradient);
  relative_position_.backward(step, length, context.position);
  embedding_.backward(step, ids.reshape({ids.numel()}), dx, length, kEmbeddingSite);
}

}  // namespace regroup
