#include "kernels/cuda/attention.h"

#include "kernels/cuda/attention_choice.h"
#include "kernels/cuda/cuda_backend.h"

namespace regroup {

void CudaBackend::do_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                               Tensor log_sum_exp, const AttentionOptions& options) {
  attention_->forward({q, k, v, bias, key_mask, out, log_sum_exp, options});
}

void CudaBackend::do_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias,
                                        Tensor key_mask, Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk,
                                        Tensor dv, Tensor dbias, const AttentionOptions& options) {
  attention_->backward({q, k, v, bias, key_mask, out, log_sum_exp, options}, {dout, dq, dk, dv, dbias});
}

}  // namespace regroup
