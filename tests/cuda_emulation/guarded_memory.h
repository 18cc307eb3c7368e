// Memory between two pages that nobody may touch.
#pragma once

#include <cstddef>

namespace regroup::emulation {

// `bytes` of zeroed memory. Its begin is aligned to 256 bytes, and its end, rounded up to 256 bytes, touches
// an inaccessible page; with AddressSanitizer the bytes up to there are out of bounds too. std::bad_alloc
// where the host has no room.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes);
  ~GuardedMemory();
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  std::byte* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  void fill_nan();                        // 0xFF: NaN in every floating-point type
  void make_accessible(bool accessible);  // or a crash for whoever touches it

 private:
  std::size_t bytes_, mapped_;
  std::byte* pages_;  // guard, memory, guard
  std::byte* data_;
  bool accessible_ = false;
};

// Fills with zeros; of much memory, without touching it: it may never be used.
void fill_zero(void* data, std::size_t bytes);

}  // namespace regroup::emulation
