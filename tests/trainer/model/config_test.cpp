#include "trainer/model/config.h"

#include <functional>

#include <gtest/gtest.h>

#include "kernels/base/json.h"
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

// base with 2 decoder layers whose attentions differ.
ModelConfig uneven_model() {
  ModelConfig config = t5_1_1("base");
  config.num_decoder_layers = 2;
  config.kv_groups = 4;
  config.site_kv_groups = {12, 3, 1, 4};
  return config;
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

TEST(Config, UnevenGroupsOfEachDecoderAttention) {
  const ModelConfig config = uneven_model();
  EXPECT_TRUE(config.uneven());
  EXPECT_EQ(config.self_groups(0), 12);
  EXPECT_EQ(config.cross_groups(0), 3);
  EXPECT_EQ(config.self_groups(1), 1);
  EXPECT_EQ(config.cross_groups(1), 4);
  EXPECT_EQ(config.all_kv_groups(), (std::vector<index_t>{1, 3, 4, 12}));
  ModelConfig even = t5_1_1("base");
  even.kv_groups = 4;
  EXPECT_FALSE(even.uneven());
  EXPECT_EQ(even.self_groups(11), 4);
  EXPECT_EQ(even.cross_groups(0), 4);
  EXPECT_EQ(even.all_kv_groups(), (std::vector<index_t>{4, 12}));
}

// k and v of one attention of base: 2 x d_kv x d_model numbers a group.
TEST(Config, UnevenModelsAreAsLargeAsTheirSumOfGroups) {
  ModelConfig even = uneven_model();
  even.site_kv_groups = {};
  EXPECT_EQ(parameter_count(uneven_model()) - parameter_count(even), (20 - 16) * 2 * 64 * 768);
}

TEST(Config, JsonRoundTripOfAnUnevenModel) {
  const std::string text = to_json(uneven_model());
  EXPECT_EQ(model_config_from_json(text, "here"), uneven_model());
  const auto json = nlohmann::json::parse(text);
  EXPECT_EQ(json["num_key_value_heads"], 4);
  EXPECT_EQ(json["decoder_num_key_value_heads"]["self"], (std::vector<int>{12, 1}));
  EXPECT_EQ(json["decoder_num_key_value_heads"]["cross"], (std::vector<int>{3, 4}));
}

TEST(Config, EvenModelsSayNothingOfTheirAttentions) {
  ModelConfig config = uneven_model();
  config.site_kv_groups = {4, 4, 4, 4};
  EXPECT_FALSE(config.uneven());
  EXPECT_EQ(to_json(config).find("decoder_num_key_value_heads"), std::string::npos);
  auto json = nlohmann::json::parse(to_json(config));
  json["decoder_num_key_value_heads"] = {{"self", {4, 4}}, {"cross", {4, 4}}};
  config.site_kv_groups = {};
  EXPECT_EQ(model_config_from_json(json.dump(), "here"), config);
}

TEST(Config, DamagedNumbersOfUnevenModelsAreRefused) {
  using nlohmann::json;
  json object = json::parse(to_json(uneven_model()));
  const auto refused = [&object](const json& value) {
    object["decoder_num_key_value_heads"] = value;
    return refusal([&] { model_config_from_json(object.dump(), "model/config.json"); });
  };
  const json good = {1, 2};
  const std::vector<std::pair<json, std::string>> cases = {
      {4, "\"decoder_num_key_value_heads\" has no list \"self\""},
      {{1, 2, 3, 4}, "has no list \"self\""},
      {{{"self", good}}, "has no list \"cross\""},
      {{{"self", good}, {"cross", 4}}, "has no list \"cross\""},
      {{{"self", {1}}, {"cross", good}},
       "\"self\" of \"decoder_num_key_value_heads\" has 1 numbers; 2 are needed"},
      {{{"self", good}, {"cross", std::vector<int>(100000, 1)}}, "has 100000 numbers; 2 are needed"},
      {{{"self", {1, -2}}, {"cross", good}}, "holds -2 for layer 1; a positive whole number"},
      {{{"self", good}, {"cross", {0, 1}}}, "holds 0 for layer 0"},
      {{{"self", good}, {"cross", {1.5, 1}}}, "holds 1.5 for layer 0"},
      {{{"self", good}, {"cross", {1, std::uint64_t{1} << 63}}}, "holds 9223372036854775808 for layer 1"},
      {{{"self", {1, nullptr}}, {"cross", good}}, "holds null for layer 1"},
      {{{"self", {1, std::vector<int>(1000, 7)}}, {"cross", good}}, "holds a list for layer 1"},
      {{{"self", {1, std::string(1000, 'x')}}, {"cross", good}}, "xxx... for layer 1"},
      {{{"self", {12, 5}}, {"cross", good}},
       "kv-groups of decoder layer 1 self-attention = 5 does not divide the 12 attention heads; use one of "
       "1, 2"},
      {{{"self", good}, {"cross", {24, 1}}}, "decoder layer 0 cross-attention = 24 does not divide"}};
  for (const auto& [value, message] : cases) {
    const std::string text = refused(value);
    EXPECT_NE(text.find(message), std::string::npos) << text;
    EXPECT_EQ(text.find("model/config.json: "), 0U) << text;
    EXPECT_LT(text.size(), 250U) << text;
  }
}

// An error shows a value in one short line, whatever a file holds.
TEST(Config, DeepOrLongValuesAreRefusedShortly) {
  std::string text = to_json(t5_1_1("small"));
  const std::size_t at = text.find("1024");
  const std::string deep = std::string(100000, '[') + std::string(100000, ']');
  text.replace(at, 4, deep);
  EXPECT_EQ(refusal([&] { model_config_from_json(text, "x"); }),
            "x: \"d_ff\" is a list; a positive whole number is needed");
  text.replace(at, deep.size(), "\"" + std::string(100000, 'y') + "\"");
  EXPECT_LT(refusal([&] { model_config_from_json(text, "x"); }).size(), 200U);
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

ModelConfig t5_1_0() {
  ModelConfig config = t5_1_1("small");
  config.feed_forward = FeedForwardKind::kRelu;
  config.tie_word_embeddings = true;
  return config;
}

// The fields that tell models apart, in front of those of t5_1_1("small")'s shape.
ModelConfig small_with(const std::string& fields) {
  const std::string shape =
      R"("vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 1024, "num_heads": 6, "num_layers": 8})";
  return model_config_from_json("{" + fields + ", " + shape, "x");
}

TEST(Config, SizeOfThePublicT5Small) {
  ModelConfig small = t5_1_0();
  small.d_ff = 2048;
  small.num_heads = small.kv_groups = small.encoder_kv_groups = 8;
  small.num_layers = small.num_decoder_layers = 6;
  EXPECT_EQ(parameter_count(small), 60506624);
}

TEST(Config, JsonRoundTripOfT5_1_0) {
  ModelConfig config = t5_1_0();
  EXPECT_EQ(model_config_from_json(to_json(config), "here"), config);
  const auto json = nlohmann::json::parse(to_json(config));
  EXPECT_EQ(json["feed_forward_proj"], "relu");
  EXPECT_EQ(json["dense_act_fn"], "relu");
  EXPECT_EQ(json["is_gated_act"], false);
  EXPECT_EQ(json["tie_word_embeddings"], true);
  EXPECT_EQ(json["scale_decoder_outputs"], true);
  config.tie_word_embeddings = false;
  EXPECT_EQ(model_config_from_json(to_json(config), "here"), config);
}

TEST(Config, TransformersTellsTheseModelsApart) {
  const ModelConfig old = t5_1_0(), newer = t5_1_1("small");
  const std::vector<std::pair<const char*, ModelConfig>> cases = {
      // Public files: t5-small says neither, T5 1.1 and Flan-T5 say both.
      {R"("model_type": "t5")", old},
      {R"("model_type": "t5", "feed_forward_proj": "relu", "is_gated_act": false, "dense_act_fn": "relu")",
       old},
      {R"("model_type": "t5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false)", newer},
      {R"("model_type": "mt5", "feed_forward_proj": "gated-gelu", "tie_word_embeddings": false)", newer},
      {R"("model_type": "mt5")", newer},
      // As transformers 5 writes them.
      {R"("model_type": "t5", "feed_forward_proj": "relu", "dense_act_fn": "relu", "is_gated_act": false,
          "tie_word_embeddings": true, "scale_decoder_outputs": true)",
       old},
      {R"("model_type": "t5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": true,
          "tie_word_embeddings": true, "scale_decoder_outputs": false)",
       newer},
      {R"("model_type": "mt5", "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new", "is_gated_act": true,
          "tie_word_embeddings": true)",
       newer}};
  for (const auto& [fields, model] : cases) EXPECT_EQ(small_with(fields), model) << fields;
  EXPECT_TRUE(small_with(R"("feed_forward_proj": "gated-gelu")").tie_word_embeddings);
  EXPECT_FALSE(small_with(R"("tie_word_embeddings": false)").tie_word_embeddings);
}

TEST(Config, RefusesOtherArchitecturesByName) {
  EXPECT_EQ(refusal([] { model_config_from_json("[1]", "x"); }), "x is not a JSON object");
  EXPECT_EQ(refusal([] { model_config_from_json("{", "x"); }), "x is not a JSON object");
  EXPECT_EQ(refusal([] { model_config_from_json("{}", "x"); }), "x: the field \"vocab_size\" is missing");
  const std::string types = "only \"t5\" or \"mt5\" can be read",
                    activations = "only \"gated-gelu\" or \"relu\" can";
  const std::vector<std::pair<const char*, std::string>> cases = {
      {R"("model_type": "umt5")",
       "x: \"model_type\" is \"umt5\", " + types + ": each layer of a UMT5 has a relative"},
      {R"("model_type": "longt5")",
       "x: \"model_type\" is \"longt5\", " + types + ": this is another architecture"},
      {R"("model_type": "switch_transformers")", "\"switch_transformers\", " + types},
      {R"("model_type": "t5gemma")", "\"t5gemma\", " + types},
      {R"("model_type": ["t5"])", "x: \"model_type\" is a list, " + types},
      {R"("feed_forward_proj": "gated-silu")", "x: \"feed_forward_proj\" is \"gated-silu\", " + activations},
      {R"("feed_forward_proj": "gelu")", "\"gelu\", " + activations},
      {R"("feed_forward_proj": 3)", "is 3, " + activations},
      {R"("feed_forward_proj": "gated-gelu", "dense_act_fn": "silu")",
       "x: \"dense_act_fn\" is \"silu\", which is not the \"gelu_new\" of its \"feed_forward_proj\""},
      {R"("feed_forward_proj": "relu", "is_gated_act": true)",
       "x: \"is_gated_act\" is true, which is not the false"},
      {R"("tie_word_embeddings": "no")", "x: \"tie_word_embeddings\" is \"no\"; true or false is needed"},
      {R"("scale_decoder_outputs": 1)", "x: \"scale_decoder_outputs\" is 1; true or false is needed"}};
  for (const auto& [fields, message] : cases) {
    const std::string text = refusal([&] { small_with(fields); });
    EXPECT_NE(text.find(message), std::string::npos) << fields << ": " << text;
    EXPECT_EQ(text.find('\n'), std::string::npos) << text;
  }
  std::string negative = to_json(t5_1_1("small"));
  negative.replace(negative.find("1024"), 4, "-7");
  EXPECT_NE(refusal([&] { model_config_from_json(negative, "x"); }).find("\"d_ff\" is -7"),
            std::string::npos);
}

TEST(Config, GroupsMustDivideHeads) {
  ModelConfig config = t5_1_1("base");
  config.kv_groups = 5;
  EXPECT_NE(refusal([&] { validate(config); }).find("1, 2, 3, 4, 6, 12"), std::string::npos);
}

TEST(Config, UnevenGroupsAreOnePerDecoderAttention) {
  ModelConfig config = uneven_model();
  EXPECT_NO_THROW(validate(config));
  config.site_kv_groups.pop_back();
  EXPECT_NE(refusal([&] { validate(config); }).find("2 layers have 4"), std::string::npos);
  config.site_kv_groups = {12, 3, 1, 7};
  EXPECT_NE(refusal([&] { validate(config); }).find("decoder layer 1 cross-attention = 7 does not divide"),
            std::string::npos);
}

TEST(Config, TensorParallelMustSuitEveryAttention) {
  ModelConfig config = uneven_model();
  const std::string message = refusal([&] { validate_tensor_parallel(config, 2); });
  EXPECT_NE(message.find("3 key/value groups (decoder layer 0 cross-attention)"), std::string::npos)
      << message;
  EXPECT_NE(message.find("use one of 1"), std::string::npos) << message;
  config.site_kv_groups = {12, 2, 1, 4};
  for (const int tp : {1, 2, 4}) EXPECT_NO_THROW(validate_tensor_parallel(config, tp));
  // The budget itself is nobody's number.
  config.kv_groups = 3;
  EXPECT_NO_THROW(validate_tensor_parallel(config, 4));
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
