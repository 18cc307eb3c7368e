#include "trainer/run/logit_check.h"

#include <array>
#include <cmath>

#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

constexpr index_t kSequences = 2, kInputs = 32, kTargets = 16;

// Ids from 2 up: padding and eos have their places.
Batch drawn_batch(index_t vocab_size) {
  const Philox draws(0, RandomPurpose::kTest, key_of("logit check"));
  Batch batch{.size = kSequences, .inputs_length = kInputs, .targets_length = kTargets};
  std::uint64_t drawn = 0;
  const auto sequences = [&](index_t length) {
    std::vector<std::int32_t> ids;
    for (index_t sequence = 0; sequence < kSequences; ++sequence) {
      const index_t filled = length - sequence * length / 4;
      for (index_t i = 0; i < length; ++i) {
        const auto id =
            2 + draws.below(static_cast<std::uint64_t>(std::max<index_t>(1, vocab_size - 2)), drawn++);
        ids.push_back(i < filled ? static_cast<std::int32_t>(id) : 0);
      }
    }
    return ids;
  };
  batch.input_ids = sequences(kInputs);
  batch.targets = sequences(kTargets);
  return batch;
}

// This rank's columns of the logits.
std::vector<float> logits_of(const ProcessGroup& world, const Layout& layout, const RankDevice& device,
                             const CheckpointSource& source) {
  const Mesh mesh(world, layout, source.config.all_kv_groups(), device.communicators);
  ModelRunner runner(*device.backend, mesh, source.config,
                     {.compute = DType::kFloat32,
                      .micro_batch = kSequences,
                      .inputs_length = kInputs,
                      .targets_length = kTargets});
  load_weights(world, source, *device.backend, runner.parameters());
  const index_t columns = source.config.vocab_size / mesh.tp_size();
  const Buffer memory = device.backend->allocate(kSequences * kTargets * columns * size_of(DType::kFloat32));
  const Tensor logits = memory.tensor(DType::kFloat32, {kSequences * kTargets, columns});
  runner.logits(drawn_batch(source.config.vocab_size), logits);
  std::vector<float> values(static_cast<std::size_t>(logits.numel()));
  device.backend->copy_to_host(logits, values.data());
  return values;
}

}  // namespace

LogitDifference compare_logits(const ProcessGroup& world, const Layout& layout, const RankDevice& device,
                               const CheckpointSource& a, const CheckpointSource& b) {
  check(a.config.vocab_size == b.config.vocab_size, "logits over vocabularies of {} and {} are compared",
        a.config.vocab_size, b.config.vocab_size);
  const std::vector<float> of_a = logits_of(world, layout, device, a);
  const std::vector<float> of_b = logits_of(world, layout, device, b);
  std::array<double, 2> most = {0, 0};
  for (std::size_t i = 0; i < of_a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(of_a[i]) - static_cast<double>(of_b[i]));
    // What is no number differs by more than anything.
    most[0] = std::max(most[0], std::isnan(difference) ? INFINITY : difference);
    most[1] = std::max(most[1], std::abs(static_cast<double>(of_a[i])));
  }
  world.all_reduce(most, ReduceOp::kMax);
  return {.largest = most[0], .magnitude = most[1]};
}

}  // namespace regroup
