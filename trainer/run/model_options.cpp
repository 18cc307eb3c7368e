#include "trainer/run/model_options.h"

#include <algorithm>

#include "kernels/base/json.h"
#include "trainer/run/micro_batch.h"

namespace regroup {
namespace {

// Encoder tokens of a micro-batch that was not asked for: enough for fast products, few enough for caches and
// memory.
index_t suitable_inputs(const Options& options) { return options.device == "cuda" ? 32768 : 4096; }

bool always(index_t) { return true; }

}  // namespace

void inherit(Options& options, const nlohmann::json& identity) {
  const auto take = [&]<class T>(const char* name, T& member) {
    if (options.given.contains(name) || !identity.contains(name)) return;
    member = identity.at(name).get<T>();
    std::string value = fmt::format("{}", member);
    if constexpr (std::is_same_v<T, bool>) value = member ? "on" : "off";
    set_resolved(options, name, value);
  };
  take("inputs-length", options.inputs_length);
  take("noise-density", options.noise_density);
  take("mean-span", options.mean_span);
  take("batch-size", options.batch_size);
  take("optimizer", options.optimizer);
  take("schedule", options.schedule);
  take("warmup", options.warmup);
  take("z-loss", options.z_loss);
  take("weight-decay", options.weight_decay);
  take("scale-by-rms", options.scale_by_rms);
  take("max-gradient-norm", options.max_gradient_norm);
  double base = options.learning_rate.value_or(0);
  take("learning-rate", base);
  if (base > 0) options.learning_rate = base;
}

ModelConfig pretrained_config(const Options& options, index_t vocab_size) {
  ModelConfig config = t5_1_1(options.model);
  config.vocab_size = vocab_size;
  config.d_model = options.d_model.value_or(config.d_model);
  config.d_kv = options.d_kv.value_or(config.d_kv);
  config.d_ff = options.d_ff.value_or(config.d_ff);
  config.num_heads = options.heads.value_or(config.num_heads);
  config.num_layers = options.layers.value_or(config.num_layers);
  config.num_decoder_layers = options.decoder_layers.value_or(config.num_layers);
  config.kv_groups = options.kv_groups.value_or(config.num_heads);
  config.encoder_kv_groups = options.encoder_kv_groups.value_or(config.num_heads);
  config.dropout_rate = options.dropout;
  validate(config);
  return config;
}

ModelConfig uptrained_config(const Options& options, const ModelConfig& parent) {
  if (!options.kv_groups && !options.encoder_kv_groups) {
    throw UserError(
        "{} needs --kv-groups: how many key/value groups the {} heads become (the paper: 8 for T5 "
        "XXL; 1 is multi-query)",
        options.mode == Mode::kConvert ? "--convert" : "--uptrain", parent.num_heads);
  }
  for (const char* name : {"d-model", "d-kv", "d-ff", "heads", "layers", "decoder-layers"}) {
    if (options.given.contains(name))
      throw UserError("--{} says nothing in this mode: the model is the parent's", name);
  }
  ModelConfig config = parent;
  config.kv_groups = options.kv_groups.value_or(parent.kv_groups);
  // An uneven parent stays as it is, above all when its own run is resumed; another number is one for all.
  if (config.kv_groups != parent.kv_groups) config.site_kv_groups.clear();
  config.encoder_kv_groups = options.encoder_kv_groups.value_or(parent.encoder_kv_groups);
  config.dropout_rate = options.dropout;
  validate(config);
  return config;
}

Schedule schedule_of(const Options& options, index_t total_steps) {
  const Schedule::Kind kind = schedule_kind(options.schedule);
  return {.kind = kind,
          .base = options.learning_rate.value_or(kind == Schedule::Kind::kRsqrt ? 1.0 : 1e-3),
          .warmup = options.warmup,
          .total = total_steps};
}

index_t micro_batch_of(const Options& options, int data_parallel, const std::function<bool(index_t)>& fits) {
  if (options.batch_size % data_parallel != 0) {
    throw UserError("batch-size = {} cannot be shared by {} data-parallel ranks; use a multiple such as {}",
                    options.batch_size, data_parallel,
                    (options.batch_size / data_parallel + 1) * data_parallel);
  }
  const index_t share = options.batch_size / data_parallel;
  if (options.micro_batch == 0)
    return fitting_micro_batch(share, std::max<index_t>(1, suitable_inputs(options) / options.inputs_length),
                               fits);
  if (share % options.micro_batch != 0) {
    throw UserError("micro-batch = {} does not divide a rank's {} sequences of a step; use {}",
                    options.micro_batch, share, fitting_micro_batch(share, options.micro_batch, always));
  }
  return options.micro_batch;
}

index_t evaluation_micro_batch(const Options& options) {
  return options.micro_batch > 0 ? options.micro_batch
                                 : std::max<index_t>(1, suitable_inputs(options) / options.inputs_length);
}

DType compute_dtype(const Options& options) {
  check(options.precision != "auto", "the precision is used before it is resolved");
  return options.precision == "fp32" ? DType::kFloat32 : DType::kBFloat16;
}

ModelRunner::Options runner_options(const Options& options, const Samples& samples, index_t micro_batch,
                                    bool train) {
  return {.compute = compute_dtype(options),
          .micro_batch = micro_batch,
          .inputs_length = options.inputs_length,
          .targets_length = samples.lengths().targets,
          .train = train,
          .dropout_rate = options.dropout,
          .recompute = options.recompute,
          .z_loss = options.z_loss};
}

SampleOptions training_samples(const Options& options) {
  return {.corruption = {.inputs_length = options.inputs_length,
                         .noise_density = options.noise_density,
                         .mean_span = options.mean_span},
          .seed = options.seed};
}

SampleOptions heldout_samples(const Options& options) {
  SampleOptions samples = training_samples(options);
  samples.seed = 0;
  samples.shuffle = false;
  return samples;
}

nlohmann::json run_identity(const Options& options, const ModelConfig& config, const Corpus& corpus,
                            const RunLength& length) {
  const bool uptraining = options.mode == Mode::kUptrain;
  nlohmann::json all = {{"mode", uptraining ? "uptrain" : "pretrain"},
                        {"model", parse_json(to_json(config))},
                        {"seed", options.seed},
                        {"corpus", fmt::format("{:016x}", corpus.fingerprint())},
                        {"inputs-length", options.inputs_length},
                        {"noise-density", options.noise_density},
                        {"mean-span", options.mean_span},
                        {"batch-size", options.batch_size},
                        {"precision", options.precision},
                        {"optimizer", options.optimizer},
                        {"schedule", options.schedule},
                        {"learning-rate", length.schedule.base},
                        {"warmup", options.warmup},
                        {"weight-decay", options.weight_decay},
                        {"scale-by-rms", options.scale_by_rms},
                        {"max-gradient-norm", options.max_gradient_norm},
                        {"z-loss", options.z_loss}};
  if (uptraining) {
    all["init-from"] = options.init_from.string();
    all["parent-steps"] = length.first_step;
    all["pooling"] = options.pooling;
    // Named only where they count, so that runs from before they existed resume.
    if (!options.parent_moments) all["parent-moments"] = false;
    if (options.grouping != "position") all["grouping"] = options.grouping;
    if (options.kv_budget != "even") all["kv-budget"] = options.kv_budget;
    if (options.pooling == "calibrated") all["calibration-batches"] = options.calibration_batches;
  }
  const Schedule::Kind kind = length.schedule.kind;
  if (kind == Schedule::Kind::kLinear || kind == Schedule::Kind::kCosine) all["steps"] = length.total_steps;
  return all;
}

std::vector<ShardedTensor> sharded_parameters(const ParameterStore& store) {
  std::vector<ShardedTensor> result;
  for (std::size_t i = 0; i < store.size(); ++i) {
    result.push_back({store.table()[i].name, store.table()[i].shape, store.slice(i), store.master(i)});
  }
  return result;
}

std::string resolved_config(const Options& options) {
  std::string text = "# What this run was told, by defaults, configuration files and command line.\n";
  for (const auto& [name, value] : options.resolved) text += fmt::format("{} = {}\n", name, value);
  return text;
}

}  // namespace regroup
