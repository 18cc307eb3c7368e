// Element types and the integer that counts everything.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <type_traits>

#include "kernels/base/error.h"

namespace regroup {

using index_t = std::int64_t;

// bfloat16: the upper half of an IEEE float, rounded to nearest even; NaN stays NaN.
struct bfloat16 {
  std::uint16_t bits = 0;
  bfloat16() = default;
  explicit bfloat16(float value) {
    const auto word = std::bit_cast<std::uint32_t>(value);
    const bool is_nan = (word & 0x7FFFFFFF) > 0x7F800000;
    bits =
        static_cast<std::uint16_t>(is_nan ? (word >> 16) | 0x40 : (word + 0x7FFF + ((word >> 16) & 1)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(std::uint32_t{bits} << 16); }
};

// float64 exists for gradient checks and for statistics; int32 for token ids and masks.
enum class DType : std::uint8_t { kFloat64, kFloat32, kBFloat16, kInt32 };

constexpr index_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 8;
    case DType::kFloat32:
      return 4;
    case DType::kBFloat16:
      return 2;
    case DType::kInt32:
      return 4;
  }
  return 0;
}

constexpr std::string_view name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return "float64";
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
  }
  return "?";
}

template <class T>
constexpr DType dtype_of() {
  if constexpr (std::is_same_v<T, double>) return DType::kFloat64;
  if constexpr (std::is_same_v<T, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<T, bfloat16>) return DType::kBFloat16;
  if constexpr (std::is_same_v<T, std::int32_t>) return DType::kInt32;
}

// The type in which statistics, softmax, losses, gradients of parameters and master weights of a computation
// in `dtype` are kept: float64 for float64, float32 for float32 and bfloat16.
constexpr DType stat_dtype(DType dtype) {
  return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}
template <class T>
using stat_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Calls f.operator()<T>() with the C++ type of a floating-point `dtype`.
template <class F>
decltype(auto) dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat64:
      return f.template operator()<double>();
    case DType::kFloat32:
      return f.template operator()<float>();
    case DType::kBFloat16:
      return f.template operator()<bfloat16>();
    case DType::kInt32:
      break;
  }
  throw InternalError("a floating-point type is needed here, not {}", name_of(dtype));
}

}  // namespace regroup
