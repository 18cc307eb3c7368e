#include "kernels/cuda/cuda_backend.h"

namespace regroup {
}  // namespace regroup
