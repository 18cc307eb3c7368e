#include "tests/cuda_emulation/guarded_memory.h"

#include <cstdint>
#include <cstring>
#include <new>
#include <sys/mman.h>

// Of AddressSanitizer (sanitizer/asan_interface.h); absent in other builds.
extern "C" {
__attribute__((weak)) void __asan_poison_memory_region(const volatile void* address, std::size_t size);
__attribute__((weak)) void __asan_unpoison_memory_region(const volatile void* address, std::size_t size);
}

namespace regroup::emulation {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kAlignment = 256;  // cudaMalloc's

std::size_t round_up(std::size_t size, std::size_t to) { return (size + to - 1) / to * to; }

}  // namespace

GuardedMemory::GuardedMemory(std::size_t bytes) : bytes_(bytes), mapped_(round_up(bytes, kPage) + 2 * kPage) {
  void* pages = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  pages_ = static_cast<std::byte*>(pages);
  data_ = pages_ + mapped_ - kPage - round_up(bytes, kAlignment);
  make_accessible(true);
  if (__asan_poison_memory_region) {
    __asan_poison_memory_region(pages_ + kPage, static_cast<std::size_t>(data_ - pages_) - kPage);
    __asan_poison_memory_region(data_ + bytes, round_up(bytes, kAlignment) - bytes);
  }
}

GuardedMemory::~GuardedMemory() {
  if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(pages_, mapped_);
  munmap(pages_, mapped_);
}

void GuardedMemory::fill_nan() { std::memset(data_, 0xFF, bytes_); }

void GuardedMemory::make_accessible(bool accessible) {
  if (accessible == accessible_) return;
  accessible_ = accessible;
  mprotect(pages_ + kPage, mapped_ - 2 * kPage, accessible ? PROT_READ | PROT_WRITE : PROT_NONE);
}

void fill_zero(void* data, std::size_t bytes) {
  auto* begin = static_cast<std::byte*>(data);
  const std::size_t head = (kPage - reinterpret_cast<std::uintptr_t>(data) % kPage) % kPage;
  if (bytes > head + kPage) {
    const std::size_t whole = (bytes - head) / kPage * kPage;
    madvise(begin + head, whole, MADV_DONTNEED);  // pages of zeros when they are touched next
    std::memset(begin + head + whole, 0, bytes - head - whole);
    bytes = head;
  }
  std::memset(begin, 0, bytes);
}

}  // namespace regroup::emulation
