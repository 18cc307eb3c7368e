// Float64 matrices and their factorizations, by BLAS and LAPACK. Everything is computed by one thread, and is
// the same to the bit however many ranks and threads there are.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// Row-major [rows, columns].
struct Matrix {
  index_t rows = 0, columns = 0;
  std::vector<double> values;

  Matrix() = default;
  Matrix(index_t row_count, index_t column_count);  // zeros
  static Matrix identity(index_t size);

  double& operator()(index_t row, index_t column) {
    return values[static_cast<std::size_t>(row * columns + column)];
  }
  double operator()(index_t row, index_t column) const {
    return values[static_cast<std::size_t>(row * columns + column)];
  }
  double* row(index_t index) { return values.data() + index * columns; }
  const double* row(index_t index) const { return values.data() + index * columns; }

  // Copies of rows [begin, end) or columns [begin, end).
  Matrix row_block(index_t begin, index_t end) const;
  Matrix column_block(index_t begin, index_t end) const;
  Matrix transposed() const;
  double squared_norm() const;  // Frobenius
};

enum class Transpose { kNo, kYes };
// op(a) op(b).
Matrix product(const Matrix& a, const Matrix& b, Transpose a_is = Transpose::kNo,
               Transpose b_is = Transpose::kNo);
// The matrices one below the other, all of one width; or side by side, all of one height.
Matrix stack(std::span<const Matrix> blocks);
Matrix side_by_side(std::span<const Matrix> blocks);

// Lower triangular L with L L^T = a, which is symmetric (its lower half counts). Nothing where it is not
// positive definite.
std::optional<Matrix> cholesky(const Matrix& a);
// Upper triangular R [columns, columns] with R^T R = a^T a, of any a, by QR.
Matrix triangular_factor(const Matrix& a);

// a = u diag(sigma) vt with k = min(rows, columns): u [rows, k], vt [k, columns], sigma descending. Each row
// of vt has its largest element positive, so that the result is as unique as it can be.
struct SingularValues {
  Matrix u;
  std::vector<double> sigma;
  Matrix vt;
};
SingularValues singular_values(const Matrix& a);

// The eigenvalues of a symmetric matrix (its lower half counts), ascending.
std::vector<double> eigenvalues(const Matrix& a);

// x with a x = b, for a symmetric positive definite `a`. InternalError where it is none.
Matrix solve(const Matrix& a, const Matrix& b);

}  // namespace regroup
