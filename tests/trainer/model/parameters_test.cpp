#include "trainer/model/parameters.h"

#include <cmath>
#include <set>

#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
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

// Law 1: initial weights are a function of seed, name and global element.
TEST(ParameterStore, InitialValuesDoNotDependOnTheLayout) {
  for (const index_t kv_groups : {1, 2, 8}) {
    CpuBackend backend(1);
    ParameterStore whole(backend, small_model(kv_groups), {});
    whole.initialise(5);
    for (const int tp : {2, 4}) {
      for (int rank = 0; rank < tp; ++rank) {
        ParameterStore part(backend, small_model(kv_groups), {.tp_rank = rank, .tp_size = tp});
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
  CpuBackend backend(1);
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
  CpuBackend backend(1);
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
