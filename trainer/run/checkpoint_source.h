// What --init-from and --checkpoint may name.
#pragma once

#include <filesystem>
#include <optional>

#include "data/corpus.h"
#include "parallel/process_group.h"
#include "trainer/conversion/regroup.h"
#include "trainer/model/config.h"
#include "trainer/model/parameter_store.h"
#include "trainer/run/run_state.h"

namespace regroup {

struct CheckpointSource {
  std::filesystem::path directory;  // with model*.safetensors and config.json
  ModelConfig config;
  std::optional<RunState> state;  // of a checkpoint that this program wrote
};

// A run (its newest complete checkpoint), one of its step directories, wherever it lies now, or a directory
// in transformers' layout. Reads configuration, state and the tensors' table only. Collective; UserError
// saying what is missing, damaged or misshaped.
CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path);

// A step directory whose small files are verified (find_damage): what they say, without a look at its
// tensors. Collective.
CheckpointSource read_step(const ProcessGroup& world, const std::filesystem::path& directory);

// Compares every byte of a checkpoint of this program with its checksums, the ranks sharing the work. Others
// carry none. Collective; UserError naming the first damaged file.
void verify_checkpoint(const ProcessGroup& world, const CheckpointSource& source);

// Fills the store's masters and weights from the checkpoint: this rank's slices, converted by the
// plan where the store's model has fewer key/value groups. Collective; UserErrors as ConvertingReader.
void load_weights(const ProcessGroup& world, const CheckpointSource& source, Backend& backend,
                  ParameterStore& store, const ConversionPlan& plan = {});

// UserError unless the corpus was tokenized with the model's vocabulary: of its size and, where the
// checkpoint has its tokenizer.model with it, that very one.
void require_same_vocabulary(const CheckpointSource& source, const Corpus& corpus);

}  // namespace regroup
