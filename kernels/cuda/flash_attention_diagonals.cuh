// The gradient of T5's bias inside FlashAttention's backward: sums of the scores' gradients along diagonals.
#pragma once

#include "kernels/cuda/flash_attention_tile.cuh"

namespace regroup::flash {

constexpr int kRows = 16 * kWarps;  // of a block of backward: queries of its first kernel, keys of its second

// Shared memory in which tiles' gradients of scores are summed along their diagonals.
struct DiagonalMemory {
  // By warp: row g holds what the lanes of row g have, from column kMargin on; zeros around.
  static constexpr int kMargin = 16, kStride = kColumns + 24;
  // A warp's 16 x 64 scores have kWarpSums diagonals; the block's 64 x 64 begin 15 diagonals a warp earlier.
  static constexpr int kWarpSums = 16 + kColumns - 1, kBlockSums = kRows + kColumns - 1;
  float rows[kWarps][8 * kStride];
  float warps[2][kWarps][kWarpSums + 1];
  float rest[2][kRows];
};

// The block's table of partial sums of dbias. A tile's diagonals are the last tile's, kColumns further: so
// the first kColumns are finished after the tile, the rest is carried on.
class Diagonals {
 public:
  __device__ Diagonals(DiagonalMemory& memory, float* table) : memory_(memory), table_(table) {
    const int thread = static_cast<int>(threadIdx.x);
    float* rows = &memory_.rows[0][0];
    for (int i = thread; i < kWarps * 8 * DiagonalMemory::kStride; i += kThreads) rows[i] = 0;
    if (thread < kRows) memory_.rest[1][thread] = 0;
  }

  // The warp's sums of tile number `tile`.
  __device__ void add(int tile, const Scores<1>& gradients) {
    float sums[kSteps + 1][2] = {};
#pragma unroll
    for (int l = 0; l < 2; ++l) {
#pragma unroll
      for (int n = 0; n < kSteps; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) sums[n - l + 1][e] += gradients[0][n][2 * l + e];
      }
    }
    float* rows = memory_.rows[warp_index()];
    float* row = rows + lane_row() * DiagonalMemory::kStride + DiagonalMemory::kMargin + lane_column();
#pragma unroll
    for (int d = 0; d < kSteps + 1; ++d)
      *reinterpret_cast<float2*>(row + 8 * (d - 1)) = {sums[d][0], sums[d][1]};
    __syncwarp();
#pragma unroll
    for (int i = 0; i < (DiagonalMemory::kWarpSums + 31) / 32; ++i) {
      const int diagonal = 32 * i + lane_index();
      if (diagonal >= DiagonalMemory::kWarpSums) break;
      float sum = 0;
#pragma unroll
      for (int g = 0; g < 8; ++g) {
        sum += rows[g * (DiagonalMemory::kStride + 1) + DiagonalMemory::kMargin - 15 + diagonal];
      }
      memory_.warps[tile % 2][warp_index()][diagonal] = sum;
    }
  }
  // The warp has nothing to add to this tile.
  __device__ void skip(int tile) {
    for (int i = lane_index(); i < DiagonalMemory::kWarpSums; i += 32) {
      memory_.warps[tile % 2][warp_index()][i] = 0;
    }
  }

  // After a barrier behind all warps' add(tile): sums over the warps.
  __device__ void combine(int tile) {
    const int place = static_cast<int>(threadIdx.x);
    if (place >= DiagonalMemory::kBlockSums) return;
    float sum = place < kRows ? memory_.rest[(tile + 1) % 2][place] : 0.0F;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const int diagonal = place - 16 * (kWarps - 1 - warp);
      if (diagonal >= 0 && diagonal < DiagonalMemory::kWarpSums)
        sum += memory_.warps[tile % 2][warp][diagonal];
    }
    if (place < kColumns) {
      table_[tile * kColumns + place] = sum;
    } else {
      memory_.rest[tile % 2][place - kColumns] = sum;
    }
    if (place == DiagonalMemory::kBlockSums - 1) memory_.rest[tile % 2][kRows - 1] = 0;
  }

  // After a barrier behind combine(tiles - 1): the rest of the table.
  __device__ void finish(int tiles, index_t length) {
    for (index_t i = static_cast<int>(threadIdx.x); i < length - tiles * kColumns; i += kThreads) {
      table_[tiles * kColumns + i] = i < kRows ? memory_.rest[(tiles + 1) % 2][i] : 0.0F;
    }
  }

 private:
  DiagonalMemory& memory_;
  float* table_;
};

}  // namespace regroup::flash
