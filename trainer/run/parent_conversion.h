// From a parent's checkpoint to a conversion: its held-out loss, calibration, plan.
#pragma once

#include "trainer/conversion/conversion_plan.h"
#include "trainer/options.h"
#include "trainer/run/checkpoint_source.h"

namespace regroup {

// --pooling, --grouping, --kv-budget and --seed. UserError naming the option and its values.
ConversionOptions conversion_options(const Options& options);

// What a parent is measured on, and how.
struct ParentData {
  const Samples* training = nullptr;  // calibration takes its first samples; null: no calibration
  const Samples* heldout = nullptr;   // null: the parent is not evaluated
  index_t micro_batch = 1;
};

struct ParentConversion {
  double parent_loss = 0;  // held-out; NaN where not measured
  double seconds = 0;      // for calibration and plan
  ConversionPlan plan;
};

// The parent's model takes memory beside nothing else and is gone on return. The mesh is made for the groups
// of parent and target. Collective over `world`; UserErrors as load_weights() and plan_conversion().
ParentConversion plan_parent(const Options& options, const ProcessGroup& world, Backend& backend,
                             const Mesh& mesh, const CheckpointSource& source, const ModelConfig& target,
                             const ParentData& data);

}  // namespace regroup
