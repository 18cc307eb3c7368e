// Matrix products by cuBLASLt: row-major operands, algorithms chosen once a shape.
#pragma once

#include <memory>
#include <string>

#include "kernels/backend.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Backend::matmul on one device's stream. A shape's first product asks cuBLASLt for candidates and, unless
// `deterministic`, times each on the operands themselves and keeps the fastest; `deterministic` keeps
// cuBLASLt's first. Split-K sums stay in float32 (no reduction in the output's type), so one algorithm gives
// the same bits in every run. float32 products are float32 throughout, never TensorFloat-32. A shape that was
// seen before allocates nothing and does not wait.
class CublasLtMatmul {
 public:
  CublasLtMatmul(CudaDevice& device, bool deterministic);
  ~CublasLtMatmul();

  // Backend::matmul, already checked.
  void operator()(Tensor a, Tensor b, Tensor c, const MatmulOptions& options);

  // The algorithm of every shape so far, as text (MatmulChoices::write).
  std::string chosen() const;
  // Shapes that have had no product yet take their algorithms from `table`, an earlier chosen(), which names
  // them. False where the table is of another version of cuBLASLt or another kind of GPU: nothing changes.
  // UserError where it is no such table, and at a product whose algorithm cuBLASLt refuses.
  bool choose(const std::string& table);

 private:
  class Plans;
  std::unique_ptr<Plans> plans_;
};

}  // namespace regroup
