// Whether a checkpoint that was written computes what the one it was made from does.
#pragma once

#include "trainer/options.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/rank_device.h"

namespace regroup {

struct LogitDifference {
  double largest = 0;    // of |a - b|, over all logits of the batch
  double magnitude = 0;  // the largest |a|
};

// Runs both models in float32, one after the other, on one batch of drawn tokens (2 x (32, 16), the second
// sequence padded) and compares their logits. Each takes memory for its weights. Both must be of one
// vocabulary. Collective; UserErrors as load_weights().
LogitDifference compare_logits(const ProcessGroup& world, const Layout& layout, const RankDevice& device,
                               const CheckpointSource& a, const CheckpointSource& b);

}  // namespace regroup
