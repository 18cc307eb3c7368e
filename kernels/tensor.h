// Two kinds of memory: a Buffer owns, a Tensor looks.
#pragma once

#include <array>
#include <functional>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include "kernels/dtype.h"

namespace regroup {

// A non-owning view of up to four dimensions, passed by value, never resized by a callee. Strides are in
// elements; the last dimension is always dense (stride 1). Default-constructed: empty ("no tensor given").
struct Tensor {
  static constexpr int kMaxRank = 4;

  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int rank = 0;
  std::array<index_t, kMaxRank> shape{};
  std::array<index_t, kMaxRank> stride{};

  Tensor() = default;
  // A dense row-major tensor over `memory`.
  Tensor(void* memory, DType type, std::span<const index_t> dims);
  Tensor(void* memory, DType type, std::initializer_list<index_t> dims)
      : Tensor(memory, type, std::span<const index_t>(dims.begin(), dims.size())) {}

  explicit operator bool() const { return data != nullptr; }
  index_t operator[](int dim) const { return shape[static_cast<std::size_t>(dim)]; }
  index_t numel() const;
  index_t bytes() const { return numel() * size_of(dtype); }
  bool is_contiguous() const;
  bool has_shape(std::initializer_list<index_t> dims) const;

  // The elements as T; InternalError where the dtype is another.
  template <class T>
  T* as() const {
    check(dtype == dtype_of<T>(), "a tensor of {} is used as {}", name_of(dtype), name_of(dtype_of<T>()));
    return static_cast<T*>(data);
  }

  // The part [begin, end) of dimension `dim`.
  Tensor slice(int dim, index_t begin, index_t end) const;
  // The same elements under another shape of the same size; a strided tensor may only split its last
  // dimension or merge or split leading dimensions that lie densely one after another.
  Tensor reshape(std::initializer_list<index_t> dims) const;
  // "float32[8, 512]"
  std::string describe() const;
};
static_assert(std::is_trivially_copyable_v<Tensor>);

// Whether two tensors' byte ranges touch.
bool overlaps(const Tensor& a, const Tensor& b);

// The only owner of memory. Move-only. How it is freed is the allocating backend's business.
class Buffer {
 public:
  using Deleter = std::function<void(void*)>;
  Buffer() = default;
  Buffer(void* memory, index_t bytes, Deleter deleter)
      : memory_(memory), bytes_(bytes), deleter_(std::move(deleter)) {}
  ~Buffer() { release(); }
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  void* data() const { return memory_; }
  index_t bytes() const { return bytes_; }
  // A dense tensor at `offset` bytes; InternalError where it would reach past the end.
  Tensor tensor(DType dtype, std::span<const index_t> dims, index_t offset = 0) const;
  Tensor tensor(DType dtype, std::initializer_list<index_t> dims, index_t offset = 0) const {
    return tensor(dtype, std::span<const index_t>(dims.begin(), dims.size()), offset);
  }

 private:
  void release() noexcept;
  void* memory_ = nullptr;
  index_t bytes_ = 0;
  Deleter deleter_;
};

}  // namespace regroup
