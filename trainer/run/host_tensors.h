// A device's tensors where the host can read and write them: for checkpoints.
#pragma once

#include <vector>

#include "kernels/backend.h"
#include "parallel/partition.h"

namespace regroup {

// The same tensors with `local` in host memory: the device's own memory where the host may touch it, else
// copies, owned here, uninitialised until from_device().
class HostTensors {
 public:
  // `backend` outlives it, and the device's tensors too.
  HostTensors(Backend& backend, std::vector<ShardedTensor> device);

  const std::vector<ShardedTensor>& tensors() const { return host_; }
  void from_device();
  void to_device();

 private:
  Backend& backend_;
  std::vector<ShardedTensor> device_, host_;
  std::vector<std::vector<std::byte>> copies_;
};

}  // namespace regroup
