// cuBLASLt of the emulated machine: plain matrix products of bfloat16, float and double. Two algorithms,
// which sum in opposite orders, the second in a workspace.
#include <algorithm>
#include <cstring>
#include <cublasLt.h>
#include <memory>
#include <new>
#include <vector>

#include "kernels/dtype.h"
#include "tests/cuda_emulation/device.h"
#include "tests/cuda_emulation/streams.h"

using regroup::bfloat16;
using regroup::emulation::Device;
using regroup::emulation::device;

namespace {

constexpr std::uint64_t kAlgorithms = 2;
constexpr std::size_t kWorkspaceBytes[kAlgorithms] = {0, 4096};

// What the opaque descriptors hold.
struct Product {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  cublasOperation_t transpose_a = CUBLAS_OP_N, transpose_b = CUBLAS_OP_N;
};
struct Layout {
  cudaDataType_t type;
  std::uint64_t rows, columns;
  std::int64_t stride;
  cublasLtOrder_t order = CUBLASLT_ORDER_COL;
};
struct Preference {
  std::uint64_t workspace_bytes = 0;
};

template <class T, class Opaque, class... Arguments>
cublasStatus_t create(Opaque** handle, Arguments... arguments) {
  static_assert(sizeof(T) <= sizeof(Opaque));
  *handle = std::make_unique<Opaque>().release();
  new (*handle) T{arguments...};
  return CUBLAS_STATUS_SUCCESS;
}
template <class Opaque>
cublasStatus_t destroy(Opaque* handle) {
  const std::unique_ptr<Opaque> owned(handle);
  return CUBLAS_STATUS_SUCCESS;
}
template <class T, class Opaque>
T& as(Opaque* handle) {
  return *std::launder(reinterpret_cast<T*>(handle));
}

template <class T>
cublasStatus_t set(T& field, const void* value, std::size_t bytes) {
  if (bytes != sizeof(T)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&field, value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

std::size_t size_of(cudaDataType_t type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

// An operand as the product sees it: element (i, j) at i row_step + j column_step.
struct View {
  std::size_t rows, columns, row_step, column_step;
};
View view_of(const Layout& layout, cublasOperation_t operation) {
  const auto stride = static_cast<std::size_t>(layout.stride);
  View view{layout.rows, layout.columns, 1, stride};
  if (layout.order == CUBLASLT_ORDER_ROW) std::swap(view.row_step, view.column_step);
  if (operation == CUBLAS_OP_N) return view;
  return {view.columns, view.rows, view.column_step, view.row_step};
}

bool is_in_device_memory(const void* data, const Layout& layout) {
  const std::uint64_t leading = layout.order == CUBLASLT_ORDER_COL ? layout.rows : layout.columns;
  const std::uint64_t others = layout.order == CUBLASLT_ORDER_COL ? layout.columns : layout.rows;
  if (layout.stride < static_cast<std::int64_t>(leading)) return false;
  const std::uint64_t elements = (others - 1) * static_cast<std::uint64_t>(layout.stride) + leading;
  return device().contains(data, elements * size_of(layout.type));
}

cublasStatus_t check_types(const Product& product, const Layout& a, const Layout& b, const Layout& c,
                           const Layout& d) {
  const bool in_double = a.type == CUDA_R_64F;
  const bool types = a.type == b.type && c.type == d.type &&
                     (a.type == CUDA_R_16BF  ? d.type == CUDA_R_16BF || d.type == CUDA_R_32F
                      : a.type == CUDA_R_32F ? d.type == CUDA_R_32F
                                             : in_double && d.type == CUDA_R_64F);
  const bool computes = product.compute == (in_double ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F) &&
                        product.scale == (in_double ? CUDA_R_64F : CUDA_R_32F);
  if (!types || !computes) return CUBLAS_STATUS_NOT_SUPPORTED;
  const View left = view_of(a, product.transpose_a), right = view_of(b, product.transpose_b);
  const bool shapes = left.columns == right.rows && d.rows == left.rows && d.columns == right.columns &&
                      c.rows == d.rows && c.columns == d.columns && d.rows > 0 && d.columns > 0 &&
                      left.columns > 0;
  return shapes ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}

// The elements in S, row by row.
template <class S, class T>
std::vector<S> pack(const void* data, const View& view) {
  std::vector<S> packed(view.rows * view.columns);
  for (std::size_t i = 0; i < view.rows; ++i) {
    for (std::size_t j = 0; j < view.columns; ++j) {
      packed[i * view.columns + j] =
          static_cast<S>(static_cast<const T*>(data)[i * view.row_step + j * view.column_step]);
    }
  }
  return packed;
}

// d = alpha a b + beta c, summed in S.
template <class T, class D, class S>
void multiply(const View& a, const void* a_data, const View& b, const void* b_data, const View& c,
              const void* c_data, const View& d, void* d_data, S alpha, S beta, bool downwards) {
  const std::vector<S> left = pack<S, T>(a_data, a), right = pack<S, T>(b_data, b);
  std::vector<S> sums(b.columns);
  for (std::size_t i = 0; i < a.rows; ++i) {
    std::fill(sums.begin(), sums.end(), S{0});
    for (std::size_t step = 0; step < a.columns; ++step) {
      const std::size_t k = downwards ? a.columns - 1 - step : step;
      const S factor = left[i * a.columns + k];
      const S* row = right.data() + k * b.columns;
      for (std::size_t j = 0; j < b.columns; ++j) sums[j] += factor * row[j];
    }
    for (std::size_t j = 0; j < b.columns; ++j) {
      S result = alpha * sums[j];
      // With beta 0, c is not read.
      if (beta != 0) {
        result += beta * static_cast<S>(static_cast<const D*>(c_data)[i * c.row_step + j * c.column_step]);
      }
      static_cast<D*>(d_data)[i * d.row_step + j * d.column_step] = static_cast<D>(result);
    }
  }
}

}  // namespace

extern "C" {

std::size_t cublasLtGetVersion() { return 1; }
const char* cublasLtGetStatusString(cublasStatus_t status) {
  switch (status) {
    case CUBLAS_STATUS_SUCCESS:
      return "success";
    case CUBLAS_STATUS_INVALID_VALUE:
      return "invalid value";
    case CUBLAS_STATUS_NOT_SUPPORTED:
      return "not supported";
    default:
      return "error of the emulation";
  }
}

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(std::make_unique<int>().release());
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  regroup::emulation::refuse_while_unwinding("cublasLtDestroy");
  return destroy(reinterpret_cast<int*>(handle));
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* product, cublasComputeType_t compute,
                                        cudaDataType_t scale) {
  return create<Product>(product, compute, scale);
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t product) { return destroy(product); }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t product,
                                              cublasLtMatmulDescAttributes_t attribute, const void* value,
                                              std::size_t bytes) {
  switch (attribute) {
    case CUBLASLT_MATMUL_DESC_TRANSA:
      return set(as<Product>(product).transpose_a, value, bytes);
    case CUBLASLT_MATMUL_DESC_TRANSB:
      return set(as<Product>(product).transpose_b, value, bytes);
    default:
      return CUBLAS_STATUS_NOT_SUPPORTED;
  }
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          std::uint64_t rows, std::uint64_t columns, std::int64_t stride) {
  return create<Layout>(layout, type, rows, columns, stride);
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return destroy(layout); }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout,
                                                cublasLtMatrixLayoutAttribute_t attribute, const void* value,
                                                std::size_t bytes) {
  if (attribute != CUBLASLT_MATRIX_LAYOUT_ORDER) return CUBLAS_STATUS_NOT_SUPPORTED;
  return set(as<Layout>(layout).order, value, bytes);
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  return create<Preference>(preference);
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return destroy(preference);
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, std::size_t bytes) {
  if (attribute != CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES) return CUBLAS_STATUS_SUCCESS;
  return set(as<Preference>(preference).workspace_bytes, value, bytes);
}

cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t product,
                                       cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                       cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                       const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
  result->state =
      algorithm->data[0] - 1 < kAlgorithms
          ? check_types(as<Product>(product), as<Layout>(a), as<Layout>(b), as<Layout>(c), as<Layout>(d))
          : CUBLAS_STATUS_INVALID_VALUE;
  if (result->state != CUBLAS_STATUS_SUCCESS) return result->state;
  result->algo = *algorithm;
  result->workspaceSize = kWorkspaceBytes[algorithm->data[0] - 1];
  result->wavesCount = 1;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t product,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                              cublasLtMatmulPreference_t preference, int most,
                                              cublasLtMatmulHeuristicResult_t results[], int* count) {
  *count = 0;
  for (std::uint64_t number = 1; number <= kAlgorithms && *count < most; ++number) {
    if (kWorkspaceBytes[number - 1] > as<Preference>(preference).workspace_bytes) continue;
    const cublasLtMatmulAlgo_t algorithm{.data = {number}};
    const cublasStatus_t status =
        cublasLtMatmulAlgoCheck(handle, product, a, b, c, d, &algorithm, &results[*count]);
    if (status != CUBLAS_STATUS_SUCCESS) return status;
    ++*count;
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t product, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                              std::size_t workspace_bytes, cudaStream_t stream) {
  cublasLtMatmulHeuristicResult_t needs{};
  const cublasStatus_t status =
      cublasLtMatmulAlgoCheck(handle, product, a_layout, b_layout, c_layout, d_layout, algorithm, &needs);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const Layout &la = as<Layout>(a_layout), &lb = as<Layout>(b_layout), &lc = as<Layout>(c_layout),
               &ld = as<Layout>(d_layout);
  if (!is_in_device_memory(a, la) || !is_in_device_memory(b, lb) || !is_in_device_memory(c, lc) ||
      !is_in_device_memory(d, ld) || workspace_bytes < needs.workspaceSize ||
      (needs.workspaceSize > 0 && !device().contains(workspace, workspace_bytes))) {
    return CUBLAS_STATUS_INVALID_VALUE;
  }
  const View va = view_of(la, as<Product>(product).transpose_a),
             vb = view_of(lb, as<Product>(product).transpose_b), vc = view_of(lc, CUBLAS_OP_N),
             vd = view_of(ld, CUBLAS_OP_N);
  const auto run = [&]<class T, class D, class S>() {
    regroup::emulation::issue(stream,
                              [=, alpha = *static_cast<const S*>(alpha), beta = *static_cast<const S*>(beta),
                               used = needs.workspaceSize, downwards = algorithm->data[0] == 2] {
                                const Device::Access access(device(), {a, b, c, d, workspace});
                                if (used > 0) std::memset(workspace, 0xFF, used);
                                multiply<T, D, S>(va, a, vb, b, vc, c, vd, d, alpha, beta, downwards);
                              });
  };
  if (la.type == CUDA_R_64F) run.operator()<double, double, double>();
  if (la.type == CUDA_R_32F) run.operator()<float, float, float>();
  if (la.type == CUDA_R_16BF && ld.type == CUDA_R_32F) run.operator()<bfloat16, float, float>();
  if (la.type == CUDA_R_16BF && ld.type == CUDA_R_16BF) run.operator()<bfloat16, bfloat16, float>();
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
