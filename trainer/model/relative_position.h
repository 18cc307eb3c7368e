// The relative position bias that the self-attentions of one stack share.
#pragma once

#include "trainer/model/attention.h"

namespace regroup {

class RelativePosition {
 public:
  // `prefix`: "encoder.block.0.layer.0."; the encoder's buckets are bidirectional.
  RelativePosition(const ParameterStore& store, const std::string& prefix, bool bidirectional)
      : table_(store.parameter(prefix + "SelfAttention.relative_attention_bias.weight")),
        options_{.bidirectional = bidirectional,
                 .max_distance = store.config().relative_attention_max_distance} {}

  // The bias for `length` queries and keys, in the saved arena, with room for its gradient where the step
  // trains.
  PositionBias forward(Step& step, index_t length, bool training) const {
    const DType stat = stat_dtype(table_.weight.dtype);
    PositionBias position{.bias = step.saved.allocate(stat, {table_.weight[1], 2 * length - 1}),
                          .gradient = {}};
    if (training) position.gradient = step.saved.allocate(stat, {table_.weight[1], 2 * length - 1});
    step.backend.relative_bias(table_.weight, length, position.bias, options_);
    return position;
  }
  void backward(Step& step, index_t length, const PositionBias& position) const {
    step.backend.relative_bias_backward(position.gradient, length, table_.gradient, options_);
  }

 private:
  Parameter table_;
  RelativeBiasOptions options_;
};

}  // namespace regroup
