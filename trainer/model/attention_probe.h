// Looking on at the model's attentions while it runs.
#pragma once

#include "trainer/model/step.h"

namespace regroup {

// Given in Step::probe, it is called by every attention's forward when the queries and keys are there. It
// may issue ops of its own, writes nothing of the model's, and keeps out of the step's arenas, which are
// planned without it.
class AttentionProbe {
 public:
  // What an attention is about to work on, valid during the call.
  struct View {
    index_t site = 0;    // in attention_sites()
    index_t batch = 0;   // B
    Tensor query_input;  // T [B Q, D]: the normalised input of the queries
    Tensor key_input;    // T [B K, D]: that of the keys and values; the encoder's output in cross-attention
    Tensor q, k;         // T [B, Q, H, C], [B, K, G, C], this rank's heads, as Backend::attention takes them
    Tensor bias;         // S [H, Q + K - 1] or empty
    Tensor key_mask;     // int32 [B, K] or empty
    AttentionOptions options;
  };

  virtual ~AttentionProbe() = default;
  // Called on every rank of tp for the same attention in turn, so it may be collective over tp.
  virtual void observe(Step& step, const View& view) = 0;
};

}  // namespace regroup
