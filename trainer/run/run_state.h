// What a checkpoint knows of its run beyond tensors: where it stands, and what may not change under it.
#pragma once

#include <cstdint>
#include <limits>
#include <string>

#include "kernels/base/json.h"
#include "kernels/dtype.h"
#include "trainer/optimizer/optimizer.h"
#include "trainer/run/divergence.h"

namespace regroup {

struct RunState {
  index_t step = 0;     // done, counted over the parent's too
  index_t samples = 0;  // consumed, the parent's too: the whole position in the data
  // Uptraining: where it began, and the held-out losses before its first step (NaN: pretraining).
  index_t first_step = 0;
  double parent_loss = std::numeric_limits<double>::quiet_NaN();
  double converted_loss = std::numeric_limits<double>::quiet_NaN();
  std::string parent;
  // Of its last held-out evaluation: the share of the conversion's gap that was recovered (recovery.h; NaN:
  // there was none yet), and its step. --until-recovered ends a run by what its checkpoint says here, so a
  // resumed run decides as the undisturbed one.
  double recovered = std::numeric_limits<double>::quiet_NaN();
  index_t recovered_step = 0;
  nlohmann::json conversion;  // ConversionProvenance of a converted model, else null
  // Where the optimizer's moments of some parameters began, if not at first_step: with the parent, whose they
  // are.
  MomentOffsets moment_offsets;
  std::string cpu_level;  // of the ranks' processors when this was written; "" on GPUs and in older runs
  Divergence divergence;  // what judges the next step
  // Everything that the numbers of the run are a function of: model, data, optimizer, seed. Layout is not
  // part of it.
  nlohmann::json identity = nlohmann::json::object();
};

nlohmann::json to_json(const RunState& state);
// UserError naming `where` where a field is missing or of the wrong type.
RunState run_state_from_json(const nlohmann::json& json, const std::string& where);

// UserError naming every option that differs, with both values, and what to do.
void require_same_identity(const nlohmann::json& saved, const nlohmann::json& asked,
                           const std::string& where);

}  // namespace regroup
