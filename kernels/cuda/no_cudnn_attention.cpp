#include "kernels/cuda/cudnn_attention.h"
#include "kernels/cuda/cudnn_attention_graph.h"

namespace regroup {

std::unique_ptr<CudnnAttention> make_cudnn_attention(CudaDevice&, Log) { return nullptr; }

bool CudnnAttentionPlan::in_this_build() { return false; }

std::string CudnnAttentionPlan::problem_on(const AttentionShape&, const std::string&) {
  throw InternalError("a plan of cuDNN's in a build without cudnn-frontend");
}

}  // namespace regroup
