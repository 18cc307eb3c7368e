#include "kernels/tensor.h"

#include <cmath>
#include <numeric>

#include <gtest/gtest.h>

#include "kernels/arena.h"
#include "kernels/make_backend.h"

namespace regroup {
namespace {

TEST(Tensor, IsDenseRowMajor) {
  std::vector<float> memory(24);
  const Tensor t(memory.data(), DType::kFloat32, {2, 3, 4});
  EXPECT_EQ(t.numel(), 24);
  EXPECT_EQ(t.bytes(), 96);
  EXPECT_TRUE(t.is_contiguous());
  EXPECT_EQ(t.stride[0], 12);
  EXPECT_EQ(t.stride[2], 1);
  EXPECT_TRUE(t.has_shape({2, 3, 4}));
  EXPECT_FALSE(t.has_shape({2, 12}));
  EXPECT_EQ(t.describe(), "float32[2, 3, 4]");
  EXPECT_EQ(t.as<float>(), memory.data());
  EXPECT_THROW(t.as<double>(), InternalError);
  EXPECT_FALSE(Tensor());
}

TEST(Tensor, SlicesKeepTheStrides) {
  std::vector<float> memory(24);
  const Tensor t(memory.data(), DType::kFloat32, {6, 4});
  const Tensor columns = t.slice(1, 1, 3);
  EXPECT_EQ(columns.as<float>(), memory.data() + 1);
  EXPECT_TRUE(columns.has_shape({6, 2}));
  EXPECT_EQ(columns.stride[0], 4);
  EXPECT_FALSE(columns.is_contiguous());
  EXPECT_TRUE(t.slice(0, 2, 5).is_contiguous());
  EXPECT_TRUE(columns.slice(0, 3, 4).is_contiguous());
  EXPECT_THROW(t.slice(1, 2, 5), InternalError);
  EXPECT_THROW(t.slice(2, 0, 0), InternalError);
}

// Every element keeps its address under the new shape.
TEST(Tensor, ReshapesAStridedTensorWhereItsRowsAllow) {
  std::vector<float> memory(5 * 36);
  std::iota(memory.begin(), memory.end(), 0.0F);
  const Tensor wide(memory.data(), DType::kFloat32, {5, 36});
  const Tensor part = wide.slice(1, 12, 24);
  const Tensor heads = part.reshape({5, 3, 4});
  for (index_t n = 0; n < 5; ++n) {
    for (index_t c = 0; c < 12; ++c) {
      const index_t at = n * heads.stride[0] + c / 4 * heads.stride[1] + c % 4 * heads.stride[2];
      EXPECT_EQ(heads.as<float>()[at], static_cast<float>(n * 36 + 12 + c));
    }
  }
  const Tensor batches = wide.slice(1, 0, 12).slice(0, 0, 4).reshape({2, 2, 12});
  EXPECT_EQ(batches.stride[0], 72);
  EXPECT_EQ(batches.stride[1], 36);
  EXPECT_TRUE(batches.reshape({4, 12}).has_shape({4, 12}));
  EXPECT_EQ(batches.reshape({4, 12}).stride[0], 36);
  EXPECT_THROW(part.reshape({60}), InternalError);
  EXPECT_THROW(part.reshape({5, 13}), InternalError);
  EXPECT_EQ(wide.reshape({180}).numel(), 180);
}

TEST(Tensor, OverlapIsOfBytes) {
  std::vector<float> memory(20);
  const Tensor t(memory.data(), DType::kFloat32, {4, 5});
  EXPECT_TRUE(overlaps(t, t.slice(0, 3, 4)));
  EXPECT_FALSE(overlaps(t.slice(0, 0, 2), t.slice(0, 2, 4)));
  EXPECT_FALSE(overlaps(t, Tensor()));
  EXPECT_FALSE(overlaps(t, t.slice(0, 2, 2)));
}

TEST(Buffer, FreesOnceAndOnlyOnce) {
  int freed = 0;
  int memory = 0;
  {
    Buffer first(&memory, 4, [&](void*) { ++freed; });
    Buffer second(std::move(first));
    EXPECT_EQ(first.data(), nullptr);
    EXPECT_EQ(second.data(), &memory);
    EXPECT_THROW(second.tensor(DType::kFloat32, {2}), InternalError);
    EXPECT_THROW(second.tensor(DType::kBFloat16, {1}, 3), InternalError);
    EXPECT_NO_THROW(second.tensor(DType::kBFloat16, {1}, 2));
  }
  EXPECT_EQ(freed, 1);
}

TEST(Arena, GivesBackWhatAFrameTook) {
  const auto owned = make_backend({.threads = 1});
  Backend& backend = *owned;
  Arena arena(backend.allocate(1024));
  const Tensor kept = arena.allocate(DType::kFloat32, {3});
  EXPECT_EQ(arena.used(), 64);
  {
    const Arena::Frame frame(arena);
    const Tensor scratch = arena.allocate(DType::kBFloat16, {5, 40});
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(scratch.data) % Arena::kAlignment, 0U);
    EXPECT_FALSE(overlaps(kept, scratch));
    EXPECT_EQ(arena.used(), 64 + 448);
  }
  EXPECT_EQ(arena.used(), 64);
  EXPECT_EQ(arena.high_water(), 64 + 448);
  EXPECT_THROW(arena.allocate(DType::kFloat32, {241}), InternalError);
}

TEST(DType, BFloat16RoundsToNearestEven) {
  EXPECT_EQ(bfloat16(1.0F).bits, 0x3F80);
  EXPECT_EQ(bfloat16(1.0F + 0x1p-8F).bits, 0x3F80);  // a tie: to even
  EXPECT_EQ(bfloat16(1.0F + 3 * 0x1p-8F).bits, 0x3F82);
  EXPECT_EQ(bfloat16(1.0F + 0x1.01p-8F).bits, 0x3F81);
  EXPECT_EQ(bfloat16(-INFINITY).bits, 0xFF80);
  EXPECT_EQ(bfloat16(3.4e38F).bits, 0x7F80);
  EXPECT_TRUE(std::isnan(static_cast<float>(bfloat16(NAN))));
}

TEST(CpuBackend, AllocatesZeroedAlignedMemory) {
  const auto owned = make_backend({.threads = 2});
  Backend& backend = *owned;
  const Buffer buffer = backend.allocate((index_t{5} << 20) + 3);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 64, 0U);
  const auto* const bytes = static_cast<const unsigned char*>(buffer.data());
  EXPECT_TRUE(std::all_of(bytes, bytes + buffer.bytes(), [](unsigned char b) { return b == 0; }));
  EXPECT_NO_THROW(backend.allocate(0));
  EXPECT_THROW(backend.allocate(-1), InternalError);
}

}  // namespace
}  // namespace regroup
