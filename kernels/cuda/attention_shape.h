// Everything about a call of attention that the speed of its kernels depends on.
#pragma once

#include <string>

#include "kernels/cuda/attention.h"

namespace regroup {

// Letters: kernels/backend.h.
struct AttentionShape {
  struct Rows {
    index_t sample = 0, token = 0;  // elements from one to the next; a token's heads lie densely
    bool operator==(const Rows&) const = default;
  };

  index_t batch = 0, queries = 0, keys = 0, heads = 0, groups = 0, channels = 0;
  Rows q, k, v, out;
  bool bias = false, causal = false, dropout = false;
  bool padded = false;     // keys are masked at the end of a sample only
  bool scattered = false;  // anywhere
  bool backward = false;
  // Backward only.
  Rows dout, dq, dk, dv;
  bool dbias = false;

  bool operator==(const AttentionShape&) const = default;
};

AttentionShape shape_of(const AttentionCall& call);
AttentionShape shape_of(const AttentionCall& call, const AttentionGradients& gradients);

// "backward of 8 x 512 queries, 512 keys, 12 heads, 2 groups, 64 channels, bias, padded, dbias, q 1024 ..."
std::string name_of(const AttentionShape& shape);

}  // namespace regroup
