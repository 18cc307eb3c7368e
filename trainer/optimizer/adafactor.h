// Adafactor as T5 trains with it (Shazeer and Stern 2018; t5x/adafactor.py with its defaults): no momentum,
// factored second moments, updates clipped to a root mean square of 1 and scaled by that of the parameter.
#pragma once

#include "trainer/optimizer/optimizer.h"

namespace regroup {

class Adafactor final : public Optimizer {
 public:
  struct Options {
    // beta2 at step t is 1 - (t - step_offset + 1)^-decay_rate. Moments that start fresh at step s need
    // step_offset s.
    index_t step_offset = 0;
    MomentOffsets step_offsets = {};  // of parameters with another one
    double decay_rate = 0.8;
    index_t min_dim_size_to_factor = 128;  // of the global matrix, both dimensions
    double clipping_threshold = 1.0;
    double epsilon_gradient = 1e-30;
    double epsilon_parameter = 1e-3;
    double max_gradient_norm = 0;  // gradients are scaled down to this norm; 0: never
  };

  Adafactor(Backend& backend, ParameterStore& store, const Mesh& mesh, const Options& options);
  ~Adafactor() override;
  Adafactor(const Adafactor&) = delete;
  Adafactor& operator=(const Adafactor&) = delete;

  std::vector<ShardedTensor> state() const override;
  index_t state_bytes() const override { return state_.bytes(); }

 private:
  double do_update(index_t step, double learning_rate, const Verdict& takes) override;
  struct Plan;  // where each parameter's slots lie
  static std::vector<Plan> plan(const ParameterStore& store, const Options& options, int tp_size);

  Backend& backend_;
  ParameterStore& store_;
  Options options_;
  std::vector<Plan> plan_;
  Buffer state_;  // S: rows, columns and full second moments, one after the other
  Buffer sums_;   // float64: row and column sums that are complete on this rank
  UpdateTotals totals_;
  std::vector<AdafactorSlot> slots_;
  std::map<index_t, std::vector<AdafactorSlot>> slots_by_offset_;  // the same
};

}  // namespace regroup
