// What every implementation of grouped-query attention on a GPU is called with. Shapes and formulas:
// Backend::attention.
#pragma once

#include "kernels/backend.h"

namespace regroup {

struct AttentionCall {
  Tensor q, k, v, bias, key_mask, out, log_sum_exp;
  AttentionOptions options;
};

struct AttentionGradients {
  Tensor dout;        // in
  Tensor dq, dk, dv;  // =
  Tensor dbias;       // +=, may be empty
};

}  // namespace regroup
