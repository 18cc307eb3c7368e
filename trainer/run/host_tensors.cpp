#include "trainer/run/host_tensors.h"

#include <utility>

namespace regroup {

void fill_from_host(Backend& backend, std::span<const ShardedTensor> tensors,
                    const std::function<void(const ShardedTensor&)>& read) {
  std::vector<std::byte> memory;
  for (const ShardedTensor& tensor : tensors) {
    if (backend.host_accessible()) {
      read(tensor);
      continue;
    }
    memory.resize(static_cast<std::size_t>(tensor.local.bytes()));
    ShardedTensor host = tensor;
    host.local.data = memory.data();
    read(host);
    backend.copy_from_host(memory.data(), tensor.local);
  }
}

HostCopies::HostCopies(Backend& backend, std::vector<ShardedTensor> tensors) : tensors_(std::move(tensors)) {
  if (backend.host_accessible()) return;
  for (ShardedTensor& tensor : tensors_) {
    if (!tensor.local || tensor.slice.replica > 0) continue;
    copies_.emplace_back(static_cast<std::size_t>(tensor.local.bytes()));
    backend.copy_to_host(tensor.local, copies_.back().data());
    tensor.local.data = copies_.back().data();
  }
}

}  // namespace regroup
