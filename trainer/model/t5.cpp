#include "trainer/model/t5.h"

namespace regroup {

T5::T5(const ParameterStore& store, int tp_rank, int tp_size)
    : encoder_(store, tp_rank, tp_size), decoder_(store, tp_rank, tp_size), head_(store, tp_rank) {}

Tensor T5::forward(Step& step, const Input& input, bool training) {
  const Tensor memory = encoder_.forward(step, input.input_ids, encoder_saved_, training);
  return decoder_.forward(step, input.decoder_ids, memory, input.input_ids, decoder_saved_, training);
}

void T5::train(Step& step, const Input& input, double z_loss, double factor, Tensor loss,
               const std::function<void()>& after_decoder) {
  const Arena::Frame saved_frame(step.saved);
  const Arena::Frame scratch_frame(step.scratch);
  const Tensor hidden = forward(step, input, /*training=*/true);
  const Tensor memory = decoder_saved_.context.memory;
  const Tensor memory_gradient = step.scratch.allocate(stat_dtype(memory.dtype), {memory[0], memory[1]});
  {
    const Arena::Frame frame(step.scratch);
    const Tensor gradient = step.scratch.allocate(hidden.dtype, {hidden[0], hidden[1]});
    head_.evaluate_with_gradient(step, hidden, input.targets.reshape({input.targets.numel()}), z_loss, factor,
                                 loss, gradient);
    decoder_.backward(step, input.decoder_ids, gradient, memory_gradient, decoder_saved_);
  }
  if (after_decoder) after_decoder();
  Tensor gradient = memory_gradient;
  if (memory.dtype != memory_gradient.dtype) {
    gradient = step.scratch.allocate(memory.dtype, {memory[0], memory[1]});
    step.backend.cast(memory_gradient, gradient);
  }
  encoder_.backward(step, input.input_ids, gradient, encoder_saved_);
}

void T5::evaluate(Step& step, const Input& input, double z_loss, Tensor loss) {
  const Arena::Frame saved_frame(step.saved);
  const Arena::Frame scratch_frame(step.scratch);
  const Tensor hidden = forward(step, input, /*training=*/false);
  head_.evaluate(step, hidden, input.targets.reshape({input.targets.numel()}), z_loss, loss);
}

void T5::observe(Step& step, const Input& input) {
  const Arena::Frame saved_frame(step.saved);
  const Arena::Frame scratch_frame(step.scratch);
  forward(step, input, /*training=*/false);
}

void T5::logits(Step& step, const Input& input, Tensor logits) {
  const Arena::Frame saved_frame(step.saved);
  const Arena::Frame scratch_frame(step.scratch);
  head_.logits(step, forward(step, input, /*training=*/false), logits);
}

}  // namespace regroup
