// The optimizer state that an uptraining goes on with: its parent's, of what conversion leaves as it is.
#pragma once

#include <span>

#include "trainer/conversion/conversion_plan.h"
#include "trainer/optimizer/optimizer.h"
#include "trainer/run/checkpoint_source.h"

namespace regroup {

// By parameter, the step at which its moments began: of parameters that the plan does not change, where the
// parent's checkpoint has the state of this optimizer ("adafactor", "adamw"). The moments of all others begin
// with the uptraining, those of merged heads and of what was re-based with them among them. Collective; rank
// 0 looks.
MomentOffsets inherited_moments(const ProcessGroup& world, const CheckpointSource& parent,
                                const ConversionPlan& plan, const std::string& optimizer);

// Fills those of `state` (Optimizer::state()) that belong to the parameters in `inherited`. Collective;
// UserError naming a tensor that is missing or misshaped.
void load_moments(const ProcessGroup& world, Backend& backend, const CheckpointSource& parent,
                  const MomentOffsets& inherited, std::span<const ShardedTensor> state);

}  // namespace regroup
