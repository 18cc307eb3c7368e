// Matrices for tests: random ones, and how far two are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "kernels/base/random.h"
#include "trainer/conversion/dense_matrix.h"

namespace regroup::test {

// Standard normal, a function of `name` and the place.
inline Matrix random_matrix(const std::string& name, index_t rows, index_t columns, double scale = 1) {
  const Philox philox(7, RandomPurpose::kTest, key_of(name));
  Matrix result(rows, columns);
  for (std::size_t i = 0; i < result.values.size(); ++i) result.values[i] = scale * philox.normal(i);
  return result;
}

// x x^T / rank: symmetric, positive semidefinite, of that rank at most.
inline Matrix random_moments(const std::string& name, index_t width, index_t rank) {
  const Matrix x = random_matrix(name, width, rank, 1 / std::sqrt(static_cast<double>(rank)));
  return product(x, x, Transpose::kNo, Transpose::kYes);
}

// a + factor b.
inline Matrix sum(const Matrix& a, const Matrix& b, double factor = 1) {
  Matrix result = a;
  for (std::size_t i = 0; i < result.values.size(); ++i) result.values[i] += factor * b.values[i];
  return result;
}

inline double trace(const Matrix& a) {
  double result = 0;
  for (index_t i = 0; i < a.rows; ++i) result += a(i, i);
  return result;
}

inline bool is_finite(const Matrix& a) {
  return std::all_of(a.values.begin(), a.values.end(), [](double value) { return std::isfinite(value); });
}

// The largest difference of two elements; infinite where shapes differ or something is not finite.
inline double distance(const Matrix& a, const Matrix& b) {
  if (a.rows != b.rows || a.columns != b.columns || !is_finite(a) || !is_finite(b))
    return std::numeric_limits<double>::infinity();
  double largest = 0;
  for (std::size_t i = 0; i < a.values.size(); ++i)
    largest = std::max(largest, std::abs(a.values[i] - b.values[i]));
  return largest;
}

}  // namespace regroup::test
