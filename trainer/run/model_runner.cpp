#include "trainer/run/model_runner.h"

#include <algorithm>
#include <array>

#include "kernels/plan_backend.h"

namespace regroup {
namespace {

constexpr index_t kTokenBytes = size_of(DType::kInt32);

ParameterStore::Options store_options(const Mesh& mesh, const ModelRunner::Options& options) {
  return {.compute = options.compute,
          .tp_rank = mesh.tp_rank(),
          .tp_size = mesh.tp_size(),
          .gradients = options.train};
}

}  // namespace

ModelRunner::Plan ModelRunner::plan(const Backend& device, const Mesh& mesh, const ModelConfig& config,
                                    const Options& options) {
  constexpr index_t kEndless = index_t{1} << 46;
  PlanBackend backend(device);
  const ParameterStore store(backend, config, store_options(mesh, options));
  T5 model(store, mesh.tp_rank(), mesh.tp_size());
  const int rank = mesh.dp_rank() * mesh.tp_size() + mesh.tp_rank();
  const Mesh quiet = Mesh::plan(mesh.layout(), rank, config.all_kv_groups());
  const Buffer tokens = backend.allocate(token_bytes(options));
  const Buffer losses = backend.allocate(2 * size_of(DType::kFloat64));
  Arena saved(backend.allocate(kEndless)), scratch(backend.allocate(kEndless));
  Step step{.backend = backend,
            .saved = saved,
            .scratch = scratch,
            .mesh = quiet,
            .dropout_rate = options.train ? options.dropout_rate : 0.0,
            .recompute = !options.train || options.recompute};
  const T5::Input input = input_of(tokens, options.micro_batch, options);
  const Tensor loss = losses.tensor(DType::kFloat64, {2});
  if (options.train) model.train(step, input, options.z_loss, 1, loss);
  const double flops = backend.flops();
  // Evaluation passes through the same memory.
  step.dropout_rate = 0;
  step.recompute = true;
  model.evaluate(step, input, options.z_loss, loss);
  Plan result{.saved = saved.high_water(), .scratch = scratch.high_water(), .flops = flops};
  if (options.train && options.recompute) {
    Options plain = options;
    plain.recompute = false;
    result.flops = plan(device, mesh, config, plain).flops;
  }
  return result;
}

index_t ModelRunner::token_bytes(const Options& options) {
  return options.micro_batch * (options.inputs_length + 2 * options.targets_length) * kTokenBytes;
}

T5::Input ModelRunner::input_of(const Buffer& tokens, index_t batch, const Options& options) {
  const index_t inputs = batch * options.inputs_length;
  const index_t targets = batch * options.targets_length;
  const auto part = [&tokens, batch](index_t begin, index_t length) {
    return tokens.tensor(DType::kInt32, {batch, length}, begin * kTokenBytes);
  };
  return {.input_ids = part(0, options.inputs_length),
          .decoder_ids = part(inputs, options.targets_length),
          .targets = part(inputs + targets, options.targets_length)};
}

ModelRunner::ModelRunner(Backend& backend, const Mesh& mesh, const ModelConfig& config,
                         const Options& options)
    : backend_(backend),
      mesh_(mesh),
      options_(options),
      store_(backend, config, store_options(mesh, options)),
      model_(store_, mesh.tp_rank(), mesh.tp_size()),
      tokens_(backend.allocate(token_bytes(options))),
      losses_(backend.allocate(3 * size_of(DType::kFloat64))) {
  const Plan memory = plan(backend, mesh, config, options);
  saved_ = Arena(backend.allocate(memory.saved));
  scratch_ = Arena(backend.allocate(memory.scratch));
  flops_ = memory.flops;
  if (!options.train) return;
  std::vector<KvGradient> kv_gradients;
  for (std::size_t i = 0; i < store_.size(); ++i) {
    const Partition& partition = store_.table()[i].partition;
    if (partition.kind != Partition::Kind::kKvGroups || store_.slice(i).replicas == 1) continue;
    kv_gradients.push_back({.gradient = store_.gradient(i), .kv_groups = partition.kv_groups});
  }
  gradient_sync_ = std::make_unique<GradientSync>(mesh, std::move(kv_gradients));
}

Step ModelRunner::step(bool training) {
  return {.backend = backend_,
          .saved = saved_,
          .scratch = scratch_,
          .mesh = mesh_,
          .dropout_rate = training ? options_.dropout_rate : 0.0,
          .recompute = !training || options_.recompute};
}

T5::Input ModelRunner::load(const Batch& batch) {
  check(batch.size <= options_.micro_batch && batch.inputs_length == options_.inputs_length &&
            batch.targets_length == options_.targets_length,
        "a batch of {} x ({}, {}) does not fit the plan of {} x ({}, {})", batch.size, batch.inputs_length,
        batch.targets_length, options_.micro_batch, options_.inputs_length, options_.targets_length);
  const T5::Input input = input_of(tokens_, batch.size, options_);
  host_tokens_ = batch.input_ids;
  // The decoder reads the targets shifted right; its first input is the padding id.
  const auto length = static_cast<std::size_t>(batch.targets_length);
  for (std::size_t i = 0; i < batch.targets.size(); ++i) {
    host_tokens_.push_back(i % length != 0 ? batch.targets[i - 1] : 0);
  }
  host_tokens_.insert(host_tokens_.end(), batch.targets.begin(), batch.targets.end());
  backend_.copy_from_host(host_tokens_.data(),
                          tokens_.tensor(DType::kInt32, {static_cast<index_t>(host_tokens_.size())}));
  return input;
}

void ModelRunner::count_targets(const Batch& batch) {
  targets_ += static_cast<double>(
      std::count_if(batch.targets.begin(), batch.targets.end(), [](std::int32_t id) { return id != 0; }));
}

void ModelRunner::train(const Batch& batch, const Position& position, double factor, bool last) {
  mesh_.heartbeat().beat("forward and backward");
  Step run = step(/*training=*/true);
  run.dropout_key = Philox(position.seed, RandomPurpose::kDropout, static_cast<std::uint64_t>(position.step));
  run.first_sample = position.first_sample;
  count_targets(batch);
  const auto start_decoder = [this] {
    const Tensor all = store_.all_gradients();
    gradient_sync_->start(all.slice(0, store_.decoder_begin(), all[0]));
    decoder_started_ = true;
  };
  model_.train(run, load(batch), options_.z_loss, factor, losses_.tensor(DType::kFloat64, {2}),
               last ? start_decoder : std::function<void()>());
}

void ModelRunner::evaluate(const Batch& batch) {
  mesh_.heartbeat().beat("evaluating");
  Step run = step(/*training=*/false);
  count_targets(batch);
  model_.evaluate(run, load(batch), options_.z_loss, losses_.tensor(DType::kFloat64, {2}));
}

void ModelRunner::observe(const Batch& batch, AttentionProbe& probe) {
  mesh_.heartbeat().beat("calibrating");
  Step run = step(/*training=*/false);
  run.probe = &probe;
  model_.observe(run, load(batch));
}

void ModelRunner::logits(const Batch& batch, Tensor logits) {
  Step run = step(/*training=*/false);
  model_.logits(run, load(batch), logits);
}

LossSums ModelRunner::take_losses() {
  // With tensors on a device it is here that the host meets what its collectives wait for.
  const Heartbeat::Wait wait(mesh_.heartbeat(), "the sum of the losses");
  const Tensor losses = losses_.tensor(DType::kFloat64, {3});
  backend_.copy_from_host(&targets_, losses.slice(0, 2, 3));
  mesh_.dp().all_reduce(losses);
  std::array<double, 3> sums{};
  backend_.copy_to_host(losses, sums.data());
  backend_.fill_zero(losses);
  targets_ = 0;
  return {.cross_entropy = sums[0], .z_loss = sums[1], .targets = sums[2]};
}

void ModelRunner::synchronise_gradients() {
  const Tensor all = store_.all_gradients();
  gradient_sync_->start(decoder_started_ ? all.slice(0, 0, store_.decoder_begin()) : all);
  gradient_sync_->finish();
  decoder_started_ = false;
}

}  // namespace regroup
