#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {
namespace {

constexpr std::int32_t kPadding = 0;  // the target that brings no loss
constexpr unsigned kThreads = 256;    // of a block; a block handles a row

// Calls body(v, x) with N neighbouring logits x from column v on, for this thread's share of a row.
template <int N, class S, class Body>
__device__ void for_each_logit(const S* row, index_t columns, Body body) {
#pragma unroll 4
  for (index_t v = index_t{threadIdx.x} * N; v < columns; v += index_t{kThreads} * N) {
    S x[N];
    load_values(row + v, x);
    body(v, x);
  }
}

template <int N, class S>
__global__ void max_kernel(const S* logits, index_t columns, S* row_max) {
  const index_t n = blockIdx.x;
  S largest = -std::numeric_limits<S>::infinity();
  for_each_logit<N>(logits + n * columns, columns, [&](index_t, const S(&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) largest = x[j] > largest ? x[j] : largest;
  });
  largest = block_max(largest);
  if (threadIdx.x == 0) row_max[n] = largest;
}

template <int N, class S>
__global__ void sums_kernel(const S* logits, const S* row_max, const std::int32_t* targets, S* sums,
                            index_t rows, index_t columns, index_t first_id) {
  const index_t n = blockIdx.x;
  const S* const row = logits + n * columns;
  const S shift = row_max[n];
  S sum = 0;
  for_each_logit<N>(row, columns, [&](index_t, const S(&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum += std::exp(x[j] - shift);
  });
  const double total = block_sum(static_cast<double>(sum));
  if (threadIdx.x != 0) return;
  const index_t column = targets[n] - first_id;
  sums[n] = static_cast<S>(total);
  sums[rows + n] = column >= 0 && column < columns ? row[column] - shift : S{0};
}

// partial[block] = the sums over a block of tokens, a token a thread, of the loss and of logZ^2.
template <class S>
__global__ void loss_kernel(const S* row_max, const std::int32_t* targets, const S* sums, index_t rows,
                            double2* partial) {
  const index_t n = index_t{blockIdx.x} * kThreads + threadIdx.x;
  double loss = 0, square = 0;
  if (n < rows && targets[n] != kPadding) {
    const double log_sum = std::log(static_cast<double>(sums[n]));
    const double log_z = static_cast<double>(row_max[n]) + log_sum;
    loss = log_sum - static_cast<double>(sums[rows + n]);
    square = log_z * log_z;
  }
  loss = block_sum(loss);
  square = block_sum(square);
  if (threadIdx.x == 0) partial[blockIdx.x] = double2{loss, square};
}

__global__ void add_losses_kernel(const double2* partial, index_t count, double z_loss, double* loss) {
  double cross_entropy = 0, squares = 0;
  for (index_t b = threadIdx.x; b < count; b += kThreads) {
    cross_entropy += partial[b].x;
    squares += partial[b].y;
  }
  cross_entropy = block_sum(cross_entropy);
  squares = block_sum(squares);
  if (threadIdx.x != 0) return;
  loss[0] += cross_entropy;
  loss[1] += z_loss * squares;
}

// dlogits may be the logits: a thread writes what it has read, and nobody else reads it.
template <int N, class T>
__global__ void backward_kernel(const stat_t<T>* logits, const stat_t<T>* row_max,
                                const std::int32_t* targets, const stat_t<T>* sums, double factor, T* dlogits,
                                index_t columns, index_t first_id, double z_loss) {
  using S = stat_t<T>;
  __shared__ S scale_of_row;
  const index_t n = blockIdx.x;
  const S* const row = logits + n * columns;
  T* const out = dlogits + n * columns;
  if (targets[n] == kPadding) {
    const S zeros[N] = {};
    for (index_t v = index_t{threadIdx.x} * N; v < columns; v += index_t{kThreads} * N) {
      store_values(out + v, zeros);
    }
    return;
  }
  const S shift = row_max[n];
  if (threadIdx.x == 0) {
    const auto sum = static_cast<double>(sums[n]);
    const double log_z = static_cast<double>(shift) + std::log(sum);
    scale_of_row = static_cast<S>(factor * (1 + 2 * z_loss * log_z) / sum);
  }
  __syncthreads();
  const S scale = scale_of_row, at_target = static_cast<S>(factor);
  const index_t target = targets[n] - first_id;
  for_each_logit<N>(row, columns, [&](index_t v, S(&x)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      x[j] = scale * std::exp(x[j] - shift);
      if (v + j == target) x[j] -= at_target;
    }
    store_values(out + v, x);
  });
}

Grid block_a_row(const Tensor& logits) { return {.blocks = block_count(logits[0], 1), .threads = kThreads}; }

}  // namespace

void CudaBackend::do_cross_entropy_max(Tensor logits, Tensor row_max) {
  dispatch(logits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    constexpr int kPack = kPackSize<S>;
    launch(device_, block_a_row(logits),
           in_packs<kPack>(logits[1], {logits.data}) ? max_kernel<kPack, S> : max_kernel<1, S>,
           logits.as<S>(), logits[1], row_max.as<S>());
  });
}

void CudaBackend::do_cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                        const CrossEntropyOptions& options) {
  dispatch(logits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    constexpr int kPack = kPackSize<S>;
    launch(device_, block_a_row(logits),
           in_packs<kPack>(logits[1], {logits.data}) ? sums_kernel<kPack, S> : sums_kernel<1, S>,
           logits.as<S>(), row_max.as<S>(), targets.as<std::int32_t>(), sums.as<S>(), logits[0], logits[1],
           options.first_vocabulary_id);
  });
}

void CudaBackend::do_cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss,
                                        const CrossEntropyOptions& options) {
  dispatch(row_max.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const unsigned blocks = block_count(row_max[0], kThreads);
    auto* const partial = reinterpret_cast<double2*>(
        device_.workspace(index_t{blocks} * static_cast<index_t>(sizeof(double2))));
    launch(device_, {.blocks = blocks, .threads = kThreads}, loss_kernel<S>, row_max.as<S>(),
           targets.as<std::int32_t>(), sums.as<S>(), row_max[0], partial);
    launch(device_, {.blocks = 1, .threads = kThreads}, add_losses_kernel, partial, blocks, options.z_loss,
           loss.as<double>());
  });
}

void CudaBackend::do_cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                            double factor, Tensor dlogits,
                                            const CrossEntropyOptions& options) {
  dispatch(dlogits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    constexpr int kPack = kPackSize<T>;
    const bool by_packs = in_packs<kPack>(logits[1], {logits.data, dlogits.data});
    launch(device_, block_a_row(logits), by_packs ? backward_kernel<kPack, T> : backward_kernel<1, T>,
           logits.as<S>(), row_max.as<S>(), targets.as<std::int32_t>(), sums.as<S>(), factor, dlogits.as<T>(),
           logits[1], options.first_vocabulary_id, options.z_loss);
  });
}

}  // namespace regroup
