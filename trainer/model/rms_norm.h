// RMSNorm as a module.
#pragma once

#include "trainer/model/parameter_store.h"
#include "trainer/model/step.h"

namespace regroup {

class RmsNorm {
 public:
  struct Saved {
    Tensor x;            // T [N, D], the caller's
    Tensor inverse_rms;  // S [N]
  };

  RmsNorm(const ParameterStore& store, const std::string& name)
      : weight_(store.parameter(name)), epsilon_(store.config().layer_norm_epsilon) {}

  // The normalised x, T [N, D], in the saved arena.
  Tensor forward(Step& step, Tensor x, Saved& saved) const {
    saved = {.x = x, .inverse_rms = step.saved.allocate(stat_dtype(x.dtype), {x[0]})};
    const Tensor y = step.saved.allocate(x.dtype, {x[0], x[1]});
    step.backend.rms_norm(x, weight_.weight, y, saved.inverse_rms, epsilon_);
    return y;
  }

  // gradient += the gradient of x that comes through the norm, given dy; `gradient` T [N, D] is what reaches
  // x around it.
  void backward(Step& step, Tensor dy, Tensor gradient, const Saved& saved) const {
    step.backend.rms_norm_backward(dy, saved.x, weight_.weight, saved.inverse_rms, gradient, gradient,
                                   weight_.gradient);
  }
  // The same where nothing goes around: gradient = ...
  void backward_into(Step& step, Tensor dy, Tensor gradient, const Saved& saved) const {
    step.backend.rms_norm_backward(dy, saved.x, weight_.weight, saved.inverse_rms, {}, gradient,
                                   weight_.gradient);
  }

 private:
  Parameter weight_;
  double epsilon_;
};

}  // namespace regroup
