// Everything before a run's first step: where it starts, what it is, its memory, weights and data.
#include <array>
#include <cmath>

#include "kernels/base/file.h"
#include "kernels/base/host.h"
#include "kernels/base/json.h"
#include "kernels/matmul_peak.h"
#include "trainer/checkpoint/checkpoint_loader.h"
#include "trainer/conversion/regroup.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/optimizer/adamw.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/micro_batch.h"
#include "trainer/run/model_options.h"
#include "trainer/run/parent_conversion.h"
#include "trainer/run/parent_moments.h"
#include "trainer/run/precision.h"
#include "trainer/run/rank_device.h"
#include "trainer/run/training_run.h"

namespace regroup {

TrainingRun::TrainingRun(const Options& options, const ProcessGroup& world, const Log& log)
    : options_(options),
      world_(world),
      log_(log),
      watchdog_(world, options.hang_timeout, log),
      directory_(world, options.run, log) {
  world_.run_together([&] { corpus_.emplace(options_.corpus); });
  choose_start();
  if (options_.verify_corpus) {
    world_.run_together([&] { corpus_->verify(world_.rank(), world_.size(), &world_.heartbeat()); });
  }
  if (source_ && !source_->step) {
    log_.info("{} does not say how long it was trained: parent-steps = {} is assumed", state_.parent,
              options_.parent_steps);
  }
}

void TrainingRun::choose_start() {
  find_start();
  world_.run_together([&] { decide(); });
  if (source_ && !resuming()) verify_checkpoint(world_, *source_);
}

// The newest checkpoint that has all its files and whose small ones are intact, or the beginning. What is
// damaged is set aside on the way. The tensors' files are verified as they are read: see load().
void TrainingRun::find_start() {
  source_.reset();
  state_ = RunState();
  while ((resumed_step_ = directory_.newest())) {
    const std::optional<std::string> damage = take_up(*resumed_step_);
    if (!damage) return;
    directory_.set_aside(*resumed_step_, *damage);
  }
  if (!uptraining()) return;
  source_ = find_checkpoint(world_, options_.init_from);
  state_.first_step = source_->step.value_or(options_.parent_steps);
  state_.step = state_.first_step;
  state_.samples = source_->state ? source_->state->samples : 0;
  state_.parent = source_->directory.string();
}

// Makes a step the one that the run goes on from, unless its small files are damaged.
std::optional<std::string> TrainingRun::take_up(index_t step) {
  const std::filesystem::path directory = directory_.checkpoints().path_of(step);
  if (auto damage = find_damage(world_, directory, Verification::kSmall)) return damage;
  source_ = read_step(world_, directory);
  state_ = source_->state.value();
  resumed_step_ = step;
  return std::nullopt;
}

// Where the checkpoint to resume is damaged: sets it aside and chooses another start, which is an older step
// of the same run, for where none is left that is an error. Whether that was so.
bool TrainingRun::fall_back(const std::optional<std::string>& damage) {
  if (!damage) return false;
  directory_.set_aside(*resumed_step_, *damage);
  choose_start();
  return true;
}

// What the run is, from options and where it starts; refuses what cannot work. The same on every rank.
void TrainingRun::decide() {
  if (source_ && source_->state) inherit(options_, source_->state->identity);
  if (resuming()) keep_precision(options_, state_.identity.at("precision").get<std::string>());
  if (uptraining()) {
    config_ = uptrained_config(options_, source_->config);
    pooling_from_string(options_.pooling);
    if (!resuming()) validate_conversion(source_->config, config_);
    const double steps = options_.alpha * static_cast<double>(state_.first_step);
    total_steps_ = state_.first_step + std::max<index_t>(1, std::llround(steps));
  } else {
    config_ = pretrained_config(options_, corpus_->vocab_size());
    total_steps_ = options_.steps;
  }
  schedule_ = schedule_of(options_, total_steps_);
  if (resuming()) require_same_identity(state_.identity, identity(), options_.run.string());
  state_.identity = identity();
  if (source_) require_same_vocabulary(*source_, *corpus_);
  training_.emplace(*corpus_, Split::kTrain, training_samples(options_));
  heldout_.emplace(*corpus_, Split::kHeldout, heldout_samples(options_));
  if (source_) taken_along_ = files_to_take_along(source_->companions);
  layout_ = complete_layout(options_.layout, world_.size());
  validate_tensor_parallel(config_, layout_.tensor_parallel);
  if (source_) validate_tensor_parallel(source_->config, layout_.tensor_parallel);
  if (uptraining() && !resuming()) require_budget_fits(options_, source_->config, layout_.tensor_parallel);
  micro_batch_ = micro_batch_of(options_, layout_.data_parallel);
}

nlohmann::json TrainingRun::identity() const {
  return run_identity(options_, config_, *corpus_,
                      {.schedule = schedule_, .total_steps = total_steps_, .first_step = state_.first_step});
}

// Before the run's own model takes its memory. An uneven budget decides on the model's groups here.
void TrainingRun::plan_conversion() {
  const bool calibrates = options_.pooling == "calibrated";
  conversion_ = plan_parent(options_, world_, *backend_, *mesh_, *source_, config_,
                            {.corpus = &*corpus_,
                             .training = calibrates ? &*training_ : nullptr,
                             .heldout = &*heldout_,
                             .micro_batch = micro_batch_});
  world_.run_together([&] { validate_tensor_parallel(conversion_.plan.target, layout_.tensor_parallel); });
  state_.parent_loss = conversion_.report.parent_loss;
  state_.conversion = to_json(conversion_.report.provenance);
  if (conversion_.plan.sites.empty()) continue_conversion();
  config_ = conversion_.plan.target;
  state_.identity = identity();
  if (options_.parent_moments) {
    state_.moment_offsets = inherited_moments(world_, *source_, conversion_.plan, options_.optimizer);
  }
  log_.info("the optimizer goes on with the parent's moments of {} of {} parameters",
            state_.moment_offsets.size(), parameter_table(config_).size());
}

// The source is a converted model that stays as it is: the run is that conversion's. Where it was not trained
// on since, the gap to recover is the one to its own parent, on these samples.
void TrainingRun::continue_conversion() {
  if (!source_->state || source_->state->conversion.is_null()) return;
  const RunState& converted = *source_->state;
  state_.conversion = converted.conversion;
  constexpr double kSameSamples = 1e-3;  // relative
  if (converted.step == converted.first_step && std::isfinite(converted.parent_loss) &&
      std::abs(converted.converted_loss - state_.parent_loss) < kSameSamples * state_.parent_loss) {
    state_.parent_loss = converted.parent_loss;
  }
}

void TrainingRun::build() {
  runner_ = std::make_unique<ModelRunner>(*backend_, *mesh_, config_,
                                          runner_options(options_, *training_, micro_batch_, /*train=*/true));
  const index_t offset = state_.first_step;
  if (options_.optimizer == "adamw") {
    optimizer_ = std::make_unique<AdamW>(*backend_, runner_->parameters(), *mesh_,
                                         AdamW::Options{.step_offset = offset,
                                                        .step_offsets = state_.moment_offsets,
                                                        .weight_decay = options_.weight_decay,
                                                        .scale_by_rms = options_.scale_by_rms,
                                                        .max_gradient_norm = options_.max_gradient_norm});
  } else {
    optimizer_ =
        std::make_unique<Adafactor>(*backend_, runner_->parameters(), *mesh_,
                                    Adafactor::Options{.step_offset = offset,
                                                       .step_offsets = state_.moment_offsets,
                                                       .max_gradient_norm = options_.max_gradient_norm});
  }
  saver_ = std::make_unique<RunSaver>(world_, layout_, *backend_, directory_.checkpoints(), tensor_sets(),
                                      options_, [this](const SavedStep& step) { saved(step); });
  log_.info(
      "{} parameters; {} ranks = {} data-parallel x {} tensor-parallel, micro-batches of {}; {:.2f} GB a "
      "rank for activations, {:.2f} GB for optimizer state, {:.2f} GB of host memory for saving",
      format_count(parameter_count(config_)), world_.size(), layout_.data_parallel, layout_.tensor_parallel,
      micro_batch_, static_cast<double>(runner_->arena_bytes()) * 1e-9,
      static_cast<double>(optimizer_->state_bytes()) * 1e-9, saver_->staging_gigabytes());
}

std::vector<TensorSet> TrainingRun::tensor_sets() const {
  return {{.stem = "model", .tensors = sharded_parameters(runner_->parameters())},
          {.stem = "optimizer", .tensors = optimizer_->state()}};
}

// Model and optimizer from the checkpoint; its damage, where there is some: then they hold anything.
std::optional<std::string> TrainingRun::load() {
  if (auto damage =
          load_step(world_, layout_, *backend_, source_->directory, tensor_sets(), saver_->idle_memory())) {
    return damage;
  }
  runner_->parameters().refresh_weights();
  log_.info("resuming {} at step {}", options_.run.string(), state_.step);
  note_processor_level();
  return std::nullopt;
}

// Other instructions round differently: the run goes on, but not with the bits of an undisturbed one.
void TrainingRun::note_processor_level() {
  const std::string before = state_.cpu_level;
  state_.cpu_level = processor_level(options_);
  if (!before.empty() && !state_.cpu_level.empty() && before != state_.cpu_level) {
    log_.info("the run goes on at processor level {}; its checkpoint is from {}: the same up to rounding",
              state_.cpu_level, before);
  }
}

void TrainingRun::convert_parent() {
  load_weights(world_, *source_, *backend_, runner_->parameters(), conversion_.plan);
  load_moments(world_, *backend_, *source_, state_.moment_offsets, optimizer_->state());
  state_.converted_loss = held_out(*runner_).mean();
  conversion_.report.converted_loss = state_.converted_loss;
  world_.run_on(0, [&] { write_conversion_report(options_.run, conversion_.report); });
  conversion_ = {};
  if (reporter_) {
    reporter_->evaluation({.step = state_.step, .name = "parent", .loss = state_.parent_loss});
    reporter_->evaluation({.step = state_.step, .name = "converted", .loss = state_.converted_loss});
  }
  log_.info("held-out loss: parent ({} groups) {:.4f}, converted by {} to {} groups {:.4f} ({:+.4f})",
            source_->config.kv_groups, state_.parent_loss, options_.pooling, config_.kv_groups,
            state_.converted_loss, state_.converted_loss - state_.parent_loss);
}

// What does not depend on the step that is resumed: device, yardstick, memory.
void TrainingRun::prepare() {
  RankDevice device = open_device(options_, world_, log_);
  backend_ = std::move(device.backend);
  if (resuming()) take_up_tuning();
  const std::vector<index_t> groups = uptraining() && !resuming()
                                          ? conversion_groups(options_, source_->config, config_)
                                          : config_.all_kv_groups();
  mesh_ = std::make_unique<Mesh>(world_, layout_, groups, device.communicators);
  if (!backend_->host_accessible()) log_links(*backend_, *mesh_, log_);
  // Before the model takes its memory.
  std::array<double, 1> peak{};
  world_.run_together([&] { peak[0] = measure_matmul_peak(*backend_, compute_dtype(options_)); });
  world_.all_reduce(peak, ReduceOp::kSum);
  peak_flops_ = peak[0];
  log_.info("matmul peak of all ranks ({}, {}), measured: {:.0f} GFLOP/s", backend_->describe(),
            options_.precision, peak_flops_ * 1e-9);
  fit_micro_batch();
  if (uptraining() && !resuming()) plan_conversion();
  build();
}

// Where the user leaves it open: what the memory holds that every rank has free.
void TrainingRun::fit_micro_batch() {
  if (options_.micro_batch > 0 || !backend_->free_bytes()) return;
  const index_t free = *backend_->free_bytes();
  const auto bytes_of = [&](index_t micro_batch) {
    return training_bytes(*backend_, *mesh_, config_,
                          runner_options(options_, *training_, micro_batch, /*train=*/true),
                          options_.optimizer) +
           kUnplannedBytes;
  };
  const index_t suitable = micro_batch_;
  std::array<double, 1> smallest = {static_cast<double>(
      micro_batch_of(options_, layout_.data_parallel, [&](index_t size) { return bytes_of(size) <= free; }))};
  world_.all_reduce(smallest, ReduceOp::kMin);
  micro_batch_ = static_cast<index_t>(smallest[0]);
  if (micro_batch_ == suitable) return;
  log_.info(
      "micro-batches of {} would need {:.1f} GB of a GPU, of which {:.1f} are free: they are of {}, which "
      "need "
      "{:.1f} (--micro-batch chooses, --recompute saves memory)",
      suitable, static_cast<double>(bytes_of(suitable)) * 1e-9, static_cast<double>(free) * 1e-9,
      micro_batch_, static_cast<double>(bytes_of(micro_batch_)) * 1e-9);
}

// Where the run begins or goes on, and on what.
EventMetrics TrainingRun::start_event() const {
  EventMetrics event{.step = state_.step,
                     .name = resuming() ? "resume" : "start",
                     .detail = state_.parent,
                     .processor = processor_name(),
                     .cpu_level = processor_level(options_),
                     .precision = options_.precision};
  if (options_.device == "cuda") {
    const std::string gpu = backend_->describe();  // its name, then what it has
    event.processor = gpu.substr(0, gpu.find(','));
  }
  return event;
}

// Everything up to the first step: memory, weights, data. False where the checkpoint to resume turned out to
// be damaged: the run has another start now.
bool TrainingRun::start() {
  if (runner_ == nullptr) prepare();
  if (resuming() && fall_back(load())) return false;
  world_.run_on(0, [&] {
    reporter_ = std::make_unique<RunReporter>(options_.run, resumed_step_, options_.progress_every);
    reporter_->event(start_event());
    write_text(options_.run / "resolved.cfg", resolved_config(options_));
  });
  if (!resuming()) state_.cpu_level = processor_level(options_);
  if (!resuming() && uptraining()) convert_parent();
  if (!resuming() && !uptraining()) {
    runner_->parameters().initialise(options_.seed);
    double unigram = 0;
    world_.run_together([&] {
      unigram = unigram_loss(*training_, *heldout_, options_.evaluation_samples * 8, config_.vocab_size);
    });
    if (reporter_) reporter_->evaluation({.step = 0, .name = "unigram", .loss = unigram});
    log_.info("held-out loss of token frequencies alone: {:.4f}", unigram);
  }
  const auto micros = options_.batch_size / layout_.data_parallel / micro_batch_;
  micro_batches_.resize(static_cast<std::size_t>(micros));
  flops_per_step_ = runner_->flops() * static_cast<double>(micros * world_.size());
  make_batches();
  return true;
}

// From where the run stands in its data.
void TrainingRun::make_batches() {
  const index_t share = options_.batch_size / layout_.data_parallel;
  const index_t micros = share / micro_batch_;
  batches_.reset();  // its threads and memory first
  batches_ = std::make_unique<BatchStream>(
      *training_,
      [this, micros, begin = state_.samples + share * mesh_->dp_rank(),
       left = total_steps_ - state_.step](index_t batch) -> std::optional<BatchRequest> {
        const index_t step = batch / micros;
        if (step >= left) return std::nullopt;
        return BatchRequest{
            .first_sample = begin + step * options_.batch_size + batch % micros * micro_batch_,
            .count = micro_batch_};
      },
      PrefetchOptions{.workers = options_.workers, .depth = 2 * static_cast<int>(micros) + 2});
}

}  // namespace regroup
