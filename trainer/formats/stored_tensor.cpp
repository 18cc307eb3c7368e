#include "trainer/formats/stored_tensor.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>

#include <fmt/ranges.h>

#include "kernels/base/error.h"

namespace regroup {
namespace {

bool is_control(char c) { return static_cast<unsigned char>(c) < 0x20 || c == 0x7F; }

static_assert(std::endian::native == std::endian::little, "tensor files are read without swapping bytes");

struct TypeRow {
  StoredType type;
  std::string_view name;
  index_t bytes;
};
constexpr std::array kTypes = {
    TypeRow{StoredType::kF64, "F64", 8},        TypeRow{StoredType::kF32, "F32", 4},
    TypeRow{StoredType::kF16, "F16", 2},        TypeRow{StoredType::kBF16, "BF16", 2},
    TypeRow{StoredType::kI64, "I64", 8},        TypeRow{StoredType::kU64, "U64", 8},
    TypeRow{StoredType::kI32, "I32", 4},        TypeRow{StoredType::kU32, "U32", 4},
    TypeRow{StoredType::kI16, "I16", 2},        TypeRow{StoredType::kU16, "U16", 2},
    TypeRow{StoredType::kI8, "I8", 1},          TypeRow{StoredType::kU8, "U8", 1},
    TypeRow{StoredType::kF8E4M3, "F8_E4M3", 1}, TypeRow{StoredType::kF8E5M2, "F8_E5M2", 1},
    TypeRow{StoredType::kBool, "BOOL", 1}};

const TypeRow& row_of(StoredType type) { return kTypes[static_cast<std::size_t>(type)]; }

template <class Stored, class Out>
void convert(const std::byte* from, index_t count, Out* to) {
  for (index_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, from + i * static_cast<index_t>(sizeof(Stored)), sizeof(Stored));
    if constexpr (std::is_same_v<Stored, std::uint16_t>) {
      to[i] = static_cast<Out>(half_to_float(value));
    } else if constexpr (std::is_same_v<Stored, bfloat16>) {
      to[i] = static_cast<Out>(static_cast<float>(value));
    } else {
      to[i] = static_cast<Out>(value);
    }
  }
}

template <class Out>
void convert(StoredType type, const std::byte* from, index_t count, Out* to) {
  switch (type) {
    case StoredType::kF64:
      return convert<double>(from, count, to);
    case StoredType::kF32:
      return convert<float>(from, count, to);
    case StoredType::kF16:
      return convert<std::uint16_t>(from, count, to);
    case StoredType::kBF16:
      return convert<bfloat16>(from, count, to);
    default:
      throw InternalError("{} cannot be converted", name_of(type));
  }
}

}  // namespace

index_t size_of(StoredType type) { return row_of(type).bytes; }
std::string_view name_of(StoredType type) { return row_of(type).name; }

std::optional<StoredType> type_named(std::string_view name) {
  const auto* const row =
      std::find_if(kTypes.begin(), kTypes.end(), [&](const TypeRow& r) { return r.name == name; });
  if (row == kTypes.end()) return std::nullopt;
  return row->type;
}

StoredType stored_type(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return StoredType::kF64;
    case DType::kFloat32:
      return StoredType::kF32;
    case DType::kBFloat16:
      return StoredType::kBF16;
    case DType::kInt32:
      return StoredType::kI32;
  }
  throw InternalError("files have no type for {}", name_of(dtype));
}

bool is_floating(StoredType type) {
  return type == StoredType::kF64 || type == StoredType::kF32 || type == StoredType::kF16 ||
         type == StoredType::kBF16;
}

std::optional<std::uint64_t> stored_bytes(StoredType type, const std::vector<index_t>& shape) {
  index_t bytes = size_of(type);
  for (const index_t extent : shape) {
    if (extent < 0 || __builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return static_cast<std::uint64_t>(bytes);
}

bool all_finite(const float* values, index_t count) {
  constexpr std::uint32_t kExponent = 0x7F800000;
  bool finite = true;
  for (index_t i = 0; i < count; ++i) {
    finite &= (std::bit_cast<std::uint32_t>(values[i]) & kExponent) != kExponent;
  }
  return finite;
}

std::string shape_text(const std::vector<index_t>& shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

float half_to_float(std::uint16_t bits) {
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t exponent = (bits >> 10) & 0x1FU;
  const std::uint32_t fraction = bits & 0x3FFU;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24, exact in a float
    return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(static_cast<float>(fraction) * 0x1p-24F));
  }
  const std::uint32_t rebiased = exponent == 31 ? 255 : exponent + 127 - 15;
  return std::bit_cast<float>(sign | (rebiased << 23) | (fraction << 13));
}

std::uint16_t float_to_half(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
  if (magnitude > 0x7F800000U) return sign | 0x7E00U;   // NaN
  if (magnitude >= 0x477FF000U) return sign | 0x7C00U;  // 65520 and more, which round to infinity
  if (magnitude < 0x38800000U) {  // below 2^-14 halves are multiples of 2^-24: the float sum rounds to one
    const float sum = std::bit_cast<float>(magnitude) + 0.5F;
    return static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(sum) - 0x3F000000U));
  }
  const std::uint32_t odd = (magnitude >> 13) & 1U;
  return static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000U + 0xFFFU + odd) >> 13));
}

void store_elements(const float* from, index_t count, StoredType type, std::byte* out) {
  check(type == StoredType::kF32 || type == StoredType::kF16 || type == StoredType::kBF16,
        "parameters are not stored as {}", name_of(type));
  if (type == StoredType::kF32) {
    std::memcpy(out, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  for (index_t i = 0; i < count; ++i) {
    const std::uint16_t bits = type == StoredType::kBF16 ? bfloat16(from[i]).bits : float_to_half(from[i]);
    std::memcpy(out + i * static_cast<index_t>(sizeof(bits)), &bits, sizeof(bits));
  }
}

void convert_elements(StoredType type, const std::byte* from, index_t count, float* out) {
  convert(type, from, count, out);
}
void convert_elements(StoredType type, const std::byte* from, index_t count, double* out) {
  convert(type, from, count, out);
}

bool has_control_characters(std::string_view text) {
  return std::any_of(text.begin(), text.end(), is_control);
}

std::string printable(std::string_view text) {
  constexpr std::size_t kLongest = 100;
  std::string result(text.substr(0, kLongest));
  for (char& c : result) {
    if (is_control(c)) c = '?';
  }
  return text.size() > kLongest ? result + "..." : result;
}

}  // namespace regroup
