#include "kernels/cuda/cudnn_attention_graph.h"

#include <array>
#include <cuda_runtime_api.h>
#include <cudnn.h>
#include <unordered_map>
#include <vector>

namespace regroup {
namespace {

// cudaGraphNodeGetDependentNodes of CUDA 12 and of CUDA 13, which takes the edges too. A template, so that
// only the call that exists is compiled.
template <class Node>
cudaError_t dependent_nodes(Node node, Node* nodes, std::size_t* count) {
  if constexpr (requires { cudaGraphNodeGetDependentNodes(node, nodes, nullptr, count); }) {
    return cudaGraphNodeGetDependentNodes(node, nodes, nullptr, count);
  } else {
    return cudaGraphNodeGetDependentNodes(node, nodes, count);
  }
}

}  // namespace
}  // namespace regroup

// The frontend (1.8) calls the function of CUDA 12, in a place that is never reached here but is compiled.
// Nothing but a macro changes what a header calls without a changed copy of the header.
#define cudaGraphNodeGetDependentNodes regroup::dependent_nodes
#include <cudnn_frontend.h>
#undef cudaGraphNodeGetDependentNodes

namespace regroup {
namespace {

namespace fe = cudnn_frontend;
using fe::graph::Tensor_attributes;
using Operand = std::shared_ptr<Tensor_attributes>;
using Rows = AttentionShape::Rows;

enum Id : index_t {
  kQ = 1,
  kK,
  kV,
  kBias,
  kQueryLengths,
  kKeyLengths,
  kOut,
  kLogSumExp,
  kDOut,
  kDQ,
  kDK,
  kDV,
  kDBias
};

void check_cudnn(cudnnStatus_t result, const char* call) {
  if (result != CUDNN_STATUS_SUCCESS) throw SystemError("{} failed: {}", call, cudnnGetErrorString(result));
}

// "" where the frontend is content, else what it says, in one line.
std::string problem_of(fe::error_t status) {
  std::string text = status.is_bad() ? "cuDNN: " + status.get_message() : "";
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return text;
}

// A graph whose operations can be had without a device: the frontend refuses to gather them without a handle,
// but not before it has made them.
class OpenGraph : public fe::graph::Graph {
 public:
  std::vector<cudnnBackendDescriptor_t> operation_descriptors() {
    std::vector<cudnnBackendDescriptor_t> descriptors;
    for (const auto& operation : operations) descriptors.push_back(operation->get_raw_desc());
    for (const auto& operation : raw_operations) descriptors.push_back(operation->get_backend_descriptor());
    return descriptors;
  }
};

// Declares the operands of one attention and the attention itself.
class AttentionGraph {
 public:
  AttentionGraph(OpenGraph& graph, const AttentionShape& shape) : graph_(graph), s_(shape) {
    graph.set_io_data_type(fe::DataType_t::BFLOAT16)
        .set_intermediate_data_type(fe::DataType_t::FLOAT)
        .set_compute_data_type(fe::DataType_t::FLOAT);
  }

  void declare() {
    if (s_.backward) {
      backward();
    } else {
      forward();
    }
  }

 private:
  // [B, heads, tokens, C] in the backend's order, [B, tokens, heads, C] in memory.
  Tensor_attributes heads_of(Id id, index_t tokens, index_t heads, const Rows& rows) const {
    return Tensor_attributes()
        .set_uid(id)
        .set_dim({s_.batch, heads, tokens, s_.channels})
        .set_stride({rows.sample, s_.channels, rows.token, 1});
  }
  Tensor_attributes log_sum_exp() const {
    return Tensor_attributes()
        .set_uid(kLogSumExp)
        .set_dim({s_.batch, s_.heads, s_.queries, 1})
        .set_stride({s_.heads * s_.queries, s_.queries, 1, 1})
        .set_data_type(fe::DataType_t::FLOAT);
  }
  Tensor_attributes bias(Id id) const {
    return Tensor_attributes()
        .set_uid(id)
        .set_dim({1, s_.heads, s_.queries, s_.keys})
        .set_stride({s_.heads * s_.queries * s_.keys, s_.queries * s_.keys, s_.keys, 1});
  }
  Operand lengths(Id id) const {
    return graph_.tensor(Tensor_attributes()
                             .set_uid(id)
                             .set_dim({s_.batch, 1, 1, 1})
                             .set_stride({1, 1, 1, 1})
                             .set_data_type(fe::DataType_t::INT32));
  }
  static void output(const Operand& operand, const Tensor_attributes& like) {
    operand->set_output(true).set_uid(like.get_uid()).set_dim(like.get_dim()).set_stride(like.get_stride());
  }
  // What forward and backward have alike.
  template <class Attributes>
  void set_mask_and_bias(Attributes& attributes) const {
    attributes.set_causal_mask(s_.causal);
    if (s_.bias) attributes.set_bias(graph_.tensor(bias(kBias)));
    if (s_.padded) {
      attributes.set_padding_mask(true)
          .set_seq_len_q(lengths(kQueryLengths))
          .set_seq_len_kv(lengths(kKeyLengths));
    }
  }

  void forward() {
    auto attributes = fe::graph::SDPA_attributes().set_is_inference(false);
    set_mask_and_bias(attributes);
    const auto [out, stats] = graph_.sdpa(graph_.tensor(heads_of(kQ, s_.queries, s_.heads, s_.q)),
                                          graph_.tensor(heads_of(kK, s_.keys, s_.groups, s_.k)),
                                          graph_.tensor(heads_of(kV, s_.keys, s_.groups, s_.v)), attributes);
    output(out, heads_of(kOut, s_.queries, s_.heads, s_.out));
    output(stats, log_sum_exp());
    stats->set_data_type(fe::DataType_t::FLOAT);
  }

  void backward() {
    // cuDNN finds an engine for dbias only where the scores' gradient is scaled, by 1 as well.
    auto attributes =
        fe::graph::SDPA_backward_attributes().set_deterministic_algorithm(true).set_attn_scale(1.0F);
    set_mask_and_bias(attributes);
    if (s_.dbias)
      attributes.set_dbias(
          graph_.tensor(bias(kDBias).set_output(true).set_data_type(fe::DataType_t::BFLOAT16)));
    const auto [dq, dk, dv] =
        graph_.sdpa_backward(graph_.tensor(heads_of(kQ, s_.queries, s_.heads, s_.q)),
                             graph_.tensor(heads_of(kK, s_.keys, s_.groups, s_.k)),
                             graph_.tensor(heads_of(kV, s_.keys, s_.groups, s_.v)),
                             graph_.tensor(heads_of(kOut, s_.queries, s_.heads, s_.out)),
                             graph_.tensor(heads_of(kDOut, s_.queries, s_.heads, s_.dout)),
                             graph_.tensor(log_sum_exp()), attributes);
    output(dq, heads_of(kDQ, s_.queries, s_.heads, s_.dq));
    output(dk, heads_of(kDK, s_.keys, s_.groups, s_.dk));
    output(dv, heads_of(kDV, s_.keys, s_.groups, s_.dv));
  }

  OpenGraph& graph_;
  const AttentionShape& s_;
};

// A descriptor of cuDNN's backend, with its attributes set and finished.
class Descriptor {
 public:
  explicit Descriptor(cudnnBackendDescriptorType_t type) : descriptor_(type) {
    check_cudnn(descriptor_.get_status(), "cudnnBackendCreateDescriptor");
  }
  cudnnBackendDescriptor_t get() const { return descriptor_.get_ptr(); }
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type, std::size_t count,
                  const void* values) {
    check_cudnn(cudnnBackendSetAttribute(get(), name, type, static_cast<std::int64_t>(count), values),
                "cudnnBackendSetAttribute");
    return *this;
  }
  Descriptor& set(cudnnBackendAttributeName_t name, cudnnBackendDescriptor_t value) {
    return set(name, CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &value);
  }
  cudnnStatus_t finish() { return cudnnBackendFinalize(get()); }

 private:
  fe::detail::backend_descriptor descriptor_;
};

}  // namespace

class CudnnHandle::Connection {
 public:
  explicit Connection(cudaStream_t stream) {
    check_cudnn(cudnnCreate(&handle_), "cudnnCreate");
    const cudnnStatus_t result = cudnnSetStream(handle_, stream);
    if (result != CUDNN_STATUS_SUCCESS) cudnnDestroy(handle_);
    check_cudnn(result, "cudnnSetStream");
  }
  ~Connection() {
    if (!is_unwinding()) cudnnDestroy(handle_);
  }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  cudnnHandle_t get() const { return handle_; }

 private:
  cudnnHandle_t handle_ = nullptr;
};

CudnnHandle::CudnnHandle(cudaStream_t stream) : connection_(std::make_unique<Connection>(stream)) {}
CudnnHandle::~CudnnHandle() = default;

class CudnnAttentionPlan::Graph {
 public:
  explicit Graph(const AttentionShape& shape) { AttentionGraph(graph_, shape).declare(); }

  // "" or what cuDNN says.
  std::string build(cudnnHandle_t handle) {
    std::string problem = problem_of(graph_.build(handle, {fe::HeurMode_t::A}));
    return problem.empty() ? problem_of(graph_.get_workspace_size(workspace_bytes_)) : problem;
  }
  index_t workspace_bytes() const { return workspace_bytes_; }
  void execute(cudnnHandle_t handle, const CudnnAttentionPointers& p, void* workspace) const {
    const auto in = [](const void* pointer) { return const_cast<void*>(pointer); };  // cuDNN only reads it
    std::unordered_map<index_t, void*> pointers;
    for (const auto& [id, pointer] :
         std::initializer_list<std::pair<Id, void*>>{{kQ, in(p.q)},
                                                     {kK, in(p.k)},
                                                     {kV, in(p.v)},
                                                     {kBias, in(p.bias)},
                                                     {kQueryLengths, in(p.query_lengths)},
                                                     {kKeyLengths, in(p.key_lengths)},
                                                     {kOut, p.out},
                                                     {kLogSumExp, p.log_sum_exp},
                                                     {kDOut, in(p.dout)},
                                                     {kDQ, p.dq},
                                                     {kDK, p.dk},
                                                     {kDV, p.dv},
                                                     {kDBias, p.dbias}}) {
      if (pointer != nullptr) pointers.emplace(id, pointer);
    }
    const std::string problem = problem_of(graph_.execute(handle, pointers, workspace));
    if (!problem.empty()) throw SystemError("attention failed: {}", problem);
  }
  std::string problem_on(const std::string& device);

 private:
  OpenGraph graph_;
  index_t workspace_bytes_ = 0;
};

// What OpenGraph::build() does, but with the properties of a device in the place of a handle on one.
std::string CudnnAttentionPlan::Graph::problem_on(const std::string& device) {
  if (std::string problem = problem_of(graph_.validate()); !problem.empty()) return problem;
  // Its last step fails for want of a handle, which is an error of the backend's.
  if (fe::error_t status = graph_.build_operation_graph(nullptr);
      status.is_bad() && status.get_code() != fe::error_code_t::CUDNN_BACKEND_API_FAILED) {
    return problem_of(status);
  }
  const auto operations = graph_.operation_descriptors();
  if (operations.empty()) return "the frontend made no operations";

  Descriptor properties(CUDNN_BACKEND_DEVICEPROP_DESCRIPTOR);
  properties.set(CUDNN_ATTR_DEVICEPROP_JSON_REPRESENTATION, CUDNN_TYPE_CHAR, device.size(), device.data());
  check_cudnn(properties.finish(), "cudnnBackendFinalize of the device's properties");
  Descriptor graph(CUDNN_BACKEND_OPERATIONGRAPH_DESCRIPTOR);
  graph.set(CUDNN_ATTR_OPERATIONGRAPH_OPS, CUDNN_TYPE_BACKEND_DESCRIPTOR, operations.size(),
            operations.data());
  if (graph.finish() != CUDNN_STATUS_SUCCESS) return "cuDNN refuses the graph";

  Descriptor heuristics(CUDNN_BACKEND_ENGINEHEUR_DESCRIPTOR);
  const cudnnBackendHeurMode_t mode = CUDNN_HEUR_MODE_A;
  heuristics.set(CUDNN_ATTR_ENGINEHEUR_OPERATION_GRAPH, graph.get())
      .set(CUDNN_ATTR_ENGINEHEUR_MODE, CUDNN_TYPE_HEUR_MODE, 1, &mode)
      .set(CUDNN_ATTR_ENGINEHEUR_DEVICEPROP, properties.get());
  if (heuristics.finish() != CUDNN_STATUS_SUCCESS) return "cuDNN has no heuristics for the graph";
  Descriptor configuration(CUDNN_BACKEND_ENGINECFG_DESCRIPTOR);
  cudnnBackendDescriptor_t first = configuration.get();
  std::int64_t count = 0;
  check_cudnn(cudnnBackendGetAttribute(heuristics.get(), CUDNN_ATTR_ENGINEHEUR_RESULTS,
                                       CUDNN_TYPE_BACKEND_DESCRIPTOR, 1, &count, &first),
              "cudnnBackendGetAttribute of the heuristics");
  if (count == 0) return "cuDNN has no engine for the graph";

  Descriptor plan(CUDNN_BACKEND_EXECUTION_PLAN_DESCRIPTOR);
  plan.set(CUDNN_ATTR_EXECUTION_PLAN_ENGINE_CONFIG, first)
      .set(CUDNN_ATTR_EXECUTION_PLAN_DEVICEPROP, properties.get());
  return plan.finish() == CUDNN_STATUS_SUCCESS ? "" : "cuDNN cannot compile its kernel";
}

bool CudnnAttentionPlan::in_this_build() { return true; }

std::string CudnnAttentionPlan::problem_on(const AttentionShape& shape, const std::string& device) {
  return Graph(shape).problem_on(device);
}

CudnnAttentionPlan::CudnnAttentionPlan(std::unique_ptr<Graph> graph) : graph_(std::move(graph)) {}
CudnnAttentionPlan::~CudnnAttentionPlan() = default;

std::unique_ptr<CudnnAttentionPlan> CudnnAttentionPlan::make(const CudnnHandle& handle,
                                                             const AttentionShape& shape,
                                                             std::string& problem) {
  auto graph = std::make_unique<Graph>(shape);
  problem = graph->build(handle.connection_->get());
  if (!problem.empty()) return nullptr;
  return std::make_unique<CudnnAttentionPlan>(std::move(graph));
}

index_t CudnnAttentionPlan::workspace_bytes() const { return graph_->workspace_bytes(); }

void CudnnAttentionPlan::execute(const CudnnHandle& handle, const CudnnAttentionPointers& pointers,
                                 void* workspace) const {
  graph_->execute(handle.connection_->get(), pointers, workspace);
}

}  // namespace regroup
