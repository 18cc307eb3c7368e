// Bytes read by position, wherever they are: what parsers of large files are given.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "kernels/base/file.h"

namespace regroup {

struct ByteSource {
  std::uint64_t size = 0;
  // Fills the bytes from `offset`; all of them lie within the source.
  std::function<void(std::uint64_t offset, std::span<std::byte> bytes)> read;
};

// Of a file, which outlives it.
inline ByteSource source_of(const InputFile& file) {
  return {.size = file.size(),
          .read = [&file](std::uint64_t offset, std::span<std::byte> bytes) { file.read(offset, bytes); }};
}

// Of memory, which outlives it.
inline ByteSource source_of(std::span<const std::byte> memory) {
  return {.size = memory.size(), .read = [memory](std::uint64_t offset, std::span<std::byte> bytes) {
            const auto part = memory.subspan(offset, bytes.size());
            std::copy(part.begin(), part.end(), bytes.begin());
          }};
}

}  // namespace regroup
