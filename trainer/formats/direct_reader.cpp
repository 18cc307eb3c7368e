#include "trainer/formats/direct_reader.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <sys/mman.h>

namespace regroup {
namespace {

constexpr std::uint64_t kStaging = std::uint64_t{8} << 20;
constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

}  // namespace

DirectReader::DirectReader(const std::filesystem::path& path)
    : file_(path, Caching::kPast),
      // Disks are given few addresses with huge pages.
      memory_(static_cast<std::byte*>(std::aligned_alloc(kHugePage, kStaging + kHugePage))) {
  if (memory_ == nullptr) throw std::bad_alloc();
  ::madvise(memory_.get(), kStaging + kHugePage, MADV_HUGEPAGE);  // or not
}

void DirectReader::read(std::uint64_t begin, std::uint64_t bytes, std::uint64_t width,
                        const std::function<void(std::span<const std::byte>)>& work) {
  for (const std::uint64_t end = begin + bytes; begin < end;) {
    const std::uint64_t before = begin % kDirectAlignment;  // read too, so that the offset suits
    const std::uint64_t part = std::min(end - begin, (kStaging - before) / width * width);
    // A whole number of units, but at the end of the file.
    const std::uint64_t units = (before + part + kDirectAlignment - 1) / kDirectAlignment;
    const std::uint64_t asked = std::min(units * kDirectAlignment, file_.size() - (begin - before));
    file_.read(begin - before, {memory_.get(), static_cast<std::size_t>(asked)});
    work({memory_.get() + before, static_cast<std::size_t>(part)});
    begin += part;
  }
}

}  // namespace regroup
