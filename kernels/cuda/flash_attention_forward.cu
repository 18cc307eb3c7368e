#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_softmax.cuh"
#include "kernels/cuda/launch.cuh"

namespace regroup {
namespace flash {
namespace {

// One block: kRows queries of one head. Its warps own 16 kBlocks of them each and walk over tiles of 64 keys,
// two of which are in shared memory: one is worked on while the next arrives. Two blocks of 16 rows a warp
// halve the reads of keys and values from shared memory; where a head is wider, registers suffice for one.
template <int C, bool kBias, bool kDropout>
class Forward {
  static constexpr int kBlocks = C <= 64 ? 2 : 1, kLines = 2 * kBlocks, kWarpRows = 16 * kBlocks;

 public:
  static constexpr int kRows = kWarps * kWarpRows, kWindow = kRows + kColumns;

  struct Shared {
    bfloat16 q[kRows * C], keys[2][kColumns * C], values[2][kColumns * C];
    float bias[kBias ? 2 : 1][kBias ? kWindow : 1];
  };

  __device__ Forward(const AttentionArguments<bfloat16>& x, const HeadRows<bfloat16>& out)
      : x_(x),
        out_(out),
        shared_(*dynamic_shared<Shared>()),
        head_(static_cast<int>(blockIdx.y)),
        sample_(static_cast<int>(blockIdx.z)),
        // With a causal mask the last queries have most to do: they begin first.
        first_(static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows),
        row_(first_ + warp_index() * kWarpRows),
        mask_(x.key_mask ? x.key_mask + index_t{sample_} * x.keys : nullptr) {}

  __device__ void run() {
    int end = visible_end(mask_, x_.keys);
    if (x_.causal) end = min(end, first_ + kRows);
    const int tiles = (end + kColumns - 1) / kColumns;
    copy_rows<C, kRows>(shared_.q, x_.q.at(sample_, first_, head_), x_.q.row_stride, x_.queries - first_,
                        x_.size);
    ptx::cp_async_commit();  // also where no tile follows: a wait sees committed copies only
    Window<kWindow> window;
    if (tiles > 0) fetch(0, window);
    if (kBias && tiles > 0) window.store(shared_.bias[0]);
    Rows<C, kBlocks, true> queries;
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait<0>();
      __syncthreads();
      if (tile == 0) queries.load(shared_.q, warp_index() * kWarpRows);
      if (tile + 1 < tiles) fetch(tile + 1, window);
      const bool unseen = row_ >= x_.queries || (x_.causal && tile * kColumns > row_ + kWarpRows - 1);
      if (!unseen) visit(tile, queries);
      if (kBias && tile + 1 < tiles) window.store(shared_.bias[(tile + 1) % 2]);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    finish();
  }

 private:
  // Begins to bring a tile.
  __device__ void fetch(int tile, Window<kWindow>& window) {
    const int key = tile * kColumns, group = head_ / x_.heads_per_group;
    copy_rows<C, kColumns>(shared_.keys[tile % 2], x_.k.at(sample_, key, group), x_.k.row_stride,
                           x_.keys - key, x_.size);
    copy_rows<C, kColumns>(shared_.values[tile % 2], x_.v.at(sample_, key, group), x_.v.row_stride,
                           x_.keys - key, x_.size);
    ptx::cp_async_commit();
    if constexpr (kBias) {
      const int width = x_.queries + x_.keys - 1;
      window.fetch(x_.bias + index_t{head_} * width, width, key - first_ - kRows + x_.queries);
    }
  }

  __device__ void visit(int tile, Rows<C, kBlocks, true>& queries) {
    const int key = tile * kColumns;
    KeyBits seen;
    seen.fetch(mask_, key, x_.keys);
    Scores<kBlocks> scores;
    multiply_transposed<C>(scores, queries, shared_.keys[tile % 2]);
    if constexpr (kBias) {
      const float* window = shared_.bias[tile % 2] + kRows - 1 - warp_index() * kWarpRows;
      add_bias<kBlocks, 1>(scores, window + lane_column() - lane_row());
    } else {
      scale<kBlocks>(scores, kLog2E);
    }
    const std::uint64_t bits = seen.bits();
    if (bits == 0) return;
    const bool crossed = x_.causal && key + kColumns - 1 > row_;
    if (crossed || ~bits != 0) hide<kBlocks>(scores, bits, crossed, row_ + lane_row() + 1 - key);
    float factors[kLines];
    softmax_(scores, factors);
    scale_lines<kBlocks, C>(sums_, factors);
    if constexpr (kDropout) {
      drop<kBlocks>(
          scores, x_.dropout,
          x_.first_element(sample_, head_) + static_cast<std::uint64_t>(index_t{row_} * x_.keys + key),
          x_.keys);
    }
    Operand<kBlocks> probabilities;
    round_scores<kBlocks>(probabilities, scores);
    multiply_add<C, kBlocks>(sums_, probabilities, shared_.values[tile % 2]);
  }

  __device__ void finish() {
    float factors[kLines], log_sum_exp[kLines];
    softmax_.finish(kDropout ? static_cast<float>(x_.dropout.kept) : 1.0F, factors, log_sum_exp);
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      const int query = row_ + 8 * l + lane_row();
      if (lane_column() == 0 && query < x_.queries) {
        x_.log_sum_exp[x_.statistics_of(sample_, head_) + query] = log_sum_exp[l];
      }
    }
    store_rows<C, kBlocks>(sums_, factors, shared_.q, warp_index() * kWarpRows, out_.at(sample_, row_, head_),
                           out_.row_stride, x_.queries - row_, x_.size);
  }

  const AttentionArguments<bfloat16>& x_;
  const HeadRows<bfloat16>& out_;
  Shared& shared_;
  const int head_, sample_, first_, row_;  // row_: the warp's first query
  const std::int32_t* mask_;
  Sums<kBlocks, C> sums_ = {};
  OnlineSoftmax<kBlocks> softmax_;
};

template <int C, bool kBias, bool kDropout>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const AttentionArguments<bfloat16> x, const HeadRows<bfloat16> out) {
  Forward<C, kBias, kDropout>(x, out).run();
}

template <int C, bool kBias, bool kDropout>
void forward(CudaDevice& device, const AttentionCall& call) {
  using Kernel = Forward<C, kBias, kDropout>;
  const AttentionArguments<bfloat16> x(call);
  const Grid grid{.blocks = {block_count(x.queries, Kernel::kRows), static_cast<unsigned>(x.heads),
                             static_cast<unsigned>(x.samples)},
                  .threads = kThreads,
                  .shared_bytes = sizeof(typename Kernel::Shared)};
  launch(device, grid, forward_kernel<C, kBias, kDropout>, x, HeadRows<bfloat16>(call.out));
}

template <int C>
void forward(CudaDevice& device, const AttentionCall& call) {
  const bool drops = call.options.dropout_rate > 0;
  if (call.bias) {
    drops ? forward<C, true, true>(device, call) : forward<C, true, false>(device, call);
  } else {
    drops ? forward<C, false, true>(device, call) : forward<C, false, false>(device, call);
  }
}

}  // namespace
}  // namespace flash

bool flash_attention_supports(const CudaDevice& device, const AttentionCall& call) {
  const std::size_t shared_bytes = call.q[3] <= 64 ? sizeof(flash::Forward<64, true, false>::Shared)
                                                   : sizeof(flash::Forward<128, true, false>::Shared);
  return call.q.dtype == DType::kBFloat16 && call.q[3] % 8 == 0 && call.q[3] <= 128 &&
         has_aligned_rows(call.q) && has_aligned_rows(call.k) && has_aligned_rows(call.v) &&
         has_aligned_rows(call.out) && shared_bytes <= device.properties().sharedMemPerBlockOptin;
}

void flash_attention_forward(CudaDevice& device, const AttentionCall& call) {
  call.q[3] <= 64 ? flash::forward<64>(device, call) : flash::forward<128>(device, call);
}

}  // namespace regroup
