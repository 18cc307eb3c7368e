// cuDNN's fused attention as executable plans. No type of cuDNN and none of its frontend shows here: those
// headers take half a minute to compile, in cudnn_attention_graph.cpp alone.
#pragma once

#include <memory>
#include <string>

#include "kernels/cuda/attention_shape.h"
#include "kernels/cuda/cuda_device.h"

namespace regroup {

// Device memory. bfloat16 except where said; of forward: the first eight.
struct CudnnAttentionPointers {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const void* bias = nullptr;                                   // [1, H, Q, K]
  const void *query_lengths = nullptr, *key_lengths = nullptr;  // int32 [B]
  void *out = nullptr, *log_sum_exp = nullptr;                  // float32 [B, H, Q]; backward reads both
  const void* dout = nullptr;
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;  // =
  void* dbias = nullptr;                             // = [1, H, Q, K]
};

// A connection to cuDNN whose work goes to one stream.
class CudnnHandle {
 public:
  // On the current device. SystemError where cuDNN cannot be used.
  explicit CudnnHandle(cudaStream_t stream);
  ~CudnnHandle();
  CudnnHandle(const CudnnHandle&) = delete;
  CudnnHandle& operator=(const CudnnHandle&) = delete;

 private:
  friend class CudnnAttentionPlan;
  class Connection;
  std::unique_ptr<Connection> connection_;
};

class CudnnAttentionPlan {
 public:
  // False where there was no cudnn-frontend to build with; then this is the only member that may be used.
  static bool in_this_build();
  // nullptr where cuDNN has no kernel for the shape; `problem` then says why in one line.
  static std::unique_ptr<CudnnAttentionPlan> make(const CudnnHandle& handle, const AttentionShape& shape,
                                                  std::string& problem);
  // The problem that make() would have on a GPU that is not here, or "". `device`: JSON of its properties, in
  // the names of CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION. The kernel is compiled, but cannot run.
  static std::string problem_on(const AttentionShape& shape, const std::string& device);

  class Graph;
  explicit CudnnAttentionPlan(std::unique_ptr<Graph> graph);  // by make()
  ~CudnnAttentionPlan();

  index_t workspace_bytes() const;
  // Issues the attention of `shape`; workspace aligned to 128 bytes. SystemError where cuDNN refuses.
  void execute(const CudnnHandle& handle, const CudnnAttentionPointers& pointers, void* workspace) const;

 private:
  std::unique_ptr<Graph> graph_;
};

}  // namespace regroup
