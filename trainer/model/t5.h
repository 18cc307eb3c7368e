// T5 with grouped-query attention: forward, loss and backward of one micro-batch.
#pragma once

#include <functional>

#include "trainer/model/decoder.h"
#include "trainer/model/encoder.h"
#include "trainer/model/loss.h"

namespace regroup {

class T5 {
 public:
  // One micro-batch on the device, int32: input_ids [B, S], decoder_ids [B, T] (targets shifted right,
  // starting with padding), targets [B, T]; 0 is padding.
  struct Input {
    Tensor input_ids, decoder_ids, targets;
  };

  // Uses the store's tensors; the store outlives the model.
  T5(const ParameterStore& store, int tp_rank, int tp_size);

  // loss float64 [2] += {sum of cross-entropy, sum of z_loss log(Z)^2}; every parameter's gradient += that of
  // factor x (their sum). With factor = 1 / (number of targets in the global batch) it is the gradient of the
  // mean. `after_decoder`, where given, is called when the gradients of the decoder and of lm_head.weight are
  // complete and the encoder's backward, which ends with the embedding's, is still to come.
  void train(Step& step, const Input& input, double z_loss, double factor, Tensor loss /* += */,
             const std::function<void()>& after_decoder = {});
  // Forward only; step.dropout_rate must be 0.
  void evaluate(Step& step, const Input& input, double z_loss, Tensor loss /* += */);
  // Forward through encoder and decoder, for step.probe to look on; step.dropout_rate must be 0.
  void observe(Step& step, const Input& input);
  // This rank's columns of all logits, S [B T, V].
  void logits(Step& step, const Input& input, Tensor logits);

 private:
  Tensor forward(Step& step, const Input& input, bool training);

  Encoder encoder_;
  Decoder decoder_;
  LanguageModelHead head_;
  Encoder::Saved encoder_saved_;
  Decoder::Saved decoder_saved_;
};

}  // namespace regroup
