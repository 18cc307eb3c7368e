#include <algorithm>
#include <limits>

#include "kernels/cuda/attention_arguments.cuh"
#include "kernels/cuda/attention_bias_gradient.cuh"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/simple_attention.h"

namespace regroup {
namespace {

// A block is kSide x kSide threads and works on tiles of kTile queries and kTile keys: thread (y, x) on rows
// y + kSide i and columns x + kSide j, so that the threads of a row of scores are neighbours in a warp.
constexpr int kSide = 8;
constexpr int kThreads = kSide * kSide;

__device__ int thread_row() { return static_cast<int>(threadIdx.x) / kSide; }
__device__ int thread_column() { return static_cast<int>(threadIdx.x) % kSide; }

// Elements of a row of a tile: whole steps of kTile, and odd, so that a column lies in all banks.
template <int kTile>
__host__ __device__ constexpr int row_stride(int size) {
  return (size + kTile - 1) / kTile * kTile + 1;
}

template <class S, int kTile>
using Square = S[kTile / kSide][kTile / kSide];

// An operand in shared memory: element (r, c) at data[r row + c column].
template <class S>
struct Operand {
  const S* data;
  int row, column;
};

// sums += a b over `depth`, the thread's rows of a and columns of b.
template <class S, int kCount>
__device__ void multiply(S (&sums)[kCount][kCount], Operand<S> a, Operand<S> b, int depth) {
  a.data += thread_row() * a.row;
  b.data += thread_column() * b.column;
  for (int k = 0; k < depth; ++k) {
    S left[kCount], right[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) left[i] = a.data[kSide * i * a.row + k * a.column];
#pragma unroll
    for (int j = 0; j < kCount; ++j) right[j] = b.data[k * b.row + kSide * j * b.column];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
#pragma unroll
      for (int j = 0; j < kCount; ++j) sums[i][j] += left[i] * right[j];
    }
  }
}

// sums[r][c] = factors[r] sums[r][c] + (a b)[r][c] for all columns c < size; a [kTile, kTile].
template <class S, int kTile>
__device__ void accumulate(S* sums, int stride, int size, Operand<S> a, const S* b,
                           const S (&factors)[kTile / kSide]) {
  for (int first = 0; first < size; first += kTile) {
    S* part = sums + thread_row() * stride + first + thread_column();
    Square<S, kTile> sum;
#pragma unroll
    for (int i = 0; i < kTile / kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kTile / kSide; ++j) sum[i][j] = part[kSide * (i * stride + j)] * factors[i];
    }
    multiply(sum, a, {b + first, stride, 1}, kTile);
#pragma unroll
    for (int i = 0; i < kTile / kSide; ++i) {
#pragma unroll
      for (int j = 0; j < kTile / kSide; ++j) part[kSide * (i * stride + j)] = sum[i][j];
    }
  }
}

// Rows first, first + 1, ... of a head into a tile, zeros beyond the last row and column.
template <int kTile, class T>
__device__ void load_rows(stat_t<T>* tile, const HeadRows<const T>& x, int sample, int head, int first,
                          int rows, int size) {
  const int stride = row_stride<kTile>(size);
  for (int r = thread_row(); r < kTile; r += kSide) {
    const T* row = x.at(sample, first + r, head);
    for (int c = thread_column(); c < stride; c += kSide) {
      const bool inside = first + r < rows && c < size;
      tile[r * stride + c] = inside ? widen(row[c]) : stat_t<T>{0};
    }
  }
}

template <int kTile, class T>
__device__ void store_rows(const stat_t<T>* tile, const HeadRows<T>& x, int sample, int head, int first,
                           int rows, int size) {
  const int stride = row_stride<kTile>(size);
  for (int r = thread_row(); r < kTile && first + r < rows; r += kSide) {
    T* row = x.at(sample, first + r, head);
    for (int c = thread_column(); c < size; c += kSide) row[c] = rounded<T>(tile[r * stride + c]);
  }
}

// The score of query i and key j from their product; -inf where the query does not see the key.
template <class T>
__device__ stat_t<T> score(const AttentionArguments<T>& x, int sample, int head, int i, int j,
                           stat_t<T> product) {
  const bool seen = i < x.queries && j < x.keys && (!x.causal || j <= i) &&
                    (!x.key_mask || x.key_mask[index_t{sample} * x.keys + j] != 0);
  if (!seen) return -std::numeric_limits<stat_t<T>>::infinity();
  return x.bias ? product + x.bias[index_t{head} * (x.queries + x.keys - 1) + j - i + x.queries - 1]
                : product;
}

// What query i's probability of key j is multiplied by: 1, or 0 or 1 / (1 - rate).
template <class T>
__device__ stat_t<T> kept(const AttentionArguments<T>& x, std::uint64_t first_element, int i, int j) {
  if (!x.drops) return 1;
  return x.dropout.template one<stat_t<T>>(first_element +
                                           static_cast<std::uint64_t>(index_t{i} * x.keys + j));
}

// The thread's elements of a [kTile, kTile + 1] tile in shared memory.
template <class S, int kTile>
__device__ void store_square(S* tile, const Square<S, kTile>& values) {
#pragma unroll
  for (int i = 0; i < kTile / kSide; ++i) {
#pragma unroll
    for (int j = 0; j < kTile / kSide; ++j) {
      tile[(thread_row() + kSide * i) * (kTile + 1) + thread_column() + kSide * j] = values[i][j];
    }
  }
}

// Over the threads of a row of scores.
template <class S>
__device__ S row_max(S x) {
  for (int distance = 1; distance < kSide; distance *= 2) {
    const S other = __shfl_xor_sync(kWholeWarp, x, distance);
    x = x > other ? x : other;
  }
  return x;
}
template <class S>
__device__ S row_sum(S x) {
  for (int distance = 1; distance < kSide; distance *= 2) x += __shfl_xor_sync(kWholeWarp, x, distance);
  return x;
}

// One block: kTile queries of one head, online softmax over tiles of keys (Dao 2023, algorithm 1).
template <class T, int kTile>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const AttentionArguments<T> x, const HeadRows<T> out) {
  using S = stat_t<T>;
  constexpr int kCount = kTile / kSide;
  constexpr S kInfinity = std::numeric_limits<S>::infinity();
  const int first = static_cast<int>(blockIdx.x) * kTile, head = static_cast<int>(blockIdx.y),
            sample = static_cast<int>(blockIdx.z), group = head / x.heads_per_group;
  const int stride = row_stride<kTile>(x.size), end = x.causal ? min(x.keys, first + kTile) : x.keys;
  const std::uint64_t element = x.first_element(sample, head);
  S* q = dynamic_shared<S>();
  S *k = q + kTile * stride, *v = k + kTile * stride, *sums = v + kTile * stride, *p = sums + kTile * stride;
  load_rows<kTile>(q, x.q, sample, head, first, x.queries, x.size);
  for (int i = static_cast<int>(threadIdx.x); i < kTile * stride; i += kThreads) sums[i] = 0;
  S top[kCount], total[kCount], factors[kCount];
  for (int i = 0; i < kCount; ++i) {
    top[i] = -kInfinity;
    total[i] = 0;
  }
  for (int key = 0; key < end; key += kTile) {
    __syncthreads();
    load_rows<kTile>(k, x.k, sample, group, key, x.keys, x.size);
    load_rows<kTile>(v, x.v, sample, group, key, x.keys, x.size);
    __syncthreads();
    Square<S, kTile> s = {};
    multiply(s, {q, stride, 1}, {k, 1, stride}, x.size);
    store_square<S, kTile>(p, s);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int r = thread_row() + kSide * i;
      S* row = p + r * (kTile + 1);
      S largest = top[i], sum = 0;
#pragma unroll 1
      for (int c = thread_column(); c < kTile; c += kSide) {
        row[c] = score(x, sample, head, first + r, key + c, row[c]);
        largest = row[c] > largest ? row[c] : largest;
      }
      largest = row_max(largest);
      const S shift = largest == -kInfinity ? S{0} : largest;
#pragma unroll 1
      for (int c = thread_column(); c < kTile; c += kSide) {
        const S e = std::exp(row[c] - shift);
        sum += e;
        row[c] = e * kept(x, element, first + r, key + c);
      }
      factors[i] = std::exp(top[i] - shift);
      total[i] = total[i] * factors[i] + row_sum(sum);
      top[i] = largest;
    }
    __syncthreads();
    accumulate<S, kTile>(sums, stride, x.size, {p, kTile + 1, 1}, v, factors);
  }
  for (int i = 0; i < kCount; ++i) {
    const int r = thread_row() + kSide * i;
    for (int c = thread_column(); c < x.size; c += kSide) {
      sums[r * stride + c] = total[i] == 0 ? S{0} : sums[r * stride + c] / total[i];
    }
    if (thread_column() == 0 && first + r < x.queries) {
      x.log_sum_exp[x.statistics_of(sample, head) + first + r] =
          total[i] == 0 ? kInfinity : top[i] + std::log(total[i]);
    }
  }
  __syncthreads();
  store_rows<kTile>(sums, out, sample, head, first, x.queries, x.size);
}

template <class T>
struct BackwardArguments {
  AttentionArguments<T> x;
  HeadRows<const T> out, dout;
  HeadRows<T> dq, dk, dv;
  stat_t<T>* delta;               // [B, H, Q]: sum_n dout out
  BiasPartials<stat_t<T>> dbias;  // data null where there is no dbias
};

// The thread's elements of two [kTile, kTile + 1] tiles: from s = q k^T and dp = dout v^T to the dropped
// probabilities and the gradients of the scores.
template <int kTile, class T>
__device__ void score_gradients(const BackwardArguments<T>& a, int sample, int head, int first, int key,
                                stat_t<T>* s, stat_t<T>* dp) {
  using S = stat_t<T>;
  const AttentionArguments<T>& x = a.x;
  const std::uint64_t element = x.first_element(sample, head);
#pragma unroll 1
  for (int r = thread_row(); r < kTile; r += kSide) {
    const index_t row = x.statistics_of(sample, head) + min(first + r, x.queries - 1);
    const S log_sum_exp = x.log_sum_exp[row], delta = a.delta[row];
#pragma unroll 1
    for (int c = thread_column(); c < kTile; c += kSide) {
      const int at = r * (kTile + 1) + c;
      const S p = std::exp(score(x, sample, head, first + r, key + c, s[at]) - log_sum_exp);
      const S factor = p == 0 ? S{0} : kept(x, element, first + r, key + c);
      s[at] = p * factor;
      dp[at] = p == 0 ? S{0} : p * (dp[at] * factor - delta);
    }
  }
}

// delta of the block's queries.
template <class T, int kTile>
__device__ void find_delta(const BackwardArguments<T>& a, int sample, int head, int first) {
  for (int r = thread_row(); r < kTile; r += kSide) {
    const int query = first + r < a.x.queries ? first + r : a.x.queries - 1;
    const T *dout = a.dout.at(sample, query, head), *out = a.out.at(sample, query, head);
    stat_t<T> sum = 0;
    for (int c = thread_column(); c < a.x.size; c += kSide) sum += widen(dout[c]) * widen(out[c]);
    sum = row_sum(sum);
    if (thread_column() == 0 && first + r < a.x.queries) {
      a.delta[a.x.statistics_of(sample, head) + query] = sum;
    }
  }
}

// One block: delta, dq and the bias's partial sums of kTile queries of one head.
template <class T, int kTile>
__global__ void __launch_bounds__(kThreads) query_gradient_kernel(const BackwardArguments<T> a) {
  using S = stat_t<T>;
  constexpr int kDiagonals = 2 * kTile - 1;
  static_assert(kDiagonals <= kThreads);
  const AttentionArguments<T>& x = a.x;
  const int tile = static_cast<int>(blockIdx.x), first = tile * kTile, head = static_cast<int>(blockIdx.y),
            sample = static_cast<int>(blockIdx.z), group = head / x.heads_per_group;
  const int stride = row_stride<kTile>(x.size), end = x.causal ? min(x.keys, first + kTile) : x.keys;
  S* q = dynamic_shared<S>();
  S *dout = q + kTile * stride, *k = dout + kTile * stride, *v = k + kTile * stride, *dq = v + kTile * stride,
    *p = dq + kTile * stride, *ds = p + kTile * (kTile + 1);
  S* table = a.dbias.data ? a.dbias.table(sample, x.heads, head, tile) : nullptr;
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < kTile * stride; i += kThreads) dq[i] = 0;
  for (index_t i = thread; table && i < a.dbias.length; i += kThreads) table[i] = 0;
  load_rows<kTile>(q, x.q, sample, head, first, x.queries, x.size);
  load_rows<kTile>(dout, a.dout, sample, head, first, x.queries, x.size);
  find_delta<T, kTile>(a, sample, head, first);
  S ones[kTile / kSide];
  for (S& one : ones) one = 1;
  for (int key = 0; key < end; key += kTile) {
    __syncthreads();
    load_rows<kTile>(k, x.k, sample, group, key, x.keys, x.size);
    load_rows<kTile>(v, x.v, sample, group, key, x.keys, x.size);
    __syncthreads();
    Square<S, kTile> s = {}, dp = {};
    multiply(s, {q, stride, 1}, {k, 1, stride}, x.size);
    multiply(dp, {dout, stride, 1}, {v, 1, stride}, x.size);
    store_square<S, kTile>(p, s);
    store_square<S, kTile>(ds, dp);
    score_gradients<kTile>(a, sample, head, first, key, p, ds);
    __syncthreads();
    accumulate<S, kTile>(dq, stride, x.size, {ds, kTile + 1, 1}, k, ones);
    if (table && thread < kDiagonals) {
      S sum = 0;
      for (int r = 0; r < kTile; ++r) {
        const int c = thread - (kTile - 1) + r;
        if (c >= 0 && c < kTile) sum += ds[r * (kTile + 1) + c];
      }
      table[key + thread] += sum;
    }
  }
  __syncthreads();
  store_rows<kTile>(dq, a.dq, sample, head, first, x.queries, x.size);
}

// One block: dk and dv of kTile keys of one group, over its heads and their tiles of queries.
template <class T, int kTile>
__global__ void __launch_bounds__(kThreads) key_gradient_kernel(const BackwardArguments<T> a) {
  using S = stat_t<T>;
  const AttentionArguments<T>& x = a.x;
  const int key = static_cast<int>(blockIdx.x) * kTile, group = static_cast<int>(blockIdx.y),
            sample = static_cast<int>(blockIdx.z), stride = row_stride<kTile>(x.size);
  S* k = dynamic_shared<S>();
  S *v = k + kTile * stride, *q = v + kTile * stride, *dout = q + kTile * stride, *dk = dout + kTile * stride,
    *dv = dk + kTile * stride, *p = dv + kTile * stride, *ds = p + kTile * (kTile + 1);
  for (int i = static_cast<int>(threadIdx.x); i < 2 * kTile * stride; i += kThreads) dk[i] = 0;
  load_rows<kTile>(k, x.k, sample, group, key, x.keys, x.size);
  load_rows<kTile>(v, x.v, sample, group, key, x.keys, x.size);
  S ones[kTile / kSide];
  for (S& one : ones) one = 1;
  for (int member = 0; member < x.heads_per_group; ++member) {
    const int head = group * x.heads_per_group + member;
    for (int first = x.causal ? key : 0; first < x.queries; first += kTile) {
      __syncthreads();
      load_rows<kTile>(q, x.q, sample, head, first, x.queries, x.size);
      load_rows<kTile>(dout, a.dout, sample, head, first, x.queries, x.size);
      __syncthreads();
      Square<S, kTile> s = {}, dp = {};
      multiply(s, {q, stride, 1}, {k, 1, stride}, x.size);
      multiply(dp, {dout, stride, 1}, {v, 1, stride}, x.size);
      store_square<S, kTile>(p, s);
      store_square<S, kTile>(ds, dp);
      score_gradients<kTile>(a, sample, head, first, key, p, ds);
      __syncthreads();
      accumulate<S, kTile>(dv, stride, x.size, {p, 1, kTile + 1}, dout, ones);
      accumulate<S, kTile>(dk, stride, x.size, {ds, 1, kTile + 1}, q, ones);
    }
  }
  __syncthreads();
  store_rows<kTile>(dk, a.dk, sample, group, key, x.keys, x.size);
  store_rows<kTile>(dv, a.dv, sample, group, key, x.keys, x.size);
}

// Dynamic shared memory of a kernel with `rows` tiles of rows and `squares` tiles of scores.
template <class S, int kTile>
std::size_t shared_bytes(int rows, int squares, index_t size) {
  return sizeof(S) * kTile *
         static_cast<std::size_t>(rows * row_stride<kTile>(static_cast<int>(size)) + squares * (kTile + 1));
}
// Of the kernel that needs most.
template <class S, int kTile>
std::size_t largest_shared_bytes(index_t size) {
  return shared_bytes<S, kTile>(6, 2, size);
}

// Calls f.operator()<T, kTile>() with a large tile where it fits and there is something to fill it with, else
// a small one; false where that does not fit either.
template <class F>
bool with_tile(const CudaDevice& device, const AttentionCall& call, F&& f) {
  const std::size_t limit = device.properties().sharedMemPerBlockOptin;
  return dispatch(call.q.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const index_t size = call.q[3];
    const bool large = std::max(call.q[1], call.k[1]) > 8;
    if (large && largest_shared_bytes<S, 32>(size) <= limit) {
      f.template operator()<T, 32>();
    } else if (largest_shared_bytes<S, 8>(size) <= limit) {
      f.template operator()<T, 8>();
    } else {
      return false;
    }
    return true;
  });
}

template <class T, int kTile>
void backward(CudaDevice& device, const AttentionCall& call, const AttentionGradients& gradients) {
  using S = stat_t<T>;
  const AttentionArguments<T> x(call);
  BiasPartials<S> partials(x.queries, x.keys, kTile, kTile);
  const index_t rows = call.log_sum_exp.numel();
  const index_t tables = gradients.dbias ? partials.numel(x.samples, x.heads) : 0;
  S* delta = reinterpret_cast<S*>(device.workspace((rows + tables) * index_t{sizeof(S)}));
  if (gradients.dbias) partials.data = delta + rows;
  const BackwardArguments<T> arguments{x,
                                       HeadRows<const T>(call.out),
                                       HeadRows<const T>(gradients.dout),
                                       HeadRows<T>(gradients.dq),
                                       HeadRows<T>(gradients.dk),
                                       HeadRows<T>(gradients.dv),
                                       delta,
                                       partials};
  const auto samples = static_cast<unsigned>(x.samples);
  const Grid queries{.blocks = {block_count(x.queries, kTile), static_cast<unsigned>(x.heads), samples},
                     .threads = kThreads,
                     .shared_bytes = shared_bytes<S, kTile>(5, 2, x.size)};
  const Grid keys{.blocks = {block_count(x.keys, kTile), static_cast<unsigned>(x.groups), samples},
                  .threads = kThreads,
                  .shared_bytes = shared_bytes<S, kTile>(6, 2, x.size)};
  launch(device, queries, query_gradient_kernel<T, kTile>, arguments);
  launch(device, keys, key_gradient_kernel<T, kTile>, arguments);
  if (gradients.dbias) add_bias_partials(device, partials, x.samples, gradients.dbias, x.queries);
}

}  // namespace

bool simple_attention_supports(const CudaDevice& device, const AttentionCall& call) {
  return dispatch(call.q.dtype, [&]<class T>() {
    return largest_shared_bytes<stat_t<T>, 8>(call.q[3]) <= device.properties().sharedMemPerBlockOptin;
  });
}

void simple_attention_forward(CudaDevice& device, const AttentionCall& call) {
  const bool done = with_tile(device, call, [&]<class T, int kTile>() {
    const AttentionArguments<T> x(call);
    const Grid grid{.blocks = {block_count(x.queries, kTile), static_cast<unsigned>(x.heads),
                               static_cast<unsigned>(x.samples)},
                    .threads = kThreads,
                    .shared_bytes = shared_bytes<stat_t<T>, kTile>(4, 1, x.size)};
    launch(device, grid, forward_kernel<T, kTile>, x, HeadRows<T>(call.out));
  });
  check(done, "attention: a head of {} elements does not fit into shared memory", call.q[3]);
}

void simple_attention_backward(CudaDevice& device, const AttentionCall& call,
                               const AttentionGradients& gradients) {
  const bool done =
      with_tile(device, call, [&]<class T, int kTile>() { backward<T, kTile>(device, call, gradients); });
  check(done, "attention_backward: a head of {} elements does not fit into shared memory", call.q[3]);
}

}  // namespace regroup
