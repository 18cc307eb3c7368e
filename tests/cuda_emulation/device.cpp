#include "tests/cuda_emulation/device.h"

#include <functional>

namespace regroup::emulation {

void* Device::allocate(std::size_t bytes) {
  if (bytes > kMemoryBytes - used_) return nullptr;
  auto memory = std::make_unique<GuardedMemory>(bytes);
  if (bytes <= kLargeBytes) memory->fill_nan();
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

GuardedMemory* Device::find(const void* address) const {
  const auto after = device_.upper_bound(address);
  if (after == device_.begin()) return nullptr;
  GuardedMemory& memory = *std::prev(after)->second;
  return address < memory.data() + memory.bytes() ? &memory : nullptr;
}

bool Device::contains(const void* address, std::size_t bytes) const {
  const GuardedMemory* memory = find(address);
  return memory != nullptr && bytes <= static_cast<std::size_t>(memory->data() + memory->bytes() -
                                                                static_cast<const std::byte*>(address));
}

std::size_t Device::allowed_shared(const void* kernel) const {
  const auto found = shared_bytes_.find(kernel);
  return found == shared_bytes_.end() ? kDefaultSharedBytes : found->second;
}

void Device::wait() {
  for (auto& [address, memory] : device_) memory->make_accessible(false);
}

Device::Access::Access(Device& device) {
  for (auto& [address, memory] : device.device_) blocks_.push_back(memory.get());
  for (GuardedMemory* memory : blocks_) memory->make_accessible(true);
}

Device::Access::Access(Device& device, std::initializer_list<const void*> addresses) {
  for (const void* address : addresses) {
    if (GuardedMemory* memory = device.find(address)) blocks_.push_back(memory);
  }
  for (GuardedMemory* memory : blocks_) memory->make_accessible(true);
}

Device::Access::~Access() {
  for (GuardedMemory* memory : blocks_) {
    if (memory->bytes() <= kLargeBytes) memory->make_accessible(false);
  }
}

}  // namespace regroup::emulation
