// Loss, logits and every gradient against transformers' T5 (tests/golden), heads of a group repeated there.
#include <cmath>
#include <filesystem>
#include <map>

#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "kernels/base/json.h"
#include "tests/support/devices.h"
#include "tests/trainer/model/golden_batch.h"
#include "trainer/formats/checkpoint_reader.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

// A fixture file: transformers' weights, gradients, inputs and outputs.
class Golden {
 public:
  explicit Golden(const std::string& name)
      : path_(std::filesystem::path(REGROUP_GOLDEN) / (name + ".safetensors")), reader_(path_) {
    const auto fields = nlohmann::json::parse(reader_.metadata().at("config"));
    config_ = {.vocab_size = fields.at("vocab_size"),
               .d_model = fields.at("d_model"),
               .d_kv = fields.at("d_kv"),
               .d_ff = fields.at("d_ff"),
               .num_heads = fields.at("num_heads"),
               .num_layers = fields.at("num_layers"),
               .num_decoder_layers = fields.at("num_decoder_layers"),
               .kv_groups = fields.at("kv_groups"),
               .site_kv_groups = fields.value("site_kv_groups", std::vector<index_t>()),
               .encoder_kv_groups = fields.at("encoder_kv_groups"),
               .feed_forward = fields.value("feed_forward_proj", "") == "relu" ? FeedForwardKind::kRelu
                                                                               : FeedForwardKind::kGatedGelu,
               .tie_word_embeddings = fields.value("tie_word_embeddings", false)};
    z_loss_ = fields.at("z_loss");
  }

  const ModelConfig& config() const { return config_; }
  double z_loss() const { return z_loss_; }

  std::vector<double> values(const std::string& name) const {
    const StoredTensor* stored = reader_.find(name);
    check(stored != nullptr, "the fixture has no {}", name);
    index_t size = 1;
    for (const index_t extent : stored->shape) size *= extent;
    std::vector<double> result(static_cast<std::size_t>(size));
    reader_.read(name, 0, 0, stored->shape[0], Tensor(result.data(), DType::kFloat64, stored->shape));
    return result;
  }

  Batch batch() const { return test::golden_batch(path_, reader_); }

 private:
  std::filesystem::path path_;
  CheckpointReader reader_;
  ModelConfig config_;
  double z_loss_ = 0;
};

std::vector<double> host(Backend& backend, Tensor tensor) {
  std::vector<double> result(static_cast<std::size_t>(tensor.numel()));
  if (tensor.dtype == DType::kFloat64) {
    backend.copy_to_host(tensor, result.data());
  } else {
    std::vector<float> narrow_values(result.size());
    backend.copy_to_host(tensor, narrow_values.data());
    std::copy(narrow_values.begin(), narrow_values.end(), result.begin());
  }
  return result;
}

double relative_error(const std::vector<double>& values, const std::vector<double>& expected) {
  double difference = 0, norm = 0;
  for (std::size_t i = 0; i < values.size(); ++i) {
    difference += (values[i] - expected[i]) * (values[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  return norm == 0 ? std::sqrt(difference) : std::sqrt(difference / norm);
}

// The model with the fixture's weights, ready to run its batch.
struct Model {
  Model(DeviceKind device, const Golden& golden, DType dtype, bool recompute = false)
      : backend(test::make_test_backend(device)),
        mesh(Mesh::plan({.data_parallel = 1, .tensor_parallel = 1}, 0, golden.config().all_kv_groups())),
        batch(golden.batch()),
        runner(*backend, mesh, golden.config(),
               {.compute = dtype,
                .micro_batch = batch.size,
                .inputs_length = batch.inputs_length,
                .targets_length = batch.targets_length,
                .train = true,
                .recompute = recompute,
                .z_loss = golden.z_loss()}) {
    ParameterStore& store = runner.parameters();
    for (std::size_t i = 0; i < store.size(); ++i) {
      const std::vector<double> wide = golden.values("weights." + store.table()[i].name);
      const std::vector<float> narrow_values(wide.begin(), wide.end());
      const bool is_wide = dtype == DType::kFloat64;
      backend->copy_from_host(is_wide ? static_cast<const void*>(wide.data()) : narrow_values.data(),
                              store.master(i));
    }
    store.refresh_weights();
  }

  double targets() const {
    return static_cast<double>(
        std::count_if(batch.targets.begin(), batch.targets.end(), [](int id) { return id != 0; }));
  }
  double train() {
    runner.clear_gradients();
    runner.train(batch, {}, 1 / targets());
    const LossSums sums = runner.take_losses();
    return (sums.cross_entropy + sums.z_loss) / sums.targets;
  }

  std::unique_ptr<Backend> backend;
  Mesh mesh;
  Batch batch;
  ModelRunner runner;
};

struct Case {
  DeviceKind device;
  std::string name;
  DType dtype;
  bool recompute = false;
};

class GoldenTest : public testing::TestWithParam<Case> {};

TEST_P(GoldenTest, LossAndGradientsAreThoseOfTransformers) {
  const Golden golden(GetParam().name);
  Model model(GetParam().device, golden, GetParam().dtype, GetParam().recompute);
  const double loss = model.train();
  const double expected = golden.values("loss")[0];
  EXPECT_NEAR(loss, expected, 1e-5 * std::abs(expected));
  const ParameterStore& store = model.runner.parameters();
  for (std::size_t i = 0; i < store.size(); ++i) {
    const std::string& name = store.table()[i].name;
    EXPECT_LT(relative_error(host(*model.backend, store.gradient(i)), golden.values("gradients." + name)),
              1e-3)
        << name;
  }
}

TEST_P(GoldenTest, LogitsAreThoseOfTransformers) {
  const Golden golden(GetParam().name);
  Model model(GetParam().device, golden, GetParam().dtype);
  const index_t rows = model.batch.size * model.batch.targets_length;
  const DType stat = stat_dtype(GetParam().dtype);
  const Buffer buffer = model.backend->allocate(rows * golden.config().vocab_size * size_of(stat));
  const Tensor logits = buffer.tensor(stat, {rows, golden.config().vocab_size});
  model.runner.logits(model.batch, logits);
  const std::vector<double> values = host(*model.backend, logits);
  const std::vector<double> expected = golden.values("logits");
  for (std::size_t i = 0; i < values.size(); ++i) {
    if (model.batch.targets[i / static_cast<std::size_t>(golden.config().vocab_size)] == 0) continue;
    ASSERT_NEAR(values[i], expected[i], 1e-4) << "at " << i;
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const DeviceKind device : test::test_devices()) {
    for (const char* name :
         {"mha", "gqa3", "gqa2", "mqa", "gqa2_encoder", "uneven", "zloss", "long", "t5_1_0", "t5_1_0_gqa2"}) {
      all.push_back({device, name, DType::kFloat32});
      all.push_back({device, name, DType::kFloat64, /*recompute=*/true});
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(All, GoldenTest, testing::ValuesIn(cases()), [](const auto& param) {
  return std::string(test::name_of(param.param.device)) + "_" + param.param.name + "_" +
         std::string(name_of(param.param.dtype)) + (param.param.recompute ? "_recompute" : "");
});

class GoldenOnDevice : public testing::TestWithParam<DeviceKind> {};

TEST_P(GoldenOnDevice, BFloat16LossIsCloseAndGradientsPointTheSameWay) {
  // relu's derivative jumps where rounding turns a sign over: transformers' own gradients in bfloat16 point
  // 0.99767 the same way in t5_1_0_gqa2, and 0.9997 in the others.
  const std::vector<std::pair<const char*, double>> cases = {
      {"mha", 0.999}, {"gqa2", 0.999}, {"mqa", 0.999}, {"t5_1_0_gqa2", 0.9975}};
  for (const auto& [name, least] : cases) {
    const Golden golden(name);
    Model model(GetParam(), golden, DType::kBFloat16);
    const double expected = golden.values("loss")[0];
    EXPECT_NEAR(model.train(), expected, 1e-2 * expected) << name;
    const ParameterStore& store = model.runner.parameters();
    double dot = 0, norm = 0, expected_norm = 0;
    for (std::size_t i = 0; i < store.size(); ++i) {
      const std::vector<double> gradient = host(*model.backend, store.gradient(i));
      const std::vector<double> reference = golden.values("gradients." + store.table()[i].name);
      for (std::size_t k = 0; k < gradient.size(); ++k) {
        dot += gradient[k] * reference[k];
        norm += gradient[k] * gradient[k];
        expected_norm += reference[k] * reference[k];
      }
    }
    EXPECT_GT(dot / std::sqrt(norm * expected_norm), least) << name;
  }
}

TEST_P(GoldenOnDevice, GradientsAccumulateOverMicroBatches) {
  const Golden golden("gqa2");
  Model model(GetParam(), golden, DType::kFloat64);
  model.train();
  const std::vector<double> whole = host(*model.backend, model.runner.parameters().all_gradients());
  model.runner.clear_gradients();
  const Batch all = model.batch;
  for (index_t b = 0; b < all.size; ++b) {
    const auto row = [b](const std::vector<std::int32_t>& ids, index_t length) {
      return std::vector(ids.begin() + b * length, ids.begin() + (b + 1) * length);
    };
    const Batch one = {.size = 1,
                       .inputs_length = all.inputs_length,
                       .targets_length = all.targets_length,
                       .input_ids = row(all.input_ids, all.inputs_length),
                       .targets = row(all.targets, all.targets_length)};
    model.runner.train(one, {}, 1 / model.targets());
  }
  EXPECT_LT(relative_error(host(*model.backend, model.runner.parameters().all_gradients()), whole), 1e-13);
}

INSTANTIATE_TEST_SUITE_P(All, GoldenOnDevice, testing::ValuesIn(test::test_devices()),
                         [](const auto& param) { return std::string(test::name_of(param.param)); });

}  // namespace
}  // namespace regroup
