#include "trainer/formats/checkpoint_reader.h"

#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"
#include "tests/trainer/run/temporary_directory.h"

namespace regroup {
namespace {

using test::bytes_of;
using test::PlainTensor;
using test::refusal;
using test::TemporaryDirectory;
using test::write_plain_file;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::vector<float> counting(std::size_t count) {
  std::vector<float> values(count);
  std::iota(values.begin(), values.end(), 0.0F);
  return values;
}

// Every half: against the value that the bits mean, sign * 2^(e-15) * (1 + f/1024), computed in double.
TEST(HalfToFloat, IsExactForAllBitPatterns) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const double sign = (bits & 0x8000) != 0 ? -1 : 1;
    const int exponent = static_cast<int>((bits >> 10) & 31);
    const double fraction = bits & 0x3FF;
    const float found = half_to_float(static_cast<std::uint16_t>(bits));
    if (exponent == 31 && fraction != 0) {
      EXPECT_TRUE(std::isnan(found)) << bits;
      continue;
    }
    double expected = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) expected = std::numeric_limits<double>::infinity();
    EXPECT_EQ(static_cast<double>(found), sign * expected) << bits;
    EXPECT_EQ(std::signbit(found), sign < 0) << bits;
  }
}

TEST(CheckpointReader, ReadsSlicesOfEveryDimension) {
  const TemporaryDirectory directory;
  write_plain_file(directory / "model.safetensors", {test::plain_tensor("t", {3, 4, 5}, counting(60))});
  const CheckpointReader reader(directory.path());
  const std::vector<index_t> shape = {3, 4, 5};
  for (int dim = 0; dim < 3; ++dim) {
    for (index_t begin = 0; begin <= shape[static_cast<std::size_t>(dim)]; ++begin) {
      for (index_t end = begin; end <= shape[static_cast<std::size_t>(dim)]; ++end) {
        const Slice slice = {.dim = dim, .begin = begin, .end = end};
        auto part = local_shape(slice, shape);
        std::vector<float> found(60, -1);
        reader.read("t", dim, begin, end, Tensor(found.data(), DType::kFloat32, part));
        std::vector<float> expected(60, -1);
        std::size_t next = 0;
        for (index_t i = 0; i < 60; ++i) {
          const index_t at[] = {i / 20, i / 5 % 4, i % 5};
          if (at[dim] >= begin && at[dim] < end) expected[next++] = static_cast<float>(i);
        }
        EXPECT_EQ(found, expected) << dim << " [" << begin << ", " << end << ")";
      }
    }
  }
}

TEST(CheckpointReader, ConvertsStoredTypes) {
  const TemporaryDirectory directory;
  const std::vector<std::uint16_t> halves = {0x0001, 0x8001, 0x03FF, 0x3C00, 0x7BFF, 0x7C00, 0xFC00, 0x8000};
  const std::vector<float> half_values = {0x1p-24F, -0x1p-24F, 0x3FFp-24F, 1,
                                          65504,    INFINITY,  -INFINITY,  -0.0F};
  std::vector<bfloat16> brains;
  for (const float v : {1.0F, -2.5F, 3.0e38F, 0x1p-133F}) brains.emplace_back(v);
  const std::vector<double> doubles = {1.0 / 3, -1e300, 5};
  write_plain_file(directory / "model.safetensors",
                   {{"f16", StoredType::kF16, {2, 4}, bytes_of(halves)},
                    {"bf16", StoredType::kBF16, {4}, bytes_of(brains)},
                    {"f64", StoredType::kF64, {3}, bytes_of(doubles)},
                    {"f32", StoredType::kF32, {}, bytes_of(std::vector<float>{7})},
                    {"i64", StoredType::kI64, {1}, bytes_of(std::vector<std::int64_t>{7})}});
  const CheckpointReader reader(directory / "model.safetensors");
  std::vector<float> found(8);
  reader.read("f16", 0, 0, 2, Tensor(found.data(), DType::kFloat32, {2, 4}));
  EXPECT_EQ(found, half_values);
  std::vector<double> wide(2);
  reader.read("f16", 1, 3, 4, Tensor(wide.data(), DType::kFloat64, {2, 1}));
  EXPECT_EQ(wide, (std::vector<double>{1, -0.0}));
  found.resize(4);
  reader.read("bf16", 0, 0, 4, Tensor(found.data(), DType::kFloat32, {4}));
  EXPECT_EQ(found, (std::vector<float>{1, -2.5, static_cast<float>(bfloat16(3.0e38F)), 0x1p-133F}));
  wide.resize(3);
  reader.read("f64", 0, 0, 3, Tensor(wide.data(), DType::kFloat64, {3}));
  EXPECT_EQ(wide, doubles);
  found.resize(2);
  reader.read("f64", 0, 1, 3, Tensor(found.data(), DType::kFloat32, {2}));
  EXPECT_EQ(found, (std::vector<float>{-INFINITY, 5}));
  float scalar = 0;
  reader.read("f32", 0, 0, 0, Tensor(&scalar, DType::kFloat32, {}));
  EXPECT_EQ(scalar, 7);
  EXPECT_THAT(refusal([&] { reader.read("i64", 0, 0, 1, Tensor(found.data(), DType::kFloat32, {1})); }),
              AllOf(HasSubstr("'i64' is of type I64"), HasSubstr("model.safetensors")));
}

// More than is staged at once (4 MiB), cut along both dimensions.
TEST(CheckpointReader, ConvertsLargeTensorsPieceByPiece) {
  const TemporaryDirectory directory;
  constexpr index_t kRows = 3001, kColumns = 1023;
  std::vector<bfloat16> stored;
  for (index_t i = 0; i < kRows * kColumns; ++i) stored.emplace_back(static_cast<float>(i % 251));
  write_plain_file(directory / "m.safetensors",
                   {{"t", StoredType::kBF16, {kRows, kColumns}, bytes_of(stored)}});
  const CheckpointReader reader(directory / "m.safetensors");
  const auto expect_slice = [&](int dim, index_t begin, index_t end) {
    const auto shape = local_shape({.dim = dim, .begin = begin, .end = end}, {kRows, kColumns});
    std::vector<float> found(static_cast<std::size_t>(shape[0] * shape[1]), -1);
    reader.read("t", dim, begin, end, Tensor(found.data(), DType::kFloat32, shape));
    index_t wrong = 0;
    for (index_t i = 0; i < shape[0] * shape[1]; ++i) {
      const index_t row = i / shape[1] + (dim == 0 ? begin : 0);
      const index_t column = i % shape[1] + (dim == 1 ? begin : 0);
      wrong += found[static_cast<std::size_t>(i)] != static_cast<float>((row * kColumns + column) % 251);
    }
    EXPECT_EQ(wrong, 0) << dim;
  };
  expect_slice(0, 0, kRows);
  expect_slice(0, 7, 2900);
  expect_slice(1, 1, 1022);
  expect_slice(1, 1000, 1001);
}

TEST(CheckpointReader, NamesWhatIsWrongWithOneTensor) {
  const TemporaryDirectory directory;
  write_plain_file(directory / "model.safetensors", {test::plain_tensor("t", {2, 2}, counting(4))});
  const CheckpointReader reader(directory.path());
  std::vector<float> memory(6);
  ShardedTensor to = {.name = "t",
                      .shape = {2, 3},
                      .slice = {.dim = 0, .begin = 0, .end = 2},
                      .local = Tensor(memory.data(), DType::kFloat32, {2, 3})};
  EXPECT_THAT(refusal([&] { reader.read(to); }), AllOf(HasSubstr("model.safetensors"), HasSubstr("'t'"),
                                                       HasSubstr("[2, 2]"), HasSubstr("[2, 3]")));
  to.name = "u";
  EXPECT_THAT(refusal([&] { reader.read(to); }), HasSubstr("no tensor 'u'"));
  EXPECT_EQ(reader.find("u"), nullptr);
  ASSERT_NE(reader.find("t"), nullptr);
  EXPECT_THROW(reader.read("t", 0, 1, 3, to.local), InternalError);
}

TEST(CheckpointReader, RequireListsEverythingAtOnce) {
  const TemporaryDirectory directory;
  const auto one = counting(1);
  write_plain_file(directory / "model.safetensors",
                   {test::plain_tensor("same", {1}, one),
                    test::plain_tensor("bent", {1, 1}, one),
                    test::plain_tensor("more", {1}, one),
                    {"count", StoredType::kI32, {1}, std::string(4, '\0')},
                    test::plain_tensor("encoder.embed_tokens.weight", {1}, one),
                    test::plain_tensor("decoder.embed_tokens.weight", {1}, one),
                    test::plain_tensor("lm_head.weight", {1}, one),
                    test::plain_tensor(
                        "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", {1}, one)});
  const CheckpointReader reader(directory.path());
  const std::vector<ParameterSpec> table = {{.name = "same", .shape = {1}},
                                            {.name = "bent", .shape = {2, 1}},
                                            {.name = "lost", .shape = {1}},
                                            {.name = "count", .shape = {1}}};
  const std::string message = refusal([&] { reader.require(table); });
  EXPECT_THAT(
      message,
      AllOf(HasSubstr("1 missing (lost)"), HasSubstr("1 of another shape (bent: [1, 1] instead of [2, 1])"),
            HasSubstr("1 unknown (more)"), HasSubstr("(count: I32)"), Not(HasSubstr("same")),
            Not(HasSubstr("embed_tokens")), Not(HasSubstr("lm_head")), Not(HasSubstr("\n"))));
  const std::vector<ParameterSpec> good = {
      {.name = "same", .shape = {1}}, {.name = "bent", .shape = {1, 1}}, {.name = "more", .shape = {1}}};
  write_plain_file(directory / "good.safetensors",
                   {test::plain_tensor("same", {1}, one), test::plain_tensor("bent", {1, 1}, one),
                    test::plain_tensor("more", {1}, one)});
  EXPECT_NO_THROW(CheckpointReader(directory / "good.safetensors").require(good));
}

class IndexedCheckpoint : public testing::Test {
 protected:
  void SetUp() override {
    write_plain_file(directory_ / "model-1.safetensors", {test::plain_tensor("a", {2}, {1, 2})});
    write_plain_file(directory_ / "model-2.safetensors", {test::plain_tensor("b", {2}, {3, 4})});
  }
  std::string opened(const std::string& index) {
    write_text(directory_ / "model.safetensors.index.json", index);
    return refusal([&] { CheckpointReader reader(directory_.path()); });
  }
  TemporaryDirectory directory_;
};

TEST_F(IndexedCheckpoint, IsReadThroughItsIndex) {
  EXPECT_EQ(
      opened(
          R"({"metadata":{"total_size":16},"weight_map":{"a":"model-1.safetensors","b":"model-2.safetensors"}})"),
      "accepted");
  EXPECT_TRUE(CheckpointReader::exists(directory_.path()));
  EXPECT_FALSE(CheckpointReader::exists(directory_.path(), "optimizer"));
  const CheckpointReader reader(directory_.path());
  EXPECT_EQ(reader.tensors().size(), 2U);
  float value = 0;
  reader.read("b", 0, 1, 2, Tensor(&value, DType::kFloat32, {1}));
  EXPECT_EQ(value, 4);
}

TEST_F(IndexedCheckpoint, IsCheckedAgainstItsFiles) {
  const std::string a = R"("a":"model-1.safetensors")";
  const std::string b = R"("b":"model-2.safetensors")";
  const auto map = [](const std::string& entries) { return "{\"weight_map\":{" + entries + "}}"; };
  EXPECT_THAT(opened("{"), HasSubstr("not valid JSON"));
  const std::string deep(1'000'000, '[');
  EXPECT_THAT(opened(deep), HasSubstr("nested deeper than 32"));
  EXPECT_THAT(opened("{\"weight_map\":" + deep + std::string(deep.size(), ']') + "}"),
              HasSubstr("nested deeper than 32"));
  EXPECT_THAT(opened(std::string((16 << 20) + 1, ' ')), HasSubstr("model.safetensors.index.json"));
  EXPECT_THAT(opened("[]"), HasSubstr("weight_map"));
  EXPECT_THAT(opened("{}"), HasSubstr("weight_map"));
  EXPECT_THAT(opened(map("")), HasSubstr("weight_map"));
  EXPECT_THAT(opened(map(a + R"(,"b":2)")), HasSubstr("'b'"));
  EXPECT_THAT(opened(map(a + "," + a)), HasSubstr("twice"));
  EXPECT_THAT(
      opened(map(a + "," + b + R"(,"c":"model-3.safetensors","d":"model-4.safetensors")")),
      HasSubstr("2 of the 4 files that it names are missing: model-3.safetensors, model-4.safetensors"));
  EXPECT_THAT(opened(map(a + R"(,"b":"../model-2.safetensors")")), HasSubstr("same directory"));
  EXPECT_THAT(opened(map(a + R"(,"b":"/etc/passwd")")), HasSubstr("same directory"));
  EXPECT_THAT(opened(map(a + R"(,"b":"x\u0000.safetensors")")), HasSubstr("same directory"));
  EXPECT_THAT(opened(map(a + R"(,"b":"..")")), HasSubstr("same directory"));
  EXPECT_THAT(opened(map(a + R"(,"b":"model-1.safetensors")")),
              HasSubstr("'b' is not in model-1.safetensors"));
  EXPECT_THAT(opened(map(a + "," + b + R"(,"c":"model-1.safetensors")")), HasSubstr("'c' is not in"));
  write_plain_file(directory_ / "model-2.safetensors",
                   {test::plain_tensor("b", {2}, {3, 4}), test::plain_tensor("d", {1}, {3})});
  EXPECT_THAT(opened(map(a + "," + b)), HasSubstr("'d' of model-2.safetensors is not in the index"));
  write_plain_file(directory_ / "model-2.safetensors",
                   {test::plain_tensor("b", {2}, {3, 4}), test::plain_tensor("a", {2}, {1, 2})});
  EXPECT_THAT(opened(map(a + "," + b)), AllOf(HasSubstr("'a' is in"), HasSubstr("model-1.safetensors too")));
}

TEST(CheckpointReader, SaysWhereThereIsNoCheckpoint) {
  const TemporaryDirectory directory;
  EXPECT_THAT(refusal([&] { CheckpointReader reader(directory / "none"); }),
              AllOf(HasSubstr("none"), HasSubstr("no such file")));
  EXPECT_THAT(
      refusal([&] { CheckpointReader reader(directory.path()); }),
      HasSubstr("neither model.safetensors nor model.safetensors.index.json nor pytorch_model.bin nor "
                "pytorch_model.bin.index.json"));
  write_text(directory / "short.safetensors", "1234");
  EXPECT_THAT(refusal([&] { CheckpointReader reader(directory / "short.safetensors"); }),
              HasSubstr("too few"));
}

// Files that the reference implementation wrote (tests/golden, safetensors for Python).
TEST(CheckpointReader, ReadsFilesOfTheReferenceImplementation) {
  const CheckpointReader reader(std::filesystem::path(REGROUP_GOLDEN) / "mqa.safetensors");
  EXPECT_TRUE(reader.metadata().contains("config"));
  const StoredTensor* loss = reader.find("loss");
  ASSERT_NE(loss, nullptr);
  EXPECT_EQ(loss->shape, (std::vector<index_t>{1}));
  float value = 0;
  reader.read("loss", 0, 0, 1, Tensor(&value, DType::kFloat32, {1}));
  EXPECT_GT(value, 1.0F);
  EXPECT_LT(value, 100.0F);
}

}  // namespace
}  // namespace regroup
