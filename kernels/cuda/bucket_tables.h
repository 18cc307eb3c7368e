// T5's buckets of relative positions, on the device.
#pragma once

#include <compare>
#include <map>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// relative_position_bucket() takes logarithms in float64 that must not differ by a bit from the CPU's, so the
// host computes a table, once; it is made anew only where longer distances than ever before are asked for.
class BucketTables {
 public:
  // A device array whose element d, -reach <= d <= reach, is the bucket of distance d. Valid until the next
  // call.
  const std::int32_t* of(CudaDevice& device, const RelativeBiasOptions& options, index_t buckets,
                         index_t reach);

 private:
  struct Key {
    bool bidirectional;
    index_t max_distance, buckets;
    auto operator<=>(const Key&) const = default;
  };
  struct Table {
    index_t reach = -1;
    Buffer memory;
  };
  std::map<Key, Table> tables_;
};

}  // namespace regroup
