#include "parallel/communicator.h"

#include <cmath>
#include <cstring>
#include <vector>

#include <gtest/gtest.h>

namespace regroup {
namespace {

constexpr index_t kChunk = index_t{1} << 20;  // of mpi_communicator.cpp: lengths around it must not matter

// Value i of rank `rank`: the same on whichever rank it is asked for, so that each can compute the sum of
// all.
template <class T>
T value_of(int rank, index_t i) {
  // Mixed as by splitmix64.
  auto word = static_cast<std::uint64_t>(i * 8 + rank + 1) * 0x9E3779B97F4A7C15;
  word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9;
  word = (word ^ (word >> 27)) * 0x94D049BB133111EB;
  if constexpr (std::is_same_v<T, std::int32_t>) return static_cast<std::int32_t>(word % 2001) - 1000;
  return T(static_cast<float>(static_cast<double>(word) * 0x1p-64 - 0.5));
}

template <class T>
std::vector<T> values_of(int rank, index_t count) {
  std::vector<T> values;
  for (index_t i = 0; i < count; ++i) values.push_back(value_of<T>(rank, i));
  return values;
}

template <class T>
double number(T value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return static_cast<float>(value);
  } else {
    return static_cast<double>(value);
  }
}

// Half a unit in the last place of 1, relative error of one rounding.
template <class T>
constexpr double rounding() {
  if constexpr (std::is_same_v<T, double>) return 0x1p-53;
  if constexpr (std::is_same_v<T, float>) return 0x1p-24;
  if constexpr (std::is_same_v<T, bfloat16>) return 0x1p-8;
  return 0;
}

template <class T>
class CommunicatorOf : public testing::Test {
 protected:
  ProcessGroup world_ = ProcessGroup::world();
  std::unique_ptr<Communicator> communicator_ = make_mpi_communicator("world", world_);

  static Tensor tensor(std::vector<T>& values) {
    return Tensor(values.data(), dtype_of<T>(), {static_cast<index_t>(values.size())});
  }

  void expect_sum(index_t count) {
    std::vector<T> x = values_of<T>(world_.rank(), count);
    communicator_->all_reduce(tensor(x));
    index_t wrong = 0;
    for (index_t i = 0; i < count; ++i) {
      double expected = 0;
      double magnitude = 0;
      for (int r = 0; r < world_.size(); ++r) {
        expected += number(value_of<T>(r, i));
        magnitude += std::abs(number(value_of<T>(r, i)));
      }
      // size - 1 roundings of partial sums; bfloat16: those in float32, and one of the result to bfloat16.
      double bound = (world_.size() - 1) * rounding<T>() * magnitude;
      if constexpr (std::is_same_v<T, bfloat16>) {
        bound =
            (world_.size() - 1) * rounding<float>() * magnitude + rounding<bfloat16>() * std::abs(expected);
      }
      if (!(std::abs(number(x[static_cast<std::size_t>(i)]) - expected) <= bound * 1.01)) ++wrong;
    }
    EXPECT_EQ(wrong, 0) << "of " << count;
  }
};

using Types = testing::Types<double, float, bfloat16, std::int32_t>;
TYPED_TEST_SUITE(CommunicatorOf, Types);

TYPED_TEST(CommunicatorOf, SumsAnyLength) {
  for (const index_t count : {1, 2, 3, 5, 7, 1000, 1023, 4097, 65537}) this->expect_sum(count);
}

TYPED_TEST(CommunicatorOf, SumsMoreThanOneChunk) {
  this->expect_sum(kChunk);
  this->expect_sum(2 * kChunk + 3);
}

TYPED_TEST(CommunicatorOf, TakesMaximumAndMinimum) {
  for (const ReduceOp op : {ReduceOp::kMax, ReduceOp::kMin}) {
    auto x = values_of<TypeParam>(this->world_.rank(), 1001);
    this->communicator_->all_reduce(this->tensor(x), op);
    for (index_t i = 0; i < 1001; ++i) {
      double expected = number(value_of<TypeParam>(0, i));
      for (int r = 1; r < this->world_.size(); ++r) {
        const double other = number(value_of<TypeParam>(r, i));
        expected = op == ReduceOp::kMax ? std::max(expected, other) : std::min(expected, other);
      }
      ASSERT_EQ(number(x[static_cast<std::size_t>(i)]), expected);
    }
  }
}

TYPED_TEST(CommunicatorOf, GivesTheSameBitsOnEveryRankAndCall) {
  for (const index_t count : {index_t{3}, index_t{1000}, index_t{100'001}, kChunk + 5}) {
    std::vector<std::uint64_t> sums;
    for (int call = 0; call < 3; ++call) {
      auto x = values_of<TypeParam>(this->world_.rank(), count);
      this->communicator_->all_reduce(this->tensor(x));
      std::uint64_t bits = 0;
      for (const TypeParam& value : x) {
        std::uint64_t word = 0;
        std::memcpy(&word, &value, sizeof(value));
        bits = bits * 0x9E3779B97F4A7C15 + word;
      }
      sums.push_back(bits);
    }
    EXPECT_EQ(sums, std::vector<std::uint64_t>(3, sums[0]));
    for (const auto& others : this->world_.all_gather(sums)) EXPECT_EQ(others, sums);
  }
}

TYPED_TEST(CommunicatorOf, BroadcastsFromEveryRoot) {
  for (int root = 0; root < this->world_.size(); ++root) {
    auto x = values_of<TypeParam>(this->world_.rank(), 1234);
    this->communicator_->broadcast(this->tensor(x), root);
    for (index_t i = 0; i < 1234; ++i) {
      ASSERT_EQ(number(x[static_cast<std::size_t>(i)]), number(value_of<TypeParam>(root, i)));
    }
  }
}

// 1 + 2^-8 + 2^-8 ...: in bfloat16 each term would be rounded away (a tie, to even), in float32 none is.
TEST(Communicator, SumsBfloat16InFloat32AndRoundsOnce) {
  const ProcessGroup world = ProcessGroup::world();
  const auto communicator = make_mpi_communicator("world", world);
  std::vector<bfloat16> x(37, bfloat16(world.rank() == 0 ? 1.0F : 0x1p-8F));
  communicator->all_reduce(Tensor(x.data(), DType::kBFloat16, {37}));
  const bfloat16 expected(1.0F + static_cast<float>(world.size() - 1) * 0x1p-8F);
  for (const bfloat16 value : x) EXPECT_EQ(value.bits, expected.bits);
  if (world.size() == 4) {
    EXPECT_GT(static_cast<float>(expected), 1.0F);
  }
}

TEST(Communicator, CountsBytesAndSeconds) {
  const ProcessGroup world = ProcessGroup::world();
  const auto communicator = make_mpi_communicator("world", world);
  std::vector<float> x(100, 1.0F);
  communicator->all_reduce(Tensor(x.data(), DType::kFloat32, {10, 10}));
  communicator->broadcast(Tensor(x.data(), DType::kFloat32, {50}), 0);
  communicator->all_reduce(Tensor(x.data(), DType::kFloat32, {0}));
  EXPECT_EQ(communicator->bytes_moved(), world.size() == 1 ? 0 : 600);
  EXPECT_EQ(communicator->seconds() > 0, world.size() > 1);
  EXPECT_EQ(x[0], static_cast<float>(world.size()));
}

TEST(Communicator, RefusesWhatItCannotMove) {
  const auto communicator = make_mpi_communicator("tp", ProcessGroup::world());
  std::vector<float> x(100);
  const Tensor square(x.data(), DType::kFloat32, {10, 10});
  EXPECT_THROW(communicator->all_reduce(square.slice(1, 0, 5)), InternalError);
  EXPECT_THROW(communicator->broadcast(square, communicator->size()), InternalError);
  EXPECT_THROW(communicator->broadcast(square, -1), InternalError);
}

TEST(Communicator, OfAPlanMovesNothing) {
  const auto communicator = make_plan_communicator("tp", 3, 8);
  EXPECT_EQ(communicator->rank(), 3);
  EXPECT_EQ(communicator->size(), 8);
  EXPECT_EQ(communicator->name(), "tp");
  std::vector<float> x(4, 2.0F);
  communicator->all_reduce(Tensor(x.data(), DType::kFloat32, {4}));
  communicator->broadcast(Tensor(x.data(), DType::kFloat32, {4}), 7);
  EXPECT_EQ(x, std::vector<float>(4, 2.0F));
  EXPECT_EQ(communicator->bytes_moved(), 32);
  EXPECT_THROW(make_plan_communicator("tp", 8, 8), InternalError);
}

}  // namespace
}  // namespace regroup
