// Every factorization against its definition.
#include "trainer/conversion/dense_matrix.h"

#include <array>
#include <numbers>
#include <utility>

#include <gtest/gtest.h>
#include <omp.h>

#include "kernels/base/error.h"
#include "tests/trainer/conversion/matrices.h"

namespace regroup {
namespace {

using test::distance;
using test::random_matrix;
using test::sum;

constexpr double kRounding = 1e-12;

Matrix matrix(index_t rows, index_t columns, std::vector<double> values) {
  Matrix result(rows, columns);
  result.values = std::move(values);
  return result;
}

// Wide, tall, square, 1 x 1, single rows and columns; of full rank, of rank 2, and nothing at all.
std::vector<std::pair<std::string, Matrix>> samples() {
  std::vector<std::pair<std::string, Matrix>> result;
  for (const auto& [rows, columns] :
       {std::pair<index_t, index_t>{5, 9}, {9, 5}, {7, 7}, {1, 1}, {1, 6}, {6, 1}}) {
    const std::string name = std::to_string(rows) + " x " + std::to_string(columns);
    result.emplace_back(name, random_matrix(name, rows, columns));
    result.emplace_back(name + " of rank 2",
                        product(random_matrix("l" + name, rows, 2), random_matrix("r" + name, 2, columns)));
    result.emplace_back(name + " of zeros", Matrix(rows, columns));
  }
  return result;
}

TEST(Matrix, HasBlocksTransposeAndNorm) {
  const Matrix a = matrix(2, 3, {1, 2, 3, 4, 5, 6});
  EXPECT_EQ(a(1, 0), 4);
  EXPECT_EQ(a.row_block(1, 2).values, (std::vector<double>{4, 5, 6}));
  EXPECT_EQ(a.column_block(1, 3).values, (std::vector<double>{2, 3, 5, 6}));
  EXPECT_EQ(a.column_block(1, 3).columns, 2);
  EXPECT_EQ(a.transposed().values, (std::vector<double>{1, 4, 2, 5, 3, 6}));
  EXPECT_EQ(a.transposed().rows, 3);
  EXPECT_EQ(a.squared_norm(), 91);
  EXPECT_EQ(Matrix::identity(2).values, (std::vector<double>{1, 0, 0, 1}));
}

TEST(Matrix, StacksBlocksOfOneWidth) {
  const Matrix a = random_matrix("a", 2, 3), b = random_matrix("b", 1, 3);
  const Matrix both = stack(std::array{a, b});
  ASSERT_EQ(both.rows, 3);
  EXPECT_EQ(both.row_block(0, 2).values, a.values);
  EXPECT_EQ(both.row_block(2, 3).values, b.values);
  EXPECT_THROW(stack(std::array{a, random_matrix("c", 1, 4)}), InternalError);
  EXPECT_THROW(stack({}), InternalError);
}

TEST(Product, IsTheSumOverTheInnerDimension) {
  const Matrix a = random_matrix("a", 4, 3), b = random_matrix("b", 3, 5);
  Matrix expected(4, 5);
  for (index_t i = 0; i < 4; ++i) {
    for (index_t j = 0; j < 5; ++j) {
      for (index_t k = 0; k < 3; ++k) expected(i, j) += a(i, k) * b(k, j);
    }
  }
  const Matrix at = a.transposed(), bt = b.transposed();
  EXPECT_LT(distance(product(a, b), expected), kRounding);
  EXPECT_LT(distance(product(at, b, Transpose::kYes), expected), kRounding);
  EXPECT_LT(distance(product(a, bt, Transpose::kNo, Transpose::kYes), expected), kRounding);
  EXPECT_LT(distance(product(at, bt, Transpose::kYes, Transpose::kYes), expected), kRounding);
  EXPECT_THROW(product(a, a), InternalError);
}

// Conversion relies on it: a head that is alone is not changed by its mix.
TEST(Product, WithTheIdentityChangesNoBit) {
  const Matrix a = random_matrix("a", 5, 33);
  EXPECT_EQ(product(Matrix::identity(5), a).values, a.values);
  EXPECT_EQ(product(Matrix::identity(5), a, Transpose::kYes).values, a.values);
  EXPECT_EQ(product(a, Matrix::identity(33)).values, a.values);
}

TEST(Cholesky, IsTheLowerFactor) {
  for (const index_t n : {1, 2, 9}) {
    const Matrix x = random_matrix("x", n, n + 3);
    Matrix a = product(x, x, Transpose::kNo, Transpose::kYes);
    const Matrix whole = a;
    for (index_t i = 0; i < n; ++i) {
      for (index_t j = i + 1; j < n; ++j) a(i, j) = 1e9;  // the upper half does not count
    }
    const Matrix l = cholesky(a).value();
    EXPECT_LT(distance(product(l, l, Transpose::kNo, Transpose::kYes), whole), kRounding) << n;
    for (index_t i = 0; i < n; ++i) {
      EXPECT_GT(l(i, i), 0);
      for (index_t j = i + 1; j < n; ++j) EXPECT_EQ(l(i, j), 0);
    }
  }
}

TEST(Cholesky, IsNothingOfWhatIsNotPositiveDefinite) {
  EXPECT_FALSE(cholesky(matrix(1, 1, {-1})));
  EXPECT_FALSE(cholesky(Matrix(3, 3)));
  EXPECT_FALSE(cholesky(matrix(2, 2, {1, 2, 2, 1})));
  EXPECT_THROW(cholesky(matrix(1, 1, {std::numeric_limits<double>::quiet_NaN()})), InternalError);
  EXPECT_THROW(cholesky(random_matrix("a", 2, 3)), InternalError);
}

TEST(TriangularFactor, HasTheSameSecondMoments) {
  for (const auto& [name, a] : samples()) {
    const Matrix r = triangular_factor(a);
    ASSERT_EQ(r.rows, a.columns) << name;
    ASSERT_EQ(r.columns, a.columns) << name;
    for (index_t i = 0; i < r.rows; ++i) {
      for (index_t j = 0; j < i; ++j) EXPECT_EQ(r(i, j), 0) << name;
    }
    EXPECT_LT(distance(product(r, r, Transpose::kYes), product(a, a, Transpose::kYes)), kRounding) << name;
  }
}

TEST(SingularValues, RebuildTheMatrixFromOrthonormalFactors) {
  for (const auto& [name, a] : samples()) {
    const SingularValues s = singular_values(a);
    const index_t k = std::min(a.rows, a.columns);
    ASSERT_EQ(s.u.rows, a.rows) << name;
    ASSERT_EQ(s.u.columns, k) << name;
    ASSERT_EQ(s.vt.rows, k) << name;
    ASSERT_EQ(s.vt.columns, a.columns) << name;
    ASSERT_EQ(std::ssize(s.sigma), k) << name;
    EXPECT_TRUE(std::is_sorted(s.sigma.rbegin(), s.sigma.rend())) << name;
    EXPECT_GE(s.sigma.back(), 0) << name;
    Matrix scaled = s.vt;
    for (index_t i = 0; i < k; ++i) {
      for (index_t j = 0; j < a.columns; ++j) scaled(i, j) *= s.sigma[static_cast<std::size_t>(i)];
    }
    EXPECT_LT(distance(product(s.u, scaled), a), kRounding) << name;
    EXPECT_LT(distance(product(s.u, s.u, Transpose::kYes), Matrix::identity(k)), kRounding) << name;
    EXPECT_LT(distance(product(s.vt, s.vt, Transpose::kNo, Transpose::kYes), Matrix::identity(k)), kRounding)
        << name;
  }
}

TEST(SingularValues, ShowTheRank) {
  const SingularValues s = singular_values(product(random_matrix("l", 8, 3), random_matrix("r", 3, 12)));
  EXPECT_GT(s.sigma[2], 1e-3 * s.sigma[0]);
  EXPECT_LT(s.sigma[3], 1e-14 * s.sigma[0]);
}

TEST(SingularValues, HaveRowsWithTheLargestElementPositive) {
  for (const auto& [name, a] : samples()) {
    const SingularValues s = singular_values(a);
    for (index_t i = 0; i < s.vt.rows; ++i) {
      double largest = 0;
      for (index_t j = 0; j < a.columns; ++j) {
        if (std::abs(s.vt(i, j)) > std::abs(largest)) largest = s.vt(i, j);
      }
      EXPECT_GT(largest, 0) << name << ", row " << i;
    }
  }
  const SingularValues s = singular_values(matrix(2, 2, {2, 0, 0, -3}));
  EXPECT_LT(distance(s.vt, matrix(2, 2, {0, 1, 1, 0})), kRounding);
  EXPECT_LT(distance(s.u, matrix(2, 2, {0, 1, -1, 0})), kRounding);
  EXPECT_NEAR(s.sigma[0], 3, kRounding);
  EXPECT_NEAR(s.sigma[1], 2, kRounding);
}

TEST(SingularValues, RefuseWhatIsNotFinite) {
  Matrix a = random_matrix("a", 3, 4);
  a(1, 2) = std::numeric_limits<double>::quiet_NaN();
  EXPECT_THROW(singular_values(a), InternalError);
}

// The second difference on n points has eigenvalues 2 - 2 cos(pi k / (n + 1)).
TEST(Eigenvalues, AreThoseOfTheSecondDifference) {
  constexpr index_t kSize = 7;
  Matrix a(kSize, kSize);
  for (index_t i = 0; i < kSize; ++i) {
    a(i, i) = 2;
    if (i > 0) a(i, i - 1) = -1;
    for (index_t j = i + 1; j < kSize; ++j) a(i, j) = 1e9;  // the upper half does not count
  }
  const std::vector<double> found = eigenvalues(a);
  ASSERT_EQ(std::ssize(found), kSize);
  for (index_t k = 0; k < kSize; ++k) {
    const double angle = std::numbers::pi * static_cast<double>(k + 1) / (kSize + 1);
    EXPECT_NEAR(found[static_cast<std::size_t>(k)], 2 - 2 * std::cos(angle), kRounding);
  }
  EXPECT_EQ(eigenvalues(matrix(1, 1, {-4})), std::vector<double>{-4});
}

// Large enough for a threaded BLAS to divide them.
TEST(DenseMatrix, DoesNotDependOnTheNumberOfThreads) {
  const Matrix a = random_matrix("a", 400, 300);
  const Matrix moments = sum(product(a, a, Transpose::kYes), Matrix::identity(300));
  const auto results = [&](int threads) {
    const int before = omp_get_max_threads();
    omp_set_num_threads(threads);
    const SingularValues s = singular_values(a);
    std::vector<std::vector<double>> all = {product(a, moments).values,
                                            cholesky(moments).value().values,
                                            triangular_factor(a).values,
                                            solve(moments, moments).values,
                                            eigenvalues(moments),
                                            s.u.values,
                                            s.sigma,
                                            s.vt.values};
    EXPECT_EQ(omp_get_max_threads(), threads);
    omp_set_num_threads(before);
    return all;
  };
  EXPECT_EQ(results(1), results(3));
}

TEST(Solve, InvertsTheProduct) {
  for (const index_t n : {1, 6}) {
    const Matrix a = sum(test::random_moments("a", n, n + 2), Matrix::identity(n));
    const Matrix x = random_matrix("x", n, 4);
    EXPECT_LT(distance(solve(a, product(a, x)), x), kRounding);
  }
  EXPECT_THROW(solve(matrix(2, 2, {1, 2, 2, 1}), Matrix(2, 1)), InternalError);
  EXPECT_THROW(solve(Matrix::identity(2), Matrix(3, 1)), InternalError);
}

}  // namespace
}  // namespace regroup
