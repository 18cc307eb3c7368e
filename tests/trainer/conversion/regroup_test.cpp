#include "trainer/conversion/regroup.h"

#include <cmath>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/conversion/model_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::convert;
using test::model;
using test::Model;
using test::random_model;
using test::refusal;
using test::Storage;
using test::TemporaryDirectory;
using test::write_model;
using testing::AllOf;
using testing::HasSubstr;

bool is_regrouped(const std::string& name, const ModelConfig& parent, const ModelConfig& target) {
  const bool kv = name.ends_with("Attention.k.weight") || name.ends_with("Attention.v.weight");
  const bool encoder = name.starts_with("encoder.");
  return kv && (encoder ? parent.encoder_kv_groups != target.encoder_kv_groups
                        : parent.kv_groups != target.kv_groups);
}

// The definition, from whole tensors: the mean or the first of the K heads of each group.
std::vector<float> pooled(const std::vector<float>& source, index_t heads_per_group,
                          const ModelConfig& config, Pooling pooling) {
  const auto head = static_cast<std::size_t>(config.d_kv * config.d_model);
  const auto k = static_cast<std::size_t>(heads_per_group);
  std::vector<float> result;
  for (std::size_t g = 0; g < source.size() / head / k; ++g) {
    for (std::size_t i = 0; i < head; ++i) {
      double sum = 0;
      for (std::size_t h = 0; h < k; ++h) sum += static_cast<double>(source[(g * k + h) * head + i]);
      result.push_back(pooling == Pooling::kFirst ? source[g * k * head + i]
                                                  : static_cast<float>(sum / static_cast<double>(k)));
    }
  }
  return result;
}

TEST(ConvertingReaderTest, PoolsTheHeadsOfEachGroupInEveryLayout) {
  const TemporaryDirectory directory;
  for (const index_t from : {8, 4}) {
    const ModelConfig parent = model(from, 8);
    const Model source = random_model(parent);
    const auto file = directory / "model.safetensors";
    write_model(file, parent, source);
    for (const index_t to : {1, 2, 4}) {
      if (to > from) continue;
      const ModelConfig target = model(to, to == 2 ? 4 : 8);
      for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst}) {
        Model expected = source;
        for (auto& [name, values] : expected) {
          if (!is_regrouped(name, parent, target)) continue;
          const index_t k = name.starts_with("encoder.") ? 8 / target.encoder_kv_groups : from / to;
          values = pooled(values, k, target, pooling);
        }
        for (const int tp : {1, 2, 4}) {
          EXPECT_EQ(convert(file, parent, target, {.pooling = pooling}, tp), expected)
              << from << " -> " << to << ", tp " << tp;
        }
      }
    }
  }
}

TEST(ConvertingReaderTest, PoolsHalfPrecisionSources) {
  const TemporaryDirectory directory;
  const ModelConfig parent = model(8, 8);
  const ModelConfig target = model(2, 8);
  Model source = random_model(parent);
  write_model(directory / "m.safetensors", parent, source, Storage::kBFloat16);
  for (auto& [name, values] : source) {
    for (float& v : values) v = static_cast<float>(bfloat16(v));
    if (is_regrouped(name, parent, target)) values = pooled(values, 4, target, Pooling::kMean);
  }
  EXPECT_EQ(convert(directory / "m.safetensors", parent, target, {}, 2), source);
}

TEST(ConvertingReaderTest, EqualGroupsAreLoadedAsTheyAreWhateverThePooling) {
  const TemporaryDirectory directory;
  for (const index_t groups : {1, 4, 8}) {
    ModelConfig config = model(groups, 8);
    const Model source = random_model(config);
    write_model(directory / "m.safetensors", config, source);
    ModelConfig target = config;
    target.dropout_rate = 0.1;  // of the run, not of the weights
    for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst, Pooling::kRandom, Pooling::kSpectral}) {
      EXPECT_EQ(convert(directory / "m.safetensors", config, target, {.pooling = pooling, .seed = 5}, 2),
                source);
    }
  }
}

TEST(ConvertingReaderTest, FreshHeadsDependOnSeedAndNameOnly) {
  const TemporaryDirectory directory;
  const ModelConfig parent = model(8, 8);
  const ModelConfig target = model(4, 8);
  const Model source = random_model(parent);
  const auto file = directory / "m.safetensors";
  write_model(file, parent, source);
  const ConversionOptions options = {.pooling = Pooling::kRandom, .seed = 11};
  const Model fresh = convert(file, parent, target, options);
  for (const int tp : {2, 4, 8}) EXPECT_EQ(convert(file, parent, target, options, tp), fresh) << tp;
  const Model other = convert(file, parent, target, {.pooling = Pooling::kRandom, .seed = 12});
  for (const auto& [name, values] : fresh) {
    EXPECT_EQ(values == source.at(name), !is_regrouped(name, parent, target)) << name;
    EXPECT_EQ(values == other.at(name), !is_regrouped(name, parent, target)) << name;
  }
  EXPECT_NE(fresh.at("decoder.block.0.layer.0.SelfAttention.k.weight"),
            fresh.at("decoder.block.1.layer.0.SelfAttention.k.weight"));
}

// Mean and variance of n normal draws lie within 5 standard errors (sigma / sqrt(n), sigma^2 sqrt(2 / n)).
TEST(DrawHeads, HaveTheScaleOfT5X) {
  constexpr index_t kRows = 64, kColumns = 512;
  const double scale = 1 / std::sqrt(512.0);
  std::vector<float> values(kRows * kColumns);
  draw_heads(Tensor(values.data(), DType::kFloat32, {kRows, kColumns}), "k", 0, scale, 1);
  const double n = kRows * kColumns;
  double sum = 0, squares = 0;
  for (const float v : values) {
    sum += v;
    squares += static_cast<double>(v) * v;
  }
  EXPECT_LT(std::abs(sum / n), 5 * scale / std::sqrt(n));
  EXPECT_LT(std::abs(squares / n - scale * scale), 5 * scale * scale * std::sqrt(2 / n));
  std::vector<float> part(8 * kColumns);
  draw_heads(Tensor(part.data(), DType::kFloat32, {8, kColumns}), "k", 24, scale, 1);
  EXPECT_TRUE(std::equal(part.begin(), part.end(), values.begin() + 24 * kColumns));
}

TEST(PoolHeads, RefusesShapesThatDoNotFit) {
  std::vector<float> memory(1000);
  const auto t = [&](index_t rows, index_t columns) {
    return Tensor(memory.data(), DType::kFloat32, {rows, columns});
  };
  EXPECT_NO_THROW(pool_heads(t(12, 2), t(6, 2), 2, 3, Pooling::kMean));
  EXPECT_THROW(pool_heads(t(12, 2), t(6, 2), 3, 3, Pooling::kMean), InternalError);
  EXPECT_THROW(pool_heads(t(12, 2), t(6, 2), 2, 4, Pooling::kMean), InternalError);
  EXPECT_THROW(pool_heads(t(12, 2), t(6, 3), 2, 3, Pooling::kMean), InternalError);
  EXPECT_THROW(pool_heads(t(12, 2), t(6, 2), 2, 3, Pooling::kRandom), InternalError);
}

TEST(ValidateConversion, NamesFieldAndBothValues) {
  const ModelConfig parent = model(8, 8);
  EXPECT_NO_THROW(validate_conversion(parent, model(1, 8)));
  EXPECT_NO_THROW(validate_conversion(parent, model(4, 2)));
  EXPECT_THAT(refusal([&] { validate_conversion(model(4, 8), model(8, 8)); }),
              AllOf(HasSubstr("kv_groups = 8"), HasSubstr("has 4"), HasSubstr("1, 2, 4")));
  EXPECT_THAT(refusal([&] { validate_conversion(parent, model(3, 8)); }), HasSubstr("one of 1, 2, 4, 8"));
  EXPECT_THAT(refusal([&] { validate_conversion(parent, model(0, 8)); }), HasSubstr("one of 1, 2, 4, 8"));
  EXPECT_THAT(refusal([&] { validate_conversion(model(8, 4), model(8, 8)); }),
              HasSubstr("encoder_kv_groups = 8"));
  const auto with = [&](auto field, auto value) {
    ModelConfig target = parent;
    target.*field = value;
    return refusal([&] { validate_conversion(parent, target); });
  };
  EXPECT_THAT(with(&ModelConfig::vocab_size, 25), AllOf(HasSubstr("vocab_size = 24"), HasSubstr("25")));
  EXPECT_THAT(with(&ModelConfig::d_model, 13), AllOf(HasSubstr("d_model = 12"), HasSubstr("13")));
  EXPECT_THAT(with(&ModelConfig::d_kv, 6), HasSubstr("d_kv = 5"));
  EXPECT_THAT(with(&ModelConfig::d_ff, 6), HasSubstr("d_ff = 16"));
  EXPECT_THAT(with(&ModelConfig::num_heads, 16), HasSubstr("num_heads = 8"));
  EXPECT_THAT(with(&ModelConfig::num_layers, 6), HasSubstr("num_layers = 2"));
  EXPECT_THAT(with(&ModelConfig::num_decoder_layers, 6), HasSubstr("num_decoder_layers = 2"));
  EXPECT_THAT(with(&ModelConfig::relative_attention_num_buckets, 6), HasSubstr("num_buckets = 32"));
  EXPECT_THAT(with(&ModelConfig::relative_attention_max_distance, 6), HasSubstr("max_distance = 128"));
  EXPECT_THAT(with(&ModelConfig::layer_norm_epsilon, 1e-5), AllOf(HasSubstr("1e-06"), HasSubstr("1e-05")));
  EXPECT_EQ(with(&ModelConfig::dropout_rate, 0.1), "accepted");
}

TEST(ConvertingReaderTest, RefusesAnotherModelsCheckpoint) {
  const TemporaryDirectory directory;
  const ModelConfig parent = model(4, 8);
  write_model(directory / "m.safetensors", parent, random_model(parent));
  const CheckpointReader reader(directory / "m.safetensors");
  const auto is_listed =
      AllOf(HasSubstr("8 of another shape"), HasSubstr("decoder.block.1.layer.1.EncDecAttention.v.weight"));
  const ConversionPlan plan = {.options = {}, .target = model(1, 8), .sites = {}};
  EXPECT_THAT(refusal([&] { ConvertingReader(reader, model(8, 8), model(1, 8), plan); }), is_listed);
  for (const Pooling pooling : {Pooling::kMean, Pooling::kSpectral}) {
    EXPECT_THAT(refusal([&] {
                  convert(directory / "m.safetensors", model(8, 8), model(1, 8), {.pooling = pooling});
                }),
                is_listed);
  }
}

TEST(ConvertingReaderTest, NeedsAPlanOfEveryAttentionThatChanges) {
  const TemporaryDirectory directory;
  const ModelConfig parent = model(8, 8);
  write_model(directory / "m.safetensors", parent, random_model(parent));
  const CheckpointReader reader(directory / "m.safetensors");
  const ConversionPlan nothing = {.options = {}, .target = model(1, 8), .sites = {}};
  EXPECT_THROW(ConvertingReader(reader, parent, model(1, 8), nothing), InternalError);
}

TEST(Pooling, IsNamed) {
  for (const std::string& name : pooling_names()) EXPECT_EQ(to_string(pooling_from_string(name)), name);
  EXPECT_THAT(refusal([] { pooling_from_string("maen"); }), AllOf(HasSubstr("'mean'"), HasSubstr("random")));
}

}  // namespace
}  // namespace regroup
