#include "trainer/run/training_run.h"

#include <array>
#include <chrono>
#include <cmath>
#include <limits>

#include <fmt/ranges.h>

#include "kernels/base/file.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/matmul_peak.h"
#include "trainer/checkpoint/sharded_io.h"
#include "trainer/conversion/regroup.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/optimizer/adamw.h"
#include "trainer/run/evaluation.h"
#include "trainer/run/model_options.h"

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
  decide_start();
  decide_layout();
}

void TrainingRun::decide_start() {
  resumed_ = checkpoints_.latest();
  if (resumed_) {
    checkpoints_.verify(*resumed_);
    const std::filesystem::path directory = checkpoints_.path_of(*resumed_);
    world_.run_together([&] {
      const std::filesystem::path file = directory / "config.json";
      config_ = model_config_from_json(read_text(file, 1 << 20), file.string());
    });
    state_ = run_state_from_json(checkpoints_.state(*resumed_), (directory / "trainer.json").string());
  } else if (uptraining()) {
    parent_ = find_checkpoint(world_, options_.init_from);
    const bool known = parent_->state.has_value();
    state_.step = known ? parent_->state->step : options_.parent_steps;
    state_.samples = known ? parent_->state->samples : 0;
    state_.first_step = state_.step;
    state_.parent = parent_->directory.string();
  }
  state_.parent_loss = resumed_ ? state_.parent_loss : kUnknown;
  state_.converted_loss = resumed_ ? state_.converted_loss : kUnknown;
  world_.run_together([&] {
    if (uptraining()) {
      config_ = uptrained_config(options_, parent_ ? parent_->config : config_);
      if (parent_) validate_conversion(parent_->config, config_);
    } else {
      config_ = pretrained_config(options_, corpus_->vocab_size());
    }
    require_same_vocabulary(config_, *corpus_);
    total_steps_ =
        uptraining()
            ? state_.first_step +
                  std::max<index_t>(1, std::llround(options_.alpha * static_cast<double>(state_.first_step)))
            : options_.steps;
    schedule_ = schedule_of(options_, total_steps_);
    if (resumed_) require_same_identity(state_.identity, identity(), options_.run.string());
    state_.identity = identity();
    training_.emplace(*corpus_, Split::kTrain, training_samples(options_));
    heldout_.emplace(*corpus_, Split::kHeldout, heldout_samples(options_));
  });
}

void TrainingRun::decide_layout() {
  world_.run_together([&] {
    layout_ = complete_layout(options_.layout, world_.size());
    validate_tensor_parallel(config_, layout_.tensor_parallel);
    if (parent_) validate_tensor_parallel(parent_->config, layout_.tensor_parallel);
    micro_batch_ = micro_batch_of(options_, layout_.data_parallel);
  });
}

nlohmann::ordered_json TrainingRun::identity() const {
  nlohmann::ordered_json all = {{"mode", uptraining() ? "uptrain" : "pretrain"},
                                {"model", nlohmann::ordered_json::parse(to_json(config_))},
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
  if (uptraining()) all["pooling"] = options_.pooling;
  const bool ends = schedule_.kind == Schedule::Kind::kLinear || schedule_.kind == Schedule::Kind::kCosine;
  if (ends) all["steps"] = total_steps_;
  return all;
}

void TrainingRun::build() {
  const int threads = threads_of(options_.threads, world_.split_by_host().size());
  backend_ = std::make_unique<CpuBackend>(threads);
  std::vector<index_t> groups = {config_.kv_groups, config_.encoder_kv_groups};
  if (parent_) groups.insert(groups.end(), {parent_->config.kv_groups, parent_->config.encoder_kv_groups});
  mesh_ = std::make_unique<Mesh>(world_, layout_, groups);
  runner_ = std::make_unique<ModelRunner>(*backend_, *mesh_, config_,
                                          runner_options(options_, *training_, micro_batch_, true));
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
      "{} parameters; {} ranks = {} data-parallel x {} tensor-parallel, {} threads each, micro-batches of "
      "{}; "
      "{:.2f} GB a rank for activations, {:.2f} GB for optimizer state",
      format_count(parameter_count(config_)), world_.size(), layout_.data_parallel, layout_.tensor_parallel,
      threads, micro_batch_, static_cast<double>(runner_->arena_bytes()) * 1e-9,
      static_cast<double>(optimizer_->state_bytes()) * 1e-9);
}

void TrainingRun::load() {
  const std::filesystem::path directory = checkpoints_.path_of(*resumed_);
  world_.run_together([&] {
    const auto read_all = [&directory](const std::string& stem, const std::vector<ShardedTensor>& tensors) {
      const CheckpointReader reader(directory, stem);
      reader.require(tensors);
      for (const ShardedTensor& tensor : tensors) reader.read(tensor);
    };
    read_all("model", sharded_parameters(runner_->parameters()));
    read_all("optimizer", optimizer_->state());
  });
  runner_->parameters().refresh_weights();
  log_.info("resuming {} at step {}", options_.run.string(), state_.step);
}

void TrainingRun::convert_parent() {
  {
    ModelRunner original(*backend_, *mesh_, parent_->config,
                         runner_options(options_, *training_, micro_batch_, false));
    world_.run_together([&] {
      load_converted(CheckpointReader(parent_->directory), parent_->config, parent_->config,
                     sharded_parameters(original.parameters()));
    });
    original.parameters().refresh_weights();
    state_.parent_loss = held_out_loss(original);
  }
  world_.run_together([&] {
    load_converted(CheckpointReader(parent_->directory), parent_->config, config_,
                   sharded_parameters(runner_->parameters()),
                   {.pooling = pooling_from_string(options_.pooling), .seed = options_.seed});
  });
  runner_->parameters().refresh_weights();
  state_.converted_loss = held_out_loss(*runner_);
  const auto report = [this](const char* name, double loss) {
    if (reporter_) reporter_->evaluation({.step = state_.step, .name = name, .loss = loss});
  };
  report("parent", state_.parent_loss);
  report("converted", state_.converted_loss);
  log_.info("held-out loss: parent ({} groups) {:.4f}, converted by {} to {} groups {:.4f} ({:+.4f})",
            parent_->config.kv_groups, state_.parent_loss, options_.pooling, config_.kv_groups,
            state_.converted_loss, state_.converted_loss - state_.parent_loss);
}

double TrainingRun::held_out_loss(ModelRunner& runner) {
  return regroup::evaluate(runner, *mesh_, *heldout_, options_.evaluation_samples, micro_batch_).mean();
}

void TrainingRun::evaluate(std::string name) {
  const LossSums sums =
      regroup::evaluate(*runner_, *mesh_, *heldout_, options_.evaluation_samples, micro_batch_);
  if (reporter_) {
    reporter_->end_line();
    reporter_->evaluation({.step = state_.step,
                           .name = std::move(name),
                           .loss = sums.mean(),
                           .tokens = static_cast<std::int64_t>(sums.targets)});
  }
  log_.info("step {}: held-out loss {:.4f} over {} targets", state_.step, sums.mean(),
            format_count(static_cast<std::int64_t>(sums.targets)));
}

void TrainingRun::save() {
  PendingStep pending = checkpoints_.begin(state_.step);
  pending.write_text("config.json", to_json(config_));
  pending.copy_file("tokenizer.model", corpus_->tokenizer_file());
  const bool writes = mesh_->dp_rank() == 0;
  write_tensors(world_, pending.path(), "model", sharded_parameters(runner_->parameters()), writes);
  write_tensors(world_, pending.path(), "optimizer", optimizer_->state(), writes);
  pending.commit(to_json(state_));
  checkpoints_.prune(options_.keep_last, options_.keep_every);
}

void TrainingRun::train_step() {
  const double begin = seconds_now();
  const double waited_before = batches_->wait_seconds();
  std::array<double, 2> agreed = {0, signals_.received() ? 1.0 : 0.0};
  for (Batch& micro : micro_batches_) {
    micro = *batches_->next();
    for (const std::int32_t target : micro.targets) agreed[0] += target != 0 && mesh_->tp_rank() == 0 ? 1 : 0;
  }
  world_.all_reduce(agreed, ReduceOp::kSum);
  if (agreed[1] > 0) {
    stop_requested_ = true;
    return;
  }
  runner_->clear_gradients();
  const index_t first = options_.batch_size / layout_.data_parallel * mesh_->dp_rank();
  for (std::size_t m = 0; m < micro_batches_.size(); ++m) {
    runner_->train(micro_batches_[m],
                   {.seed = options_.seed,
                    .step = state_.step,
                    .first_sample = first + static_cast<index_t>(m) * micro_batch_},
                   1 / agreed[0]);
  }
  const LossSums sums = runner_->take_losses();
  if (!std::isfinite(sums.cross_entropy)) {
    UserError error(
        "the loss is {} at step {}; the last checkpoint is intact: resume with a smaller --learning-rate, or "
        "--precision fp32",
        sums.cross_entropy, state_.step + 1);
    error.set_on_every_rank();  // the sum over ranks is the same on all of them
    throw error;
  }
  runner_->synchronise_gradients();
  const double rate = learning_rate(schedule_, state_.step);
  const double norm = optimizer_->update(state_.step, rate);
  state_.step += 1;
  state_.samples += options_.batch_size;
  const double seconds = seconds_now() - begin;
  const SpanLengths& lengths = training_->lengths();
  const auto tokens = static_cast<double>(options_.batch_size * (options_.inputs_length + lengths.targets));
  if (!reporter_) return;
  reporter_->step({.step = state_.step,
                   .total_steps = total_steps_,
                   .loss = sums.mean(),
                   .z_loss = sums.z_loss / sums.targets,
                   .learning_rate = rate,
                   .gradient_norm = norm,
                   .tokens_per_second = tokens / seconds,
                   .share_of_peak = flops_per_step_ / seconds / peak_flops_,
                   .data_wait_share = (batches_->wait_seconds() - waited_before) / seconds,
                   .seconds_per_step = seconds,
                   .samples = state_.samples});
}

int TrainingRun::run() {
  if (resumed_ && state_.step >= total_steps_) {
    log_.info("{} is complete: {} steps are done", options_.run.string(), state_.step);
    return 0;
  }
  world_.run_on(0, [&] { regroup::create_directories(options_.run / "tensorboard"); });
  checkpoints_.prepare();
  build();
  world_.run_on(0, [&] {
    reporter_ = std::make_unique<RunReporter>(options_.run, resumed_, options_.progress_every);
    write_text(options_.run / "resolved.cfg", resolved_config(options_));
  });
  if (resumed_) {
    load();
  } else if (parent_) {
    convert_parent();
  } else {
    runner_->parameters().initialise(options_.seed);
    const double unigram =
        unigram_loss(*training_, *heldout_, options_.evaluation_samples * 8, config_.vocab_size);
    if (reporter_) reporter_->evaluation({.step = 0, .name = "unigram", .loss = unigram});
    log_.info("held-out loss of token frequencies alone: {:.4f}", unigram);
  }
  std::array<double, 1> peak = {measure_matmul_peak(*backend_, runner_->parameters().compute_dtype())};
  world_.all_reduce(peak, ReduceOp::kSum);
  peak_flops_ = peak[0];
  micro_batches_.resize(static_cast<std::size_t>(options_.batch_size / layout_.data_parallel / micro_batch_));
  const auto micros = static_cast<index_t>(micro_batches_.size());
  flops_per_step_ = runner_->flops() * static_cast<double>(micros * world_.size());
  log_.info("matmul peak of all ranks, measured: {:.0f} GFLOP/s ({})", peak_flops_ * 1e-9,
            options_.precision);
  batches_ = std::make_unique<BatchStream>(
      *training_,
      [this, micros, begin = state_.samples, left = total_steps_ - state_.step](index_t batch) {
        const index_t step = batch / micros;
        const index_t offset = options_.batch_size / layout_.data_parallel * mesh_->dp_rank();
        const BatchRequest request{
            .first_sample = begin + step * options_.batch_size + offset + batch % micros * micro_batch_,
            .count = micro_batch_};
        return step < left ? std::optional(request) : std::nullopt;
      },
      PrefetchOptions{.workers = options_.workers, .depth = 2 * static_cast<int>(micros) + 2});
  while (state_.step < total_steps_) {
    train_step();
    if (stop_requested_) {
      if (reporter_) reporter_->end_line();
      if (checkpoints_.latest() != state_.step) save();
      log_.info("stopped by a signal; saved at step {}. The same command resumes", state_.step);
      return kStoppedBySignal;
    }
    const bool last = state_.step == total_steps_;
    if (last || (options_.evaluate_every > 0 && steps_done() % options_.evaluate_every == 0))
      evaluate("held-out");
    if (last || steps_done() % options_.save_every == 0) save();
  }
  world_.run_on(0, [&] { reporter_->plot(); });
  log_.info("done: checkpoints, metrics.jsonl, loss.svg and TensorBoard files are in {}",
            options_.run.string());
  return 0;
}

}  // namespace regroup
