// Long ranges of a file, past the system's cache: for what is read once, by one process.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>

#include "kernels/base/file.h"

namespace regroup {

class DirectReader {
 public:
  // Ranges from here on are worth it.
  static constexpr std::uint64_t kLong = std::uint64_t{8} << 20;  // bytes

  // Takes 8 MiB for staging. Errors as InputFile.
  explicit DirectReader(const std::filesystem::path& path);

  // Reads [begin, begin + bytes) and calls work(part) for one part after the other, in order, of at most the
  // staging memory, whole elements of `width` bytes, which divides it. Errors as InputFile::read().
  void read(std::uint64_t begin, std::uint64_t bytes, std::uint64_t width,
            const std::function<void(std::span<const std::byte>)>& work);

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  InputFile file_;
  std::unique_ptr<std::byte, Free> memory_;
};

}  // namespace regroup
