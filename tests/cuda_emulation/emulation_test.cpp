// The emulated GPU itself: what kernels get from it, and what it makes of wrong ones.
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "kernels/cuda/ptx.cuh"
#include "kernels/dtype.h"
#include "tests/cuda_emulation/device_language.h"

namespace regroup::emulation {
namespace {

constexpr Order kOrders[] = {Order::kForward, Order::kBackward, Order::kShuffled};

// What run() complains of.
std::string complaint(const std::function<void()>& kernel, const Launch& launch) {
  try {
    run(kernel, launch);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "";
}

TEST(Machine, EveryThreadOfEveryBlockRunsOnce) {
  for (const Order order : kOrders) {
    std::vector<int> runs(6 * 90);
    run(
        [&] {
          const unsigned block = blockIdx.x + gridDim.x * blockIdx.y;
          const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
          ++runs[block * 90 + thread];
        },
        {.blocks = {3, 2}, .threads = {5, 9, 2}, .order = order});
    EXPECT_EQ(runs, std::vector<int>(6 * 90, 1));
  }
}

TEST(Machine, BarriersOrderWhatThreadsDo) {
  for (const Order order : kOrders) {
    std::vector<int> sums(4);
    run(
        [&] {
          __shared__ int values[100];
          values[threadIdx.x] = static_cast<int>(threadIdx.x + blockIdx.x);
          for (unsigned half = 64; half > 0; half /= 2) {
            __syncthreads();
            if (threadIdx.x < half && threadIdx.x + half < 100)
              values[threadIdx.x] += values[threadIdx.x + half];
          }
          EXPECT_EQ(__syncthreads_count(threadIdx.x % 3 == 0), 34);
          if (threadIdx.x == 0) sums[blockIdx.x] = values[0];
        },
        {.blocks = 4, .threads = 100, .order = order, .seed = 5});
    EXPECT_EQ(sums, (std::vector<int>{4950, 5050, 5150, 5250}));
  }
}

TEST(Machine, ARaceGivesOtherResultsInAnotherOrder) {
  std::vector<std::vector<int>> results;
  for (const Order order : kOrders) {
    std::vector<int>& result = results.emplace_back(64);
    run(
        [&] {
          __shared__ int values[64];
          values[threadIdx.x] = -1;
          __syncthreads();
          values[threadIdx.x] = static_cast<int>(threadIdx.x);
          result[threadIdx.x] = values[(threadIdx.x + 32) % 64];  // without a barrier
        },
        {.threads = 64, .order = order});
  }
  EXPECT_NE(results[0], results[1]);
}

TEST(Machine, DeadlocksAreFound) {
  EXPECT_THAT(complaint([] { threadIdx.x == 3 ? void() : __syncthreads(); }, {.threads = 40}),
              testing::HasSubstr("thread (3, 0, 0) and 0 more have left the kernel"));
  EXPECT_THAT(complaint([] { threadIdx.x == 3 ? __syncwarp() : __syncthreads(); }, {.threads = 64}),
              testing::HasSubstr("thread (3, 0, 0) waits at __syncwarp"));
  EXPECT_THAT(
      complaint([] { threadIdx.x == 3 ? __syncwarp() : void(__ballot_sync(~0U, 1)); }, {.threads = 32}),
      testing::HasSubstr("lanes of one warp are at different instructions"));
  EXPECT_THAT(complaint([] { __shfl_sync(0xFFFFU, 1, 0); }, {.threads = 16}),
              testing::HasSubstr("only whole warps"));
  // The machine works on.
  int runs = 0;
  run([&] { ++runs; }, {.threads = 64});
  EXPECT_EQ(runs, 64);
}

TEST(Machine, SharedMemoryBeginsAsNaN) {
  run(
      [] {
        auto* shared = reinterpret_cast<float*>(dynamic_shared());
        EXPECT_TRUE(std::isnan(shared[threadIdx.x]));
        shared[threadIdx.x] = 1;
      },
      {.blocks = 3, .threads = 50, .shared_bytes = 200});
}

TEST(Warp, ShufflesAndVotes) {
  run(
      [] {
        const int l = lane();
        EXPECT_EQ(__shfl_sync(~0U, l, 7), 7);
        EXPECT_EQ(__shfl_sync(~0U, l, (l + 1) % 32), (l + 1) % 32);
        EXPECT_EQ(__shfl_xor_sync(~0U, l * 1.5, 5), (l ^ 5) * 1.5);
        EXPECT_EQ(__shfl_down_sync(~0U, l, 3), l + 3 < 32 ? l + 3 : l);
        EXPECT_EQ(__shfl_up_sync(~0U, l, 3), l >= 3 ? l - 3 : l);
        EXPECT_EQ(__shfl_down_sync(~0U, l, 3, 8), l % 8 + 3 < 8 ? l + 3 : l);
        EXPECT_EQ(__shfl_sync(~0U, l, 1, 16), l / 16 * 16 + 1);
        EXPECT_EQ(__ballot_sync(~0U, l % 2 == 1), 0xAAAAAAAAU);
        EXPECT_TRUE(__any_sync(~0U, l == 9));
        EXPECT_FALSE(__all_sync(~0U, l == 9));
      },
      {.threads = 64, .order = Order::kShuffled});
}

TEST(Ptx, MatrixProduct) {
  // d += a b by mma, a [16, 16] and b [16, 8] loaded by ldmatrix: b's fragments from b^T as they are.
  const Philox random(1, RandomPurpose::kTest);
  alignas(16) bfloat16 a[16][16], b_transposed[16][16] = {};
  float want[16][8], got[16][8] = {};
  for (unsigned i = 0; i < 256; ++i) {
    a[i / 16][i % 16] = bfloat16(static_cast<float>(random.normal(i)));
    if (i < 128) b_transposed[i / 16][i % 16] = bfloat16(static_cast<float>(random.normal(i + 256)));
  }
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      want[i][j] = static_cast<float>(i - j);
      for (int k = 0; k < 16; ++k)
        want[i][j] += static_cast<float>(a[i][k]) * static_cast<float>(b_transposed[j][k]);
    }
  }
  run(
      [&] {
        const int l = lane(), g = l / 4, t = l % 4;
        // Matrices: (rows 0-7, columns 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15).
        std::uint32_t fragment_a[4], fragments_b[4];
        ptx::ldmatrix_x4(fragment_a, &a[l % 16][l / 16 * 8]);
        ptx::ldmatrix_x4(fragments_b, &b_transposed[l % 16][l / 16 * 8]);
        const std::uint32_t fragment_b[2] = {fragments_b[0], fragments_b[2]};
        float d[4];
        for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(g + i / 2 * 8 - (2 * t + i % 2));
        ptx::mma_bf16_m16n8k16(d, fragment_a, fragment_b);
        for (int i = 0; i < 4; ++i) got[g + i / 2 * 8][2 * t + i % 2] = d[i];
      },
      {.threads = 32});
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) EXPECT_NEAR(got[i][j], want[i][j], 1e-5) << i << ", " << j;
  }
}

TEST(Ptx, TransposedMatrices) {
  alignas(16) std::uint16_t matrices[32][8];
  std::iota(&matrices[0][0], &matrices[0][0] + 256, std::uint16_t{0});
  run(
      [&] {
        const int l = lane(), row = 2 * (l % 4), column = l / 4;
        std::uint32_t plain[4], transposed[4];
        ptx::ldmatrix_x4(plain, matrices[l]);
        ptx::ldmatrix_x4_transposed(transposed, matrices[l]);
        for (int i = 0; i < 4; ++i) {
          const auto* matrix = matrices + 8 * i;
          EXPECT_EQ(plain[i], matrix[column][row] | matrix[column][row + 1] << 16);
          EXPECT_EQ(transposed[i], matrix[row][column] | matrix[row + 1][column] << 16);
        }
      },
      {.threads = 32});
}

TEST(Ptx, CopiesArriveWithTheirWait) {
  alignas(16) const float global[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  run(
      [&] {
        auto* shared = reinterpret_cast<float*>(dynamic_shared());
        ptx::cp_async_16(shared, global, true);
        ptx::cp_async_commit();
        ptx::cp_async_16(shared + 4, global + 4, true);
        ptx::cp_async_16(shared + 8, nullptr, false);
        ptx::cp_async_commit();
        ptx::cp_async_wait<1>();
        EXPECT_EQ(shared[3], 3);
        EXPECT_TRUE(std::isnan(shared[4]) && std::isnan(shared[8]));
        ptx::cp_async_wait<0>();
        EXPECT_EQ(shared[7], 7);
        EXPECT_EQ(shared[11], 0);
      },
      {.shared_bytes = 48});
  EXPECT_THAT(complaint([&] { ptx::cp_async_16(dynamic_shared(), global + 1, true); }, {.shared_bytes = 16}),
              testing::HasSubstr("not aligned"));
  // A wait sees what was committed only.
  EXPECT_THAT(complaint(
                  [&] {
                    ptx::cp_async_16(dynamic_shared(), global, true);
                    ptx::cp_async_wait<0>();
                  },
                  {.shared_bytes = 16}),
              testing::HasSubstr("committed and waited for"));
}

}  // namespace
}  // namespace regroup::emulation
