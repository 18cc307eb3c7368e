#include "trainer/formats/streamed_writer.h"

#include <cmath>
#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/random.h"
#include "tests/trainer/checkpoint/shared_directory.h"
#include "tests/trainer/formats/plain_file.h"
#include "trainer/formats/checkpoint_reader.h"

namespace regroup {
namespace {

using test::refusal;
using test::SharedDirectory;
using testing::HasSubstr;

TEST(FloatToHalf, GivesBackEveryHalf) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = half_to_float(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(half_to_float(float_to_half(value)))) << bits;
    } else {
      EXPECT_EQ(float_to_half(value), bits);
    }
  }
}

// Between two neighbouring halves: what is nearer, and in the middle the even one.
TEST(FloatToHalf, RoundsToTheNearest) {
  constexpr float kBelow = -1.0F;
  for (std::uint32_t bits = 0; bits < 0x7BFF; ++bits) {
    const float low = half_to_float(static_cast<std::uint16_t>(bits));
    const float high = half_to_float(static_cast<std::uint16_t>(bits + 1));
    const float middle = low + (high - low) / 2;  // exact
    EXPECT_EQ(float_to_half(std::nextafter(middle, kBelow)), bits);
    EXPECT_EQ(float_to_half(std::nextafter(middle, std::numeric_limits<float>::max())), bits + 1);
    EXPECT_EQ(float_to_half(middle), bits % 2 == 0 ? bits : bits + 1);
    EXPECT_EQ(float_to_half(-middle), 0x8000U + (bits % 2 == 0 ? bits : bits + 1));
  }
  EXPECT_EQ(float_to_half(65519.996F), 0x7BFF);
  EXPECT_EQ(float_to_half(65520.0F), 0x7C00);
  EXPECT_EQ(float_to_half(std::numeric_limits<float>::infinity()), 0x7C00);
}

float value_at(const std::string& name, index_t element) {
  return static_cast<float>(
      Philox(5, RandomPurpose::kTest, key_of(name)).normal(static_cast<std::uint64_t>(element)));
}

index_t row_elements(const StoredTensor& tensor) { return tensor.shape.size() == 2 ? tensor.shape[1] : 1; }

// More rows than one piece holds, a vector, and a single row.
std::vector<StoredTensor> tensors_of(StoredType type) {
  return {{.name = "long", .type = type, .shape = {70'000, 33}},
          {.name = "vector", .type = type, .shape = {17}},
          {.name = "row", .type = type, .shape = {1, 5}}};
}

ReadTensorRows rows_of(const std::vector<StoredTensor>& tensors) {
  return [&tensors](const std::string& name, index_t begin, index_t end, const Tensor& out) {
    const auto tensor =
        std::find_if(tensors.begin(), tensors.end(), [&](const StoredTensor& t) { return t.name == name; });
    const index_t row = row_elements(*tensor);
    ASSERT_EQ(out.numel(), (end - begin) * row);
    for (index_t i = 0; i < out.numel(); ++i) out.as<float>()[i] = value_at(name, begin * row + i);
  };
}

class StreamedWriterTest : public testing::TestWithParam<StoredType> {};

TEST_P(StreamedWriterTest, WritesWhatItIsGiven) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  const std::vector<StoredTensor> tensors = tensors_of(GetParam());
  for (const std::uint64_t most : {std::uint64_t{1} << 40, std::uint64_t{100}}) {
    const auto folder = directory.path() / std::to_string(most);
    world.run_on(0, [&] { regroup::create_directories(folder); });
    write_streamed(world, folder, "model", tensors, rows_of(tensors), {.max_file_bytes = most});
    const CheckpointReader reader(folder);
    for (const StoredTensor& tensor : tensors) {
      ASSERT_NE(reader.find(tensor.name), nullptr);
      EXPECT_EQ(reader.find(tensor.name)->type, GetParam());
      EXPECT_EQ(reader.find(tensor.name)->shape, tensor.shape);
      const index_t count = tensor.shape[0] * row_elements(tensor);
      std::vector<float> found(static_cast<std::size_t>(count)), expected(found.size());
      reader.read(tensor.name, 0, 0, tensor.shape[0], Tensor(found.data(), DType::kFloat32, tensor.shape));
      for (index_t i = 0; i < count; ++i) expected[static_cast<std::size_t>(i)] = value_at(tensor.name, i);
      std::vector<std::byte> rounded(static_cast<std::size_t>(count * size_of(GetParam())));
      store_elements(expected.data(), count, GetParam(), rounded.data());
      convert_elements(GetParam(), rounded.data(), count, expected.data());
      EXPECT_EQ(found, expected) << tensor.name;
    }
    world.barrier();
  }
}

INSTANTIATE_TEST_SUITE_P(Types, StreamedWriterTest,
                         testing::Values(StoredType::kF32, StoredType::kBF16, StoredType::kF16),
                         [](const auto& type) { return std::string(name_of(type.param)); });

TEST(StreamedWriter, RefusesWhatCannotBeStored) {
  const ProcessGroup world = ProcessGroup::world();
  const SharedDirectory directory(world);
  const auto written = [&](StoredType type, float value) {
    const std::vector<StoredTensor> tensors = {{.name = "t", .type = type, .shape = {3}}};
    const ReadTensorRows rows = [&](const std::string&, index_t, index_t, const Tensor& out) {
      std::fill_n(out.as<float>(), out.numel(), value);
    };
    const std::string message =
        refusal([&] { write_streamed(world, directory.path(), "model", tensors, rows); });
    world.barrier();
    return message;
  };
  EXPECT_EQ(written(StoredType::kF16, 65519), "accepted");
  EXPECT_THAT(written(StoredType::kF16, -65520), HasSubstr("'t' holds -65520, which is too large for fp16"));
  EXPECT_EQ(written(StoredType::kBF16, 65520), "accepted");
  EXPECT_THAT(written(StoredType::kF32, NAN), HasSubstr("'t' holds values that are not finite"));
  EXPECT_THAT(written(StoredType::kBF16, INFINITY), HasSubstr("not finite"));
}

}  // namespace
}  // namespace regroup
