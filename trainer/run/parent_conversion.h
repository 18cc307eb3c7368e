// From a parent's checkpoint to a conversion: its held-out loss, calibration, plan.
#pragma once

#include "data/batch_stream.h"
#include "trainer/conversion/conversion_plan.h"
#include "trainer/options.h"
#include "trainer/run/checkpoint_source.h"
#include "trainer/run/conversion_report.h"

namespace regroup {

// --pooling, --grouping, --kv-budget and --seed. UserError naming the option and its values.
ConversionOptions conversion_options(const Options& options);

// What a parent is measured on, and how.
struct ParentData {
  const Corpus* corpus = nullptr;
  const Samples* training = nullptr;  // calibration takes its first samples; null: no calibration
  const Samples* heldout = nullptr;   // null: the parent is not evaluated
  index_t micro_batch = 1;
};

struct ParentConversion {
  ConversionPlan plan;
  ConversionReport report;  // all but converted_loss
};

// The parent's model takes memory beside nothing else and is gone on return. `mesh`: as conversion_groups()
// has it. Collective over `world`; UserErrors as load_weights() and plan_conversion().
ParentConversion plan_parent(const Options& options, const ProcessGroup& world, Backend& backend,
                             const Mesh& mesh, const CheckpointSource& source, const ModelConfig& target,
                             const ParentData& data);

// UserError where --kv-budget uneven may choose a number of groups that cannot be split over so many ranks.
void require_budget_fits(const Options& options, const ModelConfig& parent, int tensor_parallel);

// Every number of groups that parent, target, or what an uneven budget makes of it, may have: for the mesh.
std::vector<index_t> conversion_groups(const Options& options, const ModelConfig& parent,
                                       const ModelConfig& target);

}  // namespace regroup
