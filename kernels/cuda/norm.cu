#include <algorithm>

#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/partial_sums.cuh"

namespace regroup {
namespace {

// A warp handles a row. It reads the row twice; the second time out of the cache.
constexpr int kWarps = 4;
constexpr unsigned kThreads = kWarps * kWarpThreads;
constexpr int kTogether = 2;  // rows whose elements a thread of backward holds at a time
static_assert(kWarps % kTogether == 0);

template <int N, class T>
__global__ void rms_norm_kernel(const T* x, const T* weight, T* y, stat_t<T>* inverse_rms, index_t rows,
                                index_t columns, stat_t<T> epsilon) {
  using S = stat_t<T>;
  const index_t row = index_t{blockIdx.x} * kWarps + threadIdx.x / kWarpThreads;
  if (row >= rows) return;
  const index_t first = threadIdx.x % kWarpThreads * N, step = kWarpThreads * N;
  const T* const from = x + row * columns;
  T* const to = y + row * columns;
  S squares = 0;
#pragma unroll 4
  for (index_t d = first; d < columns; d += step) {
    S v[N];
    load_values(from + d, v);
#pragma unroll
    for (int j = 0; j < N; ++j) squares += v[j] * v[j];
  }
  const S r = S{1} / std::sqrt(warp_sum(squares) / static_cast<S>(columns) + epsilon);
  if (first == 0) inverse_rms[row] = r;
#pragma unroll 4
  for (index_t d = first; d < columns; d += step) {
    S v[N], w[N];
    load_values(from + d, v);
    load_values(weight + d, w);
#pragma unroll
    for (int j = 0; j < N; ++j) v[j] = w[j] * (v[j] * r);
    store_values(to + d, v);
  }
}

template <class T>
struct RmsNormBackward {
  const T *dy, *x, *weight;
  const stat_t<T>* inverse_rms;
  const T* residual;  // may be null, may be dx
  T* dx;
  stat_t<T>* partial;  // [blocks, columns], a block's share of dw
  index_t rows, columns, rows_per_block;

  // sum_d w dy x of a row, by a warp.
  template <int N>
  __device__ stat_t<T> weighted_dot(index_t row) const {
    const index_t at = row * columns;
    stat_t<T> sum = 0;
#pragma unroll 2
    for (index_t d = threadIdx.x % kWarpThreads * N; d < columns; d += kWarpThreads * N) {
      stat_t<T> g[N], v[N], w[N];
      load_values(dy + at + d, g);
      load_values(x + at + d, v);
      load_values(weight + d, w);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += w[j] * g[j] * v[j];
    }
    return warp_sum(sum);
  }

  // dx of columns d .. d + N - 1 in the first `count`, at most kWarps, rows from `row` on, whose r and r^2
  // mean(w dy x) are given; adds their share of dw to `sums`.
  template <int N>
  __device__ void columns_backward(index_t row, index_t count, index_t d, const stat_t<T>* scales,
                                   const stat_t<T>* slopes, stat_t<T>* sums) const {
    stat_t<T> w[N], sum[N] = {};
    load_values(weight + d, w);
#pragma unroll 1
    for (int first = 0; first < kWarps && first < count; first += kTogether) {
      // All reads before the first write, which they might wait for: dx may be the residual.
      Pack<T, N> dys[kTogether], xs[kTogether], residuals[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= count) break;
        const index_t at = (row + first + i) * columns + d;
        dys[i] = load_pack<N>(dy + at);
        xs[i] = load_pack<N>(x + at);
        if (residual != nullptr) residuals[i] = load_pack<N>(residual + at);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        if (first + i >= count) break;
        const stat_t<T> r = scales[first + i], slope = slopes[first + i];
        stat_t<T> result[N];
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const stat_t<T> g = widen(dys[i].at[j]), v = widen(xs[i].at[j]);
          sum[j] += g * v * r;
          result[j] = r * (w[j] * g - v * slope);
          if (residual != nullptr) result[j] += widen(residuals[i].at[j]);
        }
        store_values(dx + (row + first + i) * columns + d, result);
      }
    }
#pragma unroll
    for (int j = 0; j < N; ++j) sums[d + j] += sum[j];
  }
};

// A block handles rows_per_block rows, kWarps at a time: each warp finds the slope of one row, then each
// thread goes down the rows in its columns, whose share of dw it keeps in shared memory.
template <int N, class T>
__global__ void __launch_bounds__(kThreads) rms_norm_backward_kernel(RmsNormBackward<T> op) {
  using S = stat_t<T>;
  S* const sums = dynamic_shared<S>();
  __shared__ S scales[kWarps], slopes[kWarps];
  const index_t first = index_t{threadIdx.x} * N, step = index_t{kThreads} * N;
  const index_t begin = index_t{blockIdx.x} * op.rows_per_block;
  const index_t end = op.rows < begin + op.rows_per_block ? op.rows : begin + op.rows_per_block;
  const unsigned warp = threadIdx.x / kWarpThreads;
  for (index_t d = first; d < op.columns; d += step) {
    for (int j = 0; j < N; ++j) sums[d + j] = 0;
  }
  for (index_t row = begin; row < end; row += kWarps) {
    if (row + warp < end) {
      const S dot = op.template weighted_dot<N>(row + warp);
      if (threadIdx.x % kWarpThreads == 0) {
        const S r = op.inverse_rms[row + warp];
        scales[warp] = r;
        slopes[warp] = r * r * dot / static_cast<S>(op.columns);
      }
    }
    __syncthreads();
    for (index_t d = first; d < op.columns; d += step) {
      op.template columns_backward<N>(row, end - row, d, scales, slopes, sums);
    }
    __syncthreads();
  }
  S* const partial = op.partial + index_t{blockIdx.x} * op.columns;
  for (index_t d = first; d < op.columns; d += step) {
    for (int j = 0; j < N; ++j) partial[d + j] = sums[d + j];
  }
}

}  // namespace

void CudaBackend::do_rms_norm(Tensor x, Tensor weight, Tensor y, Tensor inverse_rms, double epsilon) {
  dispatch(x.dtype, [&]<class T>() {
    const Grid grid{.blocks = block_count(x[0], kWarps), .threads = kThreads};
    const bool by_packs = in_packs<kPackSize<T>>(x[1], {x.data, weight.data, y.data});
    launch(device_, grid, by_packs ? rms_norm_kernel<kPackSize<T>, T> : rms_norm_kernel<1, T>, x.as<T>(),
           weight.as<T>(), y.as<T>(), inverse_rms.as<stat_t<T>>(), x[0], x[1], epsilon);
  });
}

void CudaBackend::do_rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor inverse_rms,
                                       Tensor residual_gradient, Tensor dx, Tensor dw) {
  // Rows of a block: few enough to fill a GPU with blocks, enough that their sums cost little to write and
  // add.
  constexpr index_t kLeastRows = 16, kMostBlocks = 1024;
  dispatch(x.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t rows = x[0], columns = x[1];
    const index_t rows_per_block = std::max(kLeastRows, (rows + kMostBlocks - 1) / kMostBlocks);
    const unsigned blocks = block_count(rows, rows_per_block);
    const auto row_bytes = columns * static_cast<index_t>(sizeof(S));
    S* const partial = reinterpret_cast<S*>(device_.workspace(index_t{blocks} * row_bytes));
    const RmsNormBackward<T> op{.dy = dy.as<T>(),
                                .x = x.as<T>(),
                                .weight = weight.as<T>(),
                                .inverse_rms = inverse_rms.as<S>(),
                                .residual = residual_gradient ? residual_gradient.as<T>() : nullptr,
                                .dx = dx.as<T>(),
                                .partial = partial,
                                .rows = rows,
                                .columns = columns,
                                .rows_per_block = rows_per_block};
    const Grid grid{
        .blocks = blocks, .threads = kThreads, .shared_bytes = static_cast<std::size_t>(row_bytes)};
    const bool by_packs =
        in_packs<kPackSize<T>>(columns, {dy.data, x.data, weight.data, residual_gradient.data, dx.data});
    launch(device_, grid,
           by_packs ? rms_norm_backward_kernel<kPackSize<T>, T> : rms_norm_backward_kernel<1, T>, op);
    add_partial_rows(device_, partial, blocks, columns, dw.as<S>());
  });
}

}  // namespace regroup
