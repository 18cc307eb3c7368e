#include "trainer/model/config.h"

#include <functional>

#include <gtest/gtest.h>

#include "trainer/model/parameters.h"

namespace regroup {
namespace {

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const UserError& error) {
    return error.what();
  }
  return "nothing was refused";
}

// references: the counts of the public T5 1.1 checkpoints, and of their grouped versions.
TEST(Config, SizesHaveThePublicParameterCounts) {
  EXPECT_EQ(parameter_count(t5_1_1("small")), 76961152);
  EXPECT_EQ(parameter_count(t5_1_1("base")), 247577856);
  EXPECT_EQ(parameter_count(t5_1_1("large")), 783150080);
  EXPECT_EQ(parameter_count(t5_1_1("xl")), 2849757184);
  EXPECT_EQ(parameter_count(t5_1_1("xxl")), 11135332352);
  ModelConfig xxl = t5_1_1("xxl");
  xxl.kv_groups = 8;
  EXPECT_EQ(parameter_count(xxl), 9726046208);
  xxl.kv_groups = 1;
  EXPECT_EQ(parameter_count(xxl), 9549885440);
}

TEST(Config, UnknownSizeNamesTheNearest) {
  EXPECT_NE(refusal([] { t5_1_1("samll"); }).find("did you mean 'small'"), std::string::npos);
}

TEST(Config, JsonRoundTrip) {
  ModelConfig config = t5_1_1("base");
  config.kv_groups = 3;
  config.dropout_rate = 0.1;
  EXPECT_EQ(model_config_from_json(to_json(config), "here"), config);
}

TEST(Config, ReadsWhatTransformersWrites) {
  const std::string text =
      R"({"model_type": "t5", "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048,
    "num_heads": 12, "num_layers": 12, "num_decoder_layers": 12, "relative_attention_num_buckets": 32,
    "dropout_rate": 0.1, "layer_norm_epsilon": 1e-06, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false})";
  ModelConfig expected = t5_1_1("base");
  expected.dropout_rate = 0.1;
  EXPECT_EQ(model_config_from_json(text, "config.json"), expected);
}

TEST(Config, RefusesOtherArchitecturesByName) {
  EXPECT_NE(refusal([] { model_config_from_json("[1]", "x"); }).find("not a JSON object"), std::string::npos);
  EXPECT_NE(refusal([] { model_config_from_json("{", "x"); }).find("not a JSON object"), std::string::npos);
  EXPECT_NE(refusal([] { model_config_from_json("{}", "x"); }).find("\"vocab_size\" is missing"),
            std::string::npos);
  std::string relu = to_json(t5_1_1("small"));
  relu.replace(relu.find("gated-gelu"), 10, "relu");
  EXPECT_NE(refusal([&] { model_config_from_json(relu, "x"); }).find("relu"), std::string::npos);
  std::string negative = to_json(t5_1_1("small"));
  negative.replace(negative.find("1024"), 4, "-7");
  EXPECT_NE(refusal([&] { model_config_from_json(negative, "x"); }).find("\"d_ff\" is -7"),
            std::string::npos);
}

TEST(Config, TellsTiedModelsApartAsTransformersDoes) {
  const std::string ours = to_json(t5_1_1("small"));
  const auto with = [&ours](const std::string& old_text, const std::string& new_text) {
    std::string text = ours;
    text.replace(text.find(old_text), old_text.size(), new_text);
    return text;
  };
  const std::string tied = "\"tie_word_embeddings\": false", scaled = "\"scale_decoder_outputs\": false";
  EXPECT_NO_THROW(model_config_from_json(with(tied, "\"tie_word_embeddings\": true"), "x"));
  EXPECT_NE(refusal([&] {
              model_config_from_json(with(scaled, "\"scale_decoder_outputs\": true"), "x");
            }).find("1.0"),
            std::string::npos);
  EXPECT_NE(refusal([&] {
              model_config_from_json(with(tied + ",\n  " + scaled, "\"tie_word_embeddings\": true"), "x");
            }).find("lm_head"),
            std::string::npos);
}

TEST(Config, GroupsMustDivideHeads) {
  ModelConfig config = t5_1_1("base");
  config.kv_groups = 5;
  EXPECT_NE(refusal([&] { validate(config); }).find("1, 2, 3, 4, 6, 12"), std::string::npos);
}

TEST(Config, ImpossibleTensorParallelNamesLegalValues) {
  ModelConfig config = t5_1_1("base");
  EXPECT_NE(refusal([&] { validate_tensor_parallel(config, 5); }).find("use one of 1, 2, 4"),
            std::string::npos);
  config.kv_groups = 3;
  EXPECT_NE(refusal([&] { validate_tensor_parallel(config, 2); }).find("key/value groups"),
            std::string::npos);
  config.kv_groups = 1;
  for (const int tp : {1, 2, 4}) EXPECT_NO_THROW(validate_tensor_parallel(config, tp));
}

}  // namespace
}  // namespace regroup
