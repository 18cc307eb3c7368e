// Whether a checkpoint that was written computes what the one it was made from does.
#pragma once

#include <optional>
#include <vector>

#include "trainer/formats/stored_tensor.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/rank_device.h"

namespace regroup {

// The logits, this rank's columns of the vocabulary, that a model gives in float32 for one batch of drawn
// tokens (2 x (32, 16), the second sequence padded), its weights rounded to `rounded` before. Takes memory
// for the weights. Collective; UserErrors as load_weights().
std::vector<float> check_logits(const ProcessGroup& world, const Layout& layout, const RankDevice& device,
                                const CheckpointSource& source, std::optional<StoredType> rounded = {});

struct LogitDifference {
  double largest = 0;    // of |a - b|, over all logits; infinite where one is no number
  double magnitude = 0;  // the largest |a|
};
// Of two models of one vocabulary. Collective.
LogitDifference compare_logits(const ProcessGroup& world, const std::vector<float>& a,
                               const std::vector<float>& b);

}  // namespace regroup
