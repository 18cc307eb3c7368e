// What is made for cuDNN of our arguments, and of its results for us, against plain loops.
#include "kernels/cuda/cudnn_bias.h"

#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/make_backend.h"

namespace regroup::test {
namespace {

struct Shape {
  index_t heads, queries, keys;
};

class CudnnBias : public testing::TestWithParam<Shape> {
 protected:
  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    backend_ = std::make_unique<CudaBackend>(0, true);
  }
  template <class T>
  Tensor put(const std::vector<T>& values, std::initializer_list<index_t> shape) {
    const Tensor like(nullptr, dtype_of<T>(), shape);
    buffers_.push_back(backend_->allocate(like.bytes()));
    const Tensor tensor = buffers_.back().tensor(like.dtype, shape);
    backend_->copy_from_host(values.data(), tensor);
    return tensor;
  }
  template <class T>
  std::vector<T> get(const Tensor& tensor) {
    std::vector<T> values(static_cast<std::size_t>(tensor.numel()));
    backend_->copy_to_host(tensor, values.data());
    return values;
  }
  static std::vector<float> normal(index_t count) {
    std::vector<float> values;
    for (index_t i = 0; i < count; ++i) {
      values.push_back(
          static_cast<float>(Philox(3, RandomPurpose::kTest).normal(static_cast<std::uint64_t>(i))));
    }
    return values;
  }

  std::unique_ptr<CudaBackend> backend_;
  std::vector<Buffer> buffers_;
};

TEST_P(CudnnBias, ExpandsDiagonals) {
  const auto [heads, queries, keys] = GetParam();
  const index_t diagonals = queries + keys - 1;
  const std::vector<float> bias = normal(heads * diagonals);
  const Tensor full =
      put(std::vector<bfloat16>(static_cast<std::size_t>(heads * queries * keys)), {heads, queries, keys});
  expand_bias(backend_->device(), put(bias, {heads, diagonals}), queries, full.as<bfloat16>());
  const auto result = get<bfloat16>(full);
  std::size_t wrong = 0, i = 0;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t q = 0; q < queries; ++q) {
      for (index_t k = 0; k < keys; ++k) {
        const float value = bias[static_cast<std::size_t>(h * diagonals + k - q + queries - 1)];
        if (result[i++].bits != bfloat16(value).bits) ++wrong;
      }
    }
  }
  EXPECT_EQ(wrong, 0U);
}

TEST_P(CudnnBias, SumsDiagonals) {
  const auto [heads, queries, keys] = GetParam();
  const index_t diagonals = queries + keys - 1;
  std::vector<bfloat16> dfull;
  for (const float value : normal(heads * queries * keys)) dfull.emplace_back(value);
  const std::vector<float> before = normal(heads * diagonals);
  std::vector<double> expected(before.begin(), before.end());
  std::size_t i = 0;
  for (index_t h = 0; h < heads; ++h) {
    for (index_t q = 0; q < queries; ++q) {
      for (index_t k = 0; k < keys; ++k) {
        expected[static_cast<std::size_t>(h * diagonals + k - q + queries - 1)] +=
            double{static_cast<float>(dfull[i++])};
      }
    }
  }
  const Tensor dbias = put(before, {heads, diagonals}), full = put(dfull, {heads, queries, keys});
  sum_bias_gradient(backend_->device(), full.as<bfloat16>(), queries, dbias);
  const auto result = get<float>(dbias);
  for (std::size_t d = 0; d < expected.size(); ++d) {
    EXPECT_NEAR(result[d], expected[d], 1e-6 * static_cast<double>(std::min(queries, keys) + 1)) << d;
  }
  // The order is fixed: the same bits again.
  const Tensor again = put(before, {heads, diagonals});
  sum_bias_gradient(backend_->device(), full.as<bfloat16>(), queries, again);
  EXPECT_EQ(get<float>(again), result);
}

TEST_P(CudnnBias, CountsKeys) {
  const auto [samples, queries, keys] = GetParam();
  std::vector<std::int32_t> mask, expected;
  for (index_t b = 0; b < samples; ++b) {
    const index_t length = (b * 29) % (keys + 1);  // of sample 0: none, which counts as 1
    for (index_t k = 0; k < keys; ++k) mask.push_back(k < length ? 1 : 0);
    expected.push_back(static_cast<std::int32_t>(std::max<index_t>(length, 1)));
  }
  const std::vector<std::int32_t> zeros(static_cast<std::size_t>(samples));
  const Tensor query_lengths = put(zeros, {samples}), key_lengths = put(zeros, {samples});
  sequence_lengths(backend_->device(), put(mask, {samples, keys}), queries, query_lengths.as<std::int32_t>(),
                   key_lengths.as<std::int32_t>());
  EXPECT_EQ(get<std::int32_t>(key_lengths), expected);
  EXPECT_EQ(get<std::int32_t>(query_lengths),
            std::vector<std::int32_t>(zeros.size(), static_cast<std::int32_t>(queries)));
}

INSTANTIATE_TEST_SUITE_P(Shapes, CudnnBias,
                         testing::Values(Shape{1, 1, 1}, Shape{3, 1, 40}, Shape{2, 40, 1}, Shape{2, 33, 70},
                                         Shape{2, 70, 33}, Shape{5, 64, 64}),
                         [](const auto& instance) {
                           return fmt::format("H{}_Q{}_K{}", instance.param.heads, instance.param.queries,
                                              instance.param.keys);
                         });

}  // namespace
}  // namespace regroup::test
