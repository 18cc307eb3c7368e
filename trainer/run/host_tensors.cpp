#include "trainer/run/host_tensors.h"

#include <utility>

namespace regroup {

HostTensors::HostTensors(Backend& backend, std::vector<ShardedTensor> device)
    : backend_(backend), device_(std::move(device)), host_(device_) {
  if (backend.host_accessible()) return;
  copies_.reserve(host_.size());
  for (ShardedTensor& tensor : host_) {
    if (!tensor.local) continue;
    copies_.emplace_back(static_cast<std::size_t>(tensor.local.bytes()));
    tensor.local.data = copies_.back().data();
  }
}

void HostTensors::from_device() {
  for (std::size_t i = 0; i < host_.size(); ++i) {
    if (host_[i].local.data == device_[i].local.data) continue;
    backend_.copy_to_host(device_[i].local, host_[i].local.data);
  }
}

void HostTensors::to_device() {
  for (std::size_t i = 0; i < host_.size(); ++i) {
    if (host_[i].local.data == device_[i].local.data) continue;
    backend_.copy_from_host(host_[i].local.data, device_[i].local);
  }
}

}  // namespace regroup
