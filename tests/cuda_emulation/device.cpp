#include "tests/cuda_emulation/device.h"

#include <cstdlib>
#include <exception>
#include <functional>

#include "kernels/base/error.h"
#include "tests/cuda_emulation/streams.h"

namespace regroup::emulation {

void refuse_while_unwinding(const char* call) {
  // Thrown there it ends the process.
  check(std::uncaught_exceptions() == 0, "{} while an exception unwinds the stack", call);
}

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

GuardedMemory* Device::find(const Blocks& blocks, const void* address) {
  const auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return nullptr;
  GuardedMemory& memory = *std::prev(after)->second;
  return address < memory.data() + memory.bytes() ? &memory : nullptr;
}
GuardedMemory* Device::find(const void* address) const { return find(device_, address); }

bool Device::contains(const Blocks& blocks, const void* address, std::size_t bytes) {
  const GuardedMemory* memory = find(blocks, address);
  return memory != nullptr && bytes <= static_cast<std::size_t>(memory->data() + memory->bytes() -
                                                                static_cast<const std::byte*>(address));
}
bool Device::contains(const void* address, std::size_t bytes) const {
  return contains(device_, address, bytes);
}
bool Device::contains_pinned(const void* address, std::size_t bytes) const {
  return contains(pinned_, address, bytes);
}

std::size_t Device::most_shared() {
  const char* const bytes = std::getenv("REGROUP_EMULATED_SHARED_BYTES");
  return bytes == nullptr ? std::size_t{227} << 10 : static_cast<std::size_t>(std::atoll(bytes));
}

std::size_t Device::allowed_shared(const void* kernel) const {
  const auto found = shared_bytes_.find(kernel);
  return found == shared_bytes_.end() ? kDefaultSharedBytes : found->second;
}

std::shared_ptr<Stream> Device::make_stream() {
  auto stream = std::make_shared<Stream>(static_cast<unsigned>(streams_.size()));
  streams_.push_back(stream);
  return stream;
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
