// The safetensors format (huggingface/safetensors, "Format"): 8 bytes, little-endian, the length N of the
// header; N bytes of JSON {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__":
// {text: text}}, padded with spaces; then the tensors, row-major, little-endian, without holes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/base/file.h"
#include "trainer/formats/stored_tensor.h"

namespace regroup {

using Metadata = std::map<std::string, std::string>;

struct SafetensorsHeader {
  std::vector<StoredTensor> tensors;  // by position in the file
  Metadata metadata;
};

// Headers longer than this are refused, as the reference implementation does.
inline constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
inline constexpr std::uint64_t kHeaderLengthBytes = 8;

// The header's length N, of a file of `file_size` bytes that begins with `prefix` (at least 8 bytes of it
// where the file has them). UserError, beginning with `where`, for a length that cannot be.
std::uint64_t safetensors_header_length(std::span<const std::byte> prefix, std::uint64_t file_size,
                                        std::string_view where);

// Parses and checks everything: `prefix` is the file's first bytes, at least 8 + N of them; nothing else is
// read. UserError "<where>: ..." naming the tensor for JSON that is broken, nested too deeply or not the
// schema above, names or keys given twice or with control characters, unknown types, negative or overflowing
// shapes, offsets that do not match type and shape, overlap, leave holes, or do not end where the file ends
// (truncated). Throws nothing else, whatever the bytes are.
SafetensorsHeader parse_safetensors_header(std::span<const std::byte> prefix, std::uint64_t file_size,
                                           std::string_view where);
// The same of an open file.
SafetensorsHeader read_safetensors_header(const InputFile& file);

// The start of a file that is to hold tensors: `bytes` (the length field, JSON, padding to a multiple of 8),
// the tensors with their offsets set, in the order in which they lie: wider types first so that each is
// aligned to its size, otherwise as given.
struct SafetensorsPlan {
  std::string bytes;
  std::vector<StoredTensor> tensors;
  std::uint64_t file_size = 0;
};
// A function of its arguments only: same tensors, same bytes.
SafetensorsPlan plan_safetensors(std::vector<StoredTensor> tensors, const Metadata& metadata);

}  // namespace regroup
