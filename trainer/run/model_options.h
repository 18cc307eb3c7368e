// From options to what the parts of a run are made with.
#pragma once

#include <functional>
#include <string>

#include <nlohmann/json_fwd.hpp>

#include "trainer/model/config.h"
#include "trainer/optimizer/schedule.h"
#include "trainer/options.h"
#include "trainer/run/model_runner.h"

namespace regroup {

// Takes from `identity` (of a parent, or of the run being resumed) what was not given: lengths and corruption
// of samples, batch size, optimizer, schedule with its base and warm-up, z-loss; for law 1 has it that a run
// goes on as it was, and the paper that uptraining goes on as pretraining did. Updates `resolved` too.
void inherit(Options& options, const nlohmann::json& identity);

// The named size with everything that was set instead of it. UserError as validate().
ModelConfig pretrained_config(const Options& options, index_t vocab_size);
// The parent with the asked-for numbers of groups and dropout. An uneven parent keeps its numbers unless
// --kv-groups is another than the parent's, which then is every decoder attention's. UserError where
// --kv-groups is missing or does not divide.
ModelConfig uptrained_config(const Options& options, const ModelConfig& parent);

Schedule schedule_of(const Options& options, index_t total_steps);

// Sequences of one micro-batch of a rank: what was asked for, or as many as suit the device, of those for
// which `fits` holds. UserError where data_parallel does not divide the batch, or the micro-batch not a
// rank's share of it, naming values that would do.
index_t micro_batch_of(
    const Options& options, int data_parallel,
    const std::function<bool(index_t)>& fits = [](index_t) { return true; });

// The same for evaluation, where nothing needs to divide.
index_t evaluation_micro_batch(const Options& options);

// Of weights and activations: --precision.
DType compute_dtype(const Options& options);

ModelRunner::Options runner_options(const Options& options, const Samples& samples, index_t micro_batch,
                                    bool train);

// What is trained on, and what is evaluated on. Held-out masks have a seed of their own: every run of a
// corpus is measured on the same samples.
SampleOptions training_samples(const Options& options);
SampleOptions heldout_samples(const Options& options);

// Everything that the numbers of a run are a function of, by option; RunState::identity.
struct RunLength {
  Schedule schedule;
  index_t total_steps = 0, first_step = 0;
};
nlohmann::json run_identity(const Options& options, const ModelConfig& config, const Corpus& corpus,
                            const RunLength& length);

// The store's masters under their public names.
std::vector<ShardedTensor> sharded_parameters(const ParameterStore& store);

// The options that were resolved, as a configuration file.
std::string resolved_config(const Options& options);

}  // namespace regroup
