// FlashAttention's online softmax: what forward keeps of the tiles of keys that a query has seen.
#pragma once

#include "kernels/cuda/flash_attention_tile.cuh"

namespace regroup::flash {

template <int kBlocks>
class OnlineSoftmax {
  static constexpr int kLines = 2 * kBlocks;

 public:
  __device__ OnlineSoftmax() {
    for (float& largest : largest_) largest = -INFINITY;
  }

  // Scores (in units of log 2) to 2^(score - largest so far); factors: what sums of lines over earlier tiles
  // are to be multiplied by.
  __device__ void operator()(Scores<kBlocks>& scores, float (&factors)[kLines]) {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      float largest = largest_[l];
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
        largest = fmaxf(largest, fmaxf(scores[l / 2][n][l % 2 * 2], scores[l / 2][n][l % 2 * 2 + 1]));
      }
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kWholeWarp, largest, distance));
      }
      const float shift = largest == -INFINITY ? 0.0F : largest;
      factors[l] = ptx::exp2_approx(largest_[l] - shift);
      largest_[l] = largest;
      float total = total_[l] * factors[l];
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& score = scores[l / 2][n][l % 2 * 2 + e];
          score = ptx::exp2_approx(score - shift);
          total += score;
        }
      }
      total_[l] = total;
    }
  }

  // After the last tile: what the sums of lines are to be multiplied by (times `scale`; 0 where a query has
  // seen no key) and the lines' logarithms of the sum of exponentials.
  __device__ void finish(float scale, float (&factors)[kLines], float (&log_sum_exp)[kLines]) const {
#pragma unroll
    for (int l = 0; l < kLines; ++l) {
      float total = total_[l];
#pragma unroll
      for (int distance = 1; distance < 4; distance *= 2)
        total += __shfl_xor_sync(kWholeWarp, total, distance);
      factors[l] = total == 0 ? 0.0F : scale / total;
      log_sum_exp[l] = total == 0 ? INFINITY : (largest_[l] + log2f(total)) * kLn2;
    }
  }

 private:
  float largest_[kLines], total_[kLines] = {};
};

template <int kBlocks, int C>
__device__ void scale_lines(Sums<kBlocks, C>& sums, const float (&factors)[2 * kBlocks]) {
#pragma unroll
  for (int l = 0; l < 2 * kBlocks; ++l) {
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) sums[l / 2][n][l % 2 * 2 + e] *= factors[l];
    }
  }
}

// Probabilities that are not kept become 0. `first`: the global element of the warp's first row and the
// tile's first column.
template <int kBlocks>
__device__ void drop(Scores<kBlocks>& scores, const DropoutWords& dropout, std::uint64_t first, int keys) {
  KeptKeys<kBlocks> kept;
  kept.draw(dropout, first, keys);
#pragma unroll
  for (int l = 0; l < 2 * kBlocks; ++l) {
    const std::uint64_t line = kept.line(l);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if ((line >> (8 * n + e) & 1) == 0) scores[l / 2][n][l % 2 * 2 + e] = 0;
      }
    }
  }
}

}  // namespace regroup::flash
