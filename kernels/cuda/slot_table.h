// What a kernel that handles all slots of an optimizer in one launch finds them by.
#pragma once

#include <cstddef>
#include <type_traits>
#include <vector>

#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Descriptors of slots on the device, uploaded only where they differ from the last call's: in the first
// step.
class SlotTable {
 public:
  template <class Entry>
  const Entry* update(CudaDevice& device, const std::vector<Entry>& entries) {
    static_assert(std::has_unique_object_representations_v<Entry>, "entries are compared by their bytes");
    const auto* const begin = reinterpret_cast<const std::byte*>(entries.data());
    return static_cast<const Entry*>(
        update(device, std::vector<std::byte>(begin, begin + entries.size() * sizeof(Entry))));
  }

 private:
  const void* update(CudaDevice& device, std::vector<std::byte> entries) {
    if (entries == entries_) return memory_.data();
    const auto bytes = static_cast<index_t>(entries.size());
    if (memory_.bytes() < bytes) memory_ = device.allocate(bytes);
    device.upload(entries.data(), memory_.data(), bytes);
    entries_ = std::move(entries);
    return memory_.data();
  }

  std::vector<std::byte> entries_;
  Buffer memory_;
};

}  // namespace regroup
