#include "trainer/run/training_run.h"

#include <array>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>

#include "kernels/matmul_peak.h"
#include "trainer/checkpoint/sharded_io.h"
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
    : options_(options), world_(world), log_(log), checkpoints_(world, options.run) {
  world_.run_together([&] { corpus_.emplace(options_.corpus); });
  find_start();
  world_.run_together([&] { decide(); });
  if (source_) verify_checkpoint(world_, *source_);
  if (options_.verify_corpus) {
    world_.run_together([&] { corpus_->verify(world_.rank(), world_.size()); });
  }
  if (source_ && !source_->state) {
    log_.info("{} does not say how long it was trained: parent-steps = {} is assumed", state_.parent,
              options_.parent_steps);
  }
}

void TrainingRun::find_start() {
  resumed_step_ = checkpoints_.latest();
  if (resuming()) {
    source_ = find_checkpoint(world_, options_.run);
    state_ = source_->state.value();
    return;
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
  if (resuming()) require_same_identity(state_.identity, identity(), options_.run.string());
  state_.identity = identity();
  if (source_) require_same_vocabulary(*source_, *corpus_);
  training_.emplace(*corpus_, Split::kTrain, training_samples(options_));
  heldout_.emplace(*corpus_, Split::kHeldout, heldout_samples(options_));
  layout_ = complete_layout(options_.layout, world_.size());
  validate_tensor_parallel(config_, layout_.tensor_parallel);
  if (source_) validate_tensor_parallel(source_->config, layout_.tensor_parallel);
  micro_batch_ = micro_batch_of(options_, layout_.data_parallel);
}

nlohmann::json TrainingRun::identity() const {
  nlohmann::json all = {{"mode", uptraining() ? "uptrain" : "pretrain"},
                        {"model", nlohmann::json::parse(to_json(config_))},
                        {"seed", options_.seed},
                        {"corpus", fmt::format("{:016x}", corpus_->fingerprint())},
                        {"inputs-length", options_.inputs_length},
                        {"noise-density", options_.noise_density},
                        {"mean-span", options_.mean_span},
                        {"batch-size", options_.batch_size},
                        {"precision", options_.precision},
                        {"optimizer", options_.optimizer},
                        {"schedule", options_.schedule},
                        {"learning-rate", schedule_.base},
                        {"warmup", options_.warmup},
                        {"weight-decay", options_.weight_decay},
                        {"scale-by-rms", options_.scale_by_rms},
                        {"max-gradient-norm", options_.max_gradient_norm},
                        {"z-loss", options_.z_loss}};
  if (uptraining()) {
    all["init-from"] = options_.init_from.string();
    all["parent-steps"] = state_.first_step;
    all["pooling"] = options_.pooling;
  }
  const bool ends = schedule_.kind == Schedule::Kind::kLinear || schedule_.kind == Schedule::Kind::kCosine;
  if (ends) all["steps"] = total_steps_;
  return all;
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
  log_.info(
      "{} parameters; {} ranks = {} data-parallel x {} tensor-parallel, micro-batches of {}; {:.2f} GB a "
      "rank for activations, {:.2f} GB for optimizer state",
      format_count(parameter_count(config_)), world_.size(), layout_.data_parallel, layout_.tensor_parallel,
      micro_batch_, static_cast<double>(runner_->arena_bytes()) * 1e-9,
      static_cast<double>(optimizer_->state_bytes()) * 1e-9);
}

void TrainingRun::load() {
  world_.run_together([&] {
    const auto read_all = [this](const std::string& stem, const std::vector<ShardedTensor>& tensors) {
      const CheckpointReader reader(source_->directory, stem);
      reader.require(tensors);
      fill_from_host(*backend_, tensors, [&](const ShardedTensor& tensor) { reader.read(tensor); });
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
    if (text.empty()) return;
    regroup::create_directories(tuning_file().parent_path());
    write_text(tuning_file(), text);
  });
}

void TrainingRun::save() {
  keep_tuning();
  PendingStep pending = checkpoints_.begin(state_.step);
  pending.write_text("config.json", to_json(config_));
  pending.copy_file("tokenizer.model", corpus_->tokenizer_file());
  const bool writes = mesh_->dp_rank() == 0;
  const auto write_all = [&](const std::string& stem, std::vector<ShardedTensor> tensors) {
    if (!writes) {
      write_tensors(world_, pending.path(), stem, tensors, writes);
      return;
    }
    const HostCopies copies(*backend_, std::move(tensors));
    write_tensors(world_, pending.path(), stem, copies.tensors(), writes);
  };
  write_all("model", sharded_parameters(runner_->parameters()));
  write_all("optimizer", optimizer_->state());
  pending.commit(to_json(state_));
  checkpoints_.prune(options_.keep_last, options_.keep_every);
}

void TrainingRun::train_step() {
  const double began = seconds_now();
  const double waited = batches_->wait_seconds();
  // One small sum over all ranks: the number of targets, whether any rank got a signal, or has no batch.
  std::array<double, 3> agreed = {0, signals_.received() ? 1.0 : 0.0, 0};
  std::exception_ptr failure;
  try {
    for (Batch& micro : micro_batches_) {
      micro = *batches_->next();
      for (const std::int32_t target : micro.targets)
        agreed[0] += target != 0 && mesh_->tp_rank() == 0 ? 1 : 0;
    }
  } catch (...) {
    failure = std::current_exception();
    agreed[2] = 1;
  }
  world_.all_reduce(agreed, ReduceOp::kSum);
  if (agreed[2] > 0) {
    world_.run_together([&failure] {
      if (failure) std::rethrow_exception(failure);
    });
  }
  stop_requested_ = agreed[1] > 0;
  if (stop_requested_) return;
  runner_->clear_gradients();
  const index_t first = options_.batch_size / layout_.data_parallel * mesh_->dp_rank();
  for (std::size_t m = 0; m < micro_batches_.size(); ++m) {
    runner_->train(micro_batches_[m],
                   {.seed = options_.seed,
                    .step = state_.step,
                    .first_sample = first + static_cast<index_t>(m) * micro_batch_},
                   1 / agreed[0], /*last=*/m + 1 == micro_batches_.size());
  }
  runner_->synchronise_gradients();  // issued before the losses are waited for
  const LossSums sums = runner_->take_losses();
  update(sums, began, waited);
}

void TrainingRun::update(const LossSums& sums, double began, double waited) {
  const double rate = learning_rate(schedule_, state_.step);
  const double loss = sums.cross_entropy + sums.z_loss;
  const double norm = std::isfinite(loss) ? optimizer_->update(state_.step, rate) : kUnknown;
  if (!std::isfinite(norm)) {
    UserError error(
        "the loss is {} and the gradient's norm {} at step {}: nothing of this step was kept, and the last "
        "checkpoint is intact. Start another --run with a smaller --learning-rate, --max-gradient-norm 1 or "
        "--precision fp32",
        loss / sums.targets, norm, state_.step + 1);
    error.set_on_every_rank();  // loss and norm are sums over ranks, the same on all of them
    throw error;
  }
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
  const index_t share = options_.batch_size / layout_.data_parallel;
  const index_t micros = share / micro_batch_;
  micro_batches_.resize(static_cast<std::size_t>(micros));
  flops_per_step_ = runner_->flops() * static_cast<double>(micros * world_.size());
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
  if (reporter_) {
    reporter_->end_line();
    reporter_->event({.step = state_.step, .name = "stop", .detail = "signal"});
  }
  if (checkpoints_.latest() != state_.step) save();
  log_.info("stopped by a signal; saved at step {}. The same command resumes", state_.step);
  return kStopped;
}

int TrainingRun::run() {
  const auto draw = [&] { world_.run_on(0, [&] { plot_run(options_.run); }); };
  world_.run_on(0, [&] {
    regroup::create_directories(options_.run / "tensorboard");
    lock_ = std::make_unique<FileLock>(options_.run / ".lock");
  });
  checkpoints_.prepare();
  if (resuming() && state_.step >= total_steps_) {
    log_.info("{} is complete: {} steps are done", options_.run.string(), state_.step);
    draw();
    return 0;
  }
  start();
  while (state_.step < total_steps_) {
    train_step();
    if (stop_requested_) return stop();
    const bool last = state_.step == total_steps_;
    const bool evaluates = options_.evaluate_every > 0 && state_.step % options_.evaluate_every == 0;
    if (last || evaluates) evaluate();
    if (last || state_.step % options_.save_every == 0) save();
  }
  draw();
  log_.info("done: checkpoints, metrics.jsonl, loss.svg and TensorBoard files are in {}",
            options_.run.string());
  return 0;
}

}  // namespace regroup
