// What --init-from and --checkpoint may name.
#pragma once

#include <filesystem>
#include <optional>

#include "parallel/process_group.h"
#include "trainer/model/config.h"
#include "trainer/run/run_state.h"

namespace regroup {

struct CheckpointSource {
  std::filesystem::path directory;  // with model*.safetensors and config.json
  ModelConfig config;
  std::optional<RunState> state;  // of a checkpoint that this program wrote
};

// A run (its newest complete checkpoint), one of its step directories, or a directory in transformers'
// layout. Collective. UserError saying what is missing; checkpoints of a run are verified.
CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path);

}  // namespace regroup
