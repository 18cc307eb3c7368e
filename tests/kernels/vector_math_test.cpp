#include "kernels/cpu/vector_math.h"

#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "tests/kernels/activation_cases.h"

namespace regroup {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

double ulp_of(float x) { return std::nextafter(std::abs(x), kInfinity) - std::abs(x); }

TEST(VectorExp, IsWithinTwoUlp) {
  double worst = 0;
  for (float x = -86.59F; x < 88.72F; x += 0.0011F) {
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(vector_exp(x) - exact) / ulp_of(static_cast<float>(exact)));
  }
  EXPECT_LE(worst, 1.1);
}

TEST(VectorExp, HasTheRightEnds) {
  EXPECT_EQ(vector_exp(0.0F), 1.0F);
  EXPECT_EQ(vector_exp(-kInfinity), 0.0F);
  EXPECT_EQ(vector_exp(-87.0F), 0.0F);
  EXPECT_EQ(vector_exp(-1e30F), 0.0F);
  EXPECT_EQ(vector_exp(kInfinity), kInfinity);
  EXPECT_EQ(vector_exp(88.8F), kInfinity);
  EXPECT_LT(vector_exp(88.7F), kInfinity);
  EXPECT_TRUE(std::isnan(vector_exp(std::numeric_limits<float>::quiet_NaN())));
}

TEST(VectorExp, VectorsAndRemaindersAgreeBitByBit) {
  const Philox random(1, RandomPurpose::kTest);
  std::vector<float> x(1000), y(1000);
  for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(random.normal(i) * 20);
#pragma omp simd
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = vector_exp(x[i]);
  for (std::size_t i = 0; i < x.size(); ++i) {
    volatile float alone = x[i];
    ASSERT_EQ(y[i], vector_exp(alone));
  }
}

TEST(VectorGelu, IsWithinFourUlpOfItsArgument) {
  for (float x = -12; x < 12; x += 0.0013F) {
    const auto [value, derivative] = test::naive_gelu(static_cast<double>(x));
    const Gelu<float> got = vector_gelu(x);
    ASSERT_LE(std::abs(got.value - value), 4 * ulp_of(x)) << x;
    ASSERT_LE(std::abs(got.derivative - derivative), 8 * 0x1p-23) << x;
  }
  EXPECT_EQ(vector_gelu(1e30F).value, 1e30F);
  EXPECT_EQ(vector_gelu(1e30F).derivative, 1.0F);
  EXPECT_EQ(vector_gelu(-1e30F).value, 0.0F);
  EXPECT_EQ(vector_gelu(-1e30F).derivative, 0.0F);
}

TEST(Store, RoundsAsBFloat16Does) {
  for (std::uint32_t i = 0; i < 100000; ++i) {
    const float x = std::bit_cast<float>(i * 42953U);
    bfloat16 stored;
    store(stored, x);
    ASSERT_EQ(stored.bits, bfloat16(x).bits);
  }
}

}  // namespace
}  // namespace regroup
