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

// Masters become what a file of `type` holds of them, a few MiB at a time.
void round_masters(Backend& backend, ParameterStore& store, StoredType type) {
  constexpr index_t kPiece = index_t{1} << 20;
  const Tensor masters = store.all_masters();
  std::vector<float> values;
  std::vector<std::byte> stored;
  for (index_t begin = 0; begin < masters[0]; begin += kPiece) {
    const Tensor part = masters.slice(0, begin, std::min(masters[0], begin + kPiece));
    values.resize(static_cast<std::size_t>(part.numel()));
    stored.resize(static_cast<std::size_t>(part.numel() * size_of(type)));
    backend.copy_to_host(part, values.data());
    store_elements(values.data(), part.numel(), type, stored.data());
    convert_elements(type, stored.data(), part.numel(), values.data());
    backend.copy_from_host(values.data(), part);
  }
  store.refresh_weights();
}

}  // namespace

std::vector<float> check_logits(const ProcessGroup& world, const Layout& layout, const RankDevice& device,
                                const CheckpointSource& source, std::optional<StoredType> rounded) {
  const Mesh mesh(world, layout, source.config.all_kv_groups(), device.communicators);
  ModelRunner runner(*device.backend, mesh, source.config,
                     {.compute = DType::kFloat32,
                      .micro_batch = kSequences,
                      .inputs_length = kInputs,
                      .targets_length = kTargets});
  load_weights(world, source, *device.backend, runner.parameters());
  if (rounded) round_masters(*device.backend, runner.parameters(), *rounded);
  const index_t columns = source.config.vocab_size / mesh.tp_size();
  const Buffer memory = device.backend->allocate(kSequences * kTargets * columns * size_of(DType::kFloat32));
  const Tensor logits = memory.tensor(DType::kFloat32, {kSequences * kTargets, columns});
  runner.logits(drawn_batch(source.config.vocab_size), logits);
  std::vector<float> values(static_cast<std::size_t>(logits.numel()));
  device.backend->copy_to_host(logits, values.data());
  return values;
}

LogitDifference compare_logits(const ProcessGroup& world, const std::vector<float>& a,
                               const std::vector<float>& b) {
  check(a.size() == b.size(), "{} logits are compared with {}", a.size(), b.size());
  std::array<double, 2> most = {0, 0};
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(static_cast<double>(a[i]) - static_cast<double>(b[i]));
    most[0] = std::max(most[0], std::isnan(difference) ? INFINITY : difference);
    most[1] = std::max(most[1], std::abs(static_cast<double>(a[i])));
  }
  world.all_reduce(most, ReduceOp::kMax);
  return {.largest = most[0], .magnitude = most[1]};
}

}  // namespace regroup
