// CUDA's runtime and cuBLASLt of the emulated GPU.
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <functional>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "kernels/base/error.h"
#include "kernels/base/random.h"

namespace regroup::emulation {
namespace {

class Memory {
 public:
  explicit Memory(std::size_t bytes) { EXPECT_EQ(cudaMalloc(&data_, bytes), cudaSuccess); }
  ~Memory() { EXPECT_EQ(cudaFree(data_), cudaSuccess); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
};

cudaError_t launch(std::function<void()> thread, dim3 blocks, dim3 threads, std::size_t shared_bytes) {
  void* arguments[] = {&thread};
  const void* kernel = "a kernel";
  return cudaLaunchKernel(kernel, blocks, threads, arguments, shared_bytes, nullptr);
}

TEST(DeviceMemory, OnlyTheDeviceTouchesIt) {
  Memory memory(1000);
  auto* x = memory.as<int>();
  EXPECT_EQ(launch([=] { x[0] = 5; }, 1, 1, 0), cudaSuccess);
  int host = 0;
  EXPECT_EQ(cudaMemcpy(&host, x, sizeof(host), cudaMemcpyDeviceToHost), cudaSuccess);
  EXPECT_EQ(host, 5);
  EXPECT_DEATH(host = *const_cast<volatile int*>(x), "");
  EXPECT_DEATH(launch([=] { const_cast<volatile int*>(x)[256] = 1; }, 1, 1, 0), "");
}

TEST(DeviceMemory, CopiesStayInside) {
  Memory memory(64);
  char host[100] = {};
  auto* x = memory.as<char>();
  EXPECT_EQ(cudaMemcpy(x, host, 65, cudaMemcpyHostToDevice), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(x, host, 64, cudaMemcpyDeviceToHost), cudaErrorInvalidValue);
  EXPECT_EQ(cudaMemcpy(x + 1, host, 63, cudaMemcpyHostToDevice), cudaSuccess);
  EXPECT_EQ(cudaMemset(x, 1, 65), cudaErrorInvalidValue);
}

TEST(DeviceMemory, IsLimited) {
  std::size_t free = 0, total = 0, after = 0;
  EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
  void* data = nullptr;
  EXPECT_EQ(cudaMalloc(&data, free + 1), cudaErrorMemoryAllocation);
  EXPECT_EQ(cudaMalloc(&data, free), cudaSuccess);
  EXPECT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(after, 0);
  EXPECT_EQ(cudaFree(data), cudaSuccess);
  EXPECT_EQ(cudaFree(data), cudaErrorInvalidValue);
}

// Two streams, each of which adds to what the other wrote. Of many rounds some show a wait that is missing.
class TwoStreams {
 public:
  TwoStreams() {
    for (cudaStream_t& stream : streams_) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    for (cudaEvent_t& event : events_) cudaEventCreate(&event);
  }
  ~TwoStreams() {
    for (const cudaStream_t stream : streams_) cudaStreamDestroy(stream);
    for (const cudaEvent_t event : events_) cudaEventDestroy(event);
  }
  TwoStreams(const TwoStreams&) = delete;
  TwoStreams& operator=(const TwoStreams&) = delete;

  // x[0] after each of `rounds` doublings by one stream and additions of 1 by the other, one after another.
  int run(int rounds, bool waits_there, bool waits_back) {
    auto* x = memory_.as<int>();
    cudaMemset(x, 0, sizeof(int));
    for (int round = 0; round < rounds; ++round) {
      on(0, [=] { x[0] = (x[0] * 2) % 1000003; });
      if (waits_there) then(0, 1);
      on(1, [=] { x[0] += 1; });
      if (waits_back) then(1, 0);
    }
    int result = 0;
    cudaStreamSynchronize(streams_[0]);
    cudaMemcpy(&result, x, sizeof(result), cudaMemcpyDeviceToHost);
    cudaStreamSynchronize(streams_[1]);
    return result;
  }

 private:
  void on(std::size_t stream, std::function<void()> thread) {
    void* arguments[] = {&thread};
    EXPECT_EQ(cudaLaunchKernel("a kernel", 1, 1, arguments, 0, streams_[stream]), cudaSuccess);
  }
  void then(std::size_t first, std::size_t second) {
    cudaEventRecord(events_[first], streams_[first]);
    cudaStreamWaitEvent(streams_[second], events_[first], 0);
  }

  Memory memory_{sizeof(int)};
  cudaStream_t streams_[2] = {};
  cudaEvent_t events_[2] = {};
};

TEST(Streams, AWaitThatIsMissingShows) {
  constexpr int kRounds = 30;
  int expected = 0;
  for (int round = 0; round < kRounds; ++round) expected = (expected * 2) % 1000003 + 1;
  EXPECT_EQ(TwoStreams().run(kRounds, true, true), expected);
  EXPECT_NE(TwoStreams().run(kRounds, false, true), expected);
  EXPECT_NE(TwoStreams().run(kRounds, true, false), expected);
}

TEST(Streams, EventsAreOfTheWorkBeforeThem) {
  Memory memory(sizeof(int));
  auto* x = memory.as<int>();
  cudaStream_t stream = nullptr;
  cudaEvent_t event = nullptr;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  cudaEventCreate(&event);
  EXPECT_EQ(cudaEventQuery(event), cudaSuccess);
  cudaMemsetAsync(x, 0, sizeof(int), stream);
  cudaEventRecord(event, stream);
  EXPECT_EQ(cudaEventSynchronize(event), cudaSuccess);
  std::function<void()> thread = [] { throw InternalError("a fault of the kernel"); };
  void* arguments[] = {&thread};
  EXPECT_THROW(
      {
        cudaLaunchKernel("a kernel", 1, 1, arguments, 0, stream);
        cudaStreamSynchronize(stream);
      },
      InternalError);
  EXPECT_EQ(cudaStreamSynchronize(stream), cudaSuccess);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
}

TEST(Launches, AreLimited) {
  EXPECT_EQ(launch([] {}, {1, 65536}, 1, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch([] {}, 1, {32, 33}, 0), cudaErrorInvalidConfiguration);
  EXPECT_EQ(launch([] {}, 1, 1, 49 << 10), cudaErrorInvalidValue);
  const void* kernel = "a kernel";
  EXPECT_EQ(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 228 << 10),
            cudaErrorInvalidValue);
}

struct ProductCase {
  bool transpose_a, transpose_b, row_major;
};
class CublasLtTest : public testing::TestWithParam<ProductCase> {};

struct Matrix {
  std::uint64_t rows, columns;
  bool row_major;
  std::size_t at(std::uint64_t i, std::uint64_t j) const {
    return row_major ? i * stride() + j : j * stride() + i;
  }
  std::size_t stride() const { return (row_major ? columns : rows) + 3; }
  std::size_t size() const { return (row_major ? rows : columns) * stride(); }
  cublasLtMatrixLayout_t layout() const {
    cublasLtMatrixLayout_t result = nullptr;
    EXPECT_EQ(
        cublasLtMatrixLayoutCreate(&result, CUDA_R_64F, rows, columns, static_cast<std::int64_t>(stride())),
        CUBLAS_STATUS_SUCCESS);
    const cublasLtOrder_t order = row_major ? CUBLASLT_ORDER_ROW : CUBLASLT_ORDER_COL;
    EXPECT_EQ(cublasLtMatrixLayoutSetAttribute(result, CUBLASLT_MATRIX_LAYOUT_ORDER, &order, sizeof(order)),
              CUBLAS_STATUS_SUCCESS);
    return result;
  }
};

// d = 2 op(a) op(b) + 3 c, by every algorithm.
TEST_P(CublasLtTest, AgreesWithANaiveProduct) {
  const auto [transpose_a, transpose_b, row_major] = GetParam();
  constexpr std::uint64_t kM = 5, kN = 7, kK = 11;
  const Matrix shapes[] = {{transpose_a ? kK : kM, transpose_a ? kM : kK, row_major},
                           {transpose_b ? kN : kK, transpose_b ? kK : kN, row_major},
                           {kM, kN, row_major}};
  const Philox random(3, RandomPurpose::kTest);
  std::vector<double> host[3];
  Memory a(shapes[0].size() * 8), b(shapes[1].size() * 8), c(shapes[2].size() * 8), workspace(1 << 20);
  const Memory* memory[] = {&a, &b, &c};
  for (std::size_t i = 0; i < 3; ++i) {
    for (std::size_t n = 0; n < shapes[i].size(); ++n) host[i].push_back(random.normal(1000 * i + n));
  }
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  cublasLtCreate(&handle);
  cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_64F, CUDA_R_64F);
  const cublasOperation_t operations[] = {transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N,
                                          transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N};
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSA, &operations[0], sizeof(operations[0]));
  cublasLtMatmulDescSetAttribute(product, CUBLASLT_MATMUL_DESC_TRANSB, &operations[1], sizeof(operations[1]));
  cublasLtMatrixLayout_t layouts[3];
  for (std::size_t i = 0; i < 3; ++i) layouts[i] = shapes[i].layout();
  cublasLtMatmulPreferenceCreate(&preference);
  const std::uint64_t bytes = 1 << 20;
  cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes,
                                       sizeof(bytes));
  cublasLtMatmulHeuristicResult_t found[8];
  int count = 0;
  ASSERT_EQ(cublasLtMatmulAlgoGetHeuristic(handle, product, layouts[0], layouts[1], layouts[2], layouts[2],
                                           preference, 8, found, &count),
            CUBLAS_STATUS_SUCCESS);
  ASSERT_EQ(count, 2);
  for (int n = 0; n < count; ++n) {
    for (std::size_t i = 0; i < 3; ++i) {
      cudaMemcpy(memory[i]->as<void>(), host[i].data(), host[i].size() * 8, cudaMemcpyHostToDevice);
    }
    const double alpha = 2, beta = 3;
    ASSERT_EQ(cublasLtMatmul(handle, product, &alpha, a.as<void>(), layouts[0], b.as<void>(), layouts[1],
                             &beta, c.as<void>(), layouts[2], c.as<void>(), layouts[2], &found[n].algo,
                             workspace.as<void>(), bytes, nullptr),
              CUBLAS_STATUS_SUCCESS);
    std::vector<double> got(host[2].size());
    cudaMemcpy(got.data(), c.as<void>(), got.size() * 8, cudaMemcpyDeviceToHost);
    for (std::uint64_t i = 0; i < kM; ++i) {
      for (std::uint64_t j = 0; j < kN; ++j) {
        double want = beta * host[2][shapes[2].at(i, j)];
        for (std::uint64_t k = 0; k < kK; ++k) {
          want += alpha * host[0][transpose_a ? shapes[0].at(k, i) : shapes[0].at(i, k)] *
                  host[1][transpose_b ? shapes[1].at(j, k) : shapes[1].at(k, j)];
        }
        EXPECT_NEAR(got[shapes[2].at(i, j)], want, 1e-12) << i << ", " << j;
      }
    }
  }
  for (const cublasLtMatrixLayout_t layout : layouts) cublasLtMatrixLayoutDestroy(layout);
  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatmulDescDestroy(product);
  cublasLtDestroy(handle);
}

INSTANTIATE_TEST_SUITE_P(Transpositions, CublasLtTest,
                         testing::Values(ProductCase{false, false, false}, ProductCase{false, true, false},
                                         ProductCase{true, false, false}, ProductCase{true, true, false},
                                         ProductCase{false, false, true}, ProductCase{false, true, true},
                                         ProductCase{true, false, true}, ProductCase{true, true, true}));

}  // namespace
}  // namespace regroup::emulation
