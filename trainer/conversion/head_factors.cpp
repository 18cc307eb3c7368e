#include "trainer/conversion/head_factors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// Second moments are shrunk towards a multiple of the identity by the first share: they stay invertible where
// tokens are fewer than d_model, and directions that calibration has not seen count a little. A difference of
// moments may be indefinite by what it was measured with (bfloat16): the next ones are for that.
constexpr std::array kShrinkage = {1e-3, 1e-2, 1e-1, 1.0};

// L with L L^T = the shrunk moments.
Matrix factor_of(const std::vector<double>& moments, index_t width) {
  double trace = 0;
  for (index_t i = 0; i < width; ++i) trace += moments[static_cast<std::size_t>(i * width + i)];
  check(std::isfinite(trace), "second moments with trace {}", trace);
  if (trace <= 0) return Matrix::identity(width);  // nothing was seen, or nothing but rounding
  for (const double share : kShrinkage) {
    Matrix c(width, width);
    for (std::size_t i = 0; i < c.values.size(); ++i) c.values[i] = (1 - share) * moments[i];
    for (index_t i = 0; i < width; ++i) c(i, i) += share * trace / static_cast<double>(width);
    if (std::optional<Matrix> factor = cholesky(c)) return *std::move(factor);
  }
  throw InternalError("second moments with trace {} have no factor", trace);
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

std::vector<Matrix> read_output_heads(const CheckpointReader& reader, const std::string& name,
                                      std::span<const index_t> heads, index_t d_kv, index_t d_model) {
  const auto [first, last] = std::minmax_element(heads.begin(), heads.end());
  // The runs of one head are short, and far apart in the file.
  const Matrix all = read(reader, name, 1, *first * d_kv, Matrix(d_model, (*last + 1 - *first) * d_kv));
  std::vector<Matrix> result;
  for (const index_t head : heads) {
    result.push_back(all.column_block((head - *first) * d_kv, (head + 1 - *first) * d_kv));
  }
  return result;
}

SiteFactors::SiteFactors(const CheckpointReader& reader, const ModelConfig& parent, const AttentionSite& site,
                         const SecondMoments* moments)
    : reader_(reader),
      d_model_(parent.d_model),
      d_kv_(parent.d_kv),
      queries_per_head_(parent.num_heads / site.kv_groups),
      prefix_(site.prefix) {
  if (moments == nullptr) return;
  std::vector<double> keys = moments->attending;
  for (std::size_t i = 0; i < keys.size(); ++i) keys[i] -= moments->attended[i];
  queries_ = factor_of(moments->query, moments->width);
  keys_ = factor_of(keys, moments->width);
  values_ = factor_of(moments->attending, moments->width);
}

HeadFactors SiteFactors::scores(std::span<const index_t> heads) const {
  HeadFactors result;
  std::vector<Matrix> rights;
  for (const index_t head : heads) {
    std::vector<Matrix> lefts;  // L^T W_q^T of the query heads that read this one
    for (index_t q = head * queries_per_head_; q < (head + 1) * queries_per_head_; ++q) {
      const Matrix weight = read_head(reader_, prefix_ + "q.weight", q, d_kv_, d_model_);
      lefts.push_back(queries_.rows == 0 ? weight.transposed()
                                         : product(queries_, weight, Transpose::kYes, Transpose::kYes));
    }
    result.products.left.push_back(triangular_factor(stack(lefts)));
    rights.push_back(read_head(reader_, prefix_ + "k.weight", head, d_kv_, d_model_));
  }
  result.weights = stack(rights);
  result.products.right = keys_.rows == 0 ? result.weights : product(result.weights, keys_);
  return result;
}

HeadFactors SiteFactors::outputs(std::span<const index_t> heads) const {
  HeadFactors result;
  std::vector<index_t> readers;
  for (const index_t head : heads) {
    for (index_t q = head * queries_per_head_; q < (head + 1) * queries_per_head_; ++q) readers.push_back(q);
  }
  const std::vector<Matrix> lefts =
      read_output_heads(reader_, prefix_ + "o.weight", readers, d_kv_, d_model_);
  const auto together = static_cast<std::size_t>(queries_per_head_);
  for (std::size_t first = 0; first < lefts.size(); first += together) {
    result.products.left.push_back(triangular_factor(stack(std::span(lefts).subspan(first, together))));
  }
  std::vector<Matrix> rights;
  for (const index_t head : heads) {
    rights.push_back(read_head(reader_, prefix_ + "v.weight", head, d_kv_, d_model_));
  }
  result.weights = stack(rights);
  result.products.right = values_.rows == 0 ? result.weights : product(result.weights, values_);
  return result;
}

void balance(const HeadFactors& factors, SharedHead& merged) {
  const HeadProducts& heads = factors.products;
  if (heads.heads() == 1) return;
  const index_t d = heads.d_kv();
  const Matrix shared = product(merged.combine, factors.weights);
  std::vector<double> right(static_cast<std::size_t>(d)), left(static_cast<std::size_t>(d));  // squares
  for (index_t i = 0; i < d; ++i) {
    for (index_t j = 0; j < shared.columns; ++j)
      right[static_cast<std::size_t>(i)] += shared(i, j) * shared(i, j);
  }
  for (index_t h = 0; h < heads.heads(); ++h) {
    const Matrix mixed =
        product(heads.left[static_cast<std::size_t>(h)], merged.mix[static_cast<std::size_t>(h)]);
    for (index_t i = 0; i < d; ++i) {
      for (index_t j = 0; j < d; ++j) left[static_cast<std::size_t>(j)] += mixed(i, j) * mixed(i, j);
    }
  }
  // A direction that carries nothing keeps its size.
  std::vector<double> scale(static_cast<std::size_t>(d), 1.0);
  double before = factors.weights.squared_norm() / static_cast<double>(heads.heads()), after = 0;
  for (std::size_t i = 0; i < scale.size(); ++i) {
    if (left[i] > 0 && right[i] > 0) scale[i] = std::pow(left[i] / right[i], 0.25);
    after += scale[i] * scale[i] * right[i];
  }
  if (!(before > 0 && after > 0)) before = after = 1;
  for (index_t i = 0; i < d; ++i) {
    const double factor = scale[static_cast<std::size_t>(i)] * std::sqrt(before / after);
    for (index_t j = 0; j < merged.combine.columns; ++j) merged.combine(i, j) *= factor;
    for (Matrix& mix : merged.mix) {
      for (index_t j = 0; j < d; ++j) mix(j, i) /= factor;
    }
  }
}

}  // namespace regroup
