#include "trainer/model/parameters.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <set>

#include <gtest/gtest.h>

#include "kernels/make_backend.h"
#include "trainer/model/parameter_store.h"

namespace regroup {
namespace {

ModelConfig small_model(index_t kv_groups) {
  return {.vocab_size = 64,
          .d_model = 24,
          .d_kv = 4,
          .d_ff = 32,
          .num_heads = 8,
          .num_layers = 2,
          .num_decoder_layers = 2,
          .kv_groups = kv_groups,
          .encoder_kv_groups = 8};
}

TEST(ParameterTable, NamesAreUniqueAndThoseOfTransformers) {
  std::set<std::string> names;
  for (const ParameterSpec& spec : parameter_table(small_model(8)))
    EXPECT_TRUE(names.insert(spec.name).second);
  for (const char* name : {"shared.weight", "lm_head.weight", "encoder.final_layer_norm.weight",
                           "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
                           "decoder.block.0.layer.1.EncDecAttention.k.weight",
                           "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
  EXPECT_FALSE(names.contains("decoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"));
}

TEST(ParameterTable, T5_1_0HasOneInnerMatrixAndNoHead) {
  ModelConfig config = small_model(8);
  config.feed_forward = FeedForwardKind::kRelu;
  config.tie_word_embeddings = true;
  std::map<std::string, ParameterSpec> specs;
  for (const ParameterSpec& spec : parameter_table(config)) specs[spec.name] = spec;
  EXPECT_EQ(specs.size(), parameter_table(small_model(8)).size() - 4 - 1);
  EXPECT_FALSE(specs.contains("lm_head.weight"));
  EXPECT_FALSE(specs.contains("encoder.block.0.layer.1.DenseReluDense.wi_0.weight"));
  const ParameterSpec& wi = specs.at("decoder.block.1.layer.2.DenseReluDense.wi.weight");
  EXPECT_EQ(wi.shape, (std::vector<index_t>{32, 24}));
  EXPECT_EQ(wi.initializer, Initializer::kTruncatedNormal);
  EXPECT_DOUBLE_EQ(wi.scale, std::pow(24.0, -0.5));
  EXPECT_EQ(specs.at("shared.weight").scale, 1);
}

// 8 heads, 2 decoder layers: G < tp at some attentions, G >= tp at others.
ModelConfig uneven_model() {
  ModelConfig config = small_model(4);
  config.site_kv_groups = {8, 2, 1, 4};
  return config;
}

TEST(ParameterTable, EachDecoderAttentionHasItsGroups) {
  std::map<std::string, ParameterSpec> specs;
  for (const ParameterSpec& spec : parameter_table(uneven_model())) specs[spec.name] = spec;
  const std::vector<AttentionSite> sites = attention_sites(uneven_model());
  ASSERT_EQ(sites.size(), 6U);
  const std::vector<index_t> expected = {8, 8, 8, 2, 1, 4};
  for (std::size_t i = 0; i < sites.size(); ++i) {
    EXPECT_EQ(sites[i].kv_groups, expected[i]) << describe(sites[i]);
    for (const char* name : {"k.weight", "v.weight"}) {
      const ParameterSpec& spec = specs.at(sites[i].prefix + name);
      EXPECT_EQ(spec.shape, (std::vector<index_t>{expected[i] * 4, 24})) << spec.name;
      EXPECT_EQ(spec.partition.kv_groups, expected[i]) << spec.name;
    }
    for (const char* name : {"q.weight", "o.weight"}) {
      const ParameterSpec& spec = specs.at(sites[i].prefix + name);
      EXPECT_EQ(spec.shape[0] * spec.shape[1], 8 * 4 * 24) << spec.name;
    }
  }
  EXPECT_EQ(describe(sites[1]), "encoder layer 1 self-attention");
  EXPECT_EQ(describe(sites[5]), "decoder layer 1 cross-attention");
}

// At tp 4: 8 groups are 2 a rank, 4 are 1, 2 are held by pairs, 1 by all.
TEST(ParameterTable, UnevenGroupsLieOverTheRanksAttentionByAttention) {
  const auto table = parameter_table(uneven_model());
  const auto slice_of = [&table](const std::string& name, int rank) {
    const auto spec = std::find_if(table.begin(), table.end(), [&](const auto& s) { return s.name == name; });
    return local_slice(spec->partition, spec->shape, rank, 4);
  };
  const std::string self = "layer.0.SelfAttention.k.weight", cross = "layer.1.EncDecAttention.v.weight";
  for (int rank = 0; rank < 4; ++rank) {
    const auto is = [&](const std::string& name, index_t begin, index_t end, int replicas) {
      const Slice slice = slice_of(name, rank);
      EXPECT_EQ(slice.begin, begin * 4) << name << " " << rank;
      EXPECT_EQ(slice.end, end * 4) << name << " " << rank;
      EXPECT_EQ(slice.replicas, replicas) << name << " " << rank;
    };
    is("decoder.block.0." + self, 2 * rank, 2 * rank + 2, 1);
    is("decoder.block.0." + cross, rank / 2, rank / 2 + 1, 2);
    is("decoder.block.1." + self, 0, 1, 4);
    is("decoder.block.1." + cross, rank, rank + 1, 1);
  }
}

// Law 1: initial weights are a function of seed, name and global element.
TEST(ParameterStore, InitialValuesDoNotDependOnTheLayout) {
  for (const ModelConfig& config : {small_model(1), small_model(2), small_model(8), uneven_model()}) {
    const auto owned = make_backend({.threads = 1});
    Backend& backend = *owned;
    ParameterStore whole(backend, config, {});
    whole.initialise(5);
    for (const int tp : {2, 4}) {
      for (int rank = 0; rank < tp; ++rank) {
        ParameterStore part(backend, config, {.tp_rank = rank, .tp_size = tp});
        part.initialise(5);
        for (std::size_t i = 0; i < part.size(); ++i) {
          const Slice& slice = part.slice(i);
          const Tensor mine = part.master(i);
          const Tensor expected = whole.master(i).slice(slice.dim, slice.begin, slice.end);
          const index_t columns = mine.rank == 2 ? mine[1] : 1;
          for (index_t k = 0; k < mine.numel(); ++k) {
            ASSERT_EQ(mine.as<float>()[k],
                      expected.as<float>()[k / columns * expected.stride[0] + k % columns])
                << part.table()[i].name;
          }
        }
      }
    }
  }
}

TEST(ParameterStore, InitialValuesHaveTheScalesOfT5X) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  ModelConfig config = small_model(8);
  config.d_model = 256;
  config.d_ff = 512;
  ParameterStore store(backend, config, {});
  store.initialise(1);
  const auto deviation = [&](const std::string& name) {
    const Tensor weight = store.parameter(name).weight;
    double sum = 0;
    for (index_t k = 0; k < weight.numel(); ++k) sum += std::pow(weight.as<float>()[k], 2);
    return std::sqrt(sum / static_cast<double>(weight.numel()));
  };
  const auto near = [&](const std::string& name, double expected) {
    const auto size = static_cast<double>(store.parameter(name).weight.numel());
    // Four standard errors of an estimated standard deviation.
    EXPECT_NEAR(deviation(name), expected, 4 * expected / std::sqrt(2 * size)) << name;
  };
  near("shared.weight", 1);
  near("encoder.block.0.layer.0.SelfAttention.q.weight", std::pow(256.0 * 4, -0.5));
  near("encoder.block.0.layer.0.SelfAttention.k.weight", std::pow(256.0, -0.5));
  near("encoder.block.0.layer.0.SelfAttention.o.weight", std::pow(8.0 * 4, -0.5));
  near("encoder.block.0.layer.1.DenseReluDense.wi_0.weight", std::pow(256.0, -0.5));
  near("encoder.block.0.layer.1.DenseReluDense.wo.weight", std::pow(512.0, -0.5));
  near("lm_head.weight", std::pow(256.0, -0.5));
  EXPECT_EQ(deviation("encoder.final_layer_norm.weight"), 1);
}

TEST(ParameterStore, PacksAreOneMatrix) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  ParameterStore store(backend, small_model(2), {});
  store.initialise(3);
  const std::string prefix = "decoder.block.0.layer.0.SelfAttention.";
  const Tensor pack = store.pack(prefix + "q.weight", 3).weight;
  EXPECT_TRUE(pack.has_shape({(8 + 2 * 2) * 4, 24}));
  EXPECT_EQ(pack.slice(0, 32, 40).data, store.parameter(prefix + "k.weight").weight.data);
  EXPECT_EQ(pack.slice(0, 40, 48).data, store.parameter(prefix + "v.weight").weight.data);
  EXPECT_THROW(store.pack(prefix + "v.weight", 2), InternalError);
}

}  // namespace
}  // namespace regroup
