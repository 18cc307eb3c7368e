// Grouped-query attention by cuDNN's fused kernels. Part of a build that has the headers of cudnn-frontend
// (kernels/cuda/CMakeLists.txt); without them make_cudnn_attention() gives nothing (no_cudnn_attention.cpp).
#pragma once

#include <memory>

#include "kernels/base/log.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Limits of cuDNN's that our own kernels do not have: the bias and its gradient pass through bfloat16 [1, H,
// Q, K] in the workspace, and keys can be masked only at the end of a sample, with at least one left
// (AttentionOptions::padded_at_end): a query always sees a key. No dropout: cuDNN's has a mask of its own.
// log_sum_exp is Backend::attention's, so that forward and backward may be done by different implementations.
class CudnnAttention {
 public:
  virtual ~CudnnAttention() = default;

  // Whether cuDNN can do this. The first call of a shape makes its plan, which takes the host up to a second.
  virtual bool supports(const AttentionCall& call) = 0;
  virtual bool supports(const AttentionCall& call, const AttentionGradients& gradients) = 0;
  // Only what supports() says.
  virtual void forward(const AttentionCall& call) = 0;
  virtual void backward(const AttentionCall& call, const AttentionGradients& gradients) = 0;
};

// On `device`, which must outlive it. Gives the same bits in every run: of cuDNN's backward kernels it takes
// the deterministic. `log` is told why cuDNN cannot do a shape. nullptr where this build has no
// cudnn-frontend. SystemError where cuDNN cannot be used.
std::unique_ptr<CudnnAttention> make_cudnn_attention(CudaDevice& device, Log log);

}  // namespace regroup
