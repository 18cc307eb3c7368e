#include "trainer/conversion/head_merging.h"

#include "kernels/base/error.h"

namespace regroup {
namespace {

// R_h X_h, one below the other, of any X [n d_kv, d_model].
Matrix weighted(const HeadProducts& heads, const Matrix& x) {
  const index_t d = heads.d_kv();
  Matrix result(x.rows, x.columns);
  for (index_t h = 0; h < heads.heads(); ++h) {
    const Matrix block = product(heads.left[static_cast<std::size_t>(h)], x.row_block(h * d, (h + 1) * d));
    std::copy(block.values.begin(), block.values.end(), result.row(h * d));
  }
  return result;
}

}  // namespace

HeadProducts HeadProducts::of(std::span<const index_t> some) const {
  const index_t d = d_kv();
  HeadProducts result;
  std::vector<Matrix> rights;
  for (const index_t head : some) {
    result.left.push_back(left[static_cast<std::size_t>(head)]);
    rights.push_back(right.row_block(head * d, (head + 1) * d));
  }
  result.right = stack(rights);
  return result;
}

SharedHead merge_heads(const HeadProducts& heads) {
  const index_t n = heads.heads();
  const index_t d = heads.d_kv();
  if (n == 1) return {.combine = Matrix::identity(d), .mix = {Matrix::identity(d)}};
  const SingularValues z = singular_values(weighted(heads, heads.right));
  const auto known = static_cast<index_t>(z.sigma.size());
  SharedHead result{.combine = Matrix(d, n * d), .mix = std::vector<Matrix>(static_cast<std::size_t>(n))};
  constexpr double kNothing = 1e-12;
  std::vector<bool> carries(static_cast<std::size_t>(d));
  for (index_t i = 0; i < d; ++i) {
    carries[static_cast<std::size_t>(i)] =
        i < known && z.sigma[static_cast<std::size_t>(i)] > kNothing * z.sigma[0];
  }
  // combine B = sigma^-1 U^T Z, so combine = sigma^-1 U^T diag(R_h).
  for (index_t h = 0; h < n; ++h) {
    const Matrix part =
        product(z.u.row_block(h * d, (h + 1) * d), heads.left[static_cast<std::size_t>(h)], Transpose::kYes);
    for (index_t i = 0; i < d; ++i) {
      if (!carries[static_cast<std::size_t>(i)]) continue;
      for (index_t j = 0; j < d; ++j) {
        result.combine(i, h * d + j) = part(i, j) / z.sigma[static_cast<std::size_t>(i)];
      }
    }
  }
  for (index_t h = 0; h < n; ++h) {
    Matrix& mix = result.mix[static_cast<std::size_t>(h)];
    mix = Matrix(d, d);
    const index_t usable = std::min(d, known);
    const Matrix projected = product(heads.right.row_block(h * d, (h + 1) * d), z.vt.row_block(0, usable),
                                     Transpose::kNo, Transpose::kYes);
    for (index_t i = 0; i < d; ++i) {
      for (index_t j = 0; j < usable; ++j) {
        if (carries[static_cast<std::size_t>(j)]) mix(i, j) = projected(i, j);
      }
    }
  }
  for (index_t i = 0; i < d; ++i) {
    if (!carries[static_cast<std::size_t>(i)]) result.combine(i, i) = 1;
  }
  return result;
}

double merging_loss(const HeadProducts& heads, const SharedHead& merged) {
  const index_t d = heads.d_kv();
  const Matrix shared = product(merged.combine, heads.right);
  Matrix difference = heads.right;
  for (index_t h = 0; h < heads.heads(); ++h) {
    const Matrix block = product(merged.mix[static_cast<std::size_t>(h)], shared);
    double* const row = difference.row(h * d);
    for (std::size_t i = 0; i < block.values.size(); ++i) row[i] -= block.values[i];
  }
  return weighted(heads, difference).squared_norm();
}

double merging_energy(const HeadProducts& heads) { return weighted(heads, heads.right).squared_norm(); }

SharedHead mean_head(index_t heads, index_t d_kv) {
  SharedHead result{.combine = Matrix(d_kv, heads * d_kv),
                    .mix = std::vector<Matrix>(static_cast<std::size_t>(heads), Matrix::identity(d_kv))};
  for (index_t h = 0; h < heads; ++h) {
    for (index_t i = 0; i < d_kv; ++i) result.combine(i, h * d_kv + i) = 1.0 / static_cast<double>(heads);
  }
  return result;
}

SharedHead first_head(index_t heads, index_t d_kv) {
  SharedHead result = mean_head(heads, d_kv);
  result.combine = Matrix(d_kv, heads * d_kv);
  for (index_t i = 0; i < d_kv; ++i) result.combine(i, i) = 1;
  return result;
}

}  // namespace regroup
