#include "kernels/tensor.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <numeric>

#include <fmt/ranges.h>

namespace regroup {

Tensor::Tensor(void* memory, DType type, std::span<const index_t> dims)
    : data(memory), dtype(type), rank(static_cast<int>(dims.size())) {
  check(dims.size() <= kMaxRank, "a tensor has at most {} dimensions, not {}", kMaxRank, dims.size());
  index_t dense = 1;
  for (int dim = rank - 1; dim >= 0; --dim) {
    const auto d = static_cast<std::size_t>(dim);
    check(dims[d] >= 0, "dimension {} of a tensor is {}", dim, dims[d]);
    shape[d] = dims[d];
    stride[d] = dense;
    dense *= dims[d];
  }
}

index_t Tensor::numel() const {
  return std::accumulate(shape.begin(), shape.begin() + rank, index_t{1}, std::multiplies<>());
}

bool Tensor::is_contiguous() const {
  index_t dense = 1;
  for (int dim = rank - 1; dim >= 0; --dim) {
    const auto d = static_cast<std::size_t>(dim);
    if (shape[d] != 1 && stride[d] != dense) return false;
    dense *= shape[d];
  }
  return true;
}

bool Tensor::has_shape(std::initializer_list<index_t> dims) const {
  return static_cast<int>(dims.size()) == rank && std::equal(dims.begin(), dims.end(), shape.begin());
}

Tensor Tensor::slice(int dim, index_t begin, index_t end) const {
  const auto d = static_cast<std::size_t>(dim);
  check(dim >= 0 && dim < rank && 0 <= begin && begin <= end && end <= shape[d],
        "[{}, {}) is not a part of dimension {} of {}", begin, end, dim, describe());
  Tensor part = *this;
  part.shape[d] = end - begin;
  part.data = static_cast<std::byte*>(data) + begin * stride[d] * size_of(dtype);
  return part;
}

Tensor Tensor::reshape(std::initializer_list<index_t> dims) const {
  Tensor result(data, dtype, dims);
  check(result.numel() == numel(), "{} cannot be seen as {}", describe(), result.describe());
  if (is_contiguous()) return result;
  // Walk both shapes from the right: a run of old dimensions that lie densely under one stride may be cut
  // anew.
  int old_dim = rank - 1;
  int new_dim = result.rank - 1;
  while (new_dim >= 0) {
    check(old_dim >= 0, "{} cannot be seen as {}", describe(), result.describe());
    const index_t unit = stride[static_cast<std::size_t>(old_dim)];
    index_t available = shape[static_cast<std::size_t>(old_dim)];
    while (old_dim > 0 && stride[static_cast<std::size_t>(old_dim - 1)] == unit * available) {
      available *= shape[static_cast<std::size_t>(--old_dim)];
    }
    --old_dim;
    index_t used = 1;
    while (new_dim >= 0 && used < available) {
      const auto d = static_cast<std::size_t>(new_dim--);
      result.stride[d] = unit * used;
      used *= result.shape[d];
    }
    check(used == available, "{} with its strides cannot be seen as {}", describe(), result.describe());
    while (new_dim >= 0 && result.shape[static_cast<std::size_t>(new_dim)] == 1) {
      result.stride[static_cast<std::size_t>(new_dim--)] = unit * used;
    }
  }
  return result;
}

std::string Tensor::describe() const {
  return fmt::format("{}[{}]", name_of(dtype), fmt::join(shape.begin(), shape.begin() + rank, ", "));
}

bool overlaps(const Tensor& a, const Tensor& b) {
  const auto end_of = [](const Tensor& t) {
    index_t last = 0;
    for (int dim = 0; dim < t.rank; ++dim) {
      const auto d = static_cast<std::size_t>(dim);
      last += (t.shape[d] - 1) * t.stride[d];
    }
    return static_cast<const std::byte*>(t.data) + (last + 1) * size_of(t.dtype);
  };
  if (!a || !b || a.numel() == 0 || b.numel() == 0) return false;
  return static_cast<const std::byte*>(a.data) < end_of(b) &&
         static_cast<const std::byte*>(b.data) < end_of(a);
}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this != &other) {
    release();
    memory_ = std::exchange(other.memory_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
    deleter_ = std::exchange(other.deleter_, nullptr);
  }
  return *this;
}

void Buffer::release() noexcept {
  if (memory_ != nullptr && deleter_) deleter_(memory_);
  memory_ = nullptr;
}

Tensor Buffer::tensor(DType dtype, std::span<const index_t> dims, index_t offset) const {
  const Tensor result(static_cast<std::byte*>(memory_) + offset, dtype, dims);
  check(offset >= 0 && offset + result.bytes() <= bytes_, "{} at byte {} reaches past a buffer of {} bytes",
        result.describe(), offset, bytes_);
  return result;
}

}  // namespace regroup
