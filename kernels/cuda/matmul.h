// Matrix products by cuBLASLt: row-major operands, algorithms chosen once a shape.
#pragma once

#include <memory>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Backend::matmul on one device's stream. A shape's first product asks cuBLASLt for candidates and, unless
// `deterministic`, times each on the operands themselves and keeps the fastest; `deterministic` keeps
// cuBLASLt's first. Split-K sums stay in float32 (no reduction in the output's type), so one algorithm gives
// the same bits in every run.
class CublasLtMatmul {
 public:
  CublasLtMatmul(CudaDevice& device, bool deterministic);
  ~CublasLtMatmul();

  // Backend::matmul, already checked.
  void operator()(Tensor a, Tensor b, Tensor c, const MatmulOptions& options);

 private:
  class Plans;
  std::unique_ptr<Plans> plans_;
};

}  // namespace regroup
