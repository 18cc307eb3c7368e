// A device's tensors, filled by way of the host: from checkpoints.
#pragma once

#include <functional>
#include <span>

#include "kernels/backend.h"
#include "parallel/partition.h"

namespace regroup {

// Calls read(tensor) for each of `tensors`, with `local` in host memory, and puts what it has written there
// onto the device: one after another, so that the host needs room for the largest only.
void fill_from_host(Backend& backend, std::span<const ShardedTensor> tensors,
                    const std::function<void(const ShardedTensor&)>& read);

}  // namespace regroup
