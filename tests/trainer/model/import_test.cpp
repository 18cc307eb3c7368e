// Loss and logits of transformers' T5 from one model in every format it may come in (tests/golden/imports): a
// folder is a case, whatever its format.
#include <algorithm>
#include <filesystem>

#include <gtest/gtest.h>

#include "kernels/base/file.h"
#include "tests/support/devices.h"
#include "tests/trainer/model/golden_batch.h"
#include "trainer/checkpoint/host_tensors.h"
#include "trainer/formats/checkpoint_reader.h"
#include "trainer/model/config.h"
#include "trainer/run/model_options.h"
#include "trainer/run/model_runner.h"

namespace regroup {
namespace {

std::vector<std::string> folders() {
  std::vector<std::string> names;
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(REGROUP_GOLDEN) / "imports")) {
    if (entry.is_directory()) names.push_back(entry.path().filename().string());
  }
  std::sort(names.begin(), names.end());
  return names;
}

// What transformers made of the weights that are stored beside it.
class Expected {
 public:
  explicit Expected(std::filesystem::path path) : path_(std::move(path)), reader_(path_) {}

  std::vector<float> values(const std::string& name) const {
    const StoredTensor& stored = *reader_.find(name);
    std::vector<float> result((stored.end - stored.begin) / sizeof(float));
    reader_.read(name, 0, 0, stored.shape[0], Tensor(result.data(), DType::kFloat32, stored.shape));
    return result;
  }
  Batch batch() const { return test::golden_batch(path_, reader_); }

 private:
  std::filesystem::path path_;
  CheckpointReader reader_;
};

class ImportTest : public testing::TestWithParam<std::string> {};

TEST_P(ImportTest, GivesTheLogitsAndTheLossOfTransformers) {
  const std::filesystem::path folder = std::filesystem::path(REGROUP_GOLDEN) / "imports" / GetParam();
  const std::string config_path = (folder / "config.json").string();
  const ModelConfig config = model_config_from_json(read_text(config_path), config_path);
  ASSERT_TRUE(CheckpointReader::exists(folder));
  const CheckpointReader reader(folder);
  reader.require(parameter_table(config));
  const Expected expected(folder / "expected.safetensors");
  const Batch batch = expected.batch();

  const ProcessGroup world = ProcessGroup::world();
  const auto backend = test::make_test_backend(DeviceKind::kCpu, 1);
  const Mesh mesh(world, {.data_parallel = 1, .tensor_parallel = world.size()}, config.all_kv_groups());
  ModelRunner runner(*backend, mesh, config,
                     {.compute = DType::kFloat32,
                      .micro_batch = batch.size,
                      .inputs_length = batch.inputs_length,
                      .targets_length = batch.targets_length});
  fill_from_host(*backend, sharded_parameters(runner.parameters()),
                 [&](const ShardedTensor& tensor) { reader.read(tensor); });
  runner.parameters().refresh_weights();

  runner.evaluate(batch);
  EXPECT_NEAR(runner.take_losses().mean(), expected.values("loss")[0], 1e-5 * expected.values("loss")[0]);

  const index_t rows = batch.size * batch.targets_length;
  const index_t columns = config.vocab_size / world.size();
  std::vector<float> logits(static_cast<std::size_t>(rows * columns));
  runner.logits(batch, Tensor(logits.data(), DType::kFloat32, {rows, columns}));
  const std::vector<float> all = expected.values("logits");
  const auto [lowest, highest] = std::minmax_element(all.begin(), all.end());
  const float tolerance = 1e-5F * std::max(-*lowest, *highest);
  for (index_t row = 0; row < rows; ++row) {
    if (batch.targets[static_cast<std::size_t>(row)] == 0) continue;
    for (index_t column = 0; column < columns; ++column) {
      const index_t at = row * config.vocab_size + world.rank() * columns + column;
      ASSERT_NEAR(logits[static_cast<std::size_t>(row * columns + column)], all[static_cast<std::size_t>(at)],
                  tolerance)
          << "row " << row << ", column " << column;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, ImportTest, testing::ValuesIn(folders()),
                         [](const auto& param) { return param.param; });

}  // namespace
}  // namespace regroup
