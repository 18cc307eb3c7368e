#include "kernels/cuda/cudnn_attention.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/cudnn_attention_graph.h"
#include "kernels/cuda/cudnn_bias.h"

namespace regroup {
namespace {

constexpr index_t kAlignment = 128;           // of the parts of the workspace
constexpr std::uintptr_t kRowAlignment = 16;  // of the operands' rows, bytes
constexpr index_t kLargestHead = 128;
// cuDNN's backward with a bias gradient keeps all scores' gradients at once; beyond this the memory is better
// used.
constexpr index_t kLargestWorkspace = index_t{1} << 30;

index_t aligned(index_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

bool is_aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % kRowAlignment == 0; }
bool is_aligned(const Tensor& t) {
  return is_aligned(t.data) && (t.stride[0] * size_of(t.dtype)) % static_cast<index_t>(kRowAlignment) == 0 &&
         (t.stride[1] * size_of(t.dtype)) % static_cast<index_t>(kRowAlignment) == 0;
}

// What is true of a call whatever cuDNN says of its shape.
bool may_support(const AttentionCall& call) {
  const index_t queries = call.q[1], channels = call.q[3];
  return call.q.dtype == DType::kBFloat16 && call.q.numel() > 0 && call.k.numel() > 0 &&
         channels <= kLargestHead && channels % 8 == 0 && call.options.dropout_rate == 0 &&
         (!call.key_mask || call.options.padded_at_end) && is_aligned(call.q) && is_aligned(call.k) &&
         is_aligned(call.v) && is_aligned(call.out) && is_aligned(call.log_sum_exp.data) &&
         // cuDNN 9.18 release notes, known issues: one query, causal, grouped.
         !(call.options.causal && queries == 1);
}

bool may_support(const AttentionCall& call, const AttentionGradients& gradients) {
  const index_t queries = call.q[1], keys = call.k[1];
  return may_support(call) && is_aligned(gradients.dout) && is_aligned(gradients.dq) &&
         is_aligned(gradients.dk) && is_aligned(gradients.dv) && (!gradients.dbias || call.bias) &&
         // The frontend accepts this one and cuDNN has no kernel for it.
         !(queries == 1 && keys == 1) &&
         // The frontend puts float32 [B, H, Q] before cuDNN's own workspace.
         call.q[0] * call.q[2] * queries * size_of(DType::kFloat32) % kAlignment == 0;
}

// The parts of the workspace, in bytes and in this order.
struct Workspace {
  index_t bias = 0, dbias = 0, query_lengths = 0, key_lengths = 0, own = 0;
  index_t total() const { return bias + dbias + query_lengths + key_lengths + own; }
};

Workspace workspace_of(const AttentionShape& s, const CudnnAttentionPlan& plan) {
  const index_t matrix = aligned(s.heads * s.queries * s.keys * size_of(DType::kBFloat16));
  const index_t lengths = s.padded ? aligned(s.batch * size_of(DType::kInt32)) : 0;
  return {.bias = s.bias ? matrix : 0,
          .dbias = s.dbias ? matrix : 0,
          .query_lengths = lengths,
          .key_lengths = lengths,
          .own = plan.workspace_bytes()};
}

class Cudnn final : public CudnnAttention {
 public:
  Cudnn(CudaDevice& device, Log log) : device_(device), log_(std::move(log)), handle_(device.stream()) {}

  bool supports(const AttentionCall& call) override {
    return may_support(call) && plan(shape_of(call)) != nullptr;
  }
  bool supports(const AttentionCall& call, const AttentionGradients& gradients) override {
    return may_support(call, gradients) && plan(shape_of(call, gradients)) != nullptr;
  }
  void forward(const AttentionCall& call) override { run(shape_of(call), call, pointers_of(call), Tensor()); }
  void backward(const AttentionCall& call, const AttentionGradients& gradients) override {
    CudnnAttentionPointers pointers = pointers_of(call);
    pointers.dout = gradients.dout.data;
    pointers.dq = gradients.dq.data;
    pointers.dk = gradients.dk.data;
    pointers.dv = gradients.dv.data;
    run(shape_of(call, gradients), call, pointers, gradients.dbias);
  }

 private:
  struct Entry {
    AttentionShape shape;
    std::unique_ptr<CudnnAttentionPlan> plan;  // nullptr: cuDNN has none, or none that fits
  };

  static CudnnAttentionPointers pointers_of(const AttentionCall& call) {
    return {.q = call.q.data,
            .k = call.k.data,
            .v = call.v.data,
            .out = call.out.data,
            .log_sum_exp = call.log_sum_exp.data};
  }

  // A model has a handful of shapes, so a list is searched as fast as a table.
  const CudnnAttentionPlan* plan(const AttentionShape& shape) {
    for (const Entry& entry : entries_) {
      if (entry.shape == shape) return entry.plan.get();
    }
    std::string problem;
    auto made = CudnnAttentionPlan::make(handle_, shape, problem);
    if (made != nullptr) {
      const index_t bytes = workspace_of(shape, *made).total();
      if (bytes > kLargestWorkspace) {
        problem = fmt::format("it needs {} MiB of workspace", bytes >> 20);
        made = nullptr;
      }
    }
    if (made == nullptr) log_.info("attention, {}: not by cuDNN: {}", name_of(shape), problem);
    entries_.push_back({shape, std::move(made)});
    return entries_.back().plan.get();
  }

  void run(const AttentionShape& shape, const AttentionCall& call, CudnnAttentionPointers pointers,
           Tensor dbias);

  CudaDevice& device_;
  Log log_;
  CudnnHandle handle_;
  std::vector<Entry> entries_;
};

void Cudnn::run(const AttentionShape& shape, const AttentionCall& call, CudnnAttentionPointers pointers,
                Tensor dbias) {
  const CudnnAttentionPlan* const made = plan(shape);
  check(made != nullptr, "cuDNN has no attention for the {}", name_of(shape));
  const Workspace parts = workspace_of(shape, *made);
  std::byte* next = device_.workspace(parts.total());
  const auto take = [&next](index_t bytes) { return std::exchange(next, next + bytes); };
  if (call.bias) {
    auto* full = reinterpret_cast<bfloat16*>(take(parts.bias));
    expand_bias(device_, call.bias, shape.queries, full);
    pointers.bias = full;
  }
  if (dbias) {
    // cuDNN need not write what a mask hides.
    pointers.dbias = take(parts.dbias);
    check_cuda(cudaMemsetAsync(pointers.dbias, 0, static_cast<std::size_t>(parts.dbias), device_.stream()),
               "cudaMemsetAsync");
  }
  if (call.key_mask) {
    auto* query_lengths = reinterpret_cast<std::int32_t*>(take(parts.query_lengths));
    auto* key_lengths = reinterpret_cast<std::int32_t*>(take(parts.key_lengths));
    sequence_lengths(device_, call.key_mask, shape.queries, query_lengths, key_lengths);
    pointers.query_lengths = query_lengths;
    pointers.key_lengths = key_lengths;
  }
  made->execute(handle_, pointers, next);
  if (dbias) sum_bias_gradient(device_, static_cast<const bfloat16*>(pointers.dbias), shape.queries, dbias);
}

}  // namespace

std::unique_ptr<CudnnAttention> make_cudnn_attention(CudaDevice& device, Log log) {
  return std::make_unique<Cudnn>(device, std::move(log));
}

}  // namespace regroup
