#include "trainer/formats/safetensors.h"

#include <cstring>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::string length_field(std::uint64_t length) {
  std::string bytes(8, '\0');
  for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<char>((length >> (8 * i)) & 0xFF);
  return bytes;
}

// A file's first bytes with this header text.
std::string with_length(const std::string& json) { return length_field(json.size()) + json; }

SafetensorsHeader parse(const std::string& prefix, std::uint64_t file_size) {
  return parse_safetensors_header(std::as_bytes(std::span(prefix.data(), prefix.size())), file_size,
                                  "x.safetensors");
}

std::string refusal(const std::string& prefix, std::uint64_t file_size) {
  try {
    parse(prefix, file_size);
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

// A file that Python's struct and json would write for {"b": I32 [2], "a": F32 [2, 2]}, byte by byte.
TEST(Safetensors, ReadsAHandMadeFile) {
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[2],"data_offsets":[16,24]},)"
      R"("a":{"shape":[2,2],"data_offsets":[0,16],"dtype":"F32"}}   )";
  const std::string prefix = with_length(json);
  const SafetensorsHeader header = parse(prefix, prefix.size() + 24);
  ASSERT_EQ(header.tensors.size(), 2U);
  EXPECT_EQ(header.metadata, (Metadata{{"format", "pt"}}));
  EXPECT_EQ(header.tensors[0].name, "a");  // by position
  EXPECT_EQ(header.tensors[0].type, StoredType::kF32);
  EXPECT_EQ(header.tensors[0].shape, (std::vector<index_t>{2, 2}));
  EXPECT_EQ(header.tensors[0].begin, prefix.size());
  EXPECT_EQ(header.tensors[1].begin, prefix.size() + 16);
  EXPECT_EQ(header.tensors[1].end, prefix.size() + 24);
}

TEST(Safetensors, PlansTheseBytes) {
  const SafetensorsPlan plan = plan_safetensors({{.name = "half", .type = StoredType::kBF16, .shape = {3}},
                                                 {.name = "x", .type = StoredType::kF32, .shape = {2, 1}},
                                                 {.name = "scalar", .type = StoredType::kF32, .shape = {}}},
                                                {{"format", "pt"}});
  const std::string json =
      R"({"__metadata__":{"format":"pt"},"x":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},)"
      R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[8,12]},)"
      R"("half":{"dtype":"BF16","shape":[3],"data_offsets":[12,18]}})";
  const std::string padded = json + std::string((8 - json.size() % 8) % 8, ' ');
  EXPECT_EQ(plan.bytes, with_length(padded));
  EXPECT_EQ(plan.bytes.size() % 8, 0U);
  EXPECT_EQ(plan.file_size, plan.bytes.size() + 18);
}

TEST(Safetensors, WhatIsPlannedIsRead) {
  std::vector<StoredTensor> tensors;
  for (const auto type :
       {StoredType::kF64, StoredType::kF32, StoredType::kF16, StoredType::kBF16, StoredType::kI64,
        StoredType::kU64, StoredType::kI32, StoredType::kU32, StoredType::kI16, StoredType::kU16,
        StoredType::kI8, StoredType::kU8, StoredType::kF8E4M3, StoredType::kF8E5M2, StoredType::kBool}) {
    tensors.push_back({.name = "quote\" " + std::string(name_of(type)), .type = type, .shape = {3, 5}});
  }
  tensors.push_back({.name = "empty", .type = StoredType::kF32, .shape = {0, 4}});
  const Metadata metadata = {{"a", "b \"c\"\n"}};
  const SafetensorsPlan plan = plan_safetensors(tensors, metadata);
  const SafetensorsHeader header = parse(plan.bytes, plan.file_size);
  EXPECT_EQ(header.metadata, metadata);
  ASSERT_EQ(header.tensors.size(), tensors.size());
  for (const StoredTensor& planned : plan.tensors) {
    const auto at = std::find_if(header.tensors.begin(), header.tensors.end(),
                                 [&](const StoredTensor& t) { return t.name == planned.name; });
    ASSERT_NE(at, header.tensors.end()) << planned.name;
    EXPECT_EQ(at->type, planned.type);
    EXPECT_EQ(at->shape, planned.shape);
    EXPECT_EQ(at->begin, planned.begin);
    EXPECT_EQ(at->end, planned.end);
    EXPECT_EQ(at->begin % static_cast<std::uint64_t>(size_of(at->type)), 0U) << planned.name;
  }
}

TEST(Safetensors, RefusesTwoTensorsOfOneName) {
  const StoredTensor t = {.name = "t", .type = StoredType::kF32, .shape = {1}};
  EXPECT_THROW(plan_safetensors({t, t}, {}), InternalError);
}

struct Hostile {
  const char* what;
  std::string prefix;
  std::uint64_t data;  // bytes behind the prefix
  const char* message;
};

std::string entry(const std::string& rest) { return with_length("{\"t\":{" + rest + "}}"); }

std::vector<Hostile> hostile_files() {
  const std::string good = R"("dtype":"F32","shape":[2],"data_offsets":[0,8])";
  const auto offsets = [](const std::string& o) {
    return entry(R"("dtype":"F32","shape":[2],"data_offsets":)" + o);
  };
  const auto shape = [](const std::string& s) {
    return entry(R"("dtype":"F32","data_offsets":[0,8],"shape":)" + s);
  };
  const auto two = [](const std::string& a, const std::string& b) {
    return with_length(R"({"first":{"dtype":"U8","shape":[4],"data_offsets":)" + a +
                       R"(},"second":{"dtype":"U8","shape":[4],"data_offsets":)" + b + "}}");
  };
  return {
      {"empty", "", 0, "too few"},
      {"seven bytes", std::string(7, '\0'), 0, "too few"},
      {"length 2^63", length_field(std::uint64_t{1} << 63) + "{}", 0, "more than the 100000000 allowed"},
      {"length 2^64 - 1", length_field(~std::uint64_t{0}) + "{}", 0, "more than the 100000000 allowed"},
      {"length past the end", length_field(1000) + "{}", 0, "truncated"},
      {"length 0", length_field(0), 0, "does not begin with '{'"},
      {"no JSON", with_length("{nonsense"), 0, "not valid JSON"},
      {"unfinished", with_length(R"({"t":)"), 0, "not valid JSON"},
      {"text after it", with_length("{} x"), 0, "not valid JSON"},
      {"invalid UTF-8", with_length("{\"\xFF\":{}}"), 0, "not valid JSON"},
      {"an array", with_length("[]"), 0, "does not begin with '{'"},
      {"space before", with_length(" {}"), 0, "does not begin with '{'"},
      {"a tensor that is a number", with_length(R"({"t":1})"), 0, "'t' is a number"},
      {"a tensor that is an array", with_length(R"({"t":[]})"), 0, "'t' is an array"},
      {"a tensor that is null", with_length(R"({"t":null})"), 0, "'t' is null"},
      {"deep nesting", with_length("{\"t\":" + std::string(100000, '[') + std::string(100000, ']') + "}"), 0,
       "'t' is an array"},
      {"deep objects", entry(R"("dtype":{"a":{"a":{}}})"), 0, "holds an object"},
      {"deep shape", shape("[[2]]"), 8, "holds an array"},
      {"same tensor twice", with_length("{\"t\":{" + good + "},\"t\":{" + good + "}}"), 8,
       "'t' is there twice"},
      {"same key twice", entry(good + R"(,"dtype":"F32")"), 8, "'t' has 'dtype' twice"},
      {"metadata twice", with_length(R"({"__metadata__":{},"__metadata__":{}})"), 0, "twice"},
      {"metadata key twice", with_length(R"({"__metadata__":{"a":"1","a":"2"}})"), 0, "twice"},
      {"metadata number", with_length(R"({"__metadata__":{"a":1}})"), 0, "does not belong there"},
      {"unknown key", entry(good + R"(,"strides":[1])"), 8, "unknown key 'strides'"},
      {"no dtype", entry(R"("shape":[2],"data_offsets":[0,8])"), 8, "'t' has no 'dtype'"},
      {"no shape", entry(R"("dtype":"F32","data_offsets":[0,8])"), 8, "'t' has no 'shape'"},
      {"no offsets", entry(R"("dtype":"F32","shape":[2])"), 8, "'t' has no 'data_offsets'"},
      {"unknown dtype", entry(R"("dtype":"F33","shape":[2],"data_offsets":[0,8])"), 8, "unknown dtype 'F33'"},
      {"dtype number", entry(R"("dtype":3,"shape":[2],"data_offsets":[0,8])"), 8, "does not belong there"},
      {"shape text", shape("\"2\""), 8, "does not belong there"},
      {"negative shape", shape("[-2]"), 8, "negative number -2"},
      {"fractional shape", shape("[2.0]"), 8, "impossible number 2.0"},
      {"shape 2^63", shape("[9223372036854775808]"), 8, "impossible number"},
      {"shape 2^70", shape("[1180591620717411303424]"), 8, "impossible number"},
      {"shape overflows", shape("[4294967296,4294967296]"), 8, "impossibly large"},
      {"shape overflows by the element", shape("[4611686018427387904]"), 8, "impossibly large"},
      {"too many dimensions",
       shape("[1" +
             [] {
               std::string ones;
               for (int i = 0; i < 40; ++i) ones += ",1";
               return ones;
             }() +
             "]"),
       8, "more than 32 numbers"},
      {"wrong size", shape("[3]"), 8, "needs 12 bytes"},
      {"one offset", offsets("[0]"), 8, "has 1 data_offsets"},
      {"three offsets", offsets("[0,8,8]"), 8, "has 3 data_offsets"},
      {"negative offset", offsets("[-8,0]"), 8, "negative number -8"},
      {"offsets reversed", offsets("[8,0]"), 8, "data_offsets are [8, 0]"},
      {"offsets beyond the end", offsets("[8,16]"), 8, "truncated"},
      {"offsets near 2^63", offsets("[9223372036854775799,9223372036854775807]"), 8, "truncated"},
      {"truncated data", offsets("[0,8]"), 7, "truncated"},
      {"data beyond", offsets("[0,8]"), 9, "1 bytes at the end belong to no tensor"},
      {"hole at the start", offsets("[4,12]"), 12, "4 bytes before tensor 't' belong to no tensor"},
      {"hole between", two("[0,4]", "[5,9]"), 9, "1 bytes before tensor 'second'"},
      {"overlap", two("[0,4]", "[3,7]"), 7, "'first' and 'second' overlap"},
      {"same place", two("[0,4]", "[0,4]"), 4, "'first' and 'second' overlap"},
      {"control characters", with_length(R"({"a\nb":{}})"), 0, "'a?b' has control characters"},
  };
}

TEST(Safetensors, RefusesHostileHeadersInOneClearLine) {
  for (const Hostile& h : hostile_files()) {
    const std::string message = refusal(h.prefix, h.prefix.size() + h.data);
    EXPECT_THAT(message, AllOf(HasSubstr(h.message), HasSubstr("x.safetensors: "), Not(HasSubstr("\n"))))
        << h.what;
    EXPECT_LT(message.size(), 400U) << h.what;
  }
}

TEST(Safetensors, RefusesAPrefixShorterThanTheHeader) {
  const std::string whole = with_length("{}      ");
  EXPECT_EQ(refusal(whole, whole.size()), "accepted");
  EXPECT_THAT(refusal(whole.substr(0, 10), whole.size()), HasSubstr("only 2 are there"));
}

// Whatever single byte of a header is changed, it is read as something well-formed or refused as a UserError.
TEST(Safetensors, EveryChangedByteIsHandled) {
  const SafetensorsPlan plan = plan_safetensors({{.name = "a", .type = StoredType::kF32, .shape = {2, 3}},
                                                 {.name = "b", .type = StoredType::kBF16, .shape = {4}}},
                                                {{"format", "pt"}});
  for (std::size_t at = 0; at < plan.bytes.size(); ++at) {
    for (int value = 0; value < 256; ++value) {
      std::string bytes = plan.bytes;
      bytes[at] = static_cast<char>(value);
      try {
        for (const StoredTensor& t : parse(bytes, plan.file_size).tensors) {
          EXPECT_LE(t.begin, t.end);
          EXPECT_LE(t.end, plan.file_size);
        }
      } catch (const UserError&) {
      }
    }
  }
}

}  // namespace
}  // namespace regroup
