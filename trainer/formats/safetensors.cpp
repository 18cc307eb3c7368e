#include "trainer/formats/safetensors.h"

#include <algorithm>
#include <array>
#include <limits>
#include <optional>
#include <tuple>
#include <unordered_set>
#include <utility>

#include "kernels/base/error.h"
#include "kernels/base/json.h"
#include "trainer/formats/little_endian.h"

namespace regroup {
namespace {

constexpr std::size_t kMaxDimensions = 32;  // bounds what a hostile header can make us allocate
constexpr std::uint64_t kAlignment = 8;

// Builds the header from the events of a JSON parser, so that names given twice are seen and nothing but the
// schema is ever held in memory. A member that returns false ends parsing; failure() says why.
class HeaderBuilder : public nlohmann::json_sax<nlohmann::json> {
 public:
  SafetensorsHeader header;
  const std::string& failure() const { return failure_; }

  bool start_object(std::size_t) override {
    switch (state_) {
      case State::kStart:
        state_ = State::kRoot;
        return true;
      case State::kRoot:
        state_ = name_ == "__metadata__" ? State::kMetadata : State::kTensor;
        fields_.clear();
        if (state_ == State::kTensor) header.tensors.push_back({.name = name_, .shape = {}});
        return true;
      default:
        return unexpected("an object");
    }
  }

  bool key(string_t& text) override {
    if (state_ == State::kRoot) {
      name_ = text;
      if (has_control_characters(text)) return fail("the name '{}' has control characters", printable(text));
      return names_.insert(text).second || fail("the tensor '{}' is there twice", printable(text));
    }
    field_ = text;
    if (!fields_.insert(text).second) return fail("'{}' has '{}' twice", printable(name_), printable(text));
    if (state_ == State::kMetadata || text == "dtype" || text == "shape" || text == "data_offsets")
      return true;
    return fail("tensor '{}' has the unknown key '{}'", printable(name_), printable(text));
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_.contains(field)) return fail("tensor '{}' has no '{}'", printable(name_), field);
      }
    }
    state_ = state_ == State::kRoot ? State::kEnd : State::kRoot;
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ != State::kTensor || field_ == "dtype") return unexpected("an array");
    state_ = State::kArray;
    numbers_.clear();
    return true;
  }

  bool end_array() override {
    state_ = State::kTensor;
    StoredTensor& tensor = header.tensors.back();
    if (field_ == "shape") {
      tensor.shape = numbers_;
      return true;
    }
    if (numbers_.size() != 2)
      return fail("tensor '{}' has {} data_offsets, not 2", printable(name_), numbers_.size());
    tensor.begin = static_cast<std::uint64_t>(numbers_[0]);
    tensor.end = static_cast<std::uint64_t>(numbers_[1]);
    return true;
  }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ != State::kArray) return unexpected("a number");
    if (value > static_cast<std::uint64_t>(std::numeric_limits<index_t>::max()))
      return fail("tensor '{}' has the impossible number {} in '{}'", printable(name_), value, field_);
    if (numbers_.size() == kMaxDimensions)
      return fail("tensor '{}' has more than {} numbers in '{}'", printable(name_), kMaxDimensions, field_);
    numbers_.push_back(static_cast<index_t>(value));
    return true;
  }

  bool string(string_t& text) override {
    if (state_ == State::kMetadata) {
      header.metadata.emplace(field_, text);
      return true;
    }
    if (state_ != State::kTensor || field_ != "dtype") return unexpected("a text");
    const std::optional<StoredType> type = type_named(text);
    if (!type) return fail("tensor '{}' has the unknown dtype '{}'", printable(name_), printable(text));
    header.tensors.back().type = *type;
    return true;
  }

  bool number_integer(number_integer_t value) override {
    return state_ == State::kArray
               ? fail("tensor '{}' has the negative number {} in '{}'", printable(name_), value, field_)
               : unexpected("a number");
  }
  bool number_float(number_float_t, const string_t& text) override {
    return state_ == State::kArray ? fail("tensor '{}' has the impossible number {} in '{}'",
                                          printable(name_), printable(text), field_)
                                   : unexpected("a number");
  }
  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a boolean"); }
  bool binary(binary_t&) override { return unexpected("binary data"); }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail("the header is not valid JSON (at byte {} of it)", position);
  }

 private:
  enum class State { kStart, kRoot, kTensor, kMetadata, kArray, kEnd };

  template <class... Args>
  bool fail(fmt::format_string<Args...> format, Args&&... args) {
    failure_ = fmt::format(format, std::forward<Args>(args)...);
    return false;
  }
  bool unexpected(const char* what) {
    if (state_ == State::kStart) return fail("the header is {}, not an object", what);
    if (state_ == State::kRoot) return fail("'{}' is {}, not an object", printable(name_), what);
    return fail("'{}' of '{}' is or holds {}, which does not belong there", printable(field_),
                printable(name_), what);
  }

  State state_ = State::kStart;
  std::string name_, field_;
  std::unordered_set<std::string> names_, fields_;
  std::vector<index_t> numbers_;
  std::string failure_;
};

// Types and shapes against offsets, and offsets against one another and the file. Makes the offsets absolute.
void check_layout(SafetensorsHeader& header, std::uint64_t data_begin, std::uint64_t file_size,
                  std::string_view where) {
  for (const StoredTensor& t : header.tensors) {
    const auto bytes = stored_bytes(t.type, t.shape);
    if (!bytes) throw UserError("{}: the shape of tensor '{}' is impossibly large", where, printable(t.name));
    if (t.begin > t.end || t.end - t.begin != *bytes) {
      throw UserError(
          "{}: tensor '{}' needs {} bytes for its dtype and shape, but its data_offsets are [{}, {}]", where,
          printable(t.name), *bytes, t.begin, t.end);
    }
    if (t.end > file_size - data_begin) {
      throw UserError(
          "{}: tensor '{}' ends at byte {} of the data, but the file has only {}; it is truncated or damaged",
          where, printable(t.name), t.end, file_size - data_begin);
    }
  }
  std::sort(header.tensors.begin(), header.tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  std::uint64_t end = 0;
  const std::string* previous = nullptr;
  for (StoredTensor& t : header.tensors) {
    if (t.begin < end) {
      throw UserError("{}: the tensors '{}' and '{}' overlap", where, printable(*previous),
                      printable(t.name));
    }
    if (t.begin > end) {
      throw UserError("{}: {} bytes before tensor '{}' belong to no tensor", where, t.begin - end,
                      printable(t.name));
    }
    end = t.end;
    previous = &t.name;
    t.begin += data_begin;
    t.end += data_begin;
  }
  if (end != file_size - data_begin) {
    throw UserError("{}: {} bytes at the end belong to no tensor", where, file_size - data_begin - end);
  }
}

}  // namespace

std::uint64_t safetensors_header_length(std::span<const std::byte> prefix, std::uint64_t file_size,
                                        std::string_view where) {
  if (file_size < kHeaderLengthBytes || prefix.size() < kHeaderLengthBytes) {
    throw UserError("{}: {} bytes are too few for a safetensors file", where, file_size);
  }
  const std::uint64_t length = little_endian(prefix.first(kHeaderLengthBytes));
  if (length > kMaxHeaderBytes) {
    throw UserError(
        "{}: the header would have {} bytes, more than the {} allowed; this is no safetensors file", where,
        length, kMaxHeaderBytes);
  }
  if (length > file_size - kHeaderLengthBytes) {
    throw UserError(
        "{}: the header has {} bytes, but the file only {}; it is truncated or no safetensors file", where,
        length, file_size);
  }
  return length;
}

SafetensorsHeader parse_safetensors_header(std::span<const std::byte> prefix, std::uint64_t file_size,
                                           std::string_view where) {
  const std::uint64_t length = safetensors_header_length(prefix, file_size, where);
  if (prefix.size() < kHeaderLengthBytes + length) {
    throw UserError("{}: the header has {} bytes, but only {} are there", where, length,
                    prefix.size() - kHeaderLengthBytes);
  }
  const auto* text = reinterpret_cast<const char*>(prefix.data()) + kHeaderLengthBytes;
  HeaderBuilder builder;
  if (length == 0 || text[0] != '{') throw UserError("{}: the header does not begin with '{{'", where);
  if (!read_json({text, length}, builder)) {
    throw UserError("{}: {}", where, builder.failure());
  }
  check_layout(builder.header, kHeaderLengthBytes + length, file_size, where);
  return std::move(builder.header);
}

SafetensorsHeader read_safetensors_header(const InputFile& file) {
  const std::string where = file.path().string();
  std::vector<std::byte> prefix(std::min(kHeaderLengthBytes, file.size()));
  file.read(0, prefix);
  prefix.resize(kHeaderLengthBytes + safetensors_header_length(prefix, file.size(), where));
  file.read(0, prefix);
  return parse_safetensors_header(prefix, file.size(), where);
}

SafetensorsPlan plan_safetensors(std::vector<StoredTensor> tensors, const Metadata& metadata) {
  std::stable_sort(tensors.begin(), tensors.end(), [](const StoredTensor& a, const StoredTensor& b) {
    return size_of(a.type) > size_of(b.type);
  });
  std::unordered_set<std::string> names = {"__metadata__"};
  std::string json = "{";
  if (!metadata.empty()) json += "\"__metadata__\":" + json_text(nlohmann::json(metadata));
  std::uint64_t end = 0;
  for (StoredTensor& t : tensors) {
    check(names.insert(t.name).second, "two tensors of a file have the name '{}'", t.name);
    const auto bytes = stored_bytes(t.type, t.shape);
    check(bytes.has_value(), "tensor '{}' is too large for a file", t.name);
    t.begin = end;
    t.end = end += *bytes;
    json += fmt::format("{}{}:{{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}}",
                        json.size() > 1 ? "," : "", json_text(nlohmann::json(t.name)), name_of(t.type),
                        json_text(nlohmann::json(t.shape)), t.begin, t.end);
  }
  json += '}';
  json.resize((json.size() + kAlignment - 1) / kAlignment * kAlignment, ' ');
  SafetensorsPlan plan;
  for (std::uint64_t i = 0; i < kHeaderLengthBytes; ++i) {
    plan.bytes += static_cast<char>((json.size() >> (8 * i)) & 0xFF);
  }
  plan.bytes += json;
  for (StoredTensor& t : tensors) {
    t.begin += plan.bytes.size();
    t.end += plan.bytes.size();
  }
  plan.file_size = plan.bytes.size() + end;
  plan.tensors = std::move(tensors);
  return plan;
}

}  // namespace regroup
