#include "kernels/base/random.h"

#include <cmath>
#include <set>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/cpu/dropout_mask.h"

namespace regroup {
namespace {

using Words = std::array<std::uint32_t, 4>;

// Random123, kat_vectors, philox4x32-10.
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(Philox::from_key(0)(0, 0), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  constexpr std::uint64_t kOnes = ~std::uint64_t{0};
  EXPECT_EQ(Philox::from_key(kOnes)(kOnes, kOnes), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox::from_key(0x299f31d0a4093822)(0x85a308d3243f6a88, 0x0370734413198a2e),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, StreamsOfDifferentCoordinatesDiffer) {
  std::set<std::uint64_t> keys;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    for (const RandomPurpose purpose : {RandomPurpose::kInitialise, RandomPurpose::kDropout}) {
      for (std::uint64_t subkey = 0; subkey < 10; ++subkey) {
        const Philox parent(seed, purpose, subkey);
        keys.insert(parent.key());
        keys.insert(parent.child(0).key());
        keys.insert(parent.child(1).key());
      }
    }
  }
  EXPECT_EQ(keys.size(), 10U * 2 * 10 * 3);
  EXPECT_NE(key_of("encoder.block.0"), key_of("encoder.block.1"));
}

TEST(Philox, BelowIsInRangeAndUniform) {
  const Philox philox(3, RandomPurpose::kTest);
  constexpr std::uint64_t kBound = 7, kDraws = 70000;
  std::vector<double> counts(kBound);
  for (std::uint64_t i = 0; i < kDraws; ++i) {
    const std::uint64_t value = philox.below(kBound, i);
    ASSERT_LT(value, kBound);
    counts[value] += 1;
  }
  double chi_square = 0;
  for (const double n : counts) chi_square += (n - 10000) * (n - 10000) / 10000;
  EXPECT_LT(chi_square, 22.46);  // 6 degrees of freedom, 0.1 %
  EXPECT_THROW(philox.below(0, 0), InternalError);
}

TEST(Philox, NormalHasMeanZeroAndVarianceOne) {
  const Philox philox(4, RandomPurpose::kTest);
  constexpr int kDraws = 100000;
  double sum = 0, squares = 0;
  for (int i = 0; i < kDraws; ++i) {
    const double x = philox.normal(static_cast<std::uint64_t>(i));
    sum += x;
    squares += x * x;
  }
  const double mean = sum / kDraws;
  EXPECT_LT(std::abs(mean), 4 / std::sqrt(static_cast<double>(kDraws)));
  EXPECT_LT(std::abs(squares / kDraws - 1), 4 * std::sqrt(2.0 / kDraws));
}

TEST(Philox, UniformIsInsideTheOpenInterval) {
  const Philox philox(5, RandomPurpose::kTest);
  double sum = 0;
  for (std::uint64_t i = 0; i < 10000; ++i) {
    const double x = philox.uniform(i);
    ASSERT_GT(x, 0);
    ASSERT_LT(x, 1);
    sum += x;
  }
  EXPECT_NEAR(sum / 10000, 0.5, 4 * std::sqrt(1.0 / 12 / 10000));
}

TEST(FeistelPermutation, VisitsEveryIndexOnce) {
  for (const std::uint64_t size : {1ULL, 2ULL, 3ULL, 17ULL, 64ULL, 1000ULL, 4097ULL}) {
    const FeistelPermutation permutation(Philox(1, RandomPurpose::kSampleOrder, size), size);
    std::set<std::uint64_t> seen;
    for (std::uint64_t i = 0; i < size; ++i) {
      const std::uint64_t image = permutation(i);
      ASSERT_LT(image, size);
      seen.insert(image);
    }
    EXPECT_EQ(seen.size(), size);
    EXPECT_THROW(permutation(size), InternalError);
  }
}

TEST(FeistelPermutation, EpochsDifferAndNeighboursScatter) {
  constexpr std::uint64_t kSize = 10000;
  const FeistelPermutation a(Philox(1, RandomPurpose::kSampleOrder, 0), kSize);
  const FeistelPermutation b(Philox(1, RandomPurpose::kSampleOrder, 1), kSize);
  std::uint64_t same = 0;
  double covariance = 0, variance = 0;
  for (std::uint64_t i = 0; i + 1 < kSize; ++i) {
    same += a(i) == b(i) ? 1 : 0;
    const double here = static_cast<double>(a(i)) - kSize / 2.0,
                 next = static_cast<double>(a(i + 1)) - kSize / 2.0;
    covariance += here * next;
    variance += here * here;
  }
  EXPECT_LT(same, 10U);  // 1 expected
  EXPECT_LT(std::abs(covariance / variance), 4 / std::sqrt(static_cast<double>(kSize)));
}

TEST(DropoutMask, IsPhiloxWordByWordForAnyPart) {
  const Philox philox(9, RandomPurpose::kDropout);
  constexpr double kRate = 0.3;
  const DropoutMask mask(philox, kRate);
  for (const index_t first : {index_t{0}, index_t{1}, index_t{7}, (index_t{1} << 34) - 5}) {
    for (const index_t size : {1, 3, 256, 777}) {
      std::vector<float> factors(static_cast<std::size_t>(size));
      mask.factors(first, size, factors.data());
      for (index_t i = 0; i < size; ++i) {
        const auto element = static_cast<std::uint64_t>(first + i);
        const bool kept = philox(element / 4)[element % 4] >= kRate * 0x1p32;
        ASSERT_EQ(factors[static_cast<std::size_t>(i)], kept ? static_cast<float>(1 / (1 - kRate)) : 0.0F);
      }
    }
  }
}

TEST(DropoutMask, KeepsItsShare) {
  constexpr index_t kSize = 100000;
  constexpr double kRate = 0.1;
  std::vector<double> factors(kSize);
  DropoutMask(Philox(2, RandomPurpose::kDropout), kRate).factors(0, kSize, factors.data());
  double sum = 0;
  for (const double f : factors) sum += f;
  EXPECT_NEAR(sum / kSize, 1, 4 * std::sqrt(kRate / (1 - kRate) / kSize));
}

}  // namespace
}  // namespace regroup
