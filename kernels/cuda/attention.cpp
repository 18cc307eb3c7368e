#include "kernels/cuda/attention.h"

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/simple_attention.h"

namespace regroup {

void CudaBackend::do_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                               Tensor log_sum_exp, const AttentionOptions& options) {
  const AttentionCall call{q, k, v, bias, key_mask, out, log_sum_exp, options};
  if (flash_attention_supports(call)) {
    flash_attention_forward(device_, call);
  } else {
    simple_attention_forward(device_, call);
  }
}

void CudaBackend::do_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias,
                                        Tensor key_mask, Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk,
                                        Tensor dv, Tensor dbias, const AttentionOptions& options) {
  const AttentionCall call{q, k, v, bias, key_mask, out, log_sum_exp, options};
  const AttentionGradients gradients{dout, dq, dk, dv, dbias};
  if (flash_attention_supports(call, gradients)) {
    flash_attention_backward(device_, call, gradients);
  } else {
    simple_attention_backward(device_, call, gradients);
  }
}

}  // namespace regroup
