// Memory of a step: planned once, handed out by bumping, given back by leaving a Frame.
#pragma once

#include "kernels/tensor.h"

namespace regroup {

// A bump allocator over one Buffer. A step's `saved` arena holds what backward needs, its `scratch` arena
// what the current operation needs. Never grows: asking for more than the plan is an InternalError.
class Arena {
 public:
  static constexpr index_t kAlignment = 64;

  Arena() = default;
  explicit Arena(Buffer buffer) : buffer_(std::move(buffer)) {}

  // Uninitialised memory, valid until the enclosing Frame ends.
  Tensor allocate(DType dtype, std::initializer_list<index_t> dims) {
    const Tensor result = buffer_.tensor(dtype, dims, used_);
    used_ += (result.bytes() + kAlignment - 1) / kAlignment * kAlignment;
    check(used_ <= buffer_.bytes(), "the memory plan has {} bytes, {} are needed for {}", buffer_.bytes(),
          used_, result.describe());
    high_water_ = used_ > high_water_ ? used_ : high_water_;
    return result;
  }

  index_t used() const { return used_; }
  index_t high_water() const { return high_water_; }  // bytes, since construction
  index_t capacity() const { return buffer_.bytes(); }

  // Everything allocated during the life of a Frame is given back when it ends.
  class Frame {
   public:
    explicit Frame(Arena& arena) : arena_(arena), mark_(arena.used_) {}
    ~Frame() { arena_.used_ = mark_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Arena& arena_;
    index_t mark_;
  };

 private:
  Buffer buffer_;
  index_t used_ = 0;
  index_t high_water_ = 0;
};

}  // namespace regroup
