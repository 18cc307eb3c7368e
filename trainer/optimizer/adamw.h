// AdamW (Loshchilov and Hutter 2019), optionally with Adafactor's scaling by the parameter's root mean
// square, without which T5's embedding (standard deviation 1) barely moves.
#pragma once

#include "trainer/optimizer/optimizer.h"

namespace regroup {

class AdamW final : public Optimizer {
 public:
  struct Options {
    index_t step_offset = 0;          // bias correction counts from here
    MomentOffsets step_offsets = {};  // of parameters with another one
    double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;
    double weight_decay = 0;  // of matrices; norms and the bias tables are not decayed
    bool scale_by_rms = false;
    double max_gradient_norm = 0;  // 0: never clip
  };

  AdamW(Backend& backend, ParameterStore& store, const Mesh& mesh, const Options& options);

  std::vector<ShardedTensor> state() const override;
  index_t state_bytes() const override { return state_.bytes(); }

 private:
  double do_update(index_t step, double learning_rate, const Verdict& takes) override;
  Backend& backend_;
  ParameterStore& store_;
  Options options_;
  Buffer state_;  // S: first moments, then second moments, each in the order of the store's flat masters
  UpdateTotals totals_;
  std::vector<AdamWSlot> slots_;
  std::map<index_t, std::vector<AdamWSlot>> slots_by_offset_;  // the same
};

}  // namespace regroup
