#include "kernels/cuda/attention_bias_gradient.cuh"
#include "kernels/cuda/launch.cuh"

namespace regroup {
namespace {

// A block sums 32 neighbouring diagonals of one head: each of its 8 warps every eighth table, then the first
// warp their sums.
constexpr int kWarps = 8;

template <class S>
__global__ void add_partials_kernel(BiasPartials<S> partials, int samples, int heads, int queries,
                                    int diagonals, S* dbias) {
  __shared__ S sums[kWarps][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int head = static_cast<int>(blockIdx.y), diagonal = static_cast<int>(blockIdx.x) * 32 + lane;
  const int tables = samples * partials.tiles;
  S sum = 0;
#pragma unroll 4
  for (int i = warp; i < tables; i += kWarps) {
    const int tile = i % partials.tiles;
    const index_t place = index_t{diagonal} - queries + (tile + 1) * partials.rows;
    if (diagonal < diagonals && place >= 0 && place < partials.length) {
      sum += partials.table(i / partials.tiles, heads, head, tile)[place];
    }
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || diagonal >= diagonals) return;
  for (int other = 1; other < kWarps; ++other) sum += sums[other][lane];
  dbias[index_t{head} * diagonals + diagonal] += sum;
}

template <class S>
void add(CudaDevice& device, const BiasPartials<S>& partials, index_t samples, const Tensor& dbias,
         index_t queries) {
  const auto heads = static_cast<unsigned>(dbias[0]);
  const Grid grid{.blocks = {block_count(dbias[1], 32), heads}, .threads = 32 * kWarps};
  launch(device, grid, add_partials_kernel<S>, partials, samples, heads, queries, dbias[1], dbias.as<S>());
}

}  // namespace

void add_bias_partials(CudaDevice& device, const BiasPartials<float>& partials, index_t samples, Tensor dbias,
                       index_t queries) {
  add(device, partials, samples, dbias, queries);
}
void add_bias_partials(CudaDevice& device, const BiasPartials<double>& partials, index_t samples,
                       Tensor dbias, index_t queries) {
  add(device, partials, samples, dbias, queries);
}

}  // namespace regroup
