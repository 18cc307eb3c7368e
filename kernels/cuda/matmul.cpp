#include "kernels/cuda/matmul.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <cublasLt.h>
#include <limits>
#include <span>
#include <unordered_map>
#include <vector>

#include "kernels/cuda/matmul_choices.h"
#include "kernels/cuda/stopwatch.h"

namespace regroup {
namespace {

constexpr index_t kHopperWorkspaceBytes = index_t{32} << 20;  // cuBLAS, "Workspace": recommended sizes
constexpr index_t kWorkspaceBytes = index_t{4} << 20;
constexpr index_t kLargestAlignment = 256;  // of a pointer; more makes no difference to cuBLASLt
constexpr int kCandidates = 8;
constexpr int kTimedRuns = 4;

void check_cublas(cublasStatus_t result, const char* call) {
  if (result != CUBLAS_STATUS_SUCCESS) {
    throw SystemError("{} failed: {}", call, cublasLtGetStatusString(result));
  }
}

struct Destroy {
  void operator()(cublasLtHandle_t handle) const noexcept {
    if (!is_unwinding()) cublasLtDestroy(handle);  // waits for the device
  }
  void operator()(cublasLtMatmulDesc_t descriptor) const noexcept { cublasLtMatmulDescDestroy(descriptor); }
  void operator()(cublasLtMatrixLayout_t layout) const noexcept { cublasLtMatrixLayoutDestroy(layout); }
  void operator()(cublasLtMatmulPreference_t preference) const noexcept {
    cublasLtMatmulPreferenceDestroy(preference);
  }
};
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

struct MatmulShapeHash {
  std::size_t operator()(const MatmulShape& s) const {
    std::size_t hash = 0xCBF29CE484222325;
    for (const index_t field : {s.m, s.n, s.k, s.a_stride, s.b_stride, s.c_stride,
                                (s.a_alignment << 40) + (s.b_alignment << 20) + s.c_alignment,
                                static_cast<index_t>(s.type) * 64 + static_cast<index_t>(s.c_type) * 8 +
                                    s.transpose_a * 4 + s.transpose_b * 2 + s.accumulate}) {
      hash = (hash ^ static_cast<std::size_t>(field)) * 0x100000001B3;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

index_t alignment_of(const void* data) {
  const auto address = reinterpret_cast<std::uintptr_t>(data);
  return std::min(kLargestAlignment, index_t{1} << std::min(std::countr_zero(address), 62));
}

// From row to row; of a matrix with one row the stride means nothing.
index_t row_stride(const Tensor& t) { return t[0] > 1 ? t.stride[0] : std::max<index_t>(t[1], 1); }

MatmulShape shape_of(const Tensor& a, const Tensor& b, const Tensor& c, const MatmulOptions& options) {
  return {.m = c[0],
          .n = c[1],
          .k = options.transpose_a ? a[0] : a[1],
          .a_stride = row_stride(a),
          .b_stride = row_stride(b),
          .c_stride = row_stride(c),
          .a_alignment = alignment_of(a.data),
          .b_alignment = alignment_of(b.data),
          .c_alignment = alignment_of(c.data),
          .type = a.dtype,
          .c_type = c.dtype,
          .transpose_a = options.transpose_a,
          .transpose_b = options.transpose_b,
          .accumulate = options.accumulate};
}

cudaDataType_t data_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return CUDA_R_64F;
    case DType::kFloat32:
      return CUDA_R_32F;
    case DType::kBFloat16:
      return CUDA_R_16BF;
    case DType::kInt32:
      break;
  }
  throw InternalError("a matrix product of {}", name_of(dtype));
}

// A row-major [rows, columns] matrix, which cuBLASLt sees as its column-major transpose.
Owned<cublasLtMatrixLayout_t> transposed_layout(DType dtype, index_t rows, index_t columns, index_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_cublas(cublasLtMatrixLayoutCreate(&layout, data_type_of(dtype), static_cast<std::uint64_t>(columns),
                                          static_cast<std::uint64_t>(rows), stride),
               "cublasLtMatrixLayoutCreate");
  return Owned<cublasLtMatrixLayout_t>(layout);
}

struct Operands {
  const void* a;
  const void* b;
  void* c;
};

// c = op(a) op(b) in column-major terms: c^T = op(b)^T op(a)^T, so cuBLASLt's first operand is b.
struct Plan {
  Owned<cublasLtMatmulDesc_t> product;
  Owned<cublasLtMatrixLayout_t> a, b, c;
  cublasLtMatmulAlgo_t algorithm{};
  bool in_double = false, accumulate = false;
};

Plan describe_product(const MatmulShape& s) {
  Plan plan;
  plan.in_double = s.type == DType::kFloat64;
  plan.accumulate = s.accumulate;
  cublasLtMatmulDesc_t product = nullptr;
  check_cublas(cublasLtMatmulDescCreate(&product, plan.in_double ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F,
                                        plan.in_double ? CUDA_R_64F : CUDA_R_32F),
               "cublasLtMatmulDescCreate");
  plan.product.reset(product);
  const auto set = [&](cublasLtMatmulDescAttributes_t attribute, bool transpose) {
    const cublasOperation_t operation = transpose ? CUBLAS_OP_T : CUBLAS_OP_N;
    check_cublas(cublasLtMatmulDescSetAttribute(product, attribute, &operation, sizeof(operation)),
                 "cublasLtMatmulDescSetAttribute");
  };
  set(CUBLASLT_MATMUL_DESC_TRANSA, s.transpose_b);
  set(CUBLASLT_MATMUL_DESC_TRANSB, s.transpose_a);
  plan.a = s.transpose_a ? transposed_layout(s.type, s.k, s.m, s.a_stride)
                         : transposed_layout(s.type, s.m, s.k, s.a_stride);
  plan.b = s.transpose_b ? transposed_layout(s.type, s.n, s.k, s.b_stride)
                         : transposed_layout(s.type, s.k, s.n, s.b_stride);
  plan.c = transposed_layout(s.c_type, s.m, s.n, s.c_stride);
  return plan;
}

Owned<cublasLtMatmulPreference_t> preference_of(const MatmulShape& s, index_t workspace_bytes) {
  cublasLtMatmulPreference_t created = nullptr;
  check_cublas(cublasLtMatmulPreferenceCreate(&created), "cublasLtMatmulPreferenceCreate");
  Owned<cublasLtMatmulPreference_t> preference(created);
  const auto set = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
    check_cublas(cublasLtMatmulPreferenceSetAttribute(created, attribute, &value, sizeof(value)),
                 "cublasLtMatmulPreferenceSetAttribute");
  };
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(workspace_bytes));
  // In place is in the output's type.
  const bool rounds = s.c_type != stat_dtype(s.type);
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
      static_cast<std::uint32_t>(
          CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
          (rounds ? CUBLASLT_REDUCTION_SCHEME_NONE : CUBLASLT_REDUCTION_SCHEME_INPLACE)));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<std::uint32_t>(s.b_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<std::uint32_t>(s.a_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<std::uint32_t>(s.c_alignment));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<std::uint32_t>(s.c_alignment));
  return preference;
}

}  // namespace

class CublasLtMatmul::Plans {
 public:
  Plans(CudaDevice& device, bool deterministic)
      : device_(device),
        deterministic_(deterministic),
        workspace_(
            device.allocate(device.compute_capability() >= 90 ? kHopperWorkspaceBytes : kWorkspaceBytes)),
        choices_(cublasLtGetVersion(), device.properties().name) {
    cublasLtHandle_t handle = nullptr;
    check_cublas(cublasLtCreate(&handle), "cublasLtCreate");
    handle_.reset(handle);
  }

  void multiply(const MatmulShape& shape, const Operands& operands);
  void fill_zero(const Tensor& c) {
    const bool dense = c.is_contiguous();
    const index_t rows = dense ? 1 : c[0], row = (dense ? c.numel() : c[1]) * size_of(c.dtype);
    for (index_t i = 0; i < rows; ++i) {
      check_cuda(cudaMemsetAsync(static_cast<std::byte*>(c.data) + i * c.stride[0] * size_of(c.dtype), 0,
                                 static_cast<std::size_t>(row), device_.stream()),
                 "cudaMemsetAsync");
    }
  }
  MatmulChoices& choices() { return choices_; }

 private:
  Plan make(const MatmulShape& shape, const Operands& operands);
  std::vector<cublasLtMatmulAlgo_t> candidates(const MatmulShape& shape, const Plan& plan) const;
  cublasLtMatmulAlgo_t named(const std::string& name, const Plan& plan,
                             const MatmulAlgorithm& algorithm) const;
  cublasLtMatmulAlgo_t fastest(const MatmulShape& shape, const Plan& plan, const Operands& operands,
                               std::span<const cublasLtMatmulAlgo_t> algorithms);
  // d = op(a) op(b) (+ c)
  cublasStatus_t run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm, const Operands& operands,
                     void* d) const;

  CudaDevice& device_;
  bool deterministic_;
  Buffer workspace_;
  Owned<cublasLtHandle_t> handle_;
  std::unordered_map<MatmulShape, Plan, MatmulShapeHash> plans_;
  MatmulChoices choices_;
};

void CublasLtMatmul::Plans::multiply(const MatmulShape& shape, const Operands& operands) {
  auto found = plans_.find(shape);
  if (found == plans_.end()) found = plans_.emplace(shape, make(shape, operands)).first;
  const Plan& plan = found->second;
  check_cublas(run(plan, plan.algorithm, operands, operands.c), "cublasLtMatmul");
}

Plan CublasLtMatmul::Plans::make(const MatmulShape& shape, const Operands& operands) {
  const std::string name = name_of(shape);
  Plan plan = describe_product(shape);
  if (const auto algorithm = choices_.find(name)) {
    plan.algorithm = named(name, plan, *algorithm);
    return plan;
  }
  const auto algorithms = candidates(shape, plan);
  if (algorithms.empty()) {
    throw UserError("this cuBLASLt has no algorithm for the product {} on this GPU; use another --precision",
                    name);
  }
  plan.algorithm = deterministic_ || algorithms.size() == 1 ? algorithms.front()
                                                            : fastest(shape, plan, operands, algorithms);
  MatmulAlgorithm bits{};
  static_assert(sizeof(bits) == sizeof(plan.algorithm));
  std::memcpy(bits.data(), &plan.algorithm, sizeof(bits));
  choices_.set(name, bits);
  return plan;
}

std::vector<cublasLtMatmulAlgo_t> CublasLtMatmul::Plans::candidates(const MatmulShape& shape,
                                                                    const Plan& plan) const {
  const auto preference = preference_of(shape, workspace_.bytes());
  std::array<cublasLtMatmulHeuristicResult_t, kCandidates> results{};
  int count = 0;
  // A product that it has no algorithm for is an error with some versions and an empty list with others.
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_.get(), plan.product.get(), plan.b.get(), plan.a.get(), plan.c.get(), plan.c.get(),
      preference.get(), kCandidates, results.data(), &count);
  if (status != CUBLAS_STATUS_NOT_SUPPORTED) check_cublas(status, "cublasLtMatmulAlgoGetHeuristic");
  std::vector<cublasLtMatmulAlgo_t> algorithms;
  for (const auto& result : std::span(results).first(static_cast<std::size_t>(count))) {
    if (result.state == CUBLAS_STATUS_SUCCESS) algorithms.push_back(result.algo);
  }
  return algorithms;
}

cublasLtMatmulAlgo_t CublasLtMatmul::Plans::named(const std::string& name, const Plan& plan,
                                                  const MatmulAlgorithm& algorithm) const {
  cublasLtMatmulAlgo_t result{};
  std::memcpy(&result, algorithm.data(), sizeof(result));
  cublasLtMatmulHeuristicResult_t needs{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle_.get(), plan.product.get(), plan.b.get(), plan.a.get(), plan.c.get(),
                              plan.c.get(), &result, &needs);
  if (status != CUBLAS_STATUS_SUCCESS || static_cast<index_t>(needs.workspaceSize) > workspace_.bytes()) {
    throw UserError(
        "cuBLASLt refuses the algorithm that the table of matrix products names for '{}' ({}); the table is "
        "damaged: go on without it, with results that may differ in the last bits",
        name, cublasLtGetStatusString(status));
  }
  return result;
}

cublasLtMatmulAlgo_t CublasLtMatmul::Plans::fastest(const MatmulShape& shape, const Plan& plan,
                                                    const Operands& operands,
                                                    std::span<const cublasLtMatmulAlgo_t> algorithms) {
  // Where c is added to it must not change before the product itself: the runs go beside it.
  Buffer beside;
  try {
    if (shape.accumulate) beside = device_.allocate(shape.m * shape.c_stride * size_of(shape.c_type));
  } catch (const UserError&) {
    return algorithms.front();  // no room to measure in
  }
  void* const d = shape.accumulate ? beside.data() : operands.c;
  CudaStopwatch stopwatch(device_);
  float best = std::numeric_limits<float>::infinity();
  cublasLtMatmulAlgo_t result = algorithms.front();
  for (const cublasLtMatmulAlgo_t& algorithm : algorithms) {
    if (run(plan, algorithm, operands, d) != CUBLAS_STATUS_SUCCESS) continue;
    const float milliseconds = stopwatch.quickest(
        kTimedRuns, [&] { check_cublas(run(plan, algorithm, operands, d), "cublasLtMatmul"); });
    if (milliseconds < best) {
      best = milliseconds;
      result = algorithm;
    }
  }
  return result;
}

cublasStatus_t CublasLtMatmul::Plans::run(const Plan& plan, const cublasLtMatmulAlgo_t& algorithm,
                                          const Operands& operands, void* d) const {
  const double one_double = 1, old_double = plan.accumulate ? 1 : 0;
  const float one_float = 1, old_float = plan.accumulate ? 1 : 0;
  const void* one = &one_float;
  const void* old = &old_float;
  if (plan.in_double) {
    one = &one_double;
    old = &old_double;
  }
  return cublasLtMatmul(handle_.get(), plan.product.get(), one, operands.b, plan.b.get(), operands.a,
                        plan.a.get(), old, operands.c, plan.c.get(), d, plan.c.get(), &algorithm,
                        workspace_.data(), static_cast<std::size_t>(workspace_.bytes()), device_.stream());
}

CublasLtMatmul::CublasLtMatmul(CudaDevice& device, bool deterministic)
    : plans_(std::make_unique<Plans>(device, deterministic)) {}
CublasLtMatmul::~CublasLtMatmul() = default;

void CublasLtMatmul::operator()(Tensor a, Tensor b, Tensor c, const MatmulOptions& options) {
  const MatmulShape shape = shape_of(a, b, c, options);
  if (shape.m == 0 || shape.n == 0) return;
  if (shape.k == 0) {
    if (!shape.accumulate) plans_->fill_zero(c);
    return;
  }
  plans_->multiply(shape, {.a = a.data, .b = b.data, .c = c.data});
}

std::string CublasLtMatmul::chosen() const { return plans_->choices().write(); }
bool CublasLtMatmul::choose(const std::string& table) { return plans_->choices().read(table); }

}  // namespace regroup
