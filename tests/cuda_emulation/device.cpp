#include "tests/cuda_emulation/device.h"

#include <functional>

namespace regroup::emulation {

void* Device::allocate(std::size_t bytes) {
  if (bytes > kMemoryBytes - used_) return nullptr;
  auto memory = std::make_unique<GuardedMemory>(bytes);
  memory->make_accessible(false);
  void* address = memory->data();
  used_ += bytes;
  device_.emplace(address, std::move(memory));
  return address;
}

void* Device::allocate_pinned(std::size_t bytes) {
  auto memory = std::make_unique<GuardedMemory>(bytes);
  void* address = memory->data();
  pinned_.emplace(address, std::move(memory));
  return address;
}

bool Device::free(void* address) {
  const auto found = device_.find(address);
  if (found == device_.end()) return false;
  used_ -= found->second->bytes();
  device_.erase(found);
  return true;
}

bool Device::free_pinned(void* address) { return pinned_.erase(address) == 1; }

bool Device::contains(const void* address, std::size_t bytes) const {
  auto after = device_.upper_bound(address);
  if (after == device_.begin()) return false;
  const GuardedMemory& memory = *std::prev(after)->second;
  return static_cast<const std::byte*>(address) + bytes <= memory.data() + memory.bytes();
}

std::size_t Device::allowed_shared(const void* kernel) const {
  const auto found = shared_bytes_.find(kernel);
  return found == shared_bytes_.end() ? kDefaultSharedBytes : found->second;
}

void Device::make_accessible(bool accessible) {
  for (auto& [address, memory] : device_) memory->make_accessible(accessible);
}

}  // namespace regroup::emulation
