// Matrix products on the host: oneDNN for bfloat16 and float32, a plain loop for float64.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cpu_level.h"

namespace regroup {

// c = op(a) op(b) (+ c) as Backend::matmul states it. Keeps one oneDNN primitive for each combination of
// shape, strides, types and options seen, and one scratchpad as large as the largest of them needs: a
// combination that was seen before allocates nothing. The same combination gives the same bits at every call.
// Not for concurrent use.
class OneDnnMatmul {
 public:
  explicit OneDnnMatmul(int threads);
  ~OneDnnMatmul();
  OneDnnMatmul(const OneDnnMatmul&) = delete;
  OneDnnMatmul& operator=(const OneDnnMatmul&) = delete;

  // Whether this processor has instructions that multiply bfloat16, and oneDNN may use them. Where it has
  // none oneDNN may refuse products of bfloat16, or be slower at them than at float32.
  static bool multiplies_bfloat16();

  void operator()(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options);

 private:
  class Primitives;
  int threads_;
  std::unique_ptr<Primitives> primitives_;
};

// The part of limit_cpu_level() that concerns oneDNN.
void limit_onednn(CpuLevel level);

}  // namespace regroup
