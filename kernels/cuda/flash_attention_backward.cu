// Two kernels: one walks over keys and sums dq (and the bias's gradient) of its queries, one walks over
// queries and sums dk and dv of its keys, over the heads of their group too. Every sum has one owner and one
// order, so there are no atomics and the bits are the same in every run. The price: both recompute q k^T and
// dout v^T, 7 products where one kernel that adds to dq atomically has 5.
#include <algorithm>

#include "kernels/cuda/attention_bias_gradient.cuh"
#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_diagonals.cuh"
#include "kernels/cuda/launch.cuh"

namespace regroup {
namespace flash {
namespace {

constexpr int kWindow = kRows + kColumns;
// Twelve warps fit a multiprocessor where each reads its own rows again at each use; with those in registers,
// eight would. The second kernel's dropout needs the registers for its random words.
template <int C, bool kDrawsForKeys = false>
constexpr int kBlocksPerMultiprocessor = C <= 64 && !kDrawsForKeys ? 3 : 2;

struct Arguments {
  AttentionArguments<bfloat16> x;
  HeadRows<const bfloat16> out, dout;
  HeadRows<bfloat16> dq, dk, dv;
  float* delta;               // [B, H, Q]: sum_n dout out
  BiasPartials<float> dbias;  // data null where there is no dbias
};

// One block: dq, delta and the partial sums of dbias of kRows queries of one head.
template <int C, bool kBias, bool kDropout>
class QueryGradient {
 public:
  struct Shared {
    bfloat16 q[kRows * C], dout[kRows * C], keys[2][kColumns * C], values[2][kColumns * C];
    float bias[kBias ? 2 : 1][kBias ? kWindow : 1];
    float delta[kRows];
    std::conditional_t<kBias, DiagonalMemory, float> diagonals;
  };

  __device__ explicit QueryGradient(const Arguments& a)
      : a_(a),
        x_(a.x),
        shared_(*dynamic_shared<Shared>()),
        head_(static_cast<int>(blockIdx.y)),
        sample_(static_cast<int>(blockIdx.z)),
        tile_(static_cast<int>(gridDim.x - 1 - blockIdx.x)),  // causal: the longest begin first
        first_(tile_ * kRows),
        row_(first_ + warp_index() * 16),
        mask_(x_.key_mask ? x_.key_mask + index_t{sample_} * x_.keys : nullptr) {}

  __device__ void run() {
    if constexpr (kBias) {
      if (a_.dbias.data) {
        Diagonals diagonals(shared_.diagonals, a_.dbias.table(sample_, x_.heads, head_, tile_));
        walk(diagonals);
        return;
      }
    }
    NoDiagonals none;
    walk(none);
  }

 private:
  struct NoDiagonals {
    __device__ void add(int, const Scores<1>&) {}
    __device__ void skip(int) {}
    __device__ void combine(int) {}
    __device__ void finish(int, index_t) {}
  };

  template <class D>
  __device__ void walk(D& diagonals) {
    int end = visible_end(mask_, x_.keys);
    if (x_.causal) end = min(end, first_ + kRows);
    const int tiles = (end + kColumns - 1) / kColumns;
    copy_rows<C, kRows>(shared_.q, x_.q.at(sample_, first_, head_), x_.q.row_stride, x_.queries - first_,
                        x_.size);
    copy_rows<C, kRows>(shared_.dout, a_.dout.at(sample_, first_, head_), a_.dout.row_stride,
                        x_.queries - first_, x_.size);
    ptx::cp_async_commit();  // also where no tile follows: a wait sees committed copies only
    Window<kWindow> window;
    if (tiles > 0) fetch(0, window);
    if (kBias && tiles > 0) window.store(shared_.bias[0]);
    find_delta();
    Rows<C, 1, false> queries, douts;
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (tile == 0) {
        queries.load(shared_.q, warp_index() * 16);
        douts.load(shared_.dout, warp_index() * 16);
        load_statistics();
      } else {
        diagonals.combine(tile - 1);
      }
      if (tile + 1 < tiles) fetch(tile + 1, window);
      const bool unseen = row_ >= x_.queries || (x_.causal && tile * kColumns > row_ + 15);
      if (unseen || !visit(tile, queries, douts, diagonals)) diagonals.skip(tile);
      if (kBias && tile + 1 < tiles) window.store(shared_.bias[(tile + 1) % 2]);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (tiles > 0) diagonals.combine(tiles - 1);
    const float factors[2] = {1, 1};
    store_rows<C, 1>(sums_, factors, shared_.q, warp_index() * 16, a_.dq.at(sample_, row_, head_),
                     a_.dq.row_stride, x_.queries - row_, x_.size);
    __syncthreads();
    diagonals.finish(tiles, a_.dbias.length);
  }

  __device__ void fetch(int tile, Window<kWindow>& window) {
    const int key = tile * kColumns, group = head_ / x_.heads_per_group;
    copy_rows<C, kColumns>(shared_.keys[tile % 2], x_.k.at(sample_, key, group), x_.k.row_stride,
                           x_.keys - key, x_.size);
    copy_rows<C, kColumns>(shared_.values[tile % 2], x_.v.at(sample_, key, group), x_.v.row_stride,
                           x_.keys - key, x_.size);
    ptx::cp_async_commit();
    if constexpr (kBias) {
      const int width = x_.bias ? x_.queries + x_.keys - 1 : 0;
      window.fetch(x_.bias + index_t{head_} * width, width, key - first_ - kRows + x_.queries);
    }
  }

  // delta of the block's queries, for this kernel and the next.
  __device__ void find_delta() {
    constexpr int kLanes = C / 8, kStep = kThreads / kLanes;
    const int chunk = static_cast<int>(threadIdx.x) % kLanes;
#pragma unroll
    for (int row = static_cast<int>(threadIdx.x) / kLanes; row < kRows; row += kStep) {
      const int query = first_ + row;
      float sum = 0;
      if (query < x_.queries && chunk * 8 < x_.size) {
        const auto dout = load_pack<8>(a_.dout.at(sample_, query, head_) + chunk * 8);
        const auto out = load_pack<8>(a_.out.at(sample_, query, head_) + chunk * 8);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += widen(dout.at[i]) * widen(out.at[i]);
      }
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2)
        sum += __shfl_xor_sync(kWholeWarp, sum, distance);
      if (chunk == 0) {
        shared_.delta[row] = sum;
        if (query < x_.queries) a_.delta[x_.statistics_of(sample_, head_) + query] = sum;
      }
    }
  }

  // Of the lane's two rows.
  __device__ void load_statistics() {
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const int query = row_ + 8 * l + lane_row();
      log_sum_exp_[l] =
          query < x_.queries ? x_.log_sum_exp[x_.statistics_of(sample_, head_) + query] * kLog2E : INFINITY;
      delta_[l] = shared_.delta[query - first_];
    }
  }

  // Whether there was anything to see.
  template <class D>
  __device__ bool visit(int tile, Rows<C, 1, false>& queries, Rows<C, 1, false>& douts, D& diagonals) {
    const int key = tile * kColumns;
    KeyBits seen;
    seen.fetch(mask_, key, x_.keys);
    KeptKeys<1> kept;
    if constexpr (kDropout) {
      kept.draw(x_.dropout,
                x_.first_element(sample_, head_) + static_cast<std::uint64_t>(index_t{row_} * x_.keys + key),
                x_.keys);
    }
    Scores<1> scores, gradients;
    multiply_transposed<C>(scores, queries, shared_.keys[tile % 2]);
    if constexpr (kBias) {
      const float* window = shared_.bias[tile % 2] + kRows - 1 - warp_index() * 16;
      add_bias<1, 1>(scores, window + lane_column() - lane_row());
    } else {
      scale<1>(scores, kLog2E);
    }
    const std::uint64_t bits = seen.bits();
    if (bits == 0) return false;
    const bool crossed = x_.causal && key + kColumns - 1 > row_;
    if (crossed || ~bits != 0) hide<1>(scores, bits, crossed, row_ + lane_row() + 1 - key);
    multiply_transposed<C>(gradients, douts, shared_.values[tile % 2]);
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      std::uint64_t line = 0;
      if constexpr (kDropout) line = kept.line(l);
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& gradient = gradients[0][n][2 * l + e];
          if constexpr (kDropout) {
            gradient = (line >> (8 * n + e) & 1) == 0 ? 0.0F : gradient * static_cast<float>(x_.dropout.kept);
          }
          gradient = ptx::exp2_approx(scores[0][n][2 * l + e] - log_sum_exp_[l]) * (gradient - delta_[l]);
        }
      }
    }
    Operand<1> operand;
    round_scores<1>(operand, gradients);
    diagonals.add(tile, gradients);
    multiply_add<C, 1>(sums_, operand, shared_.keys[tile % 2]);
    return true;
  }

  const Arguments& a_;
  const AttentionArguments<bfloat16>& x_;
  Shared& shared_;
  const int head_, sample_, tile_, first_, row_;  // row_: the warp's first query
  const std::int32_t* mask_;
  Sums<1, C> sums_ = {};
  float log_sum_exp_[2], delta_[2];
};

// Which of a warp's probabilities are kept, where its 16 rows are keys: each lane draws for two queries and
// asks the others for the rest.
class KeptQueries {
 public:
  // `first`: the global element of the tile's first query and the warp's first key.
  __device__ void draw(const DropoutWords& dropout, std::uint64_t first, int keys) {
    std::uint32_t words = 0;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int query = lane_index() + 32 * half;
      const std::uint32_t bits =
          kept_bits<16>(dropout, first + static_cast<std::uint64_t>(index_t{query} * keys)) & 0xFFFF;
      words |= bits << 16 * half;
    }
#pragma unroll
    for (int n = 0; n < kSteps / 2; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const std::uint32_t word = __shfl_sync(kWholeWarp, words, 8 * n + lane_column() + e) >> lane_row();
#pragma unroll
        for (int i = 0; i < 4; ++i) kept_ |= (word >> 8 * i & 1) << place(i % 2, n + i / 2 * 4, e);
      }
    }
  }
  __device__ bool operator()(int line, int n, int e) const { return (kept_ >> place(line, n, e) & 1) != 0; }

 private:
  __device__ static constexpr int place(int line, int n, int e) { return 16 * line + 2 * n + e; }
  std::uint32_t kept_ = 0;
};

// One block: dk and dv of kRows keys of one group, from the queries of all heads of the group, one head after
// another. Scores are transposed: rows are keys.
template <int C, bool kBias, bool kDropout>
class KeyGradient {
 public:
  struct Shared {
    bfloat16 keys[kRows * C], values[kRows * C], q[2][kColumns * C], dout[2][kColumns * C];
    float bias[kBias ? 2 : 1][kBias ? kWindow : 1];
    float log_sum_exp[2][kColumns], delta[2][kColumns];
  };

  __device__ explicit KeyGradient(const Arguments& a)
      : a_(a),
        x_(a.x),
        shared_(*dynamic_shared<Shared>()),
        group_(static_cast<int>(blockIdx.y)),
        sample_(static_cast<int>(blockIdx.z)),
        first_(static_cast<int>(blockIdx.x) * kRows),
        row_(first_ + warp_index() * 16),
        first_tile_(x_.causal ? first_ / kColumns : 0),
        tiles_((x_.queries + kColumns - 1) / kColumns - first_tile_) {}

  __device__ void run() {
    KeyBits seen;
    seen.fetch(x_.key_mask ? x_.key_mask + index_t{sample_} * x_.keys : nullptr, first_, x_.keys);
    const std::uint64_t bits = seen.bits();
    const int visits = bits == 0 || tiles_ <= 0 ? 0 : tiles_ * x_.heads_per_group;
    copy_rows<C, kRows>(shared_.keys, x_.k.at(sample_, first_, group_), x_.k.row_stride, x_.keys - first_,
                        x_.size);
    copy_rows<C, kRows>(shared_.values, x_.v.at(sample_, first_, group_), x_.v.row_stride, x_.keys - first_,
                        x_.size);
    ptx::cp_async_commit();
    if (visits > 0) {
      fetch(0);
      store(0);
    }
    Rows<C, 1, false> keys, values;
    for (int i = 0; i < visits; ++i) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (i == 0) {
        keys.load(shared_.keys, warp_index() * 16);
        values.load(shared_.values, warp_index() * 16);
      }
      if (i + 1 < visits) fetch(i + 1);
      if (row_ < x_.keys) visit(i, keys, values);
      if (i + 1 < visits) store(i + 1);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    finish(bits);
  }

 private:
  __device__ int head_of(int visit) const { return group_ * x_.heads_per_group + visit / tiles_; }
  __device__ int query_of(int visit) const { return (first_tile_ + visit % tiles_) * kColumns; }

  // Begins to bring what visit i needs.
  __device__ void fetch(int i) {
    const int head = head_of(i), query = query_of(i), thread = static_cast<int>(threadIdx.x);
    copy_rows<C, kColumns>(shared_.q[i % 2], x_.q.at(sample_, query, head), x_.q.row_stride,
                           x_.queries - query, x_.size);
    copy_rows<C, kColumns>(shared_.dout[i % 2], a_.dout.at(sample_, query, head), a_.dout.row_stride,
                           x_.queries - query, x_.size);
    ptx::cp_async_commit();
    const int own = query + thread % kColumns;
    const bool sums = thread < kColumns;  // the first threads bring log_sum_exp, the others delta
    statistic_ = sums ? INFINITY : 0.0F;
    if (own < x_.queries)
      statistic_ = (sums ? x_.log_sum_exp : a_.delta)[x_.statistics_of(sample_, head) + own];
    if constexpr (kBias) {
      const int width = x_.bias ? x_.queries + x_.keys - 1 : 0;
      window_.fetch(x_.bias + index_t{head} * width, width, first_ - query - kColumns + x_.queries);
    }
  }
  __device__ void store(int i) {
    const int thread = static_cast<int>(threadIdx.x);
    static_assert(kThreads == 2 * kColumns);
    if (thread < kColumns) {
      shared_.log_sum_exp[i % 2][thread] = statistic_ * kLog2E;
    } else {
      shared_.delta[i % 2][thread - kColumns] = statistic_;
    }
    if constexpr (kBias) window_.store(shared_.bias[i % 2]);
  }

  __device__ void visit(int i, Rows<C, 1, false>& keys, Rows<C, 1, false>& values) {
    const int query = query_of(i);
    KeptQueries kept;
    if constexpr (kDropout) {
      kept.draw(
          x_.dropout,
          x_.first_element(sample_, head_of(i)) + static_cast<std::uint64_t>(index_t{query} * x_.keys + row_),
          x_.keys);
    }
    Scores<1> scores, gradients;
    multiply_transposed<C>(scores, keys, shared_.q[i % 2]);
    if constexpr (kBias) {
      const float* window = shared_.bias[i % 2] + kColumns - 1 + warp_index() * 16;
      add_bias<1, -1>(scores, window + lane_row() - lane_column());
    } else {
      scale<1>(scores, kLog2E);
    }
    // Key row + 8 l sees the queries from itself on.
    if (x_.causal && query < row_ + 15) {
      hide_before(scores, row_ + lane_row() - query - lane_column());
    }
    const float* log_sum_exp = shared_.log_sum_exp[i % 2] + lane_column();
    const float* delta = shared_.delta[i % 2] + lane_column();
    Operand<1> operand;
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& p = scores[0][n][e];
        p = ptx::exp2_approx(p - log_sum_exp[8 * n + e % 2]);
        gradients[0][n][e] = !kDropout || kept(e / 2, n, e % 2) ? p : 0.0F;
      }
    }
    round_scores<1>(operand, gradients);
    multiply_add<C, 1>(dv_, operand, shared_.dout[i % 2]);
    multiply_transposed<C>(gradients, values, shared_.dout[i % 2]);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float& gradient = gradients[0][n][e];
        if constexpr (kDropout) {
          gradient = kept(e / 2, n, e % 2) ? gradient * static_cast<float>(x_.dropout.kept) : 0.0F;
        }
        gradient = scores[0][n][e] * (gradient - delta[8 * n + e % 2]);
      }
    }
    round_scores<1>(operand, gradients);
    multiply_add<C, 1>(dk_, operand, shared_.q[i % 2]);
  }

  // Line l's scores of steps and halves 8 n + e < limit + 8 l become -inf.
  __device__ void hide_before(Scores<1>& scores, int limit) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (8 * n + e % 2 < limit + 8 * (e / 2)) scores[0][n][e] = -INFINITY;
      }
    }
  }

  __device__ void finish(std::uint64_t bits) {
    const float kept = kDropout ? static_cast<float>(x_.dropout.kept) : 1.0F;
    const float factors[2] = {1, 1}, value_factors[2] = {kept, kept};
    // A hidden key's rows hold anything: its probabilities were not looked after.
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      if ((bits >> (warp_index() * 16 + 8 * l + lane_row()) & 1) != 0) continue;
#pragma unroll
      for (int n = 0; n < C / 8; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) dk_[0][n][2 * l + e] = dv_[0][n][2 * l + e] = 0;
      }
    }
    store_rows<C, 1>(dk_, factors, shared_.keys, warp_index() * 16, a_.dk.at(sample_, row_, group_),
                     a_.dk.row_stride, x_.keys - row_, x_.size);
    store_rows<C, 1>(dv_, value_factors, shared_.values, warp_index() * 16, a_.dv.at(sample_, row_, group_),
                     a_.dv.row_stride, x_.keys - row_, x_.size);
  }

  const Arguments& a_;
  const AttentionArguments<bfloat16>& x_;
  Shared& shared_;
  const int group_, sample_, first_, row_;  // row_: the warp's first key
  const int first_tile_, tiles_;            // of queries that see a key of the block
  Window<kWindow> window_;
  float statistic_;
  Sums<1, C> dk_ = {}, dv_ = {};
};

template <int C, bool kBias, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<C>)
    query_gradient_kernel(const Arguments a) {
  QueryGradient<C, kBias, kDropout>(a).run();
}
template <int C, bool kBias, bool kDropout>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor<C, kDropout>)
    key_gradient_kernel(const Arguments a) {
  KeyGradient<C, kBias, kDropout>(a).run();
}

template <int C, bool kBias, bool kDropout>
void backward(CudaDevice& device, const Arguments& a) {
  const auto heads = static_cast<unsigned>(a.x.heads), groups = static_cast<unsigned>(a.x.groups),
             samples = static_cast<unsigned>(a.x.samples);
  const Grid queries{.blocks = {block_count(a.x.queries, kRows), heads, samples},
                     .threads = kThreads,
                     .shared_bytes = sizeof(typename QueryGradient<C, kBias, kDropout>::Shared)};
  const Grid keys{.blocks = {block_count(a.x.keys, kRows), groups, samples},
                  .threads = kThreads,
                  .shared_bytes = sizeof(typename KeyGradient<C, kBias, kDropout>::Shared)};
  launch(device, queries, query_gradient_kernel<C, kBias, kDropout>, a);  // writes delta for the next
  launch(device, keys, key_gradient_kernel<C, kBias, kDropout>, a);
}

template <int C>
void backward(CudaDevice& device, const Arguments& a) {
  if (a.x.bias || a.dbias.data) {
    a.x.drops ? backward<C, true, true>(device, a) : backward<C, true, false>(device, a);
  } else {
    a.x.drops ? backward<C, false, true>(device, a) : backward<C, false, false>(device, a);
  }
}

// Of the larger of the two kernels.
template <int C, bool kBias>
constexpr std::size_t kSharedBytes = std::max(sizeof(typename QueryGradient<C, kBias, false>::Shared),
                                              sizeof(typename KeyGradient<C, kBias, false>::Shared));

std::size_t shared_bytes(index_t size, bool bias) {
  if (size <= 64) return bias ? kSharedBytes<64, true> : kSharedBytes<64, false>;
  return bias ? kSharedBytes<128, true> : kSharedBytes<128, false>;
}

}  // namespace
}  // namespace flash

bool flash_attention_supports(const CudaDevice& device, const AttentionCall& call,
                              const AttentionGradients& gradients) {
  return flash_attention_supports(device, call) && has_aligned_rows(gradients.dout) &&
         has_aligned_rows(gradients.dq) && has_aligned_rows(gradients.dk) && has_aligned_rows(gradients.dv) &&
         flash::shared_bytes(call.q[3], call.bias || gradients.dbias) <=
             device.properties().sharedMemPerBlockOptin;
}

void flash_attention_backward(CudaDevice& device, const AttentionCall& call,
                              const AttentionGradients& gradients) {
  const AttentionArguments<bfloat16> x(call);
  BiasPartials<float> partials(x.queries, x.keys, flash::kRows, flash::kColumns);
  const index_t rows = call.log_sum_exp.numel();
  const index_t tables = gradients.dbias ? partials.numel(x.samples, x.heads) : 0;
  float* delta = reinterpret_cast<float*>(device.workspace((rows + tables) * index_t{sizeof(float)}));
  if (gradients.dbias) partials.data = delta + rows;
  const flash::Arguments arguments{x,
                                   HeadRows<const bfloat16>(call.out),
                                   HeadRows<const bfloat16>(gradients.dout),
                                   HeadRows<bfloat16>(gradients.dq),
                                   HeadRows<bfloat16>(gradients.dk),
                                   HeadRows<bfloat16>(gradients.dv),
                                   delta,
                                   partials};
  x.size <= 64 ? flash::backward<64>(device, arguments) : flash::backward<128>(device, arguments);
  if (gradients.dbias) add_bias_partials(device, partials, x.samples, gradients.dbias, x.queries);
}

}  // namespace regroup
