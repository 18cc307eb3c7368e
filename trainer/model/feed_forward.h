// The feed-forward sub-block, n = norm(x). T5 1.1: x + dropout(wo(dropout(gelu(wi_0 n) * (wi_1 n)))).
// T5 1.0: x + dropout(wo(dropout(relu(wi n)))).
#pragma once

#include "trainer/model/rms_norm.h"

namespace regroup {

// wi_0|wi_1 is one column-parallel product, wo a row-parallel one.
class FeedForward {
 public:
  struct Saved {
    RmsNorm::Saved norm;
    Tensor normalised;  // T [N, D]
    Tensor inner;       // T [N, 2 F] of wi_0|wi_1, T [N, F] of wi
    Tensor hidden;      // T [N, F]
  };

  // `prefix`: "encoder.block.0.layer.1."; dropout at `site` and `site + 1`.
  FeedForward(const ParameterStore& store, const std::string& prefix, index_t site, int tp_rank);

  // y = x + ...; x, y T [N, D] with `length` rows a sample. y empty: only `saved`, without the last product
  // and its sum over ranks.
  void forward(Step& step, Tensor x, Tensor y, index_t length, Saved& saved) const;
  // gradient: of y on entry, of x on return.
  void backward(Step& step, Tensor gradient, index_t length, const Saved& saved) const;

 private:
  Dropout hidden_dropout(const Step& step, index_t length) const;

  FeedForwardKind kind_;
  RmsNorm norm_;
  Parameter wi_, wo_;
  index_t site_, d_ff_, first_column_;
};

}  // namespace regroup
