// Any layout equals one rank: losses, gradients, norms and weights after three Adafactor steps, fp32, with
// dropout.
#include <algorithm>
#include <cmath>

#include <gtest/gtest.h>

#include "parallel/host_staged_communicator.h"
#include "tests/support/devices.h"
#include "trainer/optimizer/adafactor.h"
#include "trainer/optimizer/adamw.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

constexpr index_t kSamples = 8, kInputs = 11, kTargets = 7, kVocabulary = 256;
constexpr std::uint64_t kSeed = 17;
constexpr int kSteps = 3;

ModelConfig config_of(index_t kv_groups, index_t encoder_kv_groups) {
  return {.vocab_size = kVocabulary,
          .d_model = 128,
          .d_kv = 16,
          .d_ff = 136,
          .num_heads = 8,
          .num_layers = 2,
          .num_decoder_layers = 2,
          .kv_groups = kv_groups,
          .encoder_kv_groups = encoder_kv_groups,
          .dropout_rate = 0.1};
}

// G < tp at some attentions and G >= tp at others, whatever tp is.
ModelConfig uneven_model() {
  ModelConfig config = config_of(4, 8);
  config.site_kv_groups = {8, 2, 1, 4};
  return config;
}

// The embedding's gradient comes from the head, the decoder's inputs and the encoder's.
ModelConfig t5_1_0() {
  ModelConfig config = config_of(2, 8);
  config.feed_forward = FeedForwardKind::kRelu;
  config.tie_word_embeddings = true;
  return config;
}

// The samples [first, first + count) of the global batch of a step, of different lengths, padded with 0.
Batch batch_of(index_t step, index_t first, index_t count) {
  Batch batch{.first_sample = first, .size = count, .inputs_length = kInputs, .targets_length = kTargets};
  for (index_t n = first; n < first + count; ++n) {
    const Philox philox(kSeed, RandomPurpose::kTest, static_cast<std::uint64_t>(step * kSamples + n));
    const auto fill = [&](std::vector<std::int32_t>& ids, index_t length, std::uint64_t stream) {
      const index_t real = length - static_cast<index_t>(philox.below(4, stream));
      for (index_t i = 0; i < length; ++i) {
        const auto id = 2 + philox.below(kVocabulary - 2, stream + 1 + static_cast<std::uint64_t>(i));
        ids.push_back(i < real ? static_cast<std::int32_t>(id) : 0);
      }
    };
    fill(batch.input_ids, kInputs, 0);
    fill(batch.targets, kTargets, 1000);
  }
  return batch;
}

double targets_of(index_t step) {
  const Batch all = batch_of(step, 0, kSamples);
  return static_cast<double>(
      std::count_if(all.targets.begin(), all.targets.end(), [](int id) { return id != 0; }));
}

struct Outcome {
  std::vector<double> losses, norms;
};

// Three steps on a mesh; gradients are those of the last step.
class Training {
 public:
  Training(DeviceKind device, const ProcessGroup& group, Layout layout, const ModelConfig& config,
           index_t micro_batch, bool recompute, bool adamw = false)
      : backend_(test::make_test_backend(device, 1)),
        mesh_(group, layout, config.all_kv_groups(),
              [this](std::string name, const ProcessGroup& axis) {
                return make_host_staged_communicator(std::move(name), axis, *backend_);
              }),
        micro_batch_(micro_batch),
        runner_(*backend_, mesh_, config,
                {.compute = DType::kFloat32,
                 .micro_batch = micro_batch,
                 .inputs_length = kInputs,
                 .targets_length = kTargets,
                 .train = true,
                 .dropout_rate = config.dropout_rate,
                 .recompute = recompute,
                 .z_loss = 1e-4}) {
    runner_.parameters().initialise(kSeed);
    if (adamw) {
      // An epsilon of the gradients' own size: with Adam's usual one the first steps are the gradient's
      // signs, and rounding turns over those of elements near 0.
      optimizer_ = std::make_unique<AdamW>(
          *backend_, runner_.parameters(), mesh_,
          AdamW::Options{.epsilon = 1e-2, .weight_decay = 0.1, .scale_by_rms = true, .max_gradient_norm = 1});
    } else {
      optimizer_ = std::make_unique<Adafactor>(*backend_, runner_.parameters(), mesh_, Adafactor::Options{});
    }
  }

  Outcome train() {
    Outcome outcome;
    const index_t share = kSamples / mesh_.dp_size();
    for (index_t step = 0; step < kSteps; ++step) {
      runner_.clear_gradients();
      for (index_t m = 0; m < share; m += micro_batch_) {
        const index_t first = share * mesh_.dp_rank() + m;
        runner_.train(batch_of(step, first, micro_batch_),
                      {.seed = kSeed, .step = step, .first_sample = first}, 1 / targets_of(step),
                      /*last=*/m + micro_batch_ == share);
      }
      outcome.losses.push_back(runner_.take_losses().mean());
      runner_.synchronise_gradients();
      outcome.norms.push_back(optimizer_->update(step, 0.01));
    }
    return outcome;
  }

  const ParameterStore& parameters() { return runner_.parameters(); }
  std::vector<float> host(Tensor tensor) {
    std::vector<float> values(static_cast<std::size_t>(tensor.numel()));
    backend_->copy_to_host(tensor, values.data());
    return values;
  }

 private:
  std::unique_ptr<Backend> backend_;
  Mesh mesh_;
  index_t micro_batch_;
  ModelRunner runner_;
  std::unique_ptr<Optimizer> optimizer_;
};

// |a - b| / |b| of a run's slice `part` against the same part of the reference's whole tensor.
double relative_error(Training& run, Tensor on_device, const Slice& slice, Training& reference,
                      Tensor whole_on_device) {
  std::vector<float> values = run.host(on_device), whole_values = reference.host(whole_on_device);
  Tensor part = on_device, whole = whole_on_device;
  part.data = values.data();
  whole.data = whole_values.data();
  const Tensor expected = whole.slice(slice.dim, slice.begin, slice.end);
  const index_t columns = part.rank == 2 ? part[1] : 1;
  double difference = 0, norm = 0;
  for (index_t r = 0; r < part[0]; ++r) {
    for (index_t c = 0; c < columns; ++c) {
      const double a = part.as<float>()[r * columns + c];
      const double b = expected.as<float>()[r * expected.stride[0] + c];
      difference += (a - b) * (a - b);
      norm += b * b;
    }
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

struct LayoutCase {
  DeviceKind device;
  std::string name;
  ModelConfig config;
  bool recompute = false, adamw = false;
};

class LayoutTest : public testing::TestWithParam<LayoutCase> {};

TEST_P(LayoutTest, EqualsOneRank) {
  const auto& [device, name, config, recompute, adamw] = GetParam();
  const ProcessGroup world = ProcessGroup::world();
  Training reference(device, world.split(world.rank(), 0), Layout{}, config, kSamples, /*recompute=*/false,
                     adamw);
  const Outcome expected = reference.train();
  for (int tp = 1; tp <= world.size(); tp *= 2) {
    const Layout layout = {.data_parallel = world.size() / tp, .tensor_parallel = tp};
    Training run(device, world, layout, config, std::min<index_t>(2, kSamples / layout.data_parallel),
                 recompute, adamw);
    const Outcome outcome = run.train();
    for (std::size_t step = 0; step < kSteps; ++step) {
      EXPECT_NEAR(outcome.losses[step], expected.losses[step], 1e-5 * expected.losses[step]) << "tp " << tp;
      EXPECT_NEAR(outcome.norms[step], expected.norms[step], 1e-5 * expected.norms[step]) << "tp " << tp;
    }
    const ParameterStore& store = run.parameters();
    for (std::size_t i = 0; i < store.size(); ++i) {
      const std::string where = fmt::format("{} at tp {}", store.table()[i].name, tp);
      EXPECT_LT(relative_error(run, store.gradient(i), store.slice(i), reference,
                               reference.parameters().gradient(i)),
                1e-5)
          << where;
      EXPECT_LT(
          relative_error(run, store.master(i), store.slice(i), reference, reference.parameters().master(i)),
          1e-5)
          << where;
    }
  }
}

std::vector<LayoutCase> layout_cases() {
  std::vector<LayoutCase> cases;
  for (const DeviceKind device : test::test_devices()) {
    const auto grouped = [&](index_t kv_groups, index_t encoder_kv_groups, bool recompute, bool adamw) {
      cases.push_back({device, fmt::format("G{}_encoder{}", kv_groups, encoder_kv_groups),
                       config_of(kv_groups, encoder_kv_groups), recompute, adamw});
    };
    // Who owns what is the same on every device.
    const std::vector<index_t> all_groups =
        device == DeviceKind::kCpu ? std::vector<index_t>{1, 2, 4, 8} : std::vector<index_t>{2};
    for (const index_t kv_groups : all_groups) {
      for (const bool recompute : {false, true}) grouped(kv_groups, 8, recompute, false);
    }
    if (device == DeviceKind::kCpu) grouped(2, 1, false, false);
    grouped(1, 8, false, true);
    cases.push_back({device, "uneven", uneven_model(), /*recompute=*/true});
    cases.push_back({device, "T5_1_0", t5_1_0()});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Groups, LayoutTest, testing::ValuesIn(layout_cases()), [](const auto& param) {
  const LayoutCase& c = param.param;
  return fmt::format("{}_{}{}{}", test::name_of(c.device), c.name, c.recompute ? "_recompute" : "",
                     c.adamw ? "_adamw" : "");
});

// Dropout really drops: the comparison above would pass without it.
class OnDevice : public testing::TestWithParam<DeviceKind> {};

TEST_P(OnDevice, DropoutChangesTheLoss) {
  const ProcessGroup world = ProcessGroup::world();
  const ProcessGroup alone = world.split(world.rank(), 0);
  ModelConfig plain = config_of(8, 8);
  plain.dropout_rate = 0;
  Training with(GetParam(), alone, Layout{}, config_of(8, 8), kSamples, false);
  Training without(GetParam(), alone, Layout{}, plain, kSamples, false);
  EXPECT_GT(std::abs(with.train().losses[0] - without.train().losses[0]), 1e-3);
}

TEST_P(OnDevice, TheSameLayoutGivesTheSameBits) {
  const ProcessGroup world = ProcessGroup::world();
  const Layout layout = {.data_parallel = 1, .tensor_parallel = world.size()};
  Training first(GetParam(), world, layout, config_of(2, 8), 4, false);
  Training second(GetParam(), world, layout, config_of(2, 8), 4, false);
  EXPECT_EQ(first.train().losses, second.train().losses);
  EXPECT_EQ(first.host(first.parameters().all_masters()), second.host(second.parameters().all_masters()));
}

INSTANTIATE_TEST_SUITE_P(All, OnDevice, testing::ValuesIn(test::test_devices()),
                         [](const auto& param) { return std::string(test::name_of(param.param)); });

}  // namespace
}  // namespace regroup
