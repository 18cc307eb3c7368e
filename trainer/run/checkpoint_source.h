// What --init-from and --checkpoint may name.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>

#include "data/corpus.h"
#include "parallel/process_group.h"
#include "trainer/conversion/regroup.h"
#include "trainer/model/config.h"
#include "trainer/model/parameter_store.h"
#include "trainer/run/run_state.h"

namespace regroup {

struct CheckpointSource {
  std::filesystem::path directory;   // what CheckpointReader is given: with model*.safetensors, or T5X's
  std::filesystem::path companions;  // where config.json and tokenizer.model lie, if they do
  ModelConfig config;
  std::optional<RunState> state;  // of a checkpoint that this program wrote
  std::optional<index_t> step;    // how long it was trained, where it says so
  std::string optimizer;          // whose moments are in it: "adafactor", "adamw", or none
};

// A run (its newest complete checkpoint), one of its step directories, wherever it lies now, a directory in
// transformers' layout, or a T5X checkpoint (t5x.h), whose config.json, if there is one, lies in its
// directory or the one around it; the shapes tell otherwise. Reads configuration, state and the tensors'
// table only. Collective; UserError saying what is missing, damaged or misshaped.
CheckpointSource find_checkpoint(const ProcessGroup& world, const std::filesystem::path& path);

// A step directory whose small files are verified (find_damage): what they say, without a look at its
// tensors. Collective.
CheckpointSource read_step(const ProcessGroup& world, const std::filesystem::path& directory);

// Compares every byte of a checkpoint of this program with its checksums, the ranks sharing the work. Others
// carry none. Collective; UserError naming the first damaged file.
void verify_checkpoint(const ProcessGroup& world, const CheckpointSource& source);

// Fills the store's masters and weights from the checkpoint: this rank's slices, converted by the plan where
// the store's model has fewer key/value groups. Collective; UserErrors as ConvertingReader, and one that
// lists the tensors with values that are not finite.
void load_weights(const ProcessGroup& world, const CheckpointSource& source, Backend& backend,
                  ParameterStore& store, const ConversionPlan& plan = {});

// The SentencePiece model that a checkpoint has with it: tokenizer.model, or transformers' spiece.model.
std::optional<std::filesystem::path> tokenizer_of(const std::filesystem::path& directory);

// Small files that a model takes along, from its parent to what is made of it, {name: text}, where it has
// them: how it generates (generation_config.json), and what else transformers keeps of its tokenizer.
std::map<std::string, std::string> files_to_take_along(const std::filesystem::path& directory);

// UserError unless the corpus was tokenized with the model's vocabulary: of its size and, where the
// checkpoint has a tokenizer with it, that very one.
void require_same_vocabulary(const CheckpointSource& source, const Corpus& corpus);

}  // namespace regroup
