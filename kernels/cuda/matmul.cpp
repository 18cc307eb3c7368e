#include "kernels/cuda/matmul.h"

namespace regroup {

class CublasLtMatmul::Plans {};
CublasLtMatmul::CublasLtMatmul(CudaDevice&, bool) {}
CublasLtMatmul::~CublasLtMatmul() = default;
void CublasLtMatmul::operator()(Tensor, Tensor, Tensor, const MatmulOptions&) {}

}  // namespace regroup
