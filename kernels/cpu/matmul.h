// Matrix products on the host: oneDNN for bfloat16 and float32, a plain loop for float64.
#pragma once

#include <memory>

#include "kernels/backend.h"

namespace regroup {

// c = op(a) op(b) (+ c) as Backend::matmul states it. Keeps one oneDNN primitive for each combination of
// shape, strides, types and options seen, and one scratchpad as large as the largest of them needs: a
// combination that was seen before allocates nothing. The same combination gives the same bits at every call.
// Not for concurrent use.
class CpuMatmul {
 public:
  explicit CpuMatmul(int threads);
  ~CpuMatmul();
  CpuMatmul(const CpuMatmul&) = delete;
  CpuMatmul& operator=(const CpuMatmul&) = delete;

  void operator()(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options);

 private:
  class Primitives;
  int threads_;
  std::unique_ptr<Primitives> primitives_;
};

}  // namespace regroup
