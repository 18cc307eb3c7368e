#include "trainer/conversion/head_factors.h"

#include <cmath>
#include <cstdlib>
#include <numbers>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// Second moments are shrunk towards the identity by this share: they stay invertible where tokens are fewer
// than d_model, and directions that calibration has not seen count a little.
constexpr double kShrinkage = 1e-3;

double env(const char* name, double otherwise) {
  const char* v = std::getenv(name);
  return v ? std::atof(v) : otherwise;
}

Matrix factor_of(const std::vector<double>& moments, index_t width) {
  Matrix c(width, width);
  c.values = moments;
  double trace = 0;
  for (index_t i = 0; i < width; ++i) trace += c(i, i);
  const double rho = env("RHO", kShrinkage);
  for (double& value : c.values) value *= 1 - rho;
  for (index_t i = 0; i < width; ++i) c(i, i) += rho * trace / static_cast<double>(width);
  return cholesky(c);
}

Matrix read(const CheckpointReader& reader, const std::string& name, int dim, index_t begin, Matrix into) {
  const index_t extent = dim == 0 ? into.rows : into.columns;
  reader.read(name, dim, begin, begin + extent,
              Tensor(into.values.data(), DType::kFloat64, {into.rows, into.columns}));
  for (const double value : into.values) {
    if (!std::isfinite(value))
      throw UserError("'{}' of the checkpoint is not finite: it cannot be converted", name);
  }
  return into;
}

}  // namespace

Matrix read_head(const CheckpointReader& reader, const std::string& name, index_t head, index_t d_kv,
                 index_t d_model) {
  return read(reader, name, 0, head * d_kv, Matrix(d_kv, d_model));
}

Matrix read_output_head(const CheckpointReader& reader, const std::string& name, index_t head, index_t d_kv,
                        index_t d_model) {
  return read(reader, name, 1, head * d_kv, Matrix(d_model, d_kv));
}

SiteFactors::SiteFactors(const CheckpointReader& reader, const ModelConfig& parent, const AttentionSite& site,
                         const SecondMoments* moments)
    : reader_(reader), parent_(parent), site_(site) {
  if (moments == nullptr) return;
  queries_ = factor_of(moments->query, moments->width);
  std::vector<double> keys = moments->key;
  if (env("KM", 0) == 1) {
    keys = moments->attending;
    for (std::size_t i = 0; i < keys.size(); ++i) keys[i] -= moments->attended[i];
  }
  if (env("KM", 0) == 2) keys = moments->attending;
  keys_ = factor_of(keys, moments->width);
  values_ = factor_of(env("VM", 0) == 0   ? moments->key
                      : env("VM", 0) == 1 ? moments->attended
                                          : moments->attending,
                      moments->width);
}

HeadProducts SiteFactors::scores(std::span<const index_t> heads) const {
  HeadProducts result{.inputs = keys_};
  std::vector<Matrix> rights;
  const index_t queries = parent_.num_heads / site_.kv_groups;
  for (const index_t head : heads) {
    std::vector<Matrix> lefts;  // L_q^T W_q^T of the query heads that read this one
    for (index_t q = head * queries; q < (head + 1) * queries; ++q) {
      const Matrix w = read_head(reader_, site_.prefix + "q.weight", q, parent_.d_kv, parent_.d_model);
      lefts.push_back(queries_.rows == 0
                          ? product(Matrix::identity(parent_.d_model), w, Transpose::kNo, Transpose::kYes)
                          : product(queries_, w, Transpose::kYes, Transpose::kYes));
    }
    result.left.push_back(triangular_factor(stack(lefts)));
    rights.push_back(read_head(reader_, site_.prefix + "k.weight", head, parent_.d_kv, parent_.d_model));
  }
  result.right = stack(rights);
  return result;
}

HeadProducts SiteFactors::outputs(std::span<const index_t> heads) const {
  HeadProducts result{.inputs = values_};
  std::vector<Matrix> rights;
  const index_t queries = parent_.num_heads / site_.kv_groups;
  for (const index_t head : heads) {
    std::vector<Matrix> lefts;
    for (index_t q = head * queries; q < (head + 1) * queries; ++q) {
      lefts.push_back(read_output_head(reader_, site_.prefix + "o.weight", q, parent_.d_kv, parent_.d_model));
    }
    result.left.push_back(triangular_factor(stack(lefts)));
    rights.push_back(read_head(reader_, site_.prefix + "v.weight", head, parent_.d_kv, parent_.d_model));
  }
  result.right = stack(rights);
  return result;
}

void balance(const HeadProducts& heads, SharedHead& merged) {
  if (heads.heads() == 1) return;
  const index_t d = heads.d_kv();
  const int how = static_cast<int>(env("BAL", 0));
  Matrix shared = product(merged.combine, heads.right);
  std::vector<double> row_scale(static_cast<std::size_t>(d), 1.0);
  for (index_t i = 0; i < d; ++i) {
    double k2 = 0, q2 = 0;
    for (index_t j = 0; j < shared.columns; ++j) k2 += shared(i, j) * shared(i, j);
    for (index_t h = 0; h < heads.heads(); ++h) {
      const Matrix t =
          product(heads.left[static_cast<std::size_t>(h)], merged.mix[static_cast<std::size_t>(h)]);
      for (index_t j = 0; j < d; ++j) q2 += t(j, i) * t(j, i);
    }
    double& s = row_scale[static_cast<std::size_t>(i)];
    if (how == 1) s = 1 / std::sqrt(k2 + 1e-30);                    // rows of K alike
    if (how == 2) s = std::pow((q2 + 1e-30) / (k2 + 1e-30), 0.25);  // both sides alike
    if (how == 3) s = std::sqrt(q2 + 1e-30);                        // rows of Q alike
  }
  // Frobenius norm of K as the heads' had on average.
  double now = 0;
  for (index_t i = 0; i < d; ++i)
    for (index_t j = 0; j < shared.columns; ++j)
      now += std::pow(row_scale[static_cast<std::size_t>(i)] * shared(i, j), 2);
  const double scale = std::sqrt(heads.right.squared_norm() / static_cast<double>(heads.heads()) / now);
  for (index_t i = 0; i < d; ++i) {
    const double s = scale * row_scale[static_cast<std::size_t>(i)];
    for (index_t j = 0; j < merged.combine.columns; ++j) merged.combine(i, j) *= s;
    for (Matrix& mix : merged.mix)
      for (index_t j = 0; j < d; ++j) mix(j, i) /= s;
  }
  if (env("ROT", 0) == 1) {
    Matrix rotation(d, d);  // cosine transform
    for (index_t i = 0; i < d; ++i)
      for (index_t j = 0; j < d; ++j)
        rotation(i, j) = std::sqrt((i == 0 ? 1.0 : 2.0) / static_cast<double>(d)) *
                         std::cos(std::numbers::pi / static_cast<double>(d) * (static_cast<double>(j) + 0.5) *
                                  static_cast<double>(i));
    merged.combine = product(rotation, merged.combine);
    for (Matrix& mix : merged.mix) mix = product(mix, rotation, Transpose::kNo, Transpose::kYes);
  }
}

}  // namespace regroup
