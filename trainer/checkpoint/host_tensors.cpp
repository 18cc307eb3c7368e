#include "trainer/checkpoint/host_tensors.h"

#include <vector>

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

}  // namespace regroup
