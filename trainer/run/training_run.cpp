#include "trainer/run/training_run.h"

#include <array>
#include <chrono>
#include <cmath>
#include <exception>
#include <limits>

#include "kernels/base/file.h"
#include "trainer/run/evaluation.h"

namespace regroup {
namespace {

double seconds_now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

LossSums TrainingRun::held_out(ModelRunner& runner) {
  return regroup::evaluate(runner, *mesh_, *heldout_, options_.evaluation_samples, micro_batch_);
}

void TrainingRun::evaluate() {
  const LossSums sums = held_out(*runner_);
  EvaluationMetrics metrics{.step = state_.step,
                            .name = "held-out",
                            .loss = sums.mean(),
                            .tokens = static_cast<std::int64_t>(sums.targets)};
  std::string recovery;
  if (uptraining()) {
    // Rank 0's: all ranks must come to the same decision, and sums over ranks may differ in their last bit.
    std::array<double, 1> share = {world_.rank() == 0 ? recovered_share(gap(), sums.mean()) : 0};
    world_.all_reduce(share, ReduceOp::kSum);
    state_.recovered = share[0];
    state_.recovered_step = state_.step;
    if (std::isfinite(state_.recovered)) {
      metrics.scores["recovered"] = state_.recovered;
      recovery = ", " + describe_recovered(gap(), state_.recovered);
    }
  }
  if (reporter_) {
    reporter_->end_line();
    reporter_->evaluation(metrics);
  }
  log_.info("step {}: held-out loss {:.4f} over {} targets{}", state_.step, sums.mean(),
            format_count(metrics.tokens), recovery);
  if (recovered()) note_recovered();
}

// Before the step is saved, as all that metrics.jsonl says of a step.
void TrainingRun::note_recovered() {
  const auto share_of_parent = [this](index_t step) {
    const auto parent_steps = static_cast<double>(std::max<index_t>(1, state_.first_step));
    return static_cast<double>(step - state_.first_step) / parent_steps;
  };
  const std::string what = fmt::format(
      "{}, {:g} of it was asked for: ends after {} steps, alpha {:.4g} of at most {:.4g}",
      describe_recovered(gap(), state_.recovered), options_.until_recovered, state_.step - state_.first_step,
      share_of_parent(state_.step), share_of_parent(total_steps_));
  note("recovered", what);
  log_.info("step {}: {}", state_.step, what);
}

// False where no share is asked for, and before the first evaluation (NaN).
bool TrainingRun::recovered() const {
  return options_.until_recovered > 0 && state_.recovered >= options_.until_recovered;
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
    texts = taken_along_;
    texts["config.json"] = to_json(config_);
    texts["tokenizer.model"] = read_text(corpus_->tokenizer_file());
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
  StepJudge judge(world_, state_.divergence, options_.spike_threshold);
  if (judge.passes_loss((sums.cross_entropy + sums.z_loss) / sums.targets)) {
    optimizer_->update(state_.step, rate, [&judge](double norm) { return judge.passes_norm(norm); });
  }
  if (judge.problem()) {
    diverged(*judge.problem());
    return;
  }
  state_.divergence.accept(judge.loss(), judge.norm());
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
                   .gradient_norm = judge.norm(),
                   .tokens_per_second = tokens / seconds,
                   .share_of_peak = flops_per_step_ / seconds / peak_flops_,
                   .data_wait_share = (batches_->wait_seconds() - waited) / seconds,
                   .seconds_per_step = seconds,
                   .samples = state_.samples});
}

// A step that must not be taken: nothing of it is in the weights. `reason` is the same on all ranks.
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
  if (reporter_) reporter_->end_line();
  std::optional<std::string> damage = take_up(*step);
  if (!damage) damage = load();
  if (damage) {
    SystemError error("{}, and {}: start again, from the checkpoint before", reason, *damage);
    error.set_on_every_rank();
    throw error;
  }
  state_.samples = samples;
  world_.run_on(0, [&] {
    reporter_ = std::make_unique<RunReporter>(options_.run, resumed_step_, options_.progress_every);
  });
  make_batches();
  note("rollback", reason);
  log_.info("{}: back to step {}, without the samples up to {}", reason, *step, samples);
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

// Whether the checkpoint is that of a run that has ended.
bool TrainingRun::complete() const { return resuming() && (state_.step >= total_steps_ || recovered()); }

void TrainingRun::tell_complete() const {
  if (state_.step >= total_steps_) {
    log_.info("{} is complete: {} steps are done", options_.run.string(), state_.step);
    return;
  }
  log_.info(
      "{} is complete: step {} had {}. To train on, ask for a larger --until-recovered than {:g}, or leave "
      "it "
      "out",
      options_.run.string(), state_.recovered_step, describe_recovered(gap(), state_.recovered),
      options_.until_recovered);
}

int TrainingRun::run() {
  try {
    try {
      return train();
    } catch (...) {
      rethrow_as_error();
    }
  } catch (const UserError& error) {
    if (counted_ && (world_.rank() == 0 || !error.on_every_rank())) directory_.forget_start();
    throw;
  }
}

int TrainingRun::train() {
  const auto draw = [&] { world_.run_on(0, [&] { plot_run(options_.run, options_.until_recovered); }); };
  directory_.take();
  if (directory_.newest() != resumed_step_) choose_start();  // another job had the run until now
  watchdog_.use_board(world_, options_.run);
  do {
    // Nothing else would look at the tensors of a run that has ended.
    while (complete()) {
      if (fall_back(find_damage(world_, source_->directory))) continue;
      tell_complete();
      draw();
      return 0;
    }
    if (!directory_.count_start(resumed_step_.value_or(-1), options_.restart_budget)) {
      if (world_.rank() == 0) {
        log_.error(
            "the last {} starts of {} came to no new checkpoint after step {}: the lines above and the "
            "metrics "
            "say "
            "why each ended. Put it right; then --restart-budget 0 starts it anyway",
            options_.restart_budget, options_.run.string(), state_.step);
      }
      return kNoProgress;
    }
    counted_ = true;
  } while (!start());
  while (state_.step < total_steps_ && !recovered()) {
    const index_t before = state_.step;
    train_step();
    if (stop_requested_) return stop();
    if (state_.step <= before) continue;  // rolled back
    counted_ = false;
    const bool last = state_.step == total_steps_;
    const bool evaluates = options_.evaluate_every > 0 && state_.step % options_.evaluate_every == 0;
    if (last || evaluates) evaluate();
    if (last || recovered() || state_.step % options_.save_every == 0) save();
  }
  saver_->finish();
  draw();
  log_.info("done: checkpoints, metrics.jsonl, loss.svg and TensorBoard files are in {}",
            options_.run.string());
  return 0;
}

}  // namespace regroup
