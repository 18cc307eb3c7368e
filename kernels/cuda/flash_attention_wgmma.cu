#include "kernels/cuda/flash_attention.h"
#include "kernels/cuda/flash_attention_softmax.cuh"
#include "kernels/cuda/flash_attention_wgmma.h"
#include "kernels/cuda/launch.cuh"

namespace regroup {
namespace flash {
namespace {

// As Forward of flash_attention_forward.cu, with two warpgroups of 64 queries each. Tiles are kParts parts of
// 64 columns, for a row of a swizzled tile of wgmma has 128 bytes. The queries stay in shared memory: as left
// operands in registers ptxas gives them the probabilities' registers, and the second tile is multiplied by
// those. While one warpgroup is at its softmax, the tensor cores work for others.
template <int C, bool kBias, bool kDropout>
class WgmmaForward {
 public:
  static constexpr int kBlockThreads = 256, kRows = 128, kWindow = kRows + kColumns, kParts = C / 64;

  struct Shared {
    bfloat16 q[kParts][kRows * 64], keys[2][kParts][kColumns * 64], values[2][kParts][kColumns * 64];
    float bias[kBias ? 2 : 1][kBias ? kWindow : 1];
  };
  static constexpr std::size_t kSharedBytes = sizeof(Shared) + 1024;  // to align it

  __device__ WgmmaForward(const AttentionArguments<bfloat16>& x, const HeadRows<bfloat16>& out)
      : x_(x),
        out_(out),
        shared_(*static_cast<Shared*>(ptx::align_shared_1024(dynamic_shared<unsigned char>()))),
        head_(static_cast<int>(blockIdx.y)),
        sample_(static_cast<int>(blockIdx.z)),
        // With a causal mask the last queries have most to do: they begin first.
        first_(static_cast<int>(gridDim.x - 1 - blockIdx.x) * kRows),
        row_(first_ + warp_index() * 16),
        mask_(x.key_mask ? x.key_mask + index_t{sample_} * x.keys : nullptr) {}

  __device__ void run() {
    int end = visible_end(mask_, x_.keys);
    if (x_.causal) end = min(end, first_ + kRows);
    const int tiles = (end + kColumns - 1) / kColumns;
    copy<kRows>(shared_.q, x_.q, first_, head_, x_.queries);
    ptx::cp_async_commit();  // also where no tile follows: a wait sees committed copies only
    Window<kWindow, kBlockThreads> window;
    if (tiles > 0) fetch(0, window);
    if (kBias && tiles > 0) window.store(shared_.bias[0]);
    for (int tile = 0; tile < tiles; ++tile) {
      ptx::cp_async_wait<0>();
      ptx::fence_for_wgmma();
      __syncthreads();
      if (tile + 1 < tiles) fetch(tile + 1, window);
      // A warpgroup decides as one.
      const int group_row = row_ / 64 * 64;
      if (group_row < x_.queries && (!x_.causal || tile * kColumns <= group_row + 63)) visit(tile);
      if (kBias && tile + 1 < tiles) window.store(shared_.bias[(tile + 1) % 2]);
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
    finish();
  }

 private:
  template <int kCount, int kSize>
  __device__ void copy(bfloat16 (&parts)[kParts][kSize], const HeadRows<const bfloat16>& x, int first,
                       int head, int end) {
    static_assert(kSize == kCount * 64);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      copy_rows<64, kCount, kBlockThreads>(parts[part], x.at(sample_, first, head) + 64 * part, x.row_stride,
                                           end - first, x_.size - 64 * part);
    }
  }

  // Begins to bring a tile.
  __device__ void fetch(int tile, Window<kWindow, kBlockThreads>& window) {
    const int key = tile * kColumns, group = head_ / x_.heads_per_group;
    copy<kColumns>(shared_.keys[tile % 2], x_.k, key, group, x_.keys);
    copy<kColumns>(shared_.values[tile % 2], x_.v, key, group, x_.keys);
    ptx::cp_async_commit();
    if constexpr (kBias) {
      const int width = x_.queries + x_.keys - 1;
      window.fetch(x_.bias + index_t{head_} * width, width, key - first_ - kRows + x_.queries);
    }
  }

  __device__ void visit(int tile) {
    const int key = tile * kColumns;
    KeyBits seen;
    seen.fetch(mask_, key, x_.keys);
    Scores<1> scores;
    find_scores(scores[0], tile);
    if constexpr (kBias) {
      const float* window = shared_.bias[tile % 2] + kRows - 1 - warp_index() * 16;
      add_bias<1, 1>(scores, window + lane_column() - lane_row());
    } else {
      scale<1>(scores, kLog2E);
    }
    const std::uint64_t bits = seen.bits();
    if (bits == 0) return;
    const bool crossed = x_.causal && key + kColumns - 1 > row_;
    if (crossed || ~bits != 0) hide<1>(scores, bits, crossed, row_ + lane_row() + 1 - key);
    float factors[2];
    softmax_(scores, factors);
#pragma unroll
    for (Sums<1, 64>& sums : sums_) scale_lines<1, 64>(sums, factors);
    if constexpr (kDropout) {
      drop<1>(scores, x_.dropout,
              x_.first_element(sample_, head_) + static_cast<std::uint64_t>(index_t{row_} * x_.keys + key),
              x_.keys);
    }
    Operand<1> probabilities;
    round_scores<1>(probabilities, scores);
    add_values(probabilities[0], tile);
  }

  __device__ void find_scores(float (&scores)[kSteps][4], int tile) {
    const int group_row = warp_index() / 4 * 64;
    ptx::pin(scores);
    ptx::wgmma_begin();
#pragma unroll
    for (int k = 0; k < C / 16; ++k) {
      ptx::wgmma_m64n64k16(scores, shared_.q[k / 4] + group_row * 64 + k % 4 * 16,
                           shared_.keys[tile % 2][k / 4] + k % 4 * 16, k > 0);
    }
    ptx::wgmma_end();
    ptx::pin(scores);
  }

  __device__ void add_values(std::uint32_t (&probabilities)[kColumns / 16][4], int tile) {
#pragma unroll
    for (std::uint32_t(&operand)[4] : probabilities) ptx::pin(operand);
#pragma unroll
    for (Sums<1, 64>& sums : sums_) ptx::pin(sums[0]);
    ptx::wgmma_begin();
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int k = 0; k < kColumns / 16; ++k) {
        ptx::wgmma_m64n64k16(sums_[part][0], probabilities[k], shared_.values[tile % 2][part] + k * 16 * 64);
      }
    }
    ptx::wgmma_end();
#pragma unroll
    for (Sums<1, 64>& sums : sums_) ptx::pin(sums[0]);
  }

  __device__ void finish() {
    float factors[2], log_sum_exp[2];
    softmax_.finish(kDropout ? static_cast<float>(x_.dropout.kept) : 1.0F, factors, log_sum_exp);
#pragma unroll
    for (int l = 0; l < 2; ++l) {
      const int query = row_ + 8 * l + lane_row();
      if (lane_column() == 0 && query < x_.queries) {
        x_.log_sum_exp[x_.statistics_of(sample_, head_) + query] = log_sum_exp[l];
      }
    }
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      store_rows<64, 1>(sums_[part], factors, shared_.q[part], warp_index() * 16,
                        out_.at(sample_, row_, head_) + 64 * part, out_.row_stride, x_.queries - row_,
                        x_.size - 64 * part);
    }
  }

  const AttentionArguments<bfloat16>& x_;
  const HeadRows<bfloat16>& out_;
  Shared& shared_;
  const int head_, sample_, first_, row_;  // row_: the warp's first query
  const std::int32_t* mask_;
  Sums<1, 64> sums_[kParts] = {};
  OnlineSoftmax<1> softmax_;
};

template <int C, bool kBias, bool kDropout>
__global__ void __launch_bounds__(256, C <= 64 ? 2 : 1)
    wgmma_kernel(const AttentionArguments<bfloat16> x, const HeadRows<bfloat16> out) {
  WgmmaForward<C, kBias, kDropout>(x, out).run();
}

template <int C, bool kBias, bool kDropout>
void forward(CudaDevice& device, const AttentionCall& call) {
  using Kernel = WgmmaForward<C, kBias, kDropout>;
  const AttentionArguments<bfloat16> x(call);
  const Grid grid{.blocks = {block_count(x.queries, Kernel::kRows), static_cast<unsigned>(x.heads),
                             static_cast<unsigned>(x.samples)},
                  .threads = Kernel::kBlockThreads,
                  .shared_bytes = Kernel::kSharedBytes};
  launch(device, grid, wgmma_kernel<C, kBias, kDropout>, x, HeadRows<bfloat16>(call.out));
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

bool wgmma_attention_supports(const CudaDevice& device, const AttentionCall& call) {
  return device.compute_capability() == 90 && flash_attention_supports(device, call);
}

void wgmma_attention_forward(CudaDevice& device, const AttentionCall& call) {
  call.q[3] <= 64 ? flash::forward<64>(device, call) : flash::forward<128>(device, call);
}

}  // namespace regroup
