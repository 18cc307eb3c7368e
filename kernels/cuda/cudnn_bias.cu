#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cudnn_bias.h"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"

namespace regroup {
namespace {

constexpr int kExpandThreads = 256;
constexpr int kSlices = 16;  // of a diagonal, summed side by side

// A block writes one row (h, q): a part of the diagonals' table, shifted by q.
__global__ void expand_bias_kernel(const float* bias, index_t queries, index_t keys, bfloat16* full) {
  const index_t q = blockIdx.x, h = blockIdx.y;
  const float* from = bias + h * (queries + keys - 1) + queries - 1 - q;
  bfloat16* to = full + (h * queries + q) * keys;
  for (index_t k = threadIdx.x; k < keys; k += blockDim.x) to[k] = rounded<bfloat16>(from[k]);
}

// A block sums a warp of neighbouring diagonals: in each row q their elements are neighbours. Slice s takes
// the rows s, s + kSlices, ...; then the slices are added in order.
__global__ void sum_bias_gradient_kernel(const bfloat16* dfull, index_t queries, index_t keys, float* dbias) {
  __shared__ float sums[kSlices][kWarpThreads];
  const index_t diagonals = queries + keys - 1, h = blockIdx.y;
  const index_t diagonal = static_cast<index_t>(blockIdx.x) * kWarpThreads + threadIdx.x;
  const bfloat16* matrix = dfull + h * queries * keys;
  const index_t first =
      static_cast<index_t>(blockIdx.x) * kWarpThreads - (queries - 1);  // k of the warp's first, at q 0
  // Rows in which a diagonal of this warp has an element: 0 <= k < keys for k = first + lane + q.
  const index_t begin = first + kWarpThreads - 1 < 0 ? -(first + kWarpThreads - 1) : 0;
  const index_t end = keys - first < queries ? keys - first : queries;
  float sum = 0;
  for (index_t q = begin + threadIdx.y; q < end; q += kSlices) {
    const index_t k = first + threadIdx.x + q;
    if (k >= 0 && k < keys) sum += widen(matrix[q * keys + k]);
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || diagonal >= diagonals) return;
  float total = 0;
  for (int slice = 0; slice < kSlices; ++slice) total += sums[slice][threadIdx.x];
  dbias[h * diagonals + diagonal] += total;
}

// A warp counts the keys of one sample.
__global__ void sequence_lengths_kernel(const std::int32_t* key_mask, index_t queries, index_t keys,
                                        std::int32_t* query_lengths, std::int32_t* key_lengths) {
  const index_t sample = blockIdx.x;
  int count = 0;
  for (index_t k = threadIdx.x; k < keys; k += kWarpThreads)
    count += key_mask[sample * keys + k] != 0 ? 1 : 0;
  for (int offset = kWarpThreads / 2; offset > 0; offset /= 2)
    count += __shfl_xor_sync(kWholeWarp, count, offset);
  if (threadIdx.x != 0) return;
  query_lengths[sample] = static_cast<std::int32_t>(queries);
  key_lengths[sample] = count > 1 ? count : 1;
}

}  // namespace

void expand_bias(CudaDevice& device, Tensor bias, index_t queries, bfloat16* full) {
  const Grid grid{.blocks = dim3(block_count(queries, 1), block_count(bias[0], 1)),
                  .threads = kExpandThreads};
  launch(device, grid, expand_bias_kernel, bias.as<float>(), queries, bias[1] - queries + 1, full);
}

void sum_bias_gradient(CudaDevice& device, const bfloat16* dfull, index_t queries, Tensor dbias) {
  const Grid grid{.blocks = dim3(block_count(dbias[1], kWarpThreads), block_count(dbias[0], 1)),
                  .threads = dim3(kWarpThreads, kSlices)};
  launch(device, grid, sum_bias_gradient_kernel, dfull, queries, dbias[1] - queries + 1, dbias.as<float>());
}

void sequence_lengths(CudaDevice& device, Tensor key_mask, index_t queries, std::int32_t* query_lengths,
                      std::int32_t* key_lengths) {
  launch(device, {.blocks = block_count(key_mask[0], 1), .threads = kWarpThreads}, sequence_lengths_kernel,
         key_mask.as<std::int32_t>(), queries, key_mask[1], query_lengths, key_lengths);
}

}  // namespace regroup
