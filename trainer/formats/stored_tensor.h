// Tensors as files hold them: element types, shapes, places.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/dtype.h"

namespace regroup {

// Element types a file may hold.
enum class StoredType : std::uint8_t {
  kF64,
  kF32,
  kF16,
  kBF16,
  kI64,
  kU64,
  kI32,
  kU32,
  kI16,
  kU16,
  kI8,
  kU8,
  kF8E4M3,
  kF8E5M2,
  kBool
};
index_t size_of(StoredType type);                             // bytes
std::string_view name_of(StoredType type);                    // "F32"
StoredType stored_type(DType dtype);                          // the file's type for one of ours
std::optional<StoredType> type_named(std::string_view name);  // of "F32"

// A tensor in a file.
struct StoredTensor {
  std::string name;
  StoredType type = StoredType::kF32;
  std::vector<index_t> shape;
  std::uint64_t begin = 0;  // bytes, from the start of the file
  std::uint64_t end = 0;
  bool transposed = false;  // the file holds the transpose of this matrix, row-major
};

// Whether it is F64, F32, F16 or BF16: what parameters are stored as.
bool is_floating(StoredType type);
// The bytes of a dense tensor of this type and shape; nothing where they do not fit into 63 bits or an extent
// is negative.
std::optional<std::uint64_t> stored_bytes(StoredType type, const std::vector<index_t>& shape);
// Whether no value is NaN or infinite.
bool all_finite(const float* values, index_t count);
// "[512, 64]", for messages.
std::string shape_text(const std::vector<index_t>& shape);
// An IEEE half (its bits) as a float, exactly.
float half_to_float(std::uint16_t bits);
// The nearest IEEE half (its bits), to even where two are as near; beyond 65504 infinite.
std::uint16_t float_to_half(float value);
// out[i] = the i-th of `count` elements of `type` from `from`, which need not be aligned. InternalError for a
// type that is not floating.
void convert_elements(StoredType type, const std::byte* from, index_t count, float* out);
void convert_elements(StoredType type, const std::byte* from, index_t count, double* out);
// The other way, rounded to the nearest. InternalError for types but F32, F16 and BF16.
void store_elements(const float* from, index_t count, StoredType type, std::byte* out);

// Text that came from a file, fit for one line of an error message: cut to 100 bytes, control characters as
// '?'.
std::string printable(std::string_view text);
// What no name of a tensor may have.
bool has_control_characters(std::string_view text);

}  // namespace regroup
