// What FlashAttention's kernels share: tiles of bfloat16 rows in shared memory, products of a warp's rows
// with them, bias, masks and dropout of a tile of scores.
//
// A block has kWarps warps; each owns 16 kBlocks rows of a tile of scores of kColumns columns. Scores live in
// mma's layout: with g = lane / 4 and t = lane % 4, element scores[i][n][2 h + e] is row 16 i + 8 h + g of
// the warp, column 8 n + 2 t + e. So a lane has part in 2 kBlocks rows, "lines": line 2 i + h is row 8 (2 i +
// h) + g.
#pragma once

#include <cstdint>

#include "kernels/cuda/attention_arguments.cuh"
#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/element.cuh"
#include "kernels/cuda/ptx.cuh"

namespace regroup::flash {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kColumns = 64;
constexpr int kSteps = kColumns / 8;  // blocks of 8 columns
constexpr float kLog2E = 1.44269504088896341F, kLn2 = 0.693147180559945309F;

__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / 32; }
__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % 32; }
__device__ inline int lane_row() { return lane_index() / 4; }           // g
__device__ inline int lane_column() { return 2 * (lane_index() % 4); }  // 2 t

template <int kBlocks>
using Scores = float[kBlocks][kSteps][4];
// Rows of width C in mma's layout.
template <int kBlocks, int C>
using Sums = float[kBlocks][C / 8][4];
// Scores rounded to bfloat16, as mma's left operand: 16 columns a step.
template <int kBlocks>
using Operand = std::uint32_t[kBlocks][kColumns / 16][4];

// ---- Tiles in shared memory: rows of C elements in chunks of 16 bytes, chunk c of row r at place c ^ (r %
// 8), so that the same chunk of 8 neighbouring rows lies in all banks.

template <int C>
__device__ bfloat16* chunk_at(bfloat16* tile, int row, int chunk) {
  return tile + row * C + ((chunk ^ (row & 7)) << 3);
}

// Rows 0 .. kRows - 1 from `rows` on in the background; zeros from row `count` and column `size` on.
template <int C, int kRows, int kThreads = flash::kThreads>
__device__ void copy_rows(bfloat16* tile, const bfloat16* rows, index_t stride, int count, int size) {
  constexpr int kStep = kThreads / (C / 8);  // rows at a time, a multiple of 8
  const int row = static_cast<int>(threadIdx.x) / (C / 8), chunk = static_cast<int>(threadIdx.x) % (C / 8);
  const bool inside = chunk * 8 < size;
  bfloat16* to = chunk_at<C>(tile, row, chunk);
  const bfloat16* from = rows + row * stride + chunk * 8;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const bool valid = inside && row + i * kStep < count;
    ptx::cp_async_16(to + i * kStep * C, valid ? from : rows, valid);
    from += kStep * stride;
  }
}

// The left operand of step k: 16 rows from `row` on, columns 16 k ...
template <int C>
__device__ void load_left(std::uint32_t (&a)[4], bfloat16* tile, int row, int k) {
  ptx::ldmatrix_x4(a, chunk_at<C>(tile, lane_index() & 15, 2 * k + (lane_index() >> 4)) + row * C);
}

__device__ inline void multiply(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0,
                                std::uint32_t b1) {
  const std::uint32_t b[2] = {b0, b1};
  ptx::mma_bf16_m16n8k16(d, a, b);
}

// The warp's rows of a tile as left operands; held in registers, or read again at each use where those are
// too many.
template <int C, int kBlocks, bool kHeld>
struct Rows {
  std::uint32_t fragments[kHeld ? C / 16 : 1][kBlocks][4];
  bfloat16* tile;
  int first;

  __device__ void load(bfloat16* rows, int row) {
    tile = rows;
    first = row;
    if constexpr (kHeld) {
#pragma unroll
      for (int k = 0; k < C / 16; ++k) {
#pragma unroll
        for (int i = 0; i < kBlocks; ++i) load_left<C>(fragments[k][i], tile, first + 16 * i, k);
      }
    }
  }
};

// scores = rows tile^T, over the C columns; the tile has kColumns rows.
template <int C, int kBlocks, bool kHeld>
__device__ void multiply_transposed(Scores<kBlocks>& scores, Rows<C, kBlocks, kHeld>& rows, bfloat16* tile) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (float& score : scores[i][n]) score = 0;
    }
  }
  const int row = ((lane_index() >> 4) << 3) + (lane_index() & 7), half = (lane_index() >> 3) & 1;
// Rolled where it may be: unrolled, the addresses of all steps would be kept in registers.
#pragma unroll(kHeld ? C / 16 : 2)
  for (int k = 0; k < C / 16; ++k) {
    if constexpr (!kHeld) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) load_left<C>(rows.fragments[0][i], rows.tile, rows.first + 16 * i, k);
    }
#pragma unroll
    for (int n = 0; n < kSteps; n += 2) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4(b, chunk_at<C>(tile, row, 2 * k + half) + 8 * n * C);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        multiply(scores[i][n], rows.fragments[kHeld ? k : 0][i], b[0], b[1]);
        multiply(scores[i][n + 1], rows.fragments[kHeld ? k : 0][i], b[2], b[3]);
      }
    }
  }
}

// sums += operand tile, over the tile's kColumns rows.
template <int C, int kBlocks>
__device__ void multiply_add(Sums<kBlocks, C>& sums, const Operand<kBlocks>& operand, bfloat16* tile) {
#pragma unroll
  for (int k = 0; k < kColumns / 16; ++k) {
#pragma unroll
    for (int n = 0; n < C / 8; n += 2) {
      std::uint32_t b[4];
      ptx::ldmatrix_x4_transposed(b,
                                  chunk_at<C>(tile, lane_index() & 15, n + (lane_index() >> 4)) + 16 * k * C);
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
        multiply(sums[i][n], operand[i][k], b[0], b[1]);
        multiply(sums[i][n + 1], operand[i][k], b[2], b[3]);
      }
    }
  }
}

template <int kBlocks>
__device__ void round_scores(Operand<kBlocks>& operand, const Scores<kBlocks>& scores) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
      operand[i][n / 2][n % 2 * 2] = ptx::pack_bf16(scores[i][n][0], scores[i][n][1]);
      operand[i][n / 2][n % 2 * 2 + 1] = ptx::pack_bf16(scores[i][n][2], scores[i][n][3]);
    }
  }
}

// The warp's rows, line l times factors[l], by way of its part of a tile in shared memory, where row `row` is
// the warp's first, to positions first .. of a head; whole rows of `size` elements below `count`.
template <int C, int kBlocks>
__device__ void store_rows(const Sums<kBlocks, C>& sums, const float (&factors)[2 * kBlocks], bfloat16* tile,
                           int row, bfloat16* to, index_t stride, int count, int size) {
  __syncwarp();
#pragma unroll
  for (int l = 0; l < 2 * kBlocks; ++l) {
#pragma unroll
    for (int n = 0; n < C / 8; ++n) {
      const float* pair = sums[l / 2][n] + l % 2 * 2;
      bfloat16* place = chunk_at<C>(tile, row + 8 * l + lane_row(), n) + lane_column();
      *reinterpret_cast<std::uint32_t*>(place) = ptx::pack_bf16(pair[0] * factors[l], pair[1] * factors[l]);
    }
  }
  __syncwarp();
#pragma unroll
  for (int piece = lane_index(); piece < 16 * kBlocks * C / 8; piece += 32) {
    const int r = piece / (C / 8), chunk = piece % (C / 8);
    if (r < count && chunk * 8 < size) {
      store_pack<8>(to + r * stride + chunk * 8, load_pack<8>(chunk_at<C>(tile, row + r, chunk)));
    }
  }
}

// ---- T5's bias. A tile of scores needs its diagonals only: a window of kRows + kColumns - 1 numbers, times
// log2(e), in shared memory. Of these a lane needs one pair for each difference of a step and a line.

// Numbers `first` .. first + kCount - 1 of `table`, zeros outside, in two halves around the work on a tile.
template <int kCount, int kThreads = flash::kThreads>
class Window {
 public:
  __device__ void fetch(const float* table, int size, int first) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = first + i * kThreads + static_cast<int>(threadIdx.x);
      values_[i] = place >= 0 && place < size ? table[place] : 0.0F;
    }
  }
  __device__ void store(float* window) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int place = i * kThreads + static_cast<int>(threadIdx.x);
      if (place < kCount) window[place] = values_[i] * kLog2E;
    }
  }

 private:
  static constexpr int kEach = (kCount + kThreads - 1) / kThreads;
  float values_[kEach];
};

// scores = log2(e) scores + bias, which lies at window[kSign (8 (n - line) + e)] for the lane.
template <int kBlocks, int kSign>
__device__ void add_bias(Scores<kBlocks>& scores, const float* window) {
  constexpr int kLines = 2 * kBlocks;
  float diagonals[kSteps + kLines - 1][2];
#pragma unroll
  for (int d = 0; d < kSteps + kLines - 1; ++d) {
#pragma unroll
    for (int e = 0; e < 2; ++e) diagonals[d][e] = window[kSign * (8 * (d - kLines + 1) + e)];
  }
#pragma unroll
  for (int l = 0; l < kLines; ++l) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[l / 2][n][l % 2 * 2 + e];
        score = score * kLog2E + diagonals[n - l + kLines - 1][e];
      }
    }
  }
}

template <int kBlocks>
__device__ void scale(Scores<kBlocks>& scores, float factor) {
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (float& score : scores[i][n]) score *= factor;
    }
  }
}

// ---- Who sees whom

// One more than the last key that the mask lets through. Every warp finds it for itself.
__device__ inline int visible_end(const std::int32_t* mask, int keys) {
  if (mask == nullptr) return keys;
  constexpr int kReads = 4;
  for (int end = keys; end > 0; end -= 32 * kReads) {
    int last = 0;
#pragma unroll
    for (int i = 0; i < kReads; ++i) {
      const int key = end - 1 - 32 * i - lane_index();
      if (key >= 0 && mask[key] != 0) last = max(last, key + 1);
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      last = max(last, __shfl_xor_sync(kWholeWarp, last, distance));
    }
    if (last > 0) return last;
  }
  return 0;
}

// The mask of a tile's keys, read before the tile's product and looked at after it.
class KeyBits {
 public:
  __device__ void fetch(const std::int32_t* mask, int first, int keys) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int key = first + 32 * i + lane_index();
      seen_[i] = key < keys && (mask == nullptr || mask[key] != 0);
    }
  }
  // Bit c: key first + c exists and is visible.
  __device__ std::uint64_t bits() const {
    const std::uint64_t low = __ballot_sync(kWholeWarp, seen_[0]), high = __ballot_sync(kWholeWarp, seen_[1]);
    return low | high << 32;
  }

 private:
  bool seen_[2];
};

// Bits 0 .. count - 1, for any count.
__device__ inline std::uint64_t low_bits(int count) {
  if (count <= 0) return 0;
  return count >= 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
}

// Scores whose bit is not set become -inf. Line l's row may see columns below limit + 8 l only.
template <int kBlocks>
__device__ void hide(Scores<kBlocks>& scores, std::uint64_t bits, bool causal, int limit) {
#pragma unroll
  for (int l = 0; l < 2 * kBlocks; ++l) {
    const std::uint64_t line = (causal ? bits & low_bits(limit + 8 * l) : bits) >> lane_column();
    const auto low = static_cast<std::uint32_t>(line), high = static_cast<std::uint32_t>(line >> 32);
#pragma unroll
    for (int n = 0; n < kSteps; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& score = scores[l / 2][n][l % 2 * 2 + e];
        if (((n < 4 ? low : high) >> (n % 4 * 8 + e) & 1) == 0) score = -INFINITY;
      }
    }
  }
}

// ---- Dropout

// Bit i: element first + i is kept, 0 <= i < kCount <= 32.
template <int kCount>
__device__ std::uint32_t kept_bits(const DropoutWords& dropout, std::uint64_t first) {
  const int skipped = static_cast<int>(first % 4), counters = (skipped + kCount + 3) / 4;
  std::uint64_t bits = 0;
#pragma unroll 1
  for (int i = counters - 1; i >= 0; --i) {
    const auto words = dropout.key(first / 4 + static_cast<std::uint64_t>(i));
    bits <<= 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) bits |= std::uint64_t{words[j] >= dropout.threshold} << j;
  }
  return static_cast<std::uint32_t>(bits >> skipped);
}

// Which of a warp's probabilities are kept, where its rows are queries. Each lane draws for kBlocks halves of
// rows, so that no word is drawn twice, and asks the others for the rest.
template <int kBlocks>
class KeptKeys {
 public:
  // `first`: the global element of the warp's first row and the tile's first column.
  __device__ void draw(const DropoutWords& dropout, std::uint64_t first, int keys) {
    const int row = lane_index() % (16 * kBlocks), half = lane_index() / (16 * kBlocks);
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      words_[i] = kept_bits<32>(dropout, first + static_cast<std::uint64_t>(index_t{row} * keys) +
                                             static_cast<std::uint64_t>(32 * (half + i)));
    }
  }
  // Bit 8 n + e (of the low word for n < 4, else of the high word): the lane's element of line l.
  __device__ std::uint64_t line(int l) const {
    const int row = 8 * l + lane_row();
    const std::uint64_t low = __shfl_sync(kWholeWarp, words_[0], row),
                        high = kBlocks == 2 ? __shfl_sync(kWholeWarp, words_[kBlocks - 1], row)
                                            : __shfl_sync(kWholeWarp, words_[0], row + 16);
    return (low | high << 32) >> lane_column();
  }

 private:
  std::uint32_t words_[kBlocks];
};

}  // namespace regroup::flash
