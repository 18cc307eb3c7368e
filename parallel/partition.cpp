#include "parallel/partition.h"

#include <fmt/ranges.h>

namespace regroup {
namespace {

// Part `index` of dimension `dim` cut into `parts` equal ones.
Slice part_of(const std::vector<index_t>& shape, int dim, index_t index, index_t parts) {
  check(0 <= dim && dim < static_cast<int>(shape.size()), "dimension {} of a tensor of shape [{}]", dim,
        fmt::join(shape, ", "));
  const index_t length = shape[static_cast<std::size_t>(dim)];
  check(length % parts == 0, "dimension {} of shape [{}] cannot be cut into {} equal parts", dim,
        fmt::join(shape, ", "), parts);
  const index_t part = length / parts;
  return {.dim = dim, .begin = index * part, .end = (index + 1) * part};
}

Slice kv_slice(index_t groups, const std::vector<index_t>& shape, int tp_rank, int tp_size) {
  const bool even = groups >= 1 && (groups % tp_size == 0 || tp_size % groups == 0);
  check(even, "{} key/value groups do not lie evenly over {} tensor-parallel ranks", groups, tp_size);
  part_of(shape, 0, 0, groups);  // whole groups, also where a rank holds several
  if (groups >= tp_size) return part_of(shape, 0, tp_rank, tp_size);
  const int replicas = static_cast<int>(tp_size / groups);
  Slice slice = part_of(shape, 0, tp_rank / replicas, groups);
  slice.replica = tp_rank % replicas;
  slice.replicas = replicas;
  return slice;
}

}  // namespace

Slice local_slice(const Partition& partition, const std::vector<index_t>& shape, int tp_rank, int tp_size) {
  check(0 <= tp_rank && tp_rank < tp_size, "tensor-parallel rank {} of {}", tp_rank, tp_size);
  switch (partition.kind) {
    case Partition::Kind::kReplicated:
      return {
          .dim = 0, .begin = 0, .end = shape.empty() ? 0 : shape[0], .replica = tp_rank, .replicas = tp_size};
    case Partition::Kind::kSplit:
      return part_of(shape, partition.dim, tp_rank, tp_size);
    case Partition::Kind::kKvGroups:
      return kv_slice(partition.kv_groups, shape, tp_rank, tp_size);
  }
  throw InternalError("unknown partition kind {}", static_cast<int>(partition.kind));
}

std::vector<index_t> local_shape(const Slice& slice, std::vector<index_t> shape) {
  if (!shape.empty()) shape[static_cast<std::size_t>(slice.dim)] = slice.end - slice.begin;
  return shape;
}

}  // namespace regroup
