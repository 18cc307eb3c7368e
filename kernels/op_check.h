// The vocabulary in which backend.cpp checks an op's tensors.
#pragma once

#include "kernels/tensor.h"

namespace regroup {

// Checks of one call of one op. The first breach throws InternalError naming the op, its leading tensor and
// the offending one. Costs nothing while all is well: messages are made only to be thrown.
class OpCheck {
 public:
  OpCheck(const char* op, const char* name, const Tensor& leading)
      : op_(op), name_(name), leading_(leading) {}

  // The leading tensor has this rank and a floating-point type.
  void floating(int rank) const {
    if (!leading_ || leading_.rank != rank || leading_.dtype == DType::kInt32)
      throw InternalError("{}: {} is {}; a floating-point tensor of {} dimensions is needed", op_, name_,
                          leading_.describe(), rank);
  }
  void dense() const { dense(name_, leading_); }
  void dense(const char* name, const Tensor& t) const {
    if (!t.is_contiguous())
      throw InternalError("{}({} {}): {} {} has gaps between its rows", op_, name_, leading_.describe(), name,
                          t.describe());
  }
  // A tensor of this type and shape, rows free to be strided.
  void rows(const char* name, const Tensor& t, DType dtype, std::initializer_list<index_t> shape) const {
    if (!t || t.dtype != dtype || !t.has_shape(shape))
      throw InternalError("{}({} {}): {} is {}; {} is needed", op_, name_, leading_.describe(), name,
                          t ? t.describe() : "missing", Tensor(nullptr, dtype, shape).describe());
  }
  // The same, dense.
  void is(const char* name, const Tensor& t, DType dtype, std::initializer_list<index_t> shape) const {
    rows(name, t, dtype, shape);
    dense(name, t);
  }
  // Missing, or is().
  void optional(const char* name, const Tensor& t, DType dtype, std::initializer_list<index_t> shape) const {
    if (t) is(name, t, dtype, shape);
  }
  // An output and a tensor that the op still reads share no memory.
  void apart(const char* output_name, const Tensor& output, const char* name, const Tensor& t) const {
    if (overlaps(output, t))
      throw InternalError("{}: {} {} overlaps {} {}", op_, output_name, output.describe(), name,
                          t.describe());
  }
  // They share no memory, or are the very same elements.
  void apart_or_same(const char* output_name, const Tensor& output, const char* name, const Tensor& t) const {
    const bool same = output.data == t.data && output.dtype == t.dtype && output.numel() == t.numel();
    if (!same) apart(output_name, output, name, t);
  }
  void that(bool condition, const char* what) const {
    if (!condition) throw InternalError("{}({} {}): {}", op_, name_, leading_.describe(), what);
  }

 private:
  const char* op_;
  const char* name_;
  const Tensor& leading_;
};

}  // namespace regroup
