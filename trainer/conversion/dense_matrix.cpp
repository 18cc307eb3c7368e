#include "trainer/conversion/dense_matrix.h"

#include <algorithm>
#include <cblas.h>
#include <cmath>
#include <lapacke.h>

#include <omp.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// One thread for BLAS while it lives: ranks share the work as it is, and what is computed depends neither on
// how many there are nor on how many threads each has.
class OneThread {
 public:
  OneThread() : previous_(omp_get_max_threads()) { omp_set_num_threads(1); }
  ~OneThread() { omp_set_num_threads(previous_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int previous_;
};

// LAPACK is given the transpose of a row-major matrix, which is column-major: nothing is copied into another
// order.
lapack_int order(index_t value) { return narrow<lapack_int>(value); }

void require_done(lapack_int info, const char* routine) { check(info == 0, "{} failed: {}", routine, info); }

}  // namespace

Matrix::Matrix(index_t row_count, index_t column_count)
    : rows(row_count), columns(column_count), values(static_cast<std::size_t>(row_count * column_count)) {}

Matrix Matrix::identity(index_t size) {
  Matrix result(size, size);
  for (index_t i = 0; i < size; ++i) result(i, i) = 1;
  return result;
}

Matrix Matrix::row_block(index_t begin, index_t end) const {
  Matrix result(end - begin, columns);
  std::copy(row(begin), row(end), result.values.begin());
  return result;
}

Matrix Matrix::column_block(index_t begin, index_t end) const {
  Matrix result(rows, end - begin);
  for (index_t i = 0; i < rows; ++i) std::copy(row(i) + begin, row(i) + end, result.row(i));
  return result;
}

Matrix Matrix::transposed() const {
  Matrix result(columns, rows);
  for (index_t i = 0; i < rows; ++i) {
    for (index_t j = 0; j < columns; ++j) result(j, i) = (*this)(i, j);
  }
  return result;
}

double Matrix::squared_norm() const {
  double sum = 0;
  for (const double value : values) sum += value * value;
  return sum;
}

Matrix product(const Matrix& a, const Matrix& b, Transpose a_is, Transpose b_is) {
  const index_t rows = a_is == Transpose::kYes ? a.columns : a.rows;
  const index_t inner = a_is == Transpose::kYes ? a.rows : a.columns;
  const index_t columns = b_is == Transpose::kYes ? b.rows : b.columns;
  check(inner == (b_is == Transpose::kYes ? b.columns : b.rows), "a product of [{}, {}] and [{}, {}]", a.rows,
        a.columns, b.rows, b.columns);
  Matrix result(rows, columns);
  const auto transposed = [](Transpose is) { return is == Transpose::kYes ? CblasTrans : CblasNoTrans; };
  const OneThread one_thread;
  cblas_dgemm(CblasRowMajor, transposed(a_is), transposed(b_is), order(rows), order(columns), order(inner),
              1.0, a.values.data(), order(a.columns), b.values.data(), order(b.columns), 0.0,
              result.values.data(), order(columns));
  return result;
}

Matrix stack(std::span<const Matrix> blocks) {
  check(!blocks.empty(), "a stack of no matrices");
  Matrix result;
  result.columns = blocks.front().columns;
  for (const Matrix& block : blocks) {
    check(block.columns == result.columns, "a stack of widths {} and {}", result.columns, block.columns);
    result.rows += block.rows;
    result.values.insert(result.values.end(), block.values.begin(), block.values.end());
  }
  return result;
}

Matrix side_by_side(std::span<const Matrix> blocks) {
  check(!blocks.empty(), "no matrices side by side");
  index_t columns = 0;
  for (const Matrix& block : blocks) columns += block.columns;
  Matrix result(blocks.front().rows, columns);
  index_t at = 0;
  for (const Matrix& block : blocks) {
    check(block.rows == result.rows, "heights {} and {} side by side", block.rows, result.rows);
    for (index_t i = 0; i < block.rows; ++i)
      std::copy(block.row(i), block.row(i) + block.columns, result.row(i) + at);
    at += block.columns;
  }
  return result;
}

std::optional<Matrix> cholesky(const Matrix& a) {
  check(a.rows == a.columns, "the Cholesky factor of [{}, {}]", a.rows, a.columns);
  Matrix result = a;
  // The lower half in row-major order is the upper one in column-major.
  const OneThread one_thread;
  const lapack_int info =
      LAPACKE_dpotrf(LAPACK_COL_MAJOR, 'U', order(a.rows), result.values.data(), order(a.rows));
  if (info > 0) return std::nullopt;
  require_done(info, "dpotrf");
  for (index_t i = 0; i < a.rows; ++i) std::fill(result.row(i) + i + 1, result.row(i) + a.columns, 0.0);
  return result;
}

Matrix triangular_factor(const Matrix& a) {
  // The LQ of the column-major transpose: a^T = L Q, so R = L^T; in place, R lies in the rows of `a`.
  Matrix tall = a;
  if (a.rows < a.columns) {
    tall = Matrix(a.columns, a.columns);
    std::copy(a.values.begin(), a.values.end(), tall.values.begin());
  }
  std::vector<double> scales(static_cast<std::size_t>(tall.columns));
  const OneThread one_thread;
  require_done(LAPACKE_dgelqf(LAPACK_COL_MAJOR, order(tall.columns), order(tall.rows), tall.values.data(),
                              order(tall.columns), scales.data()),
               "dgelqf");
  Matrix result = tall.row_block(0, a.columns);
  for (index_t i = 0; i < result.rows; ++i) std::fill(result.row(i), result.row(i) + i, 0.0);
  return result;
}

SingularValues singular_values(const Matrix& a) {
  const index_t k = std::min(a.rows, a.columns);
  SingularValues result{.u = Matrix(a.rows, k),
                        .sigma = std::vector<double>(static_cast<std::size_t>(k)),
                        .vt = Matrix(k, a.columns)};
  Matrix work = a;
  const OneThread one_thread;
  // Of the column-major transpose a^T = v diag(sigma) u^T.
  require_done(LAPACKE_dgesdd(LAPACK_COL_MAJOR, 'S', order(a.columns), order(a.rows), work.values.data(),
                              order(a.columns), result.sigma.data(), result.vt.values.data(),
                              order(a.columns), result.u.values.data(), order(k)),
               "dgesdd");
  for (index_t i = 0; i < k; ++i) {
    double* const row = result.vt.row(i);
    const double* const largest =
        std::max_element(row, row + a.columns, [](double x, double y) { return std::abs(x) < std::abs(y); });
    if (*largest >= 0) continue;
    for (index_t j = 0; j < a.columns; ++j) row[j] = -row[j];
    for (index_t j = 0; j < a.rows; ++j) result.u(j, i) = -result.u(j, i);
  }
  return result;
}

std::vector<double> eigenvalues(const Matrix& a) {
  check(a.rows == a.columns, "the eigenvalues of [{}, {}]", a.rows, a.columns);
  Matrix work = a;
  std::vector<double> result(static_cast<std::size_t>(a.rows));
  const OneThread one_thread;
  require_done(LAPACKE_dsyevd(LAPACK_COL_MAJOR, 'N', 'U', order(a.rows), work.values.data(), order(a.rows),
                              result.data()),
               "dsyevd");
  return result;
}

Matrix solve(const Matrix& a, const Matrix& b) {
  check(a.rows == a.columns && a.rows == b.rows, "[{}, {}] x = [{}, {}]", a.rows, a.columns, b.rows,
        b.columns);
  Matrix work = a;
  Matrix result = b;
  const OneThread one_thread;
  require_done(LAPACKE_dposv(LAPACK_ROW_MAJOR, 'L', order(a.rows), order(b.columns), work.values.data(),
                             order(a.rows), result.values.data(), order(b.columns)),
               "dposv");
  return result;
}

}  // namespace regroup
