// Which part of a global tensor a tensor-parallel rank holds. The single statement of who owns what: model,
// optimizer, gradient norm, checkpoint and conversion all read it.
#pragma once

#include <string>
#include <vector>

#include "kernels/tensor.h"

namespace regroup {

// How a parameter lies over the tp axis.
struct Partition {
  enum class Kind { kReplicated, kSplit, kKvGroups };
  Kind kind = Kind::kReplicated;
  int dim = 0;            // kSplit: the dimension cut into tp equal parts
  index_t kv_groups = 0;  // kKvGroups: dimension 0 is kv_groups equal blocks

  static Partition replicated() { return {}; }
  static Partition split(int dim) { return {.kind = Kind::kSplit, .dim = dim, .kv_groups = 0}; }
  // G >= tp: rank r holds the blocks [r G / tp, (r + 1) G / tp). G < tp: it holds block r G / tp, as do the
  // other tp / G - 1 ranks of its KV-replica group.
  static Partition kv(index_t groups) { return {.kind = Kind::kKvGroups, .dim = 0, .kv_groups = groups}; }
};

// The part of a global tensor that one tp rank holds: [begin, end) along dim, and which of `replicas` equal
// copies.
struct Slice {
  int dim = 0;
  index_t begin = 0;
  index_t end = 0;
  int replica = 0;
  int replicas = 1;
  bool whole(const std::vector<index_t>& shape) const {
    return shape.empty() || (begin == 0 && end == shape[static_cast<std::size_t>(dim)]);
  }
};

// InternalError where the shape does not divide (validate_layout() refused it before).
Slice local_slice(const Partition& partition, const std::vector<index_t>& shape, int tp_rank, int tp_size);

// The shape of the slice.
std::vector<index_t> local_shape(const Slice& slice, std::vector<index_t> shape);

// A named global tensor and the part of it that this rank holds, in host or device memory it does not own.
struct ShardedTensor {
  std::string name;            // public name
  std::vector<index_t> shape;  // global
  Slice slice;
  Tensor local;  // dense, local_shape(slice, shape)
};

}  // namespace regroup
