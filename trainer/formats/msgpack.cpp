#include "trainer/formats/msgpack.h"

#include <array>
#include <bit>
#include <cstring>
#include <limits>
#include <utility>

#include "kernels/base/error.h"

namespace regroup {
namespace {

using Kind = MsgpackValue::Kind;

constexpr int kDeepest = 32;
constexpr std::uint64_t kMostValues = std::uint64_t{1} << 18;
constexpr std::uint64_t kMostText = std::uint64_t{64} << 20;  // bytes
constexpr std::size_t kMostDimensions = 32;
constexpr int kNdarray = 1, kNumpyScalar = 3;  // flax's extensions

// A source's bytes one after the other.
class Cursor {
 public:
  Cursor(const ByteSource& source, std::string_view where) : source_(source), where_(where) {}

  std::uint64_t at() const { return at_; }
  std::uint64_t left() const { return source_.size - at_; }
  std::string_view where() const { return where_; }

  void need(std::uint64_t bytes) const {
    if (bytes > left()) {
      throw UserError("{}: at byte {} it needs {} more bytes and has {}: it is truncated or no msgpack file",
                      where_, at_, bytes, left());
    }
  }
  void skip(std::uint64_t bytes) {
    need(bytes);
    at_ += bytes;
  }
  void read(std::span<std::byte> to) {
    need(to.size());
    while (!to.empty()) {
      if (at_ < begin_ || at_ >= begin_ + window_.size()) fill();
      const auto first = static_cast<std::size_t>(at_ - begin_);
      const std::size_t count = std::min(to.size(), window_.size() - first);
      std::memcpy(to.data(), window_.data() + first, count);
      to = to.subspan(count);
      at_ += count;
    }
  }
  // An unsigned number of so many bytes, big-endian.
  std::uint64_t number(int bytes) {
    std::array<std::byte, 8> raw{};
    read(std::span(raw).first(static_cast<std::size_t>(bytes)));
    std::uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      value = (value << 8) | std::to_integer<std::uint64_t>(raw[static_cast<std::size_t>(i)]);
    }
    return value;
  }

 private:
  void fill() {
    constexpr std::uint64_t kWindow = std::uint64_t{16} << 10;
    window_.resize(static_cast<std::size_t>(std::min(kWindow, left())));
    source_.read(at_, window_);
    begin_ = at_;
  }

  const ByteSource& source_;
  std::string_view where_;
  std::uint64_t at_ = 0, begin_ = 0;
  std::vector<std::byte> window_;  // the bytes from begin_
};

// What a value's first bytes say: a number, or how much follows.
enum class Token { kNil, kBool, kInteger, kReal, kText, kBinary, kList, kMap, kExtension };
struct Head {
  Token token = Token::kNil;
  std::int64_t integer = 0;
  double real = 0;
  std::uint64_t length = 0;  // bytes, or values, or pairs of a map
  int extension = 0;
};

std::int64_t sign_extended(std::uint64_t bits, int bytes) {
  const int shift = 64 - 8 * bytes;
  return static_cast<std::int64_t>(bits << shift) >> shift;
}

class Parser {
 public:
  Parser(const ByteSource& source, std::string_view where) : cursor_(source, where) {}

  MsgpackValue document() {
    MsgpackValue root = value(0);
    if (cursor_.left() > 0) fail("{} bytes follow the end", cursor_.left());
    return root;
  }

 private:
  template <class... Args>
  [[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) const {
    throw UserError("{}: at byte {}: {}", cursor_.where(), cursor_.at(),
                    fmt::format(format, std::forward<Args>(args)...));
  }

  Head head() {
    const std::uint64_t first = cursor_.number(1);
    if (first <= 0x7F) return {.token = Token::kInteger, .integer = static_cast<std::int64_t>(first)};
    if (first <= 0x8F) return {.token = Token::kMap, .length = first & 0x0F};
    if (first <= 0x9F) return {.token = Token::kList, .length = first & 0x0F};
    if (first <= 0xBF) return {.token = Token::kText, .length = first & 0x1F};
    if (first >= 0xE0) return {.token = Token::kInteger, .integer = sign_extended(first, 1)};
    switch (first) {
      case 0xC0:
        return {};
      case 0xC2:
      case 0xC3:
        return {.token = Token::kBool, .integer = first == 0xC3};
      case 0xC4:
      case 0xC5:
      case 0xC6:
        return {.token = Token::kBinary, .length = cursor_.number(1 << (first - 0xC4))};
      case 0xC7:
      case 0xC8:
      case 0xC9:
        return extension(cursor_.number(1 << (first - 0xC7)));
      case 0xCA:
        return {.token = Token::kReal,
                .real = std::bit_cast<float>(static_cast<std::uint32_t>(cursor_.number(4)))};
      case 0xCB:
        return {.token = Token::kReal, .real = std::bit_cast<double>(cursor_.number(8))};
      case 0xCC:
      case 0xCD:
      case 0xCE:
      case 0xCF:
        return unsigned_integer(cursor_.number(1 << (first - 0xCC)));
      case 0xD0:
      case 0xD1:
      case 0xD2:
      case 0xD3: {
        const int bytes = 1 << (first - 0xD0);
        return {.token = Token::kInteger, .integer = sign_extended(cursor_.number(bytes), bytes)};
      }
      case 0xD4:
      case 0xD5:
      case 0xD6:
      case 0xD7:
      case 0xD8:
        return extension(std::uint64_t{1} << (first - 0xD4));
      case 0xD9:
      case 0xDA:
      case 0xDB:
        return {.token = Token::kText, .length = cursor_.number(1 << (first - 0xD9))};
      case 0xDC:
      case 0xDD:
        return {.token = Token::kList, .length = cursor_.number(2 << (first - 0xDC))};
      case 0xDE:
      case 0xDF:
        return {.token = Token::kMap, .length = cursor_.number(2 << (first - 0xDE))};
      default:
        fail("{:#x} begins no value; this is no msgpack file", first);
    }
  }
  Head extension(std::uint64_t length) {
    return {.token = Token::kExtension,
            .length = length,
            .extension = static_cast<int>(sign_extended(cursor_.number(1), 1))};
  }
  Head unsigned_integer(std::uint64_t number) const {
    if (number > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      fail("the number {} is too large", number);
    }
    return {.token = Token::kInteger, .integer = static_cast<std::int64_t>(number)};
  }

  MsgpackValue value(int depth) {
    if (depth > kDeepest) fail("values are nested deeper than {}", kDeepest);
    if (++values_ > kMostValues) fail("more than {} values", kMostValues);
    const Head h = head();
    MsgpackValue result;
    switch (h.token) {
      case Token::kNil:
        break;
      case Token::kBool:
      case Token::kInteger:
        result.kind = h.token == Token::kBool ? Kind::kBool : Kind::kInteger;
        result.integer = h.integer;
        break;
      case Token::kReal:
        result.kind = Kind::kReal;
        result.real = h.real;
        break;
      case Token::kText:
        result.kind = Kind::kText;
        result.text = text(h.length);
        break;
      case Token::kBinary:
        result.kind = Kind::kOther;
        cursor_.skip(h.length);
        break;
      case Token::kList:
        result.kind = Kind::kList;
        cursor_.need(h.length);  // at least a byte each
        for (std::uint64_t i = 0; i < h.length; ++i) result.list.push_back(value(depth + 1));
        break;
      case Token::kMap:
        result.kind = Kind::kMap;
        cursor_.need(2 * h.length);
        for (std::uint64_t i = 0; i < h.length; ++i) member(result, depth);
        break;
      case Token::kExtension:
        cursor_.need(h.length);
        if (h.extension == kNdarray || h.extension == kNumpyScalar) return array(h.length);
        result.kind = Kind::kOther;
        cursor_.skip(h.length);
        break;
    }
    return result;
  }

  void member(MsgpackValue& parent, int depth) {
    const Head key = head();
    if (key.token != Token::kText) fail("the key of a map is not a text");
    std::string name = text(key.length);
    if (has_control_characters(name)) fail("the key '{}' has control characters", printable(name));
    if (parent.map.contains(name)) fail("the key '{}' is there twice", printable(name));
    MsgpackValue held = value(depth + 1);
    parent.map.emplace(std::move(name), std::move(held));
  }

  std::string text(std::uint64_t length) {
    cursor_.need(length);
    text_ += length;
    if (text_ > kMostText) fail("more than {} bytes of text", kMostText);
    std::string result(length, '\0');
    cursor_.read(std::as_writable_bytes(std::span(result)));
    return result;
  }

  // [shape, type, elements], whose bytes must be exactly `length`.
  MsgpackValue array(std::uint64_t length) {
    const std::uint64_t end = cursor_.at() + length;
    MsgpackValue result;
    result.kind = Kind::kArray;
    const Head outer = head();
    if (outer.token != Token::kList || outer.length != 3) fail("an array is not [shape, type, elements]");
    const Head shape = head();
    if (shape.token != Token::kList) fail("an array's shape is not a list");
    if (shape.length > kMostDimensions) fail("an array has {} dimensions", shape.length);
    for (std::uint64_t i = 0; i < shape.length; ++i) {
      const Head extent = head();
      if (extent.token != Token::kInteger || extent.integer < 0) fail("an array's shape is impossible");
      result.array.shape.push_back(extent.integer);
    }
    const Head type = head();
    if (type.token != Token::kText && type.token != Token::kBinary) fail("an array's type is not a text");
    result.type_name = text(type.length);
    const Head elements = head();
    // Old writers have texts in place of binary data.
    if (elements.token != Token::kBinary && elements.token != Token::kText) fail("an array has no elements");
    result.array.begin = cursor_.at();
    cursor_.skip(elements.length);
    result.array.end = cursor_.at();
    if (result.array.end != end) fail("an array's bytes are not as many as its extension says");
    const std::optional<StoredType> stored = type_of_numpy(result.type_name);
    if (!stored) return result;
    result.array.type = *stored;
    if (stored_bytes(*stored, result.array.shape) != elements.length) {
      fail("an array of shape {} and type {} has {} bytes", shape_text(result.array.shape),
           printable(result.type_name), elements.length);
    }
    return result;
  }

  Cursor cursor_;
  std::uint64_t values_ = 0, text_ = 0;
};

}  // namespace

const MsgpackValue* MsgpackValue::find(std::string_view key) const {
  const auto at = map.find(key);
  return at == map.end() ? nullptr : &at->second;
}

std::optional<StoredType> type_of_numpy(std::string_view name) {
  constexpr std::array<std::pair<std::string_view, StoredType>, 13> kNames = {
      {{"float64", StoredType::kF64},
       {"float32", StoredType::kF32},
       {"float16", StoredType::kF16},
       {"bfloat16", StoredType::kBF16},
       {"int64", StoredType::kI64},
       {"uint64", StoredType::kU64},
       {"int32", StoredType::kI32},
       {"uint32", StoredType::kU32},
       {"int16", StoredType::kI16},
       {"uint16", StoredType::kU16},
       {"int8", StoredType::kI8},
       {"uint8", StoredType::kU8},
       {"bool", StoredType::kBool}}};
  for (const auto& [known, type] : kNames) {
    if (known == name) return type;
  }
  return std::nullopt;
}

MsgpackValue parse_msgpack(const ByteSource& source, std::string_view where) {
  return Parser(source, where).document();
}

}  // namespace regroup
