#include "trainer/run/logit_check.h"

#include <limits>

#include <gtest/gtest.h>

#include "tests/trainer/checkpoint/shared_directory.h"
#include "tests/trainer/conversion/model_file.h"
#include "trainer/options.h"

namespace regroup {
namespace {

class LogitCheckTest : public testing::Test {
 protected:
  // A model directory of these weights, stored so.
  CheckpointSource model(const std::string& name, const test::Model& values,
                         test::Storage storage = test::Storage::kFloat32) {
    const auto folder = directory_.path() / name;
    world_.run_on(0, [&] {
      regroup::create_directories(folder);
      test::write_model(folder / "model.safetensors", config_, values, storage);
      write_text(folder / "config.json", to_json(config_));
    });
    return find_checkpoint(world_, folder);
  }
  std::vector<float> logits(const CheckpointSource& source, std::optional<StoredType> rounded = {}) {
    return check_logits(world_, layout_, device_, source, rounded);
  }

  const ProcessGroup world_ = ProcessGroup::world();
  const test::SharedDirectory directory_{world_};
  const ModelConfig config_ = test::model(4, 8);
  const Layout layout_{.data_parallel = 1, .tensor_parallel = world_.size()};
  const RankDevice device_ = open_device(Options{}, world_, Log(world_.rank()));
};

TEST_F(LogitCheckTest, OneWeightThatDiffersIsSeen) {
  test::Model values = test::random_model(config_);
  const std::vector<float> before = logits(model("a", values));
  const LogitDifference none = compare_logits(world_, before, logits(model("same", values)));
  EXPECT_EQ(none.largest, 0);
  EXPECT_GT(none.magnitude, 0);
  // Of what the last rank alone holds.
  values["lm_head.weight"].back() += 0.5F;
  const LogitDifference found = compare_logits(world_, before, logits(model("b", values)));
  EXPECT_GT(found.largest, 1e-5 * std::max(1.0, found.magnitude));
  EXPECT_EQ(found.magnitude, none.magnitude);
}

TEST_F(LogitCheckTest, RoundingIsThatOfTheFile) {
  const test::Model values = test::random_model(config_);
  const CheckpointSource exact = model("exact", values);
  const CheckpointSource stored = model("stored", values, test::Storage::kBFloat16);
  EXPECT_GT(compare_logits(world_, logits(exact), logits(stored)).largest, 0);
  EXPECT_EQ(compare_logits(world_, logits(exact, StoredType::kBF16), logits(stored)).largest, 0);
}

TEST_F(LogitCheckTest, WhatIsNoNumberDiffers) {
  const std::vector<float> finite = {1, 2};
  const std::vector<float> bad = {1, std::numeric_limits<float>::quiet_NaN()};
  EXPECT_TRUE(std::isinf(compare_logits(world_, finite, bad).largest));
  EXPECT_TRUE(std::isinf(compare_logits(world_, bad, bad).largest));
}

}  // namespace
}  // namespace regroup
