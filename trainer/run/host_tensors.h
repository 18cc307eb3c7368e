// A device's tensors where the host can read and write them: for checkpoints.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "kernels/backend.h"
#include "parallel/partition.h"

namespace regroup {

// Calls read(tensor) for each of `tensors`, with `local` in host memory, and puts what it has written there
// onto the device: one after another, so that the host needs room for the largest only.
void fill_from_host(Backend& backend, std::span<const ShardedTensor> tensors,
                    const std::function<void(const ShardedTensor&)>& read);

// The tensors as they are now, for this rank to write: with `local` in host memory where the host cannot
// touch the device's. Of a slice that another rank has too and writes (slice.replica > 0) there is no copy.
class HostCopies {
 public:
  HostCopies(Backend& backend, std::vector<ShardedTensor> tensors);

  const std::vector<ShardedTensor>& tensors() const { return tensors_; }

 private:
  std::vector<ShardedTensor> tensors_;
  std::vector<std::vector<std::byte>> copies_;
};

}  // namespace regroup
