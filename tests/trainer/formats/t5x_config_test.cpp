#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"
#include "trainer/formats/t5x.h"
#include "trainer/model/parameters.h"

namespace regroup {
namespace {

using test::refusal;
using testing::AllOf;
using testing::HasSubstr;

class ConfigOfShapes : public testing::Test {
 protected:
  void make(const ModelConfig& config) {
    tensors_.clear();
    for (const ParameterSpec& spec : parameter_table(config)) {
      tensors_.push_back({.name = spec.name, .shape = spec.shape});
    }
  }
  StoredTensor& tensor(const std::string& name) {
    return *std::find_if(tensors_.begin(), tensors_.end(), [&](const auto& t) { return t.name == name; });
  }
  ModelConfig config() const {
    std::vector<const StoredTensor*> pointers;
    for (const StoredTensor& tensor : tensors_) pointers.push_back(&tensor);
    return config_of_shapes(pointers, "x");
  }
  std::string refused() const {
    return refusal([this] { config(); });
  }
  std::vector<StoredTensor> tensors_;
};

TEST_F(ConfigOfShapes, IsTheModel) {
  for (const std::string& size : model_sizes()) {
    const ModelConfig expected = t5_1_1(size);
    make(expected);
    EXPECT_EQ(config(), expected) << size;
  }
  ModelConfig grouped = t5_1_1("base");
  grouped.kv_groups = 1;
  grouped.encoder_kv_groups = 3;
  grouped.num_decoder_layers = 5;
  make(grouped);
  EXPECT_EQ(config(), grouped);
}

TEST_F(ConfigOfShapes, OfUnevenGroups) {
  ModelConfig uneven = t5_1_1("base");
  uneven.num_decoder_layers = 2;
  uneven.kv_groups = 4;
  uneven.site_kv_groups = {12, 1, 4, 2};  // 4.75 on average
  make(uneven);
  EXPECT_EQ(config(), uneven);
}

TEST_F(ConfigOfShapes, TellsT5_1_0) {
  ModelConfig t5_1_0 = t5_1_1("small");
  t5_1_0.tie_word_embeddings = true;
  make(t5_1_0);
  EXPECT_EQ(config(), t5_1_0);
  t5_1_0.feed_forward = FeedForwardKind::kRelu;
  make(t5_1_0);
  EXPECT_EQ(config(), t5_1_0);
}

TEST_F(ConfigOfShapes, RefusesOtherModels) {
  const std::string encoder = "encoder.block.0.layer.", decoder = "decoder.block.0.layer.";
  const ModelConfig small = t5_1_1("small");
  for (const std::string& name :
       {encoder + "0.SelfAttention.relative_attention_bias.weight", encoder + "1.DenseReluDense.wi_0.weight",
        decoder + "1.EncDecAttention.k.weight", std::string("shared.weight")}) {
    make(small);
    tensor(name).name = "gone";
    EXPECT_THAT(refused(), AllOf(HasSubstr("x: it has no '" + name + "'"), HasSubstr("config.json")));
    make(small);
    tensor(name).shape = {6};
    EXPECT_THAT(refused(), HasSubstr("has the shape [6]"));
  }
  make(small);
  tensor(encoder + "0.SelfAttention.q.weight").shape = {385, 512};
  EXPECT_THAT(refused(), HasSubstr("385 rows"));
  tensor(encoder + "0.SelfAttention.q.weight").shape = {0, 512};
  EXPECT_THAT(refused(), HasSubstr("0 rows"));
  make(small);
  tensor(encoder + "0.SelfAttention.relative_attention_bias.weight").shape = {32, 0};
  EXPECT_THAT(refused(), HasSubstr("are not heads"));
  make(small);
  tensor(encoder + "0.layer_norm.weight").name = "gone";
  EXPECT_THAT(refused(), HasSubstr("no encoder layers"));
  make(small);
  tensor(decoder + "0.SelfAttention.k.weight").shape = {4 * 64, 512};
  EXPECT_THAT(refused(), HasSubstr("kv-groups"));
}

}  // namespace
}  // namespace regroup
