#include "trainer/formats/names.h"

#include <map>
#include <set>

#include <gtest/gtest.h>

#include "trainer/model/parameters.h"

namespace regroup {
namespace {

ModelConfig deep() {
  ModelConfig config = t5_1_1("small");
  config.num_layers = 12;
  config.num_decoder_layers = 11;
  return config;
}

TEST(T5xNames, EveryParameterHasOneAndBack) {
  std::set<std::string> paths;
  for (const ParameterSpec& spec : parameter_table(deep())) {
    const auto there = t5x_name_of(spec.name);
    ASSERT_TRUE(there) << spec.name;
    EXPECT_TRUE(paths.insert(there->name).second) << there->name;
    const auto back = name_of_t5x(there->name);
    ASSERT_TRUE(back) << there->name;
    EXPECT_EQ(back->name, spec.name);
    EXPECT_EQ(back->transposed, there->transposed);
    EXPECT_EQ(there->transposed, spec.shape.size() == 2 && spec.name != "shared.weight") << spec.name;
  }
}

TEST(T5xNames, AreThese) {
  const std::map<std::string, std::string> pairs = {
      {"token_embedder/embedding", "shared.weight"},
      {"decoder/logits_dense/kernel", "lm_head.weight"},
      {"encoder/encoder_norm/scale", "encoder.final_layer_norm.weight"},
      {"encoder/relpos_bias/rel_embedding",
       "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"},
      {"encoder/layers_11/attention/out/kernel", "encoder.block.11.layer.0.SelfAttention.o.weight"},
      {"encoder/layers_0/pre_mlp_layer_norm/scale", "encoder.block.0.layer.1.layer_norm.weight"},
      {"decoder/layers_3/self_attention/key/kernel", "decoder.block.3.layer.0.SelfAttention.k.weight"},
      {"decoder/layers_3/encoder_decoder_attention/value/kernel",
       "decoder.block.3.layer.1.EncDecAttention.v.weight"},
      {"decoder/layers_3/pre_cross_attention_layer_norm/scale", "decoder.block.3.layer.1.layer_norm.weight"},
      {"decoder/layers_3/mlp/wi_1/kernel", "decoder.block.3.layer.2.DenseReluDense.wi_1.weight"},
      {"decoder/layers_3/mlp/wi/kernel", "decoder.block.3.layer.2.DenseReluDense.wi.weight"}};
  for (const auto& [path, name] : pairs) {
    EXPECT_EQ(name_of_t5x(path).value_or(OtherName{}).name, name);
    EXPECT_EQ(t5x_name_of(name).value_or(OtherName{}).name, path);
  }
}

TEST(T5xNames, OthersAreUnknown) {
  for (const char* path :
       {"", "encoder", "encoder/layers_/attention/query/kernel", "encoder/layers_x/attention/query/kernel",
        "encoder/layers_01/attention/query/kernel", "encoder/layers_1234567/attention/query/kernel",
        "encoder/layers_-1/attention/query/kernel", "encoder/layers_0/attention/query/bias",
        "encoder/block_000/layer_000/SelfAttention/q", "encoder/layers_1/self_attention/query/kernel",
        "encoder/layers_0/attention/query/kernel/", "decoder/layers_attention/query/kernel"}) {
    EXPECT_FALSE(name_of_t5x(path)) << path;
  }
  EXPECT_FALSE(t5x_name_of("encoder.embed_tokens.weight"));
  EXPECT_FALSE(t5x_name_of("encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"));
}

}  // namespace
}  // namespace regroup
