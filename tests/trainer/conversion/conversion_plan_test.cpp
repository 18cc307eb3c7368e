// Plans: what is lost by each method, who is asked for moments, and that ranks do not matter.
#include "trainer/conversion/conversion_plan.h"

#include <limits>
#include <set>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/conversion/model_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::model;
using test::Model;
using test::random_model;
using test::refusal;
using test::write_model;
using testing::HasSubstr;

constexpr index_t kEverything = std::numeric_limits<index_t>::max();

// A model in a file, and plans of its conversion.
class PlanTest : public testing::Test {
 protected:
  explicit PlanTest(ModelConfig config = model(8, 8))
      : parent(std::move(config)), values(random_model(parent)), world(ProcessGroup::world()) {
    write_model(directory / "m.safetensors", parent, values);
  }

  ConversionPlan plan(const ModelConfig& target, const ConversionOptions& options,
                      const Calibration& calibration = {}) const {
    return plan_conversion(world, CheckpointReader(directory / "m.safetensors"), parent, target, options,
                           calibration);
  }

  test::TemporaryDirectory directory;
  ModelConfig parent;
  Model values;
  ProcessGroup world;
};

// Moments that differ from attention to attention and strongly between directions.
SecondMoments moments_of(index_t site, index_t width) {
  const auto some = [&](const std::string& name) {
    Matrix x = test::random_matrix(name + std::to_string(site), width, 40);
    for (index_t i = 0; i < width; ++i) {
      for (index_t j = 0; j < x.columns; ++j)
        x(i, j) *= std::pow(0.5, static_cast<double>((i + site) % width));
    }
    return product(x, x, Transpose::kNo, Transpose::kYes);
  };
  const Matrix attended = some("attended");
  return {.width = width,
          .query = some("query").values,
          .key = some("key").values,
          .attending = test::sum(attended, some("spread")).values,
          .attended = attended.values};
}

using Requests = std::vector<std::vector<index_t>>;

// Every request is noted where `requests` is given.
Calibration made_up(index_t width, index_t sites_at_once = kEverything, Requests* requests = nullptr) {
  return {.measure =
              [width, requests](std::span<const index_t> sites) {
                if (requests != nullptr) requests->emplace_back(sites.begin(), sites.end());
                std::vector<SecondMoments> result;
                for (const index_t site : sites) result.push_back(moments_of(site, width));
                return result;
              },
          .sites_at_once = sites_at_once};
}

void expect_same(const std::vector<SharedHead>& a, const std::vector<SharedHead>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t g = 0; g < a.size(); ++g) {
    EXPECT_EQ(a[g].combine.values, b[g].combine.values);
    ASSERT_EQ(a[g].mix.size(), b[g].mix.size());
    for (std::size_t h = 0; h < a[g].mix.size(); ++h) EXPECT_EQ(a[g].mix[h].values, b[g].mix[h].values);
  }
}

// To the bit.
void expect_same(const ConversionPlan& a, const ConversionPlan& b) {
  EXPECT_EQ(a.target, b.target);
  ASSERT_EQ(a.sites.size(), b.sites.size());
  for (std::size_t s = 0; s < a.sites.size(); ++s) {
    const SiteConversion &x = a.sites[s], &y = b.sites[s];
    EXPECT_EQ(x.parent.prefix, y.parent.prefix);
    EXPECT_EQ(x.target.kv_groups, y.target.kv_groups);
    EXPECT_EQ(x.order, y.order);
    EXPECT_EQ(x.score_loss, y.score_loss);
    EXPECT_EQ(x.output_loss, y.output_loss);
    EXPECT_EQ(x.score_error, y.score_error);
    expect_same(x.keys, y.keys);
    expect_same(x.values, y.values);
  }
}

// Every pooling, grouping and budget.
std::vector<ConversionOptions> some_ways() {
  return {{.pooling = Pooling::kMean, .grouping = Grouping::kSimilarity, .budget = Budget::kUneven},
          {.pooling = Pooling::kFirst},
          {.pooling = Pooling::kSpectral, .grouping = Grouping::kSimilarity},
          {.pooling = Pooling::kCalibrated},
          {.pooling = Pooling::kCalibrated, .grouping = Grouping::kSimilarity, .budget = Budget::kUneven}};
}

TEST_F(PlanTest, OfOneRankIsThatOfAll) {
  const ProcessGroup alone = world.split(world.rank(), 0);
  const CheckpointReader reader(directory / "m.safetensors");
  for (const ConversionOptions& options : some_ways()) {
    const Calibration calibration =
        options.pooling == Pooling::kCalibrated ? made_up(parent.d_model) : Calibration{};
    expect_same(plan(model(2, 4), options, calibration),
                plan_conversion(alone, reader, parent, model(2, 4), options, calibration));
  }
}

TEST_F(PlanTest, DoesNotDependOnHowManySitesAreHeldAtOnce) {
  for (const ConversionOptions& options : some_ways()) {
    const ConversionPlan all = plan(model(2, 4), options, made_up(parent.d_model));
    for (const index_t at_once : {1, 2}) {
      expect_same(plan(model(2, 4), options, made_up(parent.d_model, at_once)), all);
    }
  }
}

TEST_F(PlanTest, AsksForTheMomentsOfAttentionsThatChange) {
  const auto requests = [&](const ModelConfig& target, ConversionOptions options, index_t at_once) {
    Requests result;
    options.pooling = Pooling::kCalibrated;
    plan(target, options, made_up(parent.d_model, at_once, &result));
    return result;
  };
  const ModelConfig decoder = model(2, 8);  // sites 2 to 5; 0 and 1 are the encoder's
  EXPECT_EQ(requests(decoder, {}, kEverything), (Requests{{2, 3, 4, 5}}));
  EXPECT_EQ(requests(decoder, {}, 2), (Requests{{2, 3}, {4, 5}}));
  EXPECT_EQ(requests(decoder, {}, 3), (Requests{{2, 3, 4}, {5}}));
  EXPECT_EQ(requests(model(8, 2), {}, 1), (Requests{{0}, {1}}));
  EXPECT_EQ(requests(parent, {}, 1), Requests{});
  // Compared, then merged: once where all fit.
  const ConversionOptions similar = {.grouping = Grouping::kSimilarity};
  EXPECT_EQ(requests(decoder, similar, kEverything), (Requests{{2, 3, 4, 5}}));
  EXPECT_EQ(requests(decoder, similar, 2), (Requests{{2, 3}, {4, 5}, {2, 3}, {4, 5}}));
  // One self-attention of the stack changes: both are reordered.
  ModelConfig uneven = parent;
  uneven.site_kv_groups = {8, 8, 4, 8};
  EXPECT_EQ(requests(uneven, {}, kEverything), (Requests{{4}}));
  EXPECT_EQ(requests(uneven, similar, kEverything), (Requests{{2, 4}}));
  // The budget is shared out over all of the decoder.
  EXPECT_EQ(requests(decoder, {.budget = Budget::kUneven}, kEverything).front(),
            (std::vector<index_t>{2, 3, 4, 5}));
}

TEST_F(PlanTest, NeedsMomentsForCalibratedOnly) {
  EXPECT_THROW(plan(model(2, 8), {.pooling = Pooling::kCalibrated}), InternalError);
}

struct Losses {
  double scores, outputs;
};

std::vector<Losses> losses(const ConversionPlan& plan) {
  std::vector<Losses> result;
  for (const SiteConversion& site : plan.sites) result.push_back({site.score_loss, site.output_loss});
  return result;
}

TEST_F(PlanTest, SpectralLosesLessThanMeanAndFirstAndRandomEverything) {
  for (const index_t groups : {1, 2, 4}) {
    const ModelConfig target = model(groups, 4);
    const auto spectral = losses(plan(target, {.pooling = Pooling::kSpectral}));
    const auto mean = losses(plan(target, {.pooling = Pooling::kMean}));
    const auto first = losses(plan(target, {.pooling = Pooling::kFirst}));
    const auto random = losses(plan(target, {.pooling = Pooling::kRandom}));
    ASSERT_EQ(spectral.size(), 6U);
    for (std::size_t s = 0; s < spectral.size(); ++s) {
      EXPECT_GT(spectral[s].scores, 0.01);
      EXPECT_GT(spectral[s].outputs, 0.01);
      for (const auto& other : {mean, first}) {
        EXPECT_LT(spectral[s].scores, other[s].scores);
        EXPECT_LT(spectral[s].outputs, other[s].outputs);
      }
      EXPECT_DOUBLE_EQ(random[s].scores, 1);
      EXPECT_DOUBLE_EQ(random[s].outputs, 1);
    }
  }
}

TEST_F(PlanTest, CalibratedLosesLeastInTheMeasureOfItsMoments) {
  const ModelConfig target = model(2, 4);
  const Calibration calibration = made_up(parent.d_model);
  const ConversionPlan best = plan(target, {.pooling = Pooling::kCalibrated}, calibration);
  for (const Pooling pooling : {Pooling::kMean, Pooling::kFirst, Pooling::kRandom, Pooling::kSpectral}) {
    const ConversionPlan other = plan(target, {.pooling = pooling}, calibration);
    ASSERT_EQ(other.sites.size(), best.sites.size());
    for (std::size_t s = 0; s < best.sites.size(); ++s) {
      EXPECT_LT(best.sites[s].score_loss, other.sites[s].score_loss);
      EXPECT_LT(best.sites[s].output_loss, other.sites[s].output_loss);
      EXPECT_LT(best.sites[s].score_error, other.sites[s].score_error);
    }
  }
}

// With a calibration its losses are told in other moments, and it is what it was.
TEST_F(PlanTest, SpectralDoesNotDependOnACalibration) {
  const ModelConfig target = model(2, 4);
  const ConversionPlan told = plan(target, {.pooling = Pooling::kSpectral}, made_up(parent.d_model));
  const ConversionPlan plain = plan(target, {.pooling = Pooling::kSpectral});
  ASSERT_EQ(told.sites.size(), plain.sites.size());
  for (std::size_t s = 0; s < plain.sites.size(); ++s) {
    expect_same(told.sites[s].keys, plain.sites[s].keys);
    expect_same(told.sites[s].values, plain.sites[s].values);
    EXPECT_NE(told.sites[s].score_loss, plain.sites[s].score_loss);
    EXPECT_GE(told.sites[s].score_loss, 0);
  }
}

TEST_F(PlanTest, SharesAnUnevenBudgetOut) {
  for (const index_t groups : {1, 2, 4}) {
    for (const bool calibrated : {false, true}) {
      ConversionOptions options = {.pooling = calibrated ? Pooling::kCalibrated : Pooling::kSpectral,
                                   .budget = Budget::kUneven};
      const Calibration calibration = calibrated ? made_up(parent.d_model) : Calibration{};
      const ModelConfig target = model(groups, 8);
      const ConversionPlan uneven = plan(target, options, calibration);
      options.budget = Budget::kEven;
      const ConversionPlan even = plan(target, options, calibration);
      const std::vector<index_t>& chosen = uneven.target.site_kv_groups;
      ASSERT_EQ(chosen.size(), 4U);
      EXPECT_LE(std::accumulate(chosen.begin(), chosen.end(), index_t{0}), 4 * target.kv_groups);
      for (const index_t g : chosen) EXPECT_TRUE(std::set<index_t>({1, 2, 4, 8}).contains(g)) << g;
      EXPECT_EQ(uneven.target.kv_groups, target.kv_groups);
      EXPECT_NO_THROW(validate(uneven.target));
      const auto whole = [&](const ConversionPlan& plan) {
        double sum = 0;
        for (const SiteConversion& site : plan.sites) {
          sum += (calibrated ? site.score_error : site.score_loss) + site.output_loss;
        }
        return sum;
      };
      EXPECT_LE(whole(uneven), whole(even) * (1 + 1e-12)) << groups;
    }
  }
}

// A fresh head loses everything whatever the group's size, a head that stays loses nothing.
TEST_F(PlanTest, AnUnevenBudgetOfFreshHeadsKeepsHeadsWhereItCan) {
  const ConversionPlan fresh = plan(model(4, 8), {.pooling = Pooling::kRandom, .budget = Budget::kUneven});
  std::vector<index_t> chosen = fresh.target.site_kv_groups;
  std::sort(chosen.begin(), chosen.end());
  EXPECT_EQ(chosen, (std::vector<index_t>{1, 1, 1, 8}));
}

TEST_F(PlanTest, ChangesOnlyAttentionsThatChange) {
  ModelConfig target = parent;
  target.site_kv_groups = {8, 2, 4, 8};
  target.encoder_kv_groups = 1;
  const ConversionPlan some = plan(target, {.pooling = Pooling::kSpectral});
  std::vector<std::string> names;
  for (const SiteConversion& site : some.sites) {
    names.push_back(describe(site.parent));
    EXPECT_TRUE(std::is_sorted(site.order.begin(), site.order.end()));
    EXPECT_EQ(std::ssize(site.keys), site.target.kv_groups);
    EXPECT_EQ(std::ssize(site.values), site.target.kv_groups);
    EXPECT_EQ(site.heads_per_group(), 8 / site.target.kv_groups);
    EXPECT_EQ(site.queries_per_head(), 1);
  }
  EXPECT_EQ(names,
            (std::vector<std::string>{"encoder layer 0 self-attention", "encoder layer 1 self-attention",
                                      "decoder layer 0 cross-attention", "decoder layer 1 self-attention"}));
  EXPECT_TRUE(plan(parent, {.pooling = Pooling::kSpectral}).sites.empty());
  EXPECT_TRUE(plan(parent, {.pooling = Pooling::kMean, .grouping = Grouping::kSimilarity}).sites.empty());
}

// The ranks do not share the tensor, but they share the refusal.
TEST_F(PlanTest, RefusesWeightsThatAreNotFinite) {
  const std::string name = "decoder.block.1.layer.1.EncDecAttention.v.weight";
  for (const float broken :
       {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    values.at(name).back() = broken;
    write_model(directory / "m.safetensors", parent, values);
    for (const Grouping grouping : {Grouping::kPosition, Grouping::kSimilarity}) {
      EXPECT_THAT(refusal([&] { plan(model(4, 8), {.pooling = Pooling::kSpectral, .grouping = grouping}); }),
                  HasSubstr("'" + name + "' of the checkpoint is not finite"));
    }
  }
}

TEST_F(PlanTest, RefusesWhatCannotBecomeTheTarget) {
  EXPECT_THAT(refusal([&] { plan(model(3, 8), {}); }), HasSubstr("use one of 1, 2, 4, 8"));
}

TEST_F(PlanTest, RefusesOneOrderForStacksOfUnequalHeads) {
  parent.site_kv_groups = {8, 8, 2, 8};
  write_model(directory / "m.safetensors", parent, random_model(parent));
  EXPECT_THAT(refusal([&] { plan(model(1, 8), {.grouping = Grouping::kSimilarity}); }),
              HasSubstr("layers 0 and 1"));
}

TEST(GroupChoices, ArePowersOfTwoThatDivideAndTheParentsOwn) {
  const auto choices = [](index_t groups) { return group_choices({.kv_groups = groups}); };
  EXPECT_EQ(choices(8), (std::vector<index_t>{1, 2, 4, 8}));
  EXPECT_EQ(choices(12), (std::vector<index_t>{1, 2, 4, 12}));
  EXPECT_EQ(choices(1), (std::vector<index_t>{1}));
}

}  // namespace
}  // namespace regroup
