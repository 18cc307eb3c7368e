// The op set refuses what its contract excludes, and says what it was given.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/plan_backend.h"
#include "tests/kernels/embedding_cases.h"

namespace regroup {
namespace {

class OpCheckTest : public testing::Test {
 protected:
  Tensor make(std::initializer_list<index_t> shape, DType dtype = DType::kFloat32) {
    const Tensor shaped(nullptr, dtype, shape);
    buffers_.push_back(backend_.allocate(shaped.bytes()));
    return buffers_.back().tensor(dtype, shape);
  }
  // The message of the InternalError that `call` throws; "" where it throws none.
  template <class Call>
  static std::string message(Call&& call) {
    try {
      call();
    } catch (const InternalError& error) {
      return error.what();
    }
    return "";
  }

  PlanBackend backend_;
  std::vector<Buffer> buffers_;
};

TEST_F(OpCheckTest, NamesTheOpAndBothTensors) {
  const Tensor x = make({7, 20}), w = make({21}), y = make({7, 20}), r = make({7});
  const std::string text = message([&] { backend_.rms_norm(x, w, y, r, 1e-6); });
  EXPECT_EQ(text, "rms_norm(x float32[7, 20]): weight is float32[21]; float32[20] is needed");
}

TEST_F(OpCheckTest, RefusesWrongTypesAndMissingTensors) {
  const Tensor x = make({7, 20}), w = make({20}), y = make({7, 20}), r = make({7});
  EXPECT_EQ(message([&] { backend_.rms_norm(x, w, y, r, 1e-6); }), "");
  const Tensor double_r = make({7}, DType::kFloat64), bf_y = make({7, 20}, DType::kBFloat16);
  EXPECT_NE(message([&] { backend_.rms_norm(x, w, y, double_r, 1e-6); }), "");
  EXPECT_NE(message([&] { backend_.rms_norm(x, w, bf_y, r, 1e-6); }), "");
  EXPECT_NE(message([&] { backend_.rms_norm(x, w, y, Tensor(), 1e-6); }).find("missing"), std::string::npos);
  EXPECT_NE(message([&] { backend_.rms_norm(Tensor(), w, y, r, 1e-6); }), "");
}

TEST_F(OpCheckTest, RefusesGapsAndOverlap) {
  const Tensor x = make({7, 20}), w = make({20}), r = make({7}), wide = make({7, 40});
  EXPECT_NE(message([&] { backend_.rms_norm(x, w, wide.slice(1, 0, 20), r, 1e-6); }).find("gaps"),
            std::string::npos);
  EXPECT_NE(message([&] { backend_.rms_norm(x, w, x, r, 1e-6); }).find("overlaps"), std::string::npos);
  EXPECT_EQ(message([&] { backend_.add(x, x, x); }), "");
  const Tensor y = wide.reshape({14, 20});
  EXPECT_NE(message([&] { backend_.add(y.slice(0, 0, 7), x, y.slice(0, 1, 8)); }).find("overlaps"),
            std::string::npos);
}

TEST_F(OpCheckTest, MatmulChecksTheProductsShape) {
  const Tensor a = make({3, 4}), b = make({5, 4}), c = make({3, 5});
  EXPECT_EQ(message([&] { backend_.matmul(a, b, c, {.transpose_b = true}); }), "");
  EXPECT_EQ(backend_.flops(), 2.0 * 3 * 4 * 5);
  EXPECT_NE(message([&] { backend_.matmul(a, b, c); }), "");
  EXPECT_NE(message([&] { backend_.matmul(a, b, make({5, 3}), {.transpose_b = true}); }), "");
  EXPECT_NE(message([&] { backend_.matmul(make({4}), b, c); }), "");
}

TEST_F(OpCheckTest, MatmulOfBFloat16MayGiveEitherType) {
  const DType bf16 = DType::kBFloat16;
  const Tensor a = make({3, 4}, bf16), b = make({4, 5}, bf16);
  EXPECT_EQ(message([&] { backend_.matmul(a, b, make({3, 5}, bf16)); }), "");
  EXPECT_EQ(message([&] { backend_.matmul(a, b, make({3, 5})); }), "");
  EXPECT_NE(message([&] { backend_.matmul(a, b, make({3, 5}, DType::kFloat64)); }), "");
}

TEST_F(OpCheckTest, DropoutMustLieInsideItsGlobalMatrix) {
  const Tensor x = make({7, 20}), y = make({7, 20});
  EXPECT_EQ(message([&] { backend_.dropout_add({}, x, y, {.rate = 0.1, .columns = 20}); }), "");
  EXPECT_EQ(message([&] { backend_.dropout_add({}, x, y, {}); }), "");
  EXPECT_NE(message([&] { backend_.dropout_add({}, x, y, {.rate = 0.1, .columns = 19}); }), "");
  EXPECT_NE(message([&] { backend_.dropout_add({}, x, y, {.rate = 1, .columns = 20}); }), "");
}

TEST_F(OpCheckTest, AttentionCountsVisibleScores) {
  const index_t b = 2, q = 5, k = 7, h = 6, g = 3, c = 4;
  const Tensor queries = make({b, q, h, c}), out = make({b, q, h, c});
  const Tensor keys = make({b, k, g, c}), values = make({b, k, g, c}), lse = make({b, h, q});
  backend_.attention(queries, keys, values, {}, {}, out, lse, {});
  EXPECT_EQ(backend_.flops(), 4.0 * b * h * c * q * k);
  const double before = backend_.flops();
  backend_.attention(queries, keys, values, {}, {}, out, lse, {.causal = true});
  EXPECT_EQ(backend_.flops() - before, 4.0 * b * h * c * (q * (q + 1) / 2));
  EXPECT_NE(message([&] {
              backend_.attention(queries, make({b, k, 4, c}), values, {}, {}, out, lse, {});
            }),
            "");
  EXPECT_NE(message([&] {
              backend_.attention(queries, keys, values, make({h, q + k}), {}, out, lse, {});
            }),
            "");
}

TEST_F(OpCheckTest, OptimizerSlotsAreFactoredOrFull) {
  const Tensor w = make({4, 6}), g = make({4, 6}), totals = make({4}, DType::kFloat64);
  AdafactorSlot slot{.weight = w, .gradient = g, .totals = totals, .global_rows = 4, .global_columns = 6};
  EXPECT_NE(message([&] { backend_.adafactor_statistics(std::span(&slot, 1), {}); }), "");
  slot.second_moment = make({4, 6});
  EXPECT_EQ(message([&] { backend_.adafactor_statistics(std::span(&slot, 1), {}); }), "");
  slot.row = make({4});
  EXPECT_NE(message([&] { backend_.adafactor_statistics(std::span(&slot, 1), {}); }), "");
}

TEST(RelativePositionBucket, AgreesWithTheGoldenThresholds) {
  for (index_t distance = -2048; distance <= 2048; ++distance) {
    ASSERT_EQ(relative_position_bucket(distance, true, 32, 128), test::golden_bucket(distance, true));
    ASSERT_EQ(relative_position_bucket(distance, false, 32, 128), test::golden_bucket(distance, false));
  }
}

TEST(RelativePositionBucket, StaysInsideAnyTable) {
  for (const index_t buckets : {2, 6, 8, 32}) {
    for (const index_t max_distance : {8, 20, 128}) {
      if (max_distance <= buckets / 2) {
        EXPECT_THROW(relative_position_bucket(-1, false, buckets, max_distance), InternalError);
        continue;
      }
      index_t last = 0;
      for (index_t past = 0; past < 1000; ++past) {
        const index_t bucket = relative_position_bucket(-past, false, buckets, max_distance);
        ASSERT_GE(bucket, last);
        ASSERT_LT(bucket, buckets);
        last = bucket;
      }
      ASSERT_EQ(last, buckets - 1);
    }
  }
}

}  // namespace
}  // namespace regroup
