#include "trainer/run/training_run.h"

#include <array>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>

#include "kernels/base/file.h"
#include "kernels/matmul_peak.h"
#include "trainer/checkpoint/checkpoint_reader.h"
#include "trainer/conversion/regroup.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/optimizer/adamw.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/host_tensors.h"
#include "trainer/run/model_options.h"
#include "trainer/run/rank_device.h"

namespace regroup {
namespace {

constexpr double kUnknown = std::numeric_limits<double>::quiet_NaN();

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

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
  if (source_ && !source_->state) {
    log_.info("{} does not say how long it was trained: parent-steps = {} is assumed", state_.parent,
              options_.parent_steps);
  }
}

void TrainingRun::choose_start() {
  find_start();
  world_.run_together([&] { decide(); });
  if (source_ && !resuming()) verify_checkpoint(world_, *source_);
}

// The newest checkpoint whose every byte is intact, or the beginning. What is damaged is set aside on the
// way.
void TrainingRun::find_start() {
  source_.reset();
  state_ = RunState();
  while ((resumed_step_ = directory_.newest())) {
    const std::filesystem::path newest = directory_.checkpoints().path_of(*resumed_step_);
    const std::optional<std::string> damage = find_damage(world_, newest);
    if (!damage) {
      source_ = find_checkpoint(world_, newest);
      state_ = source_->state.value();
      return;
    }
    directory_.set_aside(*resumed_step_, *damage);
  }
  state_.parent_loss = state_.converted_loss = kUnknown;
  if (!uptraining()) return;
  source_ = find_checkpoint(world_, options_.init_from);
  state_.first_step = source_->state ? source_->state->step : options_.parent_steps;
  state_.step = state_.first_step;
  state_.samples = source_->state ? source_->state->samples : 0;
  state_.parent = source_->directory.string();
}

// What the run is, from options and where it starts; refuses what cannot work. The same on every rank.
void TrainingRun::decide() {
  if (source_ && source_->state) inherit(options_, source_->state->identity);
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
  const nlohmann::json identity =
      run_identity(options_, config_, *corpus_,
                   {.schedule = schedule_, .total_steps = total_steps_, .first_step = state_.first_step});
  if (resuming()) require_same_identity(state_.identity, identity, options_.run.string());
  state_.identity = identity;
  if (source_) require_same_vocabulary(*source_, *corpus_);
  training_.emplace(*corpus_, Split::kTrain, training_samples(options_));
  heldout_.emplace(*corpus_, Split::kHeldout, heldout_samples(options_));
  layout_ = complete_layout(options_.layout, world_.size());
  validate_tensor_parallel(config_, layout_.tensor_parallel);
  if (source_) validate_tensor_parallel(source_->config, layout_.tensor_parallel);
  micro_batch_ = micro_batch_of(options_, layout_.data_parallel);
}

// Before the run's own model takes its memory.
void TrainingRun::evaluate_parent() {
  ModelRunner parent(*backend_, *mesh_, source_->config,
                     runner_options(options_, *training_, micro_batch_, /*train=*/false));
  load_weights(world_, *source_, parent);
  state_.parent_loss = held_out(parent).mean();
}

void TrainingRun::build() {
  runner_ = std::make_unique<ModelRunner>(*backend_, *mesh_, config_,
                                          runner_options(options_, *training_, micro_batch_, /*train=*/true));
  const index_t offset = state_.first_step;
  if (options_.optimizer == "adamw") {
    optimizer_ = std::make_unique<AdamW>(*backend_, runner_->parameters(), *mesh_,
                                         AdamW::Options{.step_offset = offset,
                                                        .weight_decay = options_.weight_decay,
                                                        .scale_by_rms = options_.scale_by_rms,
                                                        .max_gradient_norm = options_.max_gradient_norm});
  } else {
    optimizer_ = std::make_unique<Adafactor>(
        *backend_, runner_->parameters(), *mesh_,
        Adafactor::Options{.step_offset = offset, .max_gradient_norm = options_.max_gradient_norm});
  }
  saver_ = std::make_unique<RunSaver>(
      world_, layout_, *backend_, directory_.checkpoints(),
      std::vector<TensorSet>{{.stem = "model", .tensors = sharded_parameters(runner_->parameters())},
                             {.stem = "optimizer", .tensors = optimizer_->state()}},
      options_, [this](const SavedStep& step) { saved(step); });
  log_.info(
      "{} parameters; {} ranks = {} data-parallel x {} tensor-parallel, micro-batches of {}; {:.2f} GB a "
      "rank for activations, {:.2f} GB for optimizer state, {:.2f} GB of host memory for saving",
      format_count(parameter_count(config_)), world_.size(), layout_.data_parallel, layout_.tensor_parallel,
      micro_batch_, static_cast<double>(runner_->arena_bytes()) * 1e-9,
      static_cast<double>(optimizer_->state_bytes()) * 1e-9, saver_->staging_gigabytes());
}

void TrainingRun::load() {
  world_.run_together([&] {
    const auto read_all = [this](const std::string& stem, const std::vector<ShardedTensor>& tensors) {
      const CheckpointReader reader(source_->directory, stem);
      reader.require(tensors);
      fill_from_host(*backend_, tensors, [&](const ShardedTensor& tensor) {
        world_.heartbeat().beat("loading a checkpoint");
        reader.read(tensor);
      });
    };
    read_all("model", sharded_parameters(runner_->parameters()));
    read_all("optimizer", optimizer_->state());
  });
  runner_->parameters().refresh_weights();
  log_.info("resuming {} at step {}", options_.run.string(), state_.step);
}

void TrainingRun::convert_parent() {
  load_weights(world_, *source_, *runner_,
               {.pooling = pooling_from_string(options_.pooling), .seed = options_.seed});
  state_.converted_loss = held_out(*runner_).mean();
  if (reporter_) {
    reporter_->evaluation({.step = state_.step, .name = "parent", .loss = state_.parent_loss});
    reporter_->evaluation({.step = state_.step, .name = "converted", .loss = state_.converted_loss});
  }
  log_.info("held-out loss: parent ({} groups) {:.4f}, converted by {} to {} groups {:.4f} ({:+.4f})",
            source_->config.kv_groups, state_.parent_loss, options_.pooling, config_.kv_groups,
            state_.converted_loss, state_.converted_loss - state_.parent_loss);
}

LossSums TrainingRun::held_out(ModelRunner& runner) {
  return regroup::evaluate(runner, *mesh_, *heldout_, options_.evaluation_samples, micro_batch_);
}

void TrainingRun::evaluate() {
  const LossSums sums = held_out(*runner_);
  const auto targets = static_cast<std::int64_t>(sums.targets);
  if (reporter_) {
    reporter_->end_line();
    reporter_->evaluation({.step = state_.step, .name = "held-out", .loss = sums.mean(), .tokens = targets});
  }
  log_.info("step {}: held-out loss {:.4f} over {} targets", state_.step, sums.mean(), format_count(targets));
}

// What this rank's device chose by measuring: a run that goes on with the same choices gives the same bits.
std::filesystem::path TrainingRun::tuning_file() const {
  return options_.run / "tuning" / fmt::format("rank-{:05}.json", world_.rank());
}

void TrainingRun::take_up_tuning() {
  world_.run_together([this] {
    if (std::filesystem::exists(tuning_file())) backend_->set_tuning(read_text(tuning_file()));
  });
}

void TrainingRun::keep_tuning() {
  world_.run_together([this] {
    const std::string text = backend_->tuning();
    if (text.empty() || text == kept_tuning_) return;
    regroup::create_directories(tuning_file().parent_path());
    write_text(tuning_file(), text);
    kept_tuning_ = text;
  });
}

void TrainingRun::save() {
  world_.heartbeat().beat("saving a checkpoint");
  keep_tuning();
  std::map<std::string, std::string> texts;
  world_.run_on(0, [&] {
    texts = {{"config.json", to_json(config_)}, {"tokenizer.model", read_text(corpus_->tokenizer_file())}};
  });
  saver_->save(state_.step, to_json(state_), texts);
}

void TrainingRun::saved(const SavedStep& saved) {
  rollbacks_ = 0;
  if (reporter_) reporter_->end_line();
  if (!saved.complaint.empty()) log_.warning("{}: it stays; what is saved is whole", saved.complaint);
  log_.info("step {}: saved {:.2f} GB in {:.1f} s", saved.step, saved.gigabytes, saved.seconds);
  if (!reporter_) return;
  reporter_->event(
      {.step = saved.step,
       .name = "checkpoint",
       .detail = fmt::format("{:.3f} s, training waited {:.3f} s", saved.seconds, saved.waited)});
}

void TrainingRun::note(const std::string& event, const std::string& detail) {
  if (!reporter_) return;
  reporter_->end_line();
  reporter_->event({.step = state_.step, .name = event, .detail = detail});
}

void TrainingRun::train_step() {
  const double began = seconds_now();
  const double waited = batches_->wait_seconds();
  world_.heartbeat().set_step(state_.step);
  world_.heartbeat().beat("reading a batch");
  // One small sum over all ranks: the number of targets, and which ranks were asked to stop, have no batch,
  // still write the last checkpoint, or failed to.
  enum : std::size_t { kTargets, kStop, kWithoutBatch, kSaving, kSaveFailed, kSums };
  std::array<double, kSums> agreed{};
  if (signals_.received() || (world_.rank() == 0 && directory_.stop_requested())) agreed[kStop] = 1;
  if (saver_->busy()) agreed[kSaving] = 1;
  if (saver_->failed()) agreed[kSaveFailed] = 1;
  std::exception_ptr failure;
  try {
    for (Batch& micro : micro_batches_) {
      micro = *batches_->next();
      for (const std::int32_t target : micro.targets)
        agreed[kTargets] += target != 0 && mesh_->tp_rank() == 0 ? 1 : 0;
    }
  } catch (...) {
    failure = std::current_exception();
    agreed[kWithoutBatch] = 1;
  }
  world_.all_reduce(agreed, ReduceOp::kSum);
  if (agreed[kWithoutBatch] > 0) {
    world_.run_together([&failure] {
      if (failure) std::rethrow_exception(failure);
    });
  }
  if (agreed[kSaving] == 0 || agreed[kSaveFailed] > 0) saver_->proceed(agreed[kSaveFailed] > 0);
  stop_requested_ = agreed[kStop] > 0;
  if (stop_requested_) return;
  update(forward_and_backward(agreed[kTargets]), began, waited);
}

LossSums TrainingRun::forward_and_backward(double targets) {
  runner_->clear_gradients();
  const index_t first = options_.batch_size / layout_.data_parallel * mesh_->dp_rank();
  for (std::size_t m = 0; m < micro_batches_.size(); ++m) {
    runner_->train(micro_batches_[m],
                   {.seed = options_.seed,
                    .step = state_.step,
                    .first_sample = first + static_cast<index_t>(m) * micro_batch_},
                   1 / targets, /*last=*/m + 1 == micro_batches_.size());
  }
  runner_->synchronise_gradients();  // issued before the losses are waited for
  return runner_->take_losses();
}

void TrainingRun::update(const LossSums& sums, double began, double waited) {
  world_.heartbeat().beat("updating the weights");
  const double rate = learning_rate(schedule_, state_.step);
  const double threshold = options_.spike_threshold;
  const double loss = (sums.cross_entropy + sums.z_loss) / sums.targets;
  double norm = kUnknown;
  std::optional<std::string> reason = state_.divergence.judge_loss(loss, threshold);
  if (!reason) {
    norm = optimizer_->update(state_.step, rate, state_.divergence.largest_norm(threshold));
    reason = state_.divergence.judge_norm(norm, threshold);
  }
  if (reason) {
    diverged(*reason);
    return;
  }
  state_.divergence.accept(loss, norm);
  state_.step += 1;
  state_.samples += options_.batch_size;
  if (!reporter_) return;
  const double seconds = seconds_now() - began;
  peak_flops_ = std::max(peak_flops_, flops_per_step_ / seconds);
  const auto tokens =
      static_cast<double>(options_.batch_size * (options_.inputs_length + training_->lengths().targets));
  reporter_->step({.step = state_.step,
                   .total_steps = total_steps_,
                   .loss = sums.mean(),
                   .z_loss = sums.z_loss / sums.targets,
                   .learning_rate = rate,
                   .gradient_norm = norm,
                   .tokens_per_second = tokens / seconds,
                   .share_of_peak = flops_per_step_ / seconds / peak_flops_,
                   .data_wait_share = (batches_->wait_seconds() - waited) / seconds,
                   .seconds_per_step = seconds,
                   .samples = state_.samples});
}

// A step that must not be taken: nothing of it is in the weights. `reason` comes from sums over ranks and is
// the same on all of them.
void TrainingRun::diverged(const std::string& reason) {
  state_.divergence.reject();
  const std::string what = fmt::format("{} at step {}", reason, state_.step + 1);
  const bool hopeless = state_.divergence.hopeless();
  if (options_.on_divergence == "rollback" && !hopeless) return roll_back(what);
  if (options_.on_divergence == "stop" || hopeless) {
    saver_->finish();
    UserError error(
        "{}{}: nothing of this step was kept, and the last checkpoint is intact. Resume with --on-divergence "
        "skip "
        "or rollback, or start another --run with a smaller --learning-rate, --max-gradient-norm 1 or "
        "--precision "
        "fp32",
        what,
        hopeless ? fmt::format(", as were the {} before it", state_.divergence.rejected_in_a_row() - 1) : "");
    error.set_on_every_rank();
    throw error;
  }
  state_.step += 1;
  state_.samples += options_.batch_size;
  note("skip", what);
  log_.info("{}: its update is left out", what);
}

// Goes back to the last checkpoint and on from there with the samples after the bad ones.
void TrainingRun::roll_back(const std::string& reason) {
  constexpr index_t kMostRollbacks = 5;
  saver_->finish();
  const std::optional<index_t> step = directory_.checkpoints().latest();
  if (!step || ++rollbacks_ > kMostRollbacks) {
    UserError error(
        "{}, and {}: the run cannot roll back", reason,
        step ? fmt::format("{} times before since step {}", kMostRollbacks, *step) : "nothing is saved yet");
    error.set_on_every_rank();
    throw error;
  }
  const index_t samples = state_.samples + options_.batch_size;
  const std::filesystem::path newest = directory_.checkpoints().path_of(*step);
  if (const auto damage = find_damage(world_, newest)) {
    SystemError error("{}, and {}: start again, from the checkpoint before", reason, *damage);
    error.set_on_every_rank();
    throw error;
  }
  source_ = find_checkpoint(world_, newest);
  state_ = source_->state.value();
  resumed_step_ = *step;
  state_.samples = samples;
  world_.run_on(0, [&] {
    reporter_->end_line();
    reporter_ = std::make_unique<RunReporter>(options_.run, resumed_step_, options_.progress_every);
  });
  load();
  make_batches();
  note("rollback", reason);
  log_.info("{}: back to step {}, without the samples up to {}", reason, *step, samples);
}

// Everything up to the first step: memory, weights, data, yardstick.
void TrainingRun::start() {
  RankDevice device = open_device(options_, world_, log_);
  backend_ = std::move(device.backend);
  if (resuming()) take_up_tuning();
  std::vector<index_t> groups = {config_.kv_groups, config_.encoder_kv_groups};
  if (source_) groups.insert(groups.end(), {source_->config.kv_groups, source_->config.encoder_kv_groups});
  mesh_ = std::make_unique<Mesh>(world_, layout_, groups, device.communicators);
  if (!backend_->host_accessible()) log_links(*backend_, *mesh_, log_);
  // Before the model takes its memory.
  std::array<double, 1> peak = {measure_matmul_peak(*backend_, compute_dtype(options_))};
  world_.all_reduce(peak, ReduceOp::kSum);
  peak_flops_ = peak[0];
  log_.info("matmul peak of all ranks ({}, {}), measured: {:.0f} GFLOP/s", backend_->describe(),
            options_.precision, peak_flops_ * 1e-9);
  const bool converts = uptraining() && !resuming();
  if (converts) evaluate_parent();
  build();
  world_.run_on(0, [&] {
    reporter_ = std::make_unique<RunReporter>(options_.run, resumed_step_, options_.progress_every);
    reporter_->event({.step = state_.step, .name = resuming() ? "resume" : "start", .detail = state_.parent});
    write_text(options_.run / "resolved.cfg", resolved_config(options_));
  });
  if (resuming()) {
    load();
  } else if (converts) {
    convert_parent();
  } else {
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

int TrainingRun::stop() {
  saver_->finish();
  note("stop", "asked to");
  if (directory_.checkpoints().latest() != state_.step) save();
  saver_->finish();
  const bool by_file = directory_.clear_stop_request();
  log_.info("stopped by {}; saved at step {}. The same command resumes",
            by_file ? "the stop file" : "a signal", state_.step);
  return kStopped;
}

int TrainingRun::run() {
  const auto draw = [&] { world_.run_on(0, [&] { plot_run(options_.run); }); };
  directory_.take();
  if (directory_.newest() != resumed_step_) choose_start();  // another job had the run until now
  watchdog_.use_board(world_, options_.run);
  if (resuming() && state_.step >= total_steps_) {
    log_.info("{} is complete: {} steps are done", options_.run.string(), state_.step);
    draw();
    return 0;
  }
  if (!directory_.count_start(resumed_step_.value_or(-1), options_.restart_budget)) {
    if (world_.rank() == 0) {
      log_.error(
          "the last {} starts of {} came to no new checkpoint after step {}: the lines above and the metrics "
          "say "
          "why each ended. Put it right; then --restart-budget 0 starts it anyway",
          options_.restart_budget, options_.run.string(), state_.step);
    }
    return kNoProgress;
  }
  start();
  while (state_.step < total_steps_) {
    const index_t before = state_.step;
    train_step();
    if (stop_requested_) return stop();
    if (state_.step <= before) continue;  // rolled back
    const bool last = state_.step == total_steps_;
    const bool evaluates = options_.evaluate_every > 0 && state_.step % options_.evaluate_every == 0;
    if (last || evaluates) evaluate();
    if (last || state_.step % options_.save_every == 0) save();
  }
  saver_->finish();
  draw();
  log_.info("done: checkpoints, metrics.jsonl, loss.svg and TensorBoard files are in {}",
            options_.run.string());
  return 0;
}

}  // namespace regroup
