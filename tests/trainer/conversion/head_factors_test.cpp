// The measure of head factors against dense d_model x d_model products.
#include "trainer/conversion/head_factors.h"

#include <array>
#include <limits>
#include <optional>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/conversion/matrices.h"
#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::distance;
using test::random_matrix;
using test::random_moments;
using test::sum;
using test::trace;

constexpr index_t kModel = 10, kHead = 3, kQueries = 8;

std::vector<float> to_floats(const Matrix& a) { return {a.values.begin(), a.values.end()}; }
Matrix as_stored(Matrix a) {
  for (double& value : a.values) value = static_cast<double>(static_cast<float>(value));
  return a;
}

// One attention with `kv_heads` key/value heads in a file.
class Site {
 public:
  explicit Site(index_t kv_heads, double broken = 0)
      : q(as_stored(random_matrix("q", kQueries * kHead, kModel))),
        k(as_stored(random_matrix("k", kv_heads * kHead, kModel))),
        v(as_stored(random_matrix("v", kv_heads * kHead, kModel))),
        o(as_stored(random_matrix("o", kModel, kQueries * kHead))),
        queries_per_head(kQueries / kv_heads) {
    parent.d_model = kModel;
    parent.d_kv = kHead;
    parent.num_heads = kQueries;
    parent.kv_groups = kv_heads;
    site = {.kind = AttentionKind::kDecoderSelf, .layer = 0, .prefix = "site.", .kv_groups = kv_heads};
    std::vector<test::PlainTensor> tensors;
    for (const auto& [name, weight] :
         {std::pair<const char*, Matrix*>{"q", &q}, {"k", &k}, {"v", &v}, {"o", &o}}) {
      if (broken != 0) weight->values[weight->values.size() - 2] = broken;  // in the last head
      tensors.push_back(test::plain_tensor(std::string("site.") + name + ".weight",
                                           {weight->rows, weight->columns}, to_floats(*weight)));
    }
    test::write_plain_file(directory_ / "site.safetensors", tensors);
    reader.emplace(directory_ / "site.safetensors");
  }

  SiteFactors factors(const SecondMoments* moments = nullptr) const {
    return SiteFactors(*reader, parent, site, moments);
  }
  Matrix q_head(index_t i) const { return q.row_block(i * kHead, (i + 1) * kHead); }
  Matrix k_head(index_t i) const { return k.row_block(i * kHead, (i + 1) * kHead); }
  Matrix v_head(index_t i) const { return v.row_block(i * kHead, (i + 1) * kHead); }
  Matrix o_head(index_t i) const { return o.column_block(i * kHead, (i + 1) * kHead); }

  Matrix q, k, v, o;
  index_t queries_per_head;
  ModelConfig parent;
  AttentionSite site;
  std::optional<CheckpointReader> reader;

 private:
  test::TemporaryDirectory directory_;
};

SecondMoments random_site_moments(index_t rank) {
  const Matrix attended = random_moments("attended", kModel, rank);
  return {.width = kModel,
          .query = random_moments("query", kModel, rank).values,
          .key = random_moments("key", kModel, rank).values,
          .attending = sum(attended, random_moments("spread", kModel, rank)).values,
          .attended = attended.values};
}

Matrix square(const std::vector<double>& values) {
  Matrix result(kModel, kModel);
  result.values = values;
  return result;
}

// What moments become before they are used: (1 - r) C + r (trace C / width) I.
Matrix shrunk(const Matrix& moments, double share = 1e-3) {
  const Matrix result = sum(Matrix(kModel, kModel), moments, 1 - share);
  return sum(result, Matrix::identity(kModel), share * trace(moments) / kModel);
}

// trace(a d b d^T) = || a^1/2 d b^1/2 ||_F^2.
double weighed_square(const Matrix& a, const Matrix& d, const Matrix& b) {
  return trace(product(product(a, d), product(b, d, Transpose::kNo, Transpose::kYes)));
}

struct Measure {
  Matrix queries, keys, values;
};

Measure measure_of(const SecondMoments& moments) {
  const Matrix attended = square(moments.attended);
  return {.queries = shrunk(square(moments.query)),
          .keys = shrunk(sum(square(moments.attending), attended, -1)),
          .values = shrunk(square(moments.attending))};
}

SharedHead some_shared(index_t heads) {
  SharedHead result{.combine = random_matrix("combine", kHead, heads * kHead), .mix = {}};
  for (index_t h = 0; h < heads; ++h) {
    result.mix.push_back(random_matrix("mix " + std::to_string(h), kHead, kHead));
  }
  return result;
}

Matrix rows_of(const Matrix& weight, std::span<const index_t> heads) {
  std::vector<Matrix> blocks;
  for (const index_t head : heads) blocks.push_back(weight.row_block(head * kHead, (head + 1) * kHead));
  return stack(blocks);
}

// sum over query heads of || C_q^1/2 (W_q^T W_k - W_q'^T W_k') C_k^1/2 ||^2, new weights as documented.
double lost_scores(const Site& site, std::span<const index_t> heads, const SharedHead& merged,
                   const Measure& in) {
  const Matrix shared = product(merged.combine, rows_of(site.k, heads));
  double lost = 0;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    for (index_t i = 0; i < site.queries_per_head; ++i) {
      const Matrix q = site.q_head(heads[h] * site.queries_per_head + i);
      const Matrix before = product(q, site.k_head(heads[h]), Transpose::kYes);
      const Matrix after = product(product(merged.mix[h], q, Transpose::kYes), shared, Transpose::kYes);
      lost += weighed_square(in.queries, sum(before, after, -1), in.keys);
    }
  }
  return lost;
}

double lost_outputs(const Site& site, std::span<const index_t> heads, const SharedHead& merged,
                    const Measure& in) {
  const Matrix shared = product(merged.combine, rows_of(site.v, heads));
  double lost = 0;
  for (std::size_t h = 0; h < heads.size(); ++h) {
    for (index_t i = 0; i < site.queries_per_head; ++i) {
      const Matrix o = site.o_head(heads[h] * site.queries_per_head + i);
      const Matrix before = product(o, site.v_head(heads[h]));
      const Matrix after = product(product(o, merged.mix[h]), shared);
      lost += weighed_square(Matrix::identity(kModel), sum(before, after, -1), in.values);
    }
  }
  return lost;
}

void expect_measured(const Site& site, const SecondMoments* moments, const Measure& measure) {
  const std::array<index_t, 3> heads = {3, 0, 2};
  const SiteFactors factors = site.factors(moments);
  const HeadFactors scores = factors.scores(heads), outputs = factors.outputs(heads);
  EXPECT_EQ(scores.weights.values, rows_of(site.k, heads).values);
  EXPECT_EQ(outputs.weights.values, rows_of(site.v, heads).values);
  for (const SharedHead& merged : {some_shared(3), mean_head(3, kHead), merge_heads(scores.products)}) {
    const double lost = lost_scores(site, heads, merged, measure);
    EXPECT_NEAR(merging_loss(scores.products, merged), lost, 1e-10 * lost);
  }
  for (const SharedHead& merged : {some_shared(3), first_head(3, kHead), merge_heads(outputs.products)}) {
    const double lost = lost_outputs(site, heads, merged, measure);
    EXPECT_NEAR(merging_loss(outputs.products, merged), lost, 1e-10 * lost);
  }
}

TEST(SiteFactors, MeasureByMoments) {
  for (const index_t kv_heads : {8, 4}) {
    const Site site(kv_heads);
    for (const index_t rank : {2 * kModel, index_t{2}}) {  // fewer tokens than d_model, too
      const SecondMoments moments = random_site_moments(rank);
      expect_measured(site, &moments, measure_of(moments));
    }
  }
}

TEST(SiteFactors, MeasureAllInputsAlikeWithoutMoments) {
  const Matrix one = Matrix::identity(kModel);
  for (const index_t kv_heads : {8, 4}) {
    expect_measured(Site(kv_heads), nullptr, {.queries = one, .keys = one, .values = one});
  }
}

TEST(SiteFactors, MeasureAllInputsAlikeWhereNothingWasSeen) {
  const std::vector<double> zeros(kModel * kModel);
  const SecondMoments nothing = {
      .width = kModel, .query = zeros, .key = zeros, .attending = zeros, .attended = zeros};
  const Matrix one = Matrix::identity(kModel);
  expect_measured(Site(4), &nothing, {.queries = one, .keys = one, .values = one});
}

// Attention that looks at one key only has no spread of keys but what rounding leaves, of either sign.
TEST(SiteFactors, TakeAttentionWithoutSpread) {
  const Site site(4);
  const std::array<index_t, 2> heads = {0, 1};
  for (const double share : {1.0, 1 + 1e-14, 1 - 1e-14, 1 - 1e-7}) {
    SecondMoments moments = random_site_moments(2 * kModel);
    for (std::size_t i = 0; i < moments.attended.size(); ++i) {
      moments.attending[i] = share * moments.attended[i];
    }
    const HeadFactors scores = site.factors(&moments).scores(heads);
    const SharedHead merged = merge_heads(scores.products);
    EXPECT_TRUE(test::is_finite(merged.combine)) << share;
    EXPECT_LE(merging_loss(scores.products, merged), merging_energy(scores.products)) << share;
  }
}

// Moments of a model that runs in bfloat16 are positive up to rounding only.
TEST(SiteFactors, ShrinkMoreWhereMomentsAreIndefinite) {
  const Site site(4);
  for (const double share : {1e-2, 1e-1}) {
    SecondMoments moments = random_site_moments(2 * kModel);
    Matrix spread = random_moments("spread", kModel, kModel);
    // One direction is negative by half of what this share makes up for.
    for (index_t i = 1; i < kModel; ++i) spread(0, i) = spread(i, 0) = 0;
    spread(0, 0) = -0.5 * share * (trace(spread) - spread(0, 0)) / kModel;
    moments.attending = sum(square(moments.attended), spread).values;
    Measure measure = measure_of(moments);
    measure.keys = shrunk(spread, share);
    expect_measured(site, &moments, measure);
  }
}

TEST(SiteFactors, RefuseWeightsThatAreNotFinite) {
  for (const double broken :
       {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    const Site site(4, broken);
    const SiteFactors factors = site.factors();
    const std::array<index_t, 1> whole = {0}, last = {3};
    EXPECT_THAT(test::refusal([&] { factors.scores(last); }),
                testing::HasSubstr("'site.q.weight' of the checkpoint is not finite"));
    EXPECT_THAT(test::refusal([&] { factors.outputs(last); }),
                testing::HasSubstr("'site.o.weight' of the checkpoint is not finite"));
    EXPECT_EQ(test::refusal([&] { factors.scores(whole); }), "accepted");
    EXPECT_THAT(test::refusal([&] { read_head(*site.reader, "site.v.weight", 3, kHead, kModel); }),
                testing::HasSubstr("'site.v.weight'"));
  }
}

// Sums of the squares of each direction: of its row of shared weights, and of what the mixes make of R_h.
struct DirectionSizes {
  std::vector<double> right = std::vector<double>(kHead), left = std::vector<double>(kHead);
};

DirectionSizes sizes_of(const HeadFactors& heads, const SharedHead& merged) {
  DirectionSizes result;
  const Matrix shared = product(merged.combine, heads.weights);
  for (index_t i = 0; i < kHead; ++i) {
    result.right[static_cast<std::size_t>(i)] = shared.row_block(i, i + 1).squared_norm();
    for (std::size_t h = 0; h < merged.mix.size(); ++h) {
      result.left[static_cast<std::size_t>(i)] +=
          product(heads.products.left[h], merged.mix[h]).column_block(i, i + 1).squared_norm();
    }
  }
  return result;
}

TEST(Balance, KeepsProductsAndSharesSizes) {
  const Site site(8);
  const SecondMoments moments = random_site_moments(2 * kModel);
  const std::array<index_t, 4> heads = {0, 2, 5, 7};
  for (const HeadFactors& factors : {site.factors(&moments).scores(heads), site.factors().outputs(heads)}) {
    const SharedHead before = merge_heads(factors.products);
    SharedHead after = before;
    balance(factors, after);
    for (std::size_t h = 0; h < heads.size(); ++h) {
      const Matrix old_product = product(before.mix[h], product(before.combine, factors.weights));
      const Matrix new_product = product(after.mix[h], product(after.combine, factors.weights));
      EXPECT_LT(distance(new_product, old_product), 1e-12);
    }
    const DirectionSizes sizes = sizes_of(factors, after);
    double whole = 0;
    for (std::size_t i = 0; i < kHead; ++i) {
      whole += sizes.right[i];
      // One ratio for all directions: what is left is the common factor that gives the shared head its norm.
      EXPECT_NEAR(sizes.left[i] / sizes.right[i], sizes.left[0] / sizes.right[0],
                  1e-10 * sizes.left[0] / sizes.right[0]);
    }
    const double mean = factors.weights.squared_norm() / static_cast<double>(heads.size());
    EXPECT_NEAR(whole, mean, 1e-12 * mean);
  }
}

TEST(Balance, LeavesOneHeadAsItIs) {
  const std::array<index_t, 1> one = {2};
  const HeadFactors factors = Site(8).factors().scores(one);
  SharedHead merged = merge_heads(factors.products);
  balance(factors, merged);
  EXPECT_EQ(merged.combine.values, Matrix::identity(kHead).values);
  EXPECT_EQ(merged.mix[0].values, Matrix::identity(kHead).values);
}

TEST(Balance, TakesDirectionsThatCarryNothing) {
  const std::array<index_t, 2> two = {2, 3};
  HeadFactors factors = Site(8).factors().scores(two);
  // Rank 1; then nothing.
  factors.weights = product(random_matrix("l", 2 * kHead, 1), random_matrix("r", 1, kModel));
  for (int i = 0; i < 2; ++i) {
    factors.products.right = factors.weights;
    SharedHead merged = merge_heads(factors.products);
    balance(factors, merged);
    EXPECT_TRUE(test::is_finite(merged.combine));
    for (const Matrix& mix : merged.mix) EXPECT_TRUE(test::is_finite(mix));
    EXPECT_LE(merging_loss(factors.products, merged), 1e-24 * merging_energy(factors.products));
    const double mean = factors.weights.squared_norm() / 2;
    EXPECT_NEAR(product(merged.combine, factors.weights).squared_norm(), mean, 1e-12 * mean);
    factors.weights = Matrix(2 * kHead, kModel);
  }
}

}  // namespace
}  // namespace regroup
