// Products by cuBLASLt beyond their numbers (matmul_test.cpp): what measuring leaves alone, what a second
// product of a shape costs, and choices that are carried from one run to another.
#include <gtest/gtest.h>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/matmul.h"
#include "kernels/make_backend.h"

namespace regroup::test {
namespace {

class CublasLtMatmulTest : public testing::Test {
 protected:
  static constexpr index_t kM = 24, kN = 16, kK = 64;

  void SetUp() override {
    if (cuda_device_count() == 0) GTEST_SKIP() << "no GPU here";
    backend_ = std::make_unique<CudaBackend>(0, true);
    a_ = random(kM, kK);
    b_ = random(kK, kN);
    c_ = random(kM, kN);
  }
  Tensor random(index_t rows, index_t columns) {
    std::vector<float> values;
    const Philox generator(buffers_.size(), RandomPurpose::kTest);
    for (index_t i = 0; i < rows * columns; ++i) {
      values.push_back(static_cast<float>(generator.normal(static_cast<std::uint64_t>(i))));
    }
    buffers_.push_back(backend_->allocate(rows * columns * size_of(DType::kFloat32)));
    const Tensor tensor = buffers_.back().tensor(DType::kFloat32, {rows, columns});
    backend_->copy_from_host(values.data(), tensor);
    return tensor;
  }
  std::vector<float> values(const Tensor& tensor) {
    std::vector<float> result(static_cast<std::size_t>(tensor.numel()));
    backend_->copy_to_host(tensor, result.data());
    return result;
  }

  std::unique_ptr<CudaBackend> backend_;
  std::vector<Buffer> buffers_;
  Tensor a_, b_, c_;
};

TEST_F(CublasLtMatmulTest, ASecondProductAllocatesNothingAndDoesNotWait) {
  for (const bool accumulate : {false, true}) {
    CublasLtMatmul matmul(backend_->device(), false);
    matmul(a_, b_, c_, {.accumulate = accumulate});
    const CudaCounters before = backend_->device().counters();
    matmul(a_, b_, c_, {.accumulate = accumulate});
    EXPECT_EQ(backend_->device().counters().allocations, before.allocations);
    EXPECT_EQ(backend_->device().counters().waits, before.waits);
  }
}

// Measuring runs the product many times; c is added to once.
TEST_F(CublasLtMatmulTest, MeasuringAddsNothing) {
  const Tensor product = random(kM, kN);
  const std::vector<float> before = values(c_);
  CublasLtMatmul matmul(backend_->device(), false);
  matmul(a_, b_, product, {});
  matmul(a_, b_, c_, {.accumulate = true});
  const std::vector<float> result = values(c_), sum = values(product);
  for (std::size_t i = 0; i < result.size(); ++i) {
    EXPECT_NEAR(result[i], before[i] + sum[i], 1e-6 * kK) << i;
  }
}

TEST_F(CublasLtMatmulTest, ANamedAlgorithmIsUsedWithoutMeasuring) {
  CublasLtMatmul measured(backend_->device(), false), named(backend_->device(), false);
  measured(a_, b_, c_, {});
  const std::vector<float> expected = values(c_);
  const std::string table = measured.chosen();
  EXPECT_NE(table.find("float32 to float32, 24 x 16 x 64"), std::string::npos) << table;
  EXPECT_TRUE(named.choose(table));
  const CudaCounters before = backend_->device().counters();
  named(a_, b_, c_, {});
  EXPECT_EQ(backend_->device().counters().waits, before.waits);
  EXPECT_EQ(values(c_), expected);
  EXPECT_EQ(named.chosen(), table);
}

TEST_F(CublasLtMatmulTest, ADamagedAlgorithmIsRefusedInOneLine) {
  CublasLtMatmul measured(backend_->device(), true), named(backend_->device(), true);
  measured(a_, b_, c_, {});
  std::string table = measured.chosen();
  const std::size_t digits = table.find("\": \"", table.find("24 x 16 x 64")) + 4;
  table.replace(digits, 128, std::string(128, 'f'));
  EXPECT_TRUE(named.choose(table));
  try {
    named(a_, b_, c_, {});
    FAIL() << "the damaged algorithm was used";
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("24 x 16 x 64"), std::string::npos) << error.what();
  }
}

// Both tables of a backend as one text.
TEST_F(CublasLtMatmulTest, ABackendsTuningIsReadAgain) {
  CudaBackend first(0, false), second(0, false);
  first.matmul(a_, b_, c_);
  second.set_tuning(first.tuning());
  second.matmul(a_, b_, c_);
  EXPECT_EQ(second.tuning(), first.tuning());
  EXPECT_TRUE(backend_->tuning().empty()) << "a deterministic backend measures nothing";
  for (const char* damaged : {"", "{}", "[]", "{\"matmul\": {}, \"attention\": {}}"}) {
    EXPECT_THROW(second.set_tuning(damaged), UserError) << damaged;
  }
}

}  // namespace
}  // namespace regroup::test
