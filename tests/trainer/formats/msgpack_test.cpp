#include "trainer/formats/msgpack.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/trainer/formats/plain_file.h"

namespace regroup {
namespace {

using Kind = MsgpackValue::Kind;
using test::refusal;
using testing::HasSubstr;

std::string bytes(std::initializer_list<int> values) {
  std::string result;
  for (const int value : values) result += static_cast<char>(value);
  return result;
}

MsgpackValue parse(const std::string& text) {
  return parse_msgpack(source_of(std::as_bytes(std::span(text))), "x.msgpack");
}

std::string refused(const std::string& text) {
  return refusal([&] { parse(text); });
}

// {"a": value}.
std::string under_a(const std::string& value) { return bytes({0x81, 0xA1}) + "a" + value; }

// [shape, "float32" or another, elements], as an extension.
std::string array(const std::string& shape, const std::string& type, const std::string& elements,
                  int extension) {
  const std::string inner = bytes({0x93}) + shape + bytes({0xA0 | static_cast<int>(type.size())}) + type +
                            bytes({0xC4, static_cast<int>(elements.size())}) + elements;
  return bytes({0xC7, static_cast<int>(inner.size()), extension}) + inner;
}

TEST(Msgpack, ReadsEveryKindOfNumber) {
  const std::vector<std::pair<std::string, std::int64_t>> integers = {
      {bytes({0x07}), 7},
      {bytes({0xFF}), -1},
      {bytes({0xE0}), -32},
      {bytes({0xCC, 0xFF}), 255},
      {bytes({0xCD, 0x01, 0x02}), 258},
      {bytes({0xCE, 0xFF, 0, 0, 1}), 0xFF000001LL},
      {bytes({0xCF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}), INT64_MAX},
      {bytes({0xD0, 0x80}), -128},
      {bytes({0xD1, 0xFF, 0xFE}), -2},
      {bytes({0xD2, 0x80, 0, 0, 0}), INT32_MIN},
      {bytes({0xD3, 0x80, 0, 0, 0, 0, 0, 0, 0}), INT64_MIN}};
  for (const auto& [text, expected] : integers) {
    const MsgpackValue value = parse(text);
    EXPECT_EQ(value.kind, Kind::kInteger);
    EXPECT_EQ(value.integer, expected);
  }
  EXPECT_EQ(parse(bytes({0xC3})).integer, 1);
  EXPECT_EQ(parse(bytes({0xC2})).kind, Kind::kBool);
  EXPECT_EQ(parse(bytes({0xC0})).kind, Kind::kNil);
  EXPECT_EQ(parse(bytes({0xCA, 0xC0, 0x20, 0, 0})).real, -2.5);
  EXPECT_EQ(parse(bytes({0xCB, 0x3F, 0xF8, 0, 0, 0, 0, 0, 0})).real, 1.5);
}

TEST(Msgpack, ReadsTextsListsAndMaps) {
  const std::string longer(300, 'x');
  const MsgpackValue value = parse(bytes({0xDE, 0, 2, 0xD9, 1}) + "t" + bytes({0xDA, 1, 44}) + longer +
                                   bytes({0xA4}) + "list" + bytes({0xDC, 0, 3, 1, 0x92, 2, 3, 0x80}));
  ASSERT_NE(value.find("t"), nullptr);
  EXPECT_EQ(value.find("t")->text, longer);
  const MsgpackValue* list = value.find("list");
  ASSERT_NE(list, nullptr);
  ASSERT_EQ(list->list.size(), 3U);
  EXPECT_EQ(list->list[1].list[1].integer, 3);
  EXPECT_EQ(list->list[2].kind, Kind::kMap);
  EXPECT_EQ(value.find("none"), nullptr);
  EXPECT_EQ(list->find("t"), nullptr);
}

TEST(Msgpack, LeavesArraysInTheFile) {
  const std::string elements = "0123456789ABCDEF01234567";
  const std::string text = under_a(array(bytes({0x92, 2, 3}), "float32", elements, 1));
  const MsgpackValue root = parse(text);
  const MsgpackValue* found = root.find("a");
  ASSERT_NE(found, nullptr);
  EXPECT_EQ(found->kind, Kind::kArray);
  EXPECT_EQ(found->array.shape, (std::vector<index_t>{2, 3}));
  EXPECT_EQ(found->array.type, StoredType::kF32);
  EXPECT_EQ(text.substr(found->array.begin, found->array.end - found->array.begin), elements);
  const MsgpackValue scalar = parse(array(bytes({0x90}), "int32", bytes({1, 0, 0, 0}), 3));
  EXPECT_TRUE(scalar.array.shape.empty());
  EXPECT_EQ(scalar.array.type, StoredType::kI32);
  const MsgpackValue strange =
      parse(array(bytes({0x91, 1}), "complex64", bytes({1, 0, 0, 0, 0, 0, 0, 0}), 1));
  EXPECT_EQ(strange.type_name, "complex64");
  EXPECT_EQ(parse(bytes({0xD4, 2, 7})).kind, Kind::kOther);     // another extension
  EXPECT_EQ(parse(bytes({0xC4, 2, 7, 7})).kind, Kind::kOther);  // binary data
  EXPECT_EQ(parse(bytes({0xD5, 0x7F, 1, 2})).kind, Kind::kOther);
}

// A source of which only what is asked for exists: the elements of a large array are not read.
TEST(Msgpack, DoesNotReadElements) {
  const std::uint64_t elements = std::uint64_t{3} << 30;
  std::string inner =
      bytes({0x93, 0x91, 0xCE, 0x30, 0, 0, 0, 0xA7}) + "float32" + bytes({0xC6, 0xC0, 0, 0, 0});
  const std::uint64_t length = inner.size() + elements;
  std::string head = bytes({0xC9});
  for (int shift = 24; shift >= 0; shift -= 8) head += static_cast<char>(length >> shift);
  head += bytes({1}) + inner;
  std::uint64_t read = 0;
  const ByteSource source = {.size = head.size() + elements,
                             .read = [&](std::uint64_t offset, std::span<std::byte> to) {
                               read += to.size();
                               for (std::size_t i = 0; i < to.size(); ++i) {
                                 const std::uint64_t at = offset + i;
                                 to[i] = at < head.size() ? static_cast<std::byte>(head[at]) : std::byte{0};
                               }
                             }};
  const MsgpackValue value = parse_msgpack(source, "large");
  EXPECT_EQ(value.array.shape, (std::vector<index_t>{0x30000000}));
  EXPECT_EQ(value.array.end - value.array.begin, elements);
  EXPECT_LT(read, 1U << 20);
}

TEST(Msgpack, RefusesHostileBytesInOneClearLine) {
  const std::string good = array(bytes({0x91, 2}), "float32", "12345678", 1);
  const struct {
    std::string text, message;
  } cases[] = {
      {"", "truncated or no msgpack file"},
      {bytes({0xC1}), "0xc1 begins no value"},
      {bytes({0xCD, 1}), "truncated"},
      {bytes({0x01, 0x02}), "1 bytes follow the end"},
      {bytes({0xA5}) + "abcd", "needs 5 more bytes and has 4"},
      {bytes({0xDB, 0xFF, 0xFF, 0xFF, 0xFF}), "needs 4294967295 more bytes"},
      {bytes({0xC6, 0xFF, 0xFF, 0xFF, 0xFF, 0}), "truncated"},
      {bytes({0xDD, 0xFF, 0xFF, 0xFF, 0xFF, 0}), "needs 4294967295 more bytes and has 1"},
      {bytes({0xDF, 0xFF, 0xFF, 0xFF, 0xFF, 0}), "needs 8589934590 more bytes and has 1"},
      {bytes({0xC9, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0x93}), "truncated"},
      {bytes({0xCF, 0x80, 0, 0, 0, 0, 0, 0, 0}), "too large"},
      {std::string(100000, '\x91') + bytes({0}), "nested deeper than 32"},
      {std::string(40, '\x91') + bytes({0}), "nested deeper than 32"},
      {bytes({0xDD, 0, 0x10, 0, 0}) + std::string(1 << 20, '\0'), "more than 262144 values"},
      {bytes({0x81, 0x01, 0x02}), "not a text"},
      {bytes({0x82, 0xA1}) + "a" + bytes({1, 0xA1}) + "a" + bytes({2}), "'a' is there twice"},
      {bytes({0x81, 0xA2}) + "a\n" + bytes({1}), "control characters"},
      {array(bytes({0x91, 3}), "float32", "12345678", 1), "shape [3] and type float32 has 8 bytes"},
      {array(bytes({0x91, 0xFF}), "float32", "12345678", 1), "shape is impossible"},
      {array(bytes({0x92, 0xCF, 0x40, 0, 0, 0, 0, 0, 0, 0, 8}), "float32", "12345678", 1), "8 bytes"},
      {array(bytes({0x07}), "float32", "12345678", 1), "shape is not a list"},
      {array(bytes({0xDC, 0, 33}) + std::string(33, '\x01'), "float32", "1234", 1), "33 dimensions"},
      {bytes({0xC7, 1, 1, 0x92}), "not [shape, type, elements]"},
      {bytes({0xC7, 4, 1, 0x93, 0x90, 0x01, 0x02}), "type is not a text"},
      {bytes({0xC7, 5, 1, 0x93, 0x90, 0xA1}) + "f" + bytes({0x07}), "no elements"},
      {bytes({0xC7, static_cast<int>(good[1]) + 1, 1}) + good.substr(3) + "x", "not as many as"},
      {bytes({0xC7, static_cast<int>(good[1]) - 1, 1}) + good.substr(3), "not as many as"},
  };
  for (const auto& [text, message] : cases) {
    const std::string found = refused(text);
    EXPECT_THAT(found, HasSubstr(message));
    EXPECT_THAT(found, testing::StartsWith("x.msgpack: at byte "));
    EXPECT_EQ(found.find('\n'), std::string::npos);
  }
  // Every cut of a good file.
  const std::string whole = under_a(good);
  for (std::size_t length = 0; length < whole.size(); ++length) {
    EXPECT_NE(refused(whole.substr(0, length)), "accepted") << length;
  }
  EXPECT_EQ(refused(whole), "accepted");
}

}  // namespace
}  // namespace regroup
