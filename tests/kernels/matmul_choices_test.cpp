// The table of chosen algorithms: what is written is read again, what is damaged is refused in one line.
#include "kernels/cuda/matmul_choices.h"

#include <set>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace regroup::test {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr MatmulAlgorithm kFirst = {1, 0xFEDCBA9876543210, 0, 0, 0, 0, 0, ~std::uint64_t{0}};
constexpr MatmulAlgorithm kSecond = {2, 3, 5, 7, 11, 13, 17, 19};

std::string complaint(const std::string& text) {
  try {
    MatmulChoices(130100, "NVIDIA H200").read(text);
  } catch (const UserError& error) {
    return error.what();
  }
  return "none";
}

TEST(MatmulChoices, WhatIsWrittenIsReadAgain) {
  MatmulChoices written(130100, "NVIDIA H200"), read(130100, "NVIDIA H200");
  written.set("a", kFirst);
  written.set("b", kSecond);
  EXPECT_TRUE(read.read(written.write()));
  EXPECT_EQ(read.size(), 2U);
  EXPECT_EQ(read.find("a"), kFirst);
  EXPECT_EQ(read.find("b"), kSecond);
  EXPECT_EQ(read.find("c"), std::nullopt);
  EXPECT_EQ(read.write(), written.write());
}

TEST(MatmulChoices, ReadWinsOverWhatWasThere) {
  MatmulChoices written(130100, "NVIDIA H200"), read(130100, "NVIDIA H200");
  written.set("a", kFirst);
  read.set("a", kSecond);
  read.set("b", kSecond);
  EXPECT_TRUE(read.read(written.write()));
  EXPECT_EQ(read.find("a"), kFirst);
  EXPECT_EQ(read.find("b"), kSecond);
}

TEST(MatmulChoices, AnotherLibraryOrGpuChangesNothing) {
  MatmulChoices written(130100, "NVIDIA H200");
  written.set("a", kFirst);
  MatmulChoices library(130200, "NVIDIA H200"), device(130100, "NVIDIA A100");
  EXPECT_FALSE(library.read(written.write()));
  EXPECT_FALSE(device.read(written.write()));
  EXPECT_EQ(library.size() + device.size(), 0U);
}

TEST(MatmulChoices, DamagedTextIsRefusedAndChangesNothing) {
  MatmulChoices choices(130100, "NVIDIA H200");
  choices.set("a", kFirst);
  choices.set("b", kSecond);
  const std::string good = choices.write();
  for (std::size_t length = 0; length + 2 < good.size(); ++length) {
    EXPECT_THAT(complaint(good.substr(0, length)), HasSubstr("table of matrix products")) << length;
  }
  std::string digit = good;
  digit[good.find("fedc")] = 'g';
  EXPECT_THAT(complaint(digit), HasSubstr("'a'"));
  EXPECT_THAT(complaint("[]"), HasSubstr("cannot be read"));
  EXPECT_THAT(complaint("{}"), HasSubstr("cannot be read"));
  EXPECT_THAT(complaint(R"({"library": "x", "device": "y", "products": {}})"), HasSubstr("cannot be read"));
  EXPECT_THAT(complaint(R"({"library": 1, "device": "y", "products": {"a": 1}})"),
              HasSubstr("cannot be read"));
  EXPECT_THAT(complaint(R"({"library": 1, "device": "y", "products": {"a": "12"}})"), HasSubstr("128"));
  EXPECT_THAT(complaint(digit), Not(HasSubstr("\n")));
  EXPECT_THROW(choices.read(digit), UserError);
  EXPECT_EQ(choices.write(), good);
}

// Two products that differ in anything that a choice depends on have two names.
TEST(MatmulChoices, NamesTellShapesApart) {
  const MatmulShape shape{.m = 2,
                          .n = 3,
                          .k = 4,
                          .a_stride = 4,
                          .b_stride = 3,
                          .c_stride = 3,
                          .a_alignment = 16,
                          .b_alignment = 32,
                          .c_alignment = 64,
                          .type = DType::kBFloat16,
                          .c_type = DType::kBFloat16};
  EXPECT_EQ(name_of(shape), "bfloat16 to bfloat16, 2 x 3 x 4, rows 4 3 3, aligned 16 32 64");
  std::vector<MatmulShape> shapes(14, shape);
  shapes[1].m = shapes[2].n = shapes[3].k = 5;
  shapes[4].a_stride = shapes[5].b_stride = shapes[6].c_stride = 6;
  shapes[7].a_alignment = shapes[8].b_alignment = shapes[9].c_alignment = 128;
  shapes[10].c_type = DType::kFloat32;
  shapes[11].transpose_a = shapes[12].transpose_b = shapes[13].accumulate = true;
  std::set<std::string> names;
  for (const MatmulShape& s : shapes) names.insert(name_of(s));
  EXPECT_EQ(names.size(), shapes.size());
}

}  // namespace
}  // namespace regroup::test
