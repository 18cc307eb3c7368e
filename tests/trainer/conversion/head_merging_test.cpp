// The closed form against its definition, perturbations and two iterative minimisers; and where ranks fail.
#include "trainer/conversion/head_merging.h"

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>

#include <gtest/gtest.h>

#include "tests/trainer/conversion/matrices.h"

namespace regroup {
namespace {

using test::distance;
using test::random_matrix;
using test::sum;

constexpr double kExact = 1e-24;  // of an energy: rounding, squared

HeadProducts random_heads(const std::string& name, index_t heads, index_t d_kv, index_t d_model) {
  HeadProducts result;
  for (index_t h = 0; h < heads; ++h) {
    result.left.push_back(random_matrix(name + " left " + std::to_string(h), d_kv, d_kv));
  }
  result.right = random_matrix(name + " right", heads * d_kv, d_model);
  return result;
}

// The R_h B_h, one below the other.
Matrix stacked_products(const HeadProducts& heads) {
  const index_t d = heads.d_kv();
  std::vector<Matrix> blocks;
  for (index_t h = 0; h < heads.heads(); ++h) {
    blocks.push_back(
        product(heads.left[static_cast<std::size_t>(h)], heads.right.row_block(h * d, (h + 1) * d)));
  }
  return stack(blocks);
}

// The definition: sum_h || R_h (B_h - mix_h combine B) ||^2.
double loss_of(const HeadProducts& heads, const SharedHead& merged) {
  const index_t d = heads.d_kv();
  const Matrix shared = product(merged.combine, heads.right);
  double loss = 0;
  for (index_t h = 0; h < heads.heads(); ++h) {
    const auto at = static_cast<std::size_t>(h);
    const Matrix lost = sum(heads.right.row_block(h * d, (h + 1) * d), product(merged.mix[at], shared), -1);
    loss += product(heads.left[at], lost).squared_norm();
  }
  return loss;
}

// The squares of the singular values behind the first d_kv.
double discarded(const HeadProducts& heads) {
  const std::vector<double> sigma = singular_values(stacked_products(heads)).sigma;
  double squares = 0;
  for (std::size_t i = static_cast<std::size_t>(heads.d_kv()); i < sigma.size(); ++i)
    squares += sigma[i] * sigma[i];
  return squares;
}

void expect_finite(const SharedHead& merged) {
  EXPECT_TRUE(test::is_finite(merged.combine));
  for (const Matrix& mix : merged.mix) EXPECT_TRUE(test::is_finite(mix));
}

SharedHead random_shared(const std::string& name, index_t heads, index_t d_kv) {
  SharedHead result{.combine = random_matrix(name + " combine", d_kv, heads * d_kv), .mix = {}};
  for (index_t h = 0; h < heads; ++h) {
    result.mix.push_back(random_matrix(name + " mix " + std::to_string(h), d_kv, d_kv));
  }
  return result;
}

// a + factor b.
SharedHead moved(const SharedHead& a, const SharedHead& b, double factor) {
  SharedHead result{.combine = sum(a.combine, b.combine, factor), .mix = {}};
  for (std::size_t h = 0; h < a.mix.size(); ++h) result.mix.push_back(sum(a.mix[h], b.mix[h], factor));
  return result;
}

TEST(MergeHeads, LeavesOneHeadAsItIs) {
  const HeadProducts heads = random_heads("one", 1, 3, 7);
  const SharedHead merged = merge_heads(heads);
  EXPECT_EQ(merged.combine.values, Matrix::identity(3).values);
  ASSERT_EQ(merged.mix.size(), 1U);
  EXPECT_EQ(merged.mix[0].values, Matrix::identity(3).values);
  EXPECT_EQ(merging_loss(heads, merged), 0);
}

TEST(MergeHeads, LosesNothingOfIdenticalHeads) {
  for (const index_t n : {2, 3, 8}) {
    HeadProducts heads = random_heads("same", n, 4, 11);
    for (index_t h = 1; h < n; ++h) {
      std::copy_n(heads.right.row(0), 4 * 11, heads.right.row(h * 4));
    }
    const double energy = merging_energy(heads);
    EXPECT_LE(merging_loss(heads, merge_heads(heads)), kExact * energy) << n;
    EXPECT_LE(merging_loss(heads, mean_head(n, 4)), kExact * energy) << n;
    EXPECT_LE(merging_loss(heads, first_head(n, 4)), kExact * energy) << n;
  }
}

TEST(MergeHeads, LosesNothingWhereHeadsDifferByABasis) {
  HeadProducts heads = random_heads("basis", 4, 3, 10);
  const Matrix common = random_matrix("common", 3, 10);
  heads.right = product(random_matrix("bases", 12, 3), common);
  const double energy = merging_energy(heads);
  EXPECT_LE(merging_loss(heads, merge_heads(heads)), kExact * energy);
  EXPECT_GT(merging_loss(heads, mean_head(4, 3)), 0.1 * energy);
  EXPECT_GT(merging_loss(heads, first_head(4, 3)), 0.1 * energy);
}

TEST(MergingLoss, IsItsDefinition) {
  const HeadProducts heads = random_heads("definition", 3, 4, 9);
  const double energy = stacked_products(heads).squared_norm();
  EXPECT_NEAR(merging_energy(heads), energy, 1e-12 * energy);
  SharedHead none = mean_head(3, 4);
  std::fill(none.combine.values.begin(), none.combine.values.end(), 0.0);
  EXPECT_NEAR(merging_loss(heads, none), energy, 1e-12 * energy);
  for (const SharedHead& merged :
       {random_shared("any", 3, 4), mean_head(3, 4), first_head(3, 4), merge_heads(heads)}) {
    const double loss = loss_of(heads, merged);
    EXPECT_NEAR(merging_loss(heads, merged), loss, 1e-12 * loss);
  }
}

TEST(MergeHeads, LosesTheDiscardedSingularValues) {
  for (const auto& [n, d, width] : {std::array<index_t, 3>{2, 3, 20}, {4, 3, 12}, {4, 5, 7}, {8, 2, 6}}) {
    const HeadProducts heads = random_heads("discarded", n, d, width);
    const double expected = discarded(heads);
    ASSERT_GT(expected, 0);
    EXPECT_NEAR(merging_loss(heads, merge_heads(heads)), expected, 1e-12 * merging_energy(heads));
  }
}

TEST(MergeHeads, GivesAnOrthonormalSharedHead) {
  const HeadProducts heads = random_heads("orthonormal", 3, 4, 15);
  const Matrix shared = product(merge_heads(heads).combine, heads.right);
  EXPECT_LT(distance(product(shared, shared, Transpose::kNo, Transpose::kYes), Matrix::identity(4)), 1e-12);
}

TEST(MergeHeads, IsNotBeatenByItsPerturbationsNorByMeanOrFirst) {
  const HeadProducts heads = random_heads("perturbed", 4, 3, 14);
  const SharedHead best = merge_heads(heads);
  const double loss = merging_loss(heads, best);
  for (int i = 0; i < 1000; ++i) {
    const double scale = std::pow(10.0, -(i % 8));  // 1 ... 1e-7
    const SharedHead other = moved(best, random_shared("move " + std::to_string(i), 4, 3), scale);
    EXPECT_GE(merging_loss(heads, other), loss * (1 - 1e-12)) << i;
  }
  EXPECT_GE(merging_loss(heads, mean_head(4, 3)), loss);
  EXPECT_GE(merging_loss(heads, first_head(4, 3)), loss);
}

// Alternating least squares: mixes for a given shared head, then the shared head for given mixes.
double alternating_minimum(const HeadProducts& heads, const std::string& start, int rounds) {
  const index_t n = heads.heads(), d = heads.d_kv();
  SharedHead at = random_shared(start, n, d);
  for (int round = 0; round < rounds; ++round) {
    const Matrix shared = product(at.combine, heads.right);
    const Matrix gram = product(shared, shared, Transpose::kNo, Transpose::kYes);
    std::vector<Matrix> lefts, weights;
    for (index_t h = 0; h < n; ++h) {
      const auto i = static_cast<std::size_t>(h);
      const Matrix target =
          product(heads.right.row_block(h * d, (h + 1) * d), shared, Transpose::kNo, Transpose::kYes);
      at.mix[i] = solve(gram, target.transposed()).transposed();
      lefts.push_back(product(heads.left[i], at.mix[i]));
      weights.push_back(product(heads.left[i], lefts.back(), Transpose::kYes));
    }
    const Matrix left = stack(lefts);
    at.combine = solve(product(left, left, Transpose::kYes), stack(weights).transposed());
  }
  return loss_of(heads, at);
}

TEST(MergeHeads, IsReachedByAlternatingLeastSquares) {
  const HeadProducts heads = random_heads("alternating", 4, 3, 14);
  const double loss = merging_loss(heads, merge_heads(heads));
  double least = std::numeric_limits<double>::infinity();
  for (const char* start : {"a", "b", "c", "d"}) {
    const double found = alternating_minimum(heads, start, 2000);
    EXPECT_GE(found, loss * (1 - 1e-12)) << start;
    least = std::min(least, found);
  }
  EXPECT_LE(least, loss * (1 + 1e-6));
}

// Gradient descent whose step grows while the loss falls and is halved where it does not.
double descended(const HeadProducts& heads, const std::string& start, int steps) {
  const index_t d = heads.d_kv();
  SharedHead at = random_shared(start, heads.heads(), d);
  double loss = loss_of(heads, at), step = 1e-3;
  for (int i = 0; i < steps; ++i) {
    const Matrix shared = product(at.combine, heads.right);
    SharedHead gradient = moved(at, at, -1);  // zeros
    for (std::size_t h = 0; h < at.mix.size(); ++h) {
      const auto row = static_cast<index_t>(h) * d;
      const Matrix lost = sum(heads.right.row_block(row, row + d), product(at.mix[h], shared), -1);
      const Matrix weighed = product(product(heads.left[h], heads.left[h], Transpose::kYes), lost);
      gradient.mix[h] = product(weighed, shared, Transpose::kNo, Transpose::kYes);
      gradient.combine = sum(gradient.combine, product(product(at.mix[h], weighed, Transpose::kYes),
                                                       heads.right, Transpose::kNo, Transpose::kYes));
    }
    const SharedHead next = moved(at, gradient, step);
    const double found = loss_of(heads, next);
    if (!(found < loss)) {
      step /= 2;
      continue;
    }
    at = next;
    loss = found;
    step *= 1.2;
  }
  return loss;
}

TEST(MergeHeads, IsApproachedAndNotBeatenByGradientDescent) {
  const HeadProducts heads = random_heads("descent", 3, 2, 8);
  const double loss = merging_loss(heads, merge_heads(heads));
  double least = std::numeric_limits<double>::infinity();
  for (const char* start : {"a", "b", "c"}) {
    const double found = descended(heads, start, 4000);
    EXPECT_GE(found, loss * (1 - 1e-12)) << start;
    least = std::min(least, found);
  }
  EXPECT_LE(least, loss * (1 + 1e-6));
}

// A direction that carries nothing: its row of `combine` is the first head's, and no mix looks at it.
void expect_dead(const SharedHead& merged, index_t first, index_t d_kv) {
  for (index_t i = first; i < d_kv; ++i) {
    for (index_t j = 0; j < merged.combine.columns; ++j) EXPECT_EQ(merged.combine(i, j), i == j ? 1 : 0);
    for (const Matrix& mix : merged.mix) {
      for (index_t j = 0; j < d_kv; ++j) EXPECT_EQ(mix(j, i), 0);
    }
  }
}

TEST(MergeHeads, FillsDirectionsThatCarryNothing) {
  HeadProducts heads = random_heads("rank 2", 3, 5, 12);
  heads.right = product(random_matrix("l", 15, 2), random_matrix("r", 2, 12));
  const SharedHead merged = merge_heads(heads);
  expect_finite(merged);
  expect_dead(merged, 2, 5);
  EXPECT_LE(merging_loss(heads, merged), kExact * merging_energy(heads));
}

TEST(MergeHeads, TakesQueriesThatSeeLittle) {
  HeadProducts heads = random_heads("left of rank 1", 3, 4, 12);
  for (Matrix& left : heads.left) left = product(random_matrix("l", 4, 1), random_matrix("r", 1, 4));
  SharedHead merged = merge_heads(heads);  // three products of rank 1: three directions
  expect_finite(merged);
  expect_dead(merged, 3, 4);
  EXPECT_LE(merging_loss(heads, merged), kExact * merging_energy(heads));

  heads = random_heads("one head is not looked at", 3, 4, 12);
  heads.left[1] = Matrix(4, 4);
  merged = merge_heads(heads);
  expect_finite(merged);
  EXPECT_NEAR(merging_loss(heads, merged), discarded(heads), 1e-12 * merging_energy(heads));
}

TEST(MergeHeads, LosesNothingWhereHeadsAreWiderThanTheModel) {
  const HeadProducts heads = random_heads("wide", 3, 6, 4);
  const SharedHead merged = merge_heads(heads);
  expect_finite(merged);
  expect_dead(merged, 4, 6);
  EXPECT_LE(merging_loss(heads, merged), kExact * merging_energy(heads));
}

TEST(MergeHeads, TakesHeadsOfZeros) {
  HeadProducts heads = random_heads("zero", 2, 3, 8);
  heads.right = Matrix(6, 8);
  const SharedHead merged = merge_heads(heads);
  expect_dead(merged, 0, 3);
  EXPECT_EQ(merging_loss(heads, merged), 0);
  EXPECT_EQ(merging_energy(heads), 0);
  heads = random_heads("one zero", 3, 3, 8);
  std::fill_n(heads.right.row(0), 3 * 8, 0.0);
  expect_finite(merge_heads(heads));
  EXPECT_NEAR(merging_loss(heads, merge_heads(heads)), discarded(heads), 1e-12 * merging_energy(heads));
}

TEST(MergeHeads, DoesNotDependOnTheScale) {
  const HeadProducts heads = random_heads("scale", 3, 3, 10);
  const double share = merging_loss(heads, merge_heads(heads)) / merging_energy(heads);
  for (const double scale : {1e-30, 1e30}) {
    HeadProducts scaled = heads;
    for (double& value : scaled.right.values) value *= scale;
    const SharedHead merged = merge_heads(scaled);
    expect_finite(merged);
    EXPECT_NEAR(merging_loss(scaled, merged) / merging_energy(scaled), share, 1e-12) << scale;
  }
}

TEST(HeadProducts, AreTakenByHead) {
  const HeadProducts heads = random_heads("some", 4, 2, 5);
  const HeadProducts some = heads.of(std::array<index_t, 2>{3, 1});
  EXPECT_EQ(some.heads(), 2);
  EXPECT_EQ(some.d_kv(), 2);
  EXPECT_EQ(some.left[0].values, heads.left[3].values);
  EXPECT_EQ(some.left[1].values, heads.left[1].values);
  EXPECT_EQ(some.right.row_block(0, 2).values, heads.right.row_block(6, 8).values);
  EXPECT_EQ(some.right.row_block(2, 4).values, heads.right.row_block(2, 4).values);
}

TEST(MeanAndFirst, AreWhatTheySay) {
  const Matrix right = random_matrix("right", 6, 5);
  const Matrix mean = product(mean_head(3, 2).combine, right);
  const Matrix first = product(first_head(3, 2).combine, right);
  for (index_t i = 0; i < 2; ++i) {
    for (index_t j = 0; j < 5; ++j) {
      EXPECT_NEAR(mean(i, j), (right(i, j) + right(2 + i, j) + right(4 + i, j)) / 3, 1e-15);
      EXPECT_EQ(first(i, j), right(i, j));
    }
  }
  for (const SharedHead& shared : {mean_head(3, 2), first_head(3, 2)}) {
    ASSERT_EQ(shared.mix.size(), 3U);
    for (const Matrix& mix : shared.mix) EXPECT_EQ(mix.values, Matrix::identity(2).values);
  }
}

}  // namespace
}  // namespace regroup
