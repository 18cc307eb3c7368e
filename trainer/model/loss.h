// The language-model head and its loss, over a vocabulary split between tp ranks. Tokens pass in chunks, so
// that the logits of all tokens, or of the whole vocabulary, never exist. A tied head's matrix is the
// embedding; it first scales hidden, in place, by d_model^-1/2.
#pragma once

#include "trainer/model/parameter_store.h"
#include "trainer/model/step.h"

namespace regroup {

class LanguageModelHead {
 public:
  LanguageModelHead(const ParameterStore& store, int tp_rank);

  // loss float64 [2] += {sum of cross-entropy, sum of z_loss log(Z)^2} over targets that are not padding.
  // hidden T [N, D], of a tied head scaled on return; targets int32 [N].
  void evaluate(Step& step, Tensor hidden, Tensor targets, double z_loss, Tensor loss /* += */) const;

  // The same, and backward at once: the gradient of factor x (the two sums). gradient T [N, D] = that of
  // hidden as given, summed over tp; dW += ...
  void evaluate_with_gradient(Step& step, Tensor hidden, Tensor targets, double z_loss, double factor,
                              Tensor loss /* += */, Tensor gradient) const;

  // This rank's columns of the logits, S [N, V]; hidden as in evaluate(). For tests and decoding.
  void logits(Step& step, Tensor hidden, Tensor logits) const;

 private:
  struct Chunk {
    Tensor hidden, targets, logits, row_max, sums;
  };
  index_t chunk_rows(const Backend& backend, index_t rows) const;
  void scale(Step& step, Tensor x) const;
  Chunk forward(Step& step, Tensor hidden, Tensor targets, Tensor loss,
                const CrossEntropyOptions& options) const;

  bool tied_;
  Parameter weight_;
  index_t first_id_;
};

}  // namespace regroup
