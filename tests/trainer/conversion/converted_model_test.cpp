// Conversion end to end: what reaches the query heads of converted models, in whatever order they are.
#include <array>
#include <optional>
#include <set>
#include <stdexcept>

#include <gtest/gtest.h>

#include "tests/trainer/conversion/model_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::load;
using test::matrix_of;
using test::model;
using test::Model;
using test::product_of;
using test::random_model;
using test::Storage;
using test::write_model;

constexpr double kFloatRounding = 2e-6;  // of products of float32 factors, relative

// Which group head `head` of an attention was made for.
using GroupOf = std::function<index_t(const AttentionSite&, index_t head)>;

// A random model in which key/value heads of one group are the same; queries and outputs are not.
Model with_identical_heads(const ModelConfig& config, const GroupOf& group_of) {
  Model values = random_model(config);
  const auto size = static_cast<std::ptrdiff_t>(config.d_kv * config.d_model);
  for (const AttentionSite& site : attention_sites(config)) {
    for (const char* name : {"k.weight", "v.weight"}) {
      std::vector<float>& weight = values.at(site.prefix + name);
      for (index_t head = 1; head < site.kv_groups; ++head) {
        index_t first = 0;
        while (group_of(site, first) != group_of(site, head)) ++first;
        std::copy_n(weight.begin() + first * size, size, weight.begin() + head * size);
      }
    }
  }
  return values;
}

// Groups of heads that lie scattered: one scatter for all self-attentions of a stack, one for each
// cross-attention.
index_t scattered_group(const AttentionSite& site, index_t head) {
  constexpr std::array<std::array<index_t, 8>, 4> kGroups = {{{0, 1, 0, 1, 1, 0, 1, 0},
                                                              {0, 0, 1, 1, 1, 1, 0, 0},
                                                              {0, 1, 1, 0, 0, 1, 1, 0},
                                                              {0, 1, 0, 0, 1, 1, 0, 1}}};
  const index_t pattern = site.kind == AttentionKind::kCross         ? 2 + site.layer
                          : site.kind == AttentionKind::kDecoderSelf ? 1
                                                                     : 0;
  return kGroups[static_cast<std::size_t>(pattern)][static_cast<std::size_t>(head)];
}

index_t neighbouring_group(const AttentionSite& /*site*/, index_t head) { return head / 4; }

class ConvertedModelTest : public testing::Test {
 protected:
  const CheckpointReader& store(const Model& values, Storage storage = Storage::kFloat32) {
    write_model(directory / "m.safetensors", parent, values, storage);
    return reader.emplace(directory / "m.safetensors");
  }
  ConversionPlan plan(const ModelConfig& target, const ConversionOptions& options) const {
    return plan_conversion(world, *reader, parent, target, options, calibration(options));
  }
  // Calibrated by inputs that are all alike.
  Calibration calibration(const ConversionOptions& options) const {
    if (options.pooling != Pooling::kCalibrated) return {};
    const std::vector<double> one = Matrix::identity(parent.d_model).values;
    std::vector<double> two = one;
    for (double& value : two) value *= 2;
    const SecondMoments moments = {
        .width = parent.d_model, .query = one, .key = one, .attending = two, .attended = one};
    return {
        .measure = [moments](std::span<const index_t> sites) { return std::vector(sites.size(), moments); }};
  }

  ModelConfig parent = model(8, 8);
  ProcessGroup world = ProcessGroup::world();
  test::TemporaryDirectory directory;
  std::optional<CheckpointReader> reader;
};

// Each slot's products are those of the parent's head in it.
void expect_exact(const Model& converted, const Model& values, const ModelConfig& parent,
                  const ConversionPlan& plan) {
  for (const SiteConversion& site : plan.sites) {
    for (index_t slot = 0; slot < parent.num_heads; ++slot) {
      const index_t queries = site.queries_per_head();
      const index_t head = site.order[static_cast<std::size_t>(slot / queries)] * queries + slot % queries;
      const test::HeadProduct before = product_of(values, parent, site.parent, head);
      const test::HeadProduct after = product_of(converted, plan.target, site.target, slot);
      EXPECT_LT(test::relative_distance(before.scores, after.scores), kFloatRounding)
          << describe(site.parent);
      EXPECT_LT(test::relative_distance(before.outputs, after.outputs), kFloatRounding)
          << describe(site.parent);
    }
    EXPECT_LT(site.score_loss, 1e-24);
    EXPECT_LT(site.output_loss, 1e-24);
  }
}

// Whatever has no part in the plan is as it was, and a position bias has the columns of its slots' heads.
void expect_rest_unchanged(const Model& converted, const Model& values, const ModelConfig& parent,
                           const ConversionPlan& plan) {
  std::set<std::string> changed;
  for (const SiteConversion& site : plan.sites) {
    for (const char* name : {"q.weight", "k.weight", "v.weight", "o.weight"})
      changed.insert(site.parent.prefix + name);
    const std::string bias = site.parent.prefix + "relative_attention_bias.weight";
    if (!values.contains(bias)) continue;
    changed.insert(bias);
    const Matrix before = matrix_of(values, bias, parent.num_heads);
    const Matrix after = matrix_of(converted, bias, parent.num_heads);
    for (index_t slot = 0; slot < parent.num_heads; ++slot) {
      const index_t queries = site.queries_per_head();
      const index_t head = site.order[static_cast<std::size_t>(slot / queries)] * queries + slot % queries;
      EXPECT_EQ(after.column_block(slot, slot + 1).values, before.column_block(head, head + 1).values)
          << bias;
    }
  }
  for (const auto& [name, weight] : values) {
    EXPECT_TRUE(changed.contains(name) || converted.at(name) == weight) << name;
  }
}

const std::vector<index_t>& order_of(const ConversionPlan& plan, const std::string& site) {
  for (const SiteConversion& conversion : plan.sites) {
    if (describe(conversion.parent) == site) return conversion.order;
  }
  throw std::runtime_error("no " + site);
}

TEST_F(ConvertedModelTest, IdenticalNeighboursConvertExactly) {
  const Model values = with_identical_heads(parent, neighbouring_group);
  store(values);
  const ModelConfig target = model(2, 4);
  for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst, Pooling::kSpectral, Pooling::kCalibrated}) {
    for (const Grouping grouping : {Grouping::kPosition, Grouping::kSimilarity}) {
      const ConversionPlan conversion = plan(target, {.pooling = pooling, .grouping = grouping});
      ASSERT_EQ(conversion.sites.size(), 6U);
      const Model converted = load(*reader, parent, conversion, 1);
      expect_exact(converted, values, parent, conversion);
      expect_rest_unchanged(converted, values, parent, conversion);
    }
  }
}

TEST_F(ConvertedModelTest, SimilarityFindsIdenticalHeadsWhereverTheyAre) {
  const Model values = with_identical_heads(parent, scattered_group);
  store(values);
  const ModelConfig target = model(2, 2);
  for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst, Pooling::kSpectral, Pooling::kCalibrated}) {
    const ConversionPlan similar = plan(target, {.pooling = pooling, .grouping = Grouping::kSimilarity});
    for (const SiteConversion& site : similar.sites) {
      for (std::size_t slot = 0; slot < 8; ++slot) {
        EXPECT_EQ(scattered_group(site.parent, site.order[slot]), slot / 4) << describe(site.parent);
      }
    }
    const Model converted = load(*reader, parent, similar, 1);
    expect_exact(converted, values, parent, similar);
    expect_rest_unchanged(converted, values, parent, similar);
    EXPECT_NE(order_of(similar, "decoder layer 0 cross-attention"),
              order_of(similar, "decoder layer 1 cross-attention"));

    for (const SiteConversion& site : plan(target, {.pooling = pooling}).sites) {
      EXPECT_GT(site.score_loss, 0.01) << describe(site.parent);
      EXPECT_GT(site.output_loss, 0.01) << describe(site.parent);
    }
  }
}

TEST_F(ConvertedModelTest, SelfAttentionsOfAStackShareOneOrder) {
  const Model values = random_model(parent);
  store(values);
  const ConversionOptions similar = {.pooling = Pooling::kSpectral, .grouping = Grouping::kSimilarity};
  const ConversionPlan conversion = plan(model(2, 4), similar);
  EXPECT_EQ(order_of(conversion, "encoder layer 0 self-attention"),
            order_of(conversion, "encoder layer 1 self-attention"));
  EXPECT_EQ(order_of(conversion, "decoder layer 0 self-attention"),
            order_of(conversion, "decoder layer 1 self-attention"));
  EXPECT_NE(order_of(conversion, "decoder layer 0 self-attention"),
            order_of(conversion, "encoder layer 0 self-attention"));
  expect_rest_unchanged(load(*reader, parent, conversion, 1), values, parent, conversion);
}

// It has to follow the other self-attention's order, because they share the position bias.
TEST_F(ConvertedModelTest, ASelfAttentionThatKeepsItsHeadsIsReorderedWithTheOther) {
  const Model values = with_identical_heads(parent, scattered_group);
  store(values);
  ModelConfig target = parent;
  target.site_kv_groups = {8, 2, 2, 2};
  for (const Pooling pooling : {Pooling::kMean, Pooling::kSpectral}) {
    const ConversionPlan conversion = plan(target, {.pooling = pooling, .grouping = Grouping::kSimilarity});
    ASSERT_EQ(conversion.sites.size(), 4U);
    const SiteConversion& kept = conversion.sites[0];
    EXPECT_EQ(describe(kept.parent), "decoder layer 0 self-attention");
    EXPECT_EQ(kept.target.kv_groups, 8);
    EXPECT_FALSE(std::is_sorted(kept.order.begin(), kept.order.end()));
    const Model converted = load(*reader, parent, conversion, 2);
    expect_exact(converted, values, parent, conversion);
    expect_rest_unchanged(converted, values, parent, conversion);
    const index_t d = parent.d_kv;
    for (const char* name : {"q.weight", "k.weight", "v.weight"}) {
      const Matrix before = matrix_of(values, kept.parent.prefix + name, parent.d_model);
      const Matrix after = matrix_of(converted, kept.parent.prefix + name, parent.d_model);
      for (index_t slot = 0; slot < 8; ++slot) {
        const index_t head = kept.order[static_cast<std::size_t>(slot)];
        EXPECT_EQ(after.row_block(slot * d, (slot + 1) * d).values,
                  before.row_block(head * d, (head + 1) * d).values);
      }
    }
  }
  // Where only cross-attention changes, there is nothing to follow.
  target.site_kv_groups = {8, 2, 8, 2};
  const ConversionPlan conversion = plan(target, {.grouping = Grouping::kSimilarity});
  EXPECT_EQ(conversion.sites.size(), 2U);
  expect_rest_unchanged(load(*reader, parent, conversion, 1), values, parent, conversion);
}

TEST_F(ConvertedModelTest, FreshHeadsKeepTheOrder) {
  store(with_identical_heads(parent, scattered_group));
  for (const SiteConversion& site :
       plan(model(2, 2), {.pooling = Pooling::kRandom, .grouping = Grouping::kSimilarity}).sites) {
    EXPECT_TRUE(std::is_sorted(site.order.begin(), site.order.end()));
  }
}

TEST_F(ConvertedModelTest, GroupsOfTheParentAreMergedWithAllTheirQueries) {
  parent = model(4, 4);
  const Model values = with_identical_heads(parent, [](const AttentionSite& site, index_t head) {
    return site.kind == AttentionKind::kCross ? head / 2 : head % 2;
  });
  store(values);
  for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst, Pooling::kSpectral}) {
    const ConversionPlan conversion =
        plan(model(2, 2), {.pooling = pooling, .grouping = Grouping::kSimilarity});
    EXPECT_EQ(order_of(conversion, "decoder layer 1 self-attention"), (std::vector<index_t>{0, 2, 1, 3}));
    EXPECT_EQ(order_of(conversion, "decoder layer 1 cross-attention"), (std::vector<index_t>{0, 1, 2, 3}));
    const Model converted = load(*reader, parent, conversion, 2);
    expect_exact(converted, values, parent, conversion);
    expect_rest_unchanged(converted, values, parent, conversion);
  }
}

TEST_F(ConvertedModelTest, AllLayoutsGetTheSameModel) {
  store(random_model(parent));
  ModelConfig uneven = model(2, 4);
  uneven.site_kv_groups = {1, 8, 4, 2};
  const std::vector<ConversionOptions> ways = {
      {.pooling = Pooling::kMean, .grouping = Grouping::kSimilarity},
      {.pooling = Pooling::kFirst},
      {.pooling = Pooling::kSpectral},
      {.pooling = Pooling::kCalibrated, .grouping = Grouping::kSimilarity}};
  for (const ModelConfig& target : {model(2, 4), uneven}) {
    for (const ConversionOptions& options : ways) {
      const ConversionPlan conversion = plan(target, options);
      const Model whole = load(*reader, parent, conversion, 1);
      for (const int tp : {2, 4}) EXPECT_EQ(load(*reader, parent, conversion, tp), whole) << tp;
    }
  }
}

TEST_F(ConvertedModelTest, AttentionsThatKeepTheirHeadsAreReadAsTheyAre) {
  const Model values = random_model(parent);
  store(values);
  ModelConfig target = parent;
  target.site_kv_groups = {8, 2, 4, 8};
  const ConversionPlan conversion = plan(target, {.pooling = Pooling::kSpectral});
  const Model converted = load(*reader, parent, conversion, 2);
  expect_rest_unchanged(converted, values, parent, conversion);
  for (const SiteConversion& site : conversion.sites) {
    for (const char* name : {"q.weight", "k.weight", "v.weight", "o.weight"}) {
      EXPECT_NE(converted.at(site.parent.prefix + name), values.at(site.parent.prefix + name));
    }
  }
  EXPECT_EQ(conversion.sites.size(), 2U);
}

TEST_F(ConvertedModelTest, HalfPrecisionConvertsAsItsFloatValues) {
  Model values = random_model(parent);
  for (auto& [name, weight] : values) {
    for (float& value : weight) value = static_cast<float>(bfloat16(value));
  }
  for (const Pooling pooling : {Pooling::kMean, Pooling::kSpectral, Pooling::kCalibrated}) {
    const ConversionOptions options = {.pooling = pooling, .grouping = Grouping::kSimilarity};
    store(values);
    const Model from_floats = load(*reader, parent, plan(model(2, 4), options), 1);
    store(values, Storage::kBFloat16);
    EXPECT_EQ(load(*reader, parent, plan(model(2, 4), options), 1), from_floats);
  }
}

// What heads pass on before and after a conversion, where the one is a known linear map of the other.
struct KnownOutputs {
  // Of a group [m, m].
  static Matrix map_of(const SiteConversion& site, index_t group) {
    const index_t size = site.query_heads / site.target.kv_groups * 5;
    return test::random_matrix(fmt::format("map {} {}", site.parent.prefix, group), size, size);
  }
  std::vector<OutputMoments> operator()(std::span<const SiteConversion> sites,
                                        std::span<const std::vector<Matrix>> shared) const {
    std::vector<OutputMoments> result;
    for (std::size_t s = 0; s < sites.size(); ++s) {
      EXPECT_EQ(std::ssize(shared[s]), sites[s].target.kv_groups);
      OutputMoments& moments = result.emplace_back();
      for (index_t g = 0; g < sites[s].target.kv_groups; ++g) {
        const Matrix map = map_of(sites[s], g);
        const Matrix after = test::random_moments("after", map.rows, 6 * map.rows);
        const Matrix across = product(map, after);
        moments.before.push_back(product(across, map, Transpose::kNo, Transpose::kYes));
        moments.across.push_back(across);
        moments.after.push_back(after);
      }
    }
    return result;
  }
};

TEST_F(ConvertedModelTest, OutputsAreFittedToWhatHeadsPassOnTogether) {
  const Model values = random_model(parent);
  store(values);
  ModelConfig target = model(2, 4);
  target.site_kv_groups = {2, 8, 4, 1};
  ConversionOptions options = {.pooling = Pooling::kCalibrated, .grouping = Grouping::kSimilarity};
  Calibration with_outputs = calibration(options);
  const ConversionPlan plain = plan_conversion(world, *reader, parent, target, options, with_outputs);
  with_outputs.outputs = KnownOutputs();
  const ConversionPlan fitted = plan_conversion(world, *reader, parent, target, options, with_outputs);
  const Model before = load(*reader, parent, plain, 1), after = load(*reader, parent, fitted, 1);
  for (const int tp : {2, 4}) EXPECT_EQ(load(*reader, parent, fitted, tp), after) << tp;
  for (const SiteConversion& site : fitted.sites) {
    if (site.heads_per_group() == 1) {
      EXPECT_TRUE(site.outputs.empty());
      continue;
    }
    EXPECT_LT(site.output_loss, 1e-5) << describe(site.parent);
    const std::string name = site.parent.prefix + "o.weight";
    const Matrix own = matrix_of(values, name, 8 * 5), converted = matrix_of(after, name, 8 * 5);
    const index_t size = 8 / site.target.kv_groups * 5;
    for (index_t g = 0; g < site.target.kv_groups; ++g) {
      const Matrix& outputs = site.outputs[static_cast<std::size_t>(g)];
      EXPECT_LT(test::relative_distance(KnownOutputs::map_of(site, g), outputs), 1e-2);
      std::vector<Matrix> heads;
      for (const index_t head : site.query_heads_of(g)) {
        heads.push_back(own.column_block(head * 5, (head + 1) * 5).transposed());
      }
      EXPECT_LT(test::relative_distance(product(stack(heads), outputs, Transpose::kYes),
                                        converted.column_block(g * size, (g + 1) * size)),
                kFloatRounding);
    }
  }
  // Nothing else notices.
  for (const auto& [name, weight] : before) {
    EXPECT_TRUE(name.ends_with("o.weight") || after.at(name) == weight) << name;
  }
}

}  // namespace
}  // namespace regroup
