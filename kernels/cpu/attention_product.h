// Products of matrices that lie in cache: the arithmetic of attention.
//
// c[m, n] = sum_k a[m, k] b[k, n]. The left operand is read a unit at a time under any two strides (so that a
// matrix and its transpose serve alike), the right one has been packed into panels of kPanel columns, each
// dense [depth, width], so that it streams. Results come in blocks of kRows x kPanel, held in registers over
// the contraction (Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", 2008).
#pragma once

#include <algorithm>

#include "kernels/cpu/attention_lanes.h"

namespace regroup::attention {

inline constexpr index_t kRows = 4;
// Keys come in multiples of this: they are columns of scores and rows of dk and dv.
template <class S>
inline constexpr index_t kKeyMultiple = std::max(kLanes<S>, kRows);
inline constexpr index_t kPanelVectors = kVectorBytes == 64 ? 4 : 2;  // 16 of 32, 8 of 16 registers
template <class T>
inline constexpr index_t kPanel = kPanelVectors* kLanes<stat_t<T>>;

// Element (m, k) of units is data[m * row + k * step].
template <class T>
struct Left {
  const Unit<T>* data = nullptr;
  index_t row = 0;
  index_t step = 0;
};

// `depth` units by `columns`, a multiple of kLanes; see the top of this file. Contraction or columns may be
// cut by the caller: it then passes the part [first, first + ...).
template <class T>
struct Right {
  const Unit<T>* data = nullptr;
  index_t depth = 0;
  index_t columns = 0;

  index_t width(index_t column) const {
    return std::min(kPanel<T>, columns - column / kPanel<T> * kPanel<T>);
  }
  // Unit k of the panel that begins at `column`.
  const Unit<T>* panel(index_t column, index_t k) const { return data + column * depth + k * width(column); }
};

template <class S>
struct Rows {
  S* data = nullptr;
  index_t stride = 0;
};

// c = start + a b for one block; c = a b where `start` has no data. Not inlined: among other code g++ 12 runs
// out of registers and loads b anew for every row.
template <class T, int Vectors>
[[gnu::noinline]] void block_product(const Unit<T>* a, index_t a_row, index_t a_step, const Unit<T>* b,
                                     index_t b_step, index_t depth, Rows<const stat_t<T>> start,
                                     Rows<stat_t<T>> c) {
  using S = stat_t<T>;
  constexpr index_t kWidth = kLanes<S>;
  Vector<S> sum[kRows][Vectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      sum[r][v] = start.data ? load<S>(start.data + r * start.stride + v * kWidth) : Vector<S>{};
    }
  }
  for (index_t k = 0; k < depth; ++k) {
    Vector<Unit<T>> right[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      right[v] = load<Unit<T>>(b + v * kWidth);
      hold(right[v]);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      Unit<T> left;
      std::memcpy(&left, a + r * a_row, sizeof left);  // it may have been stored as two halves
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) multiply_add(sum[r][v], left, right[v]);
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) save<S>(c.data + r * c.stride + v * kWidth, sum[r][v]);
  }
}

// What of a product a block of rows needs: columns before `columns`, units [first, last) of the contraction.
struct Extent {
  index_t columns = 0, first = 0, last = 0;
};

// c [rows, columns] = start + a b over the units [first, last) of the contraction; a begins at unit `first`,
// b at column `column` (a multiple of kPanel); rows a multiple of kRows, columns of kLanes. extent_of(m) may
// cut this short for the block of rows from m on, as causal attention does; what it cuts off c is not
// written.
template <class T, class ExtentOf>
void product(index_t rows, Left<T> a, const Right<T>& b, index_t column, Extent whole,
             Rows<const stat_t<T>> start, Rows<stat_t<T>> c, ExtentOf extent_of) {
  constexpr index_t kWidth = kLanes<stat_t<T>>;
  constexpr index_t kDepth = 64;  // of a pass: kDepth x kPanel units of b stay in the first-level cache
  for (index_t n = 0; n < whole.columns; n += kPanel<T>) {
    const index_t step = b.width(column + n);
    for (index_t pass = whole.first; pass == whole.first || pass < whole.last; pass += kDepth) {
      for (index_t m = 0; m < rows; m += kRows) {
        const Extent extent = extent_of(m);
        const index_t vectors = std::min(kPanelVectors, (extent.columns - n) / kWidth);
        const index_t first = std::max(pass, extent.first), last = std::min(pass + kDepth, extent.last);
        const bool begins = extent.first >= pass && extent.first < pass + kDepth;
        if (vectors <= 0 || (first >= last && !begins)) continue;
        const Unit<T>* left = a.data + m * a.row + (first - whole.first) * a.step;
        const Unit<T>* panel = b.panel(column + n, first);
        const index_t depth = std::max<index_t>(0, last - first);
        const Rows<stat_t<T>> block{c.data + m * c.stride + n, c.stride};
        Rows<const stat_t<T>> begin{block.data, block.stride};
        if (begins) begin = {start.data ? start.data + m * start.stride + n : nullptr, start.stride};
        switch (vectors) {
          case 1:
            block_product<T, 1>(left, a.row, a.step, panel, step, depth, begin, block);
            break;
          case 2:
            block_product<T, 2>(left, a.row, a.step, panel, step, depth, begin, block);
            break;
          case 3:
            block_product<T, 3>(left, a.row, a.step, panel, step, depth, begin, block);
            break;
          default:
            block_product<T, kPanelVectors>(left, a.row, a.step, panel, step, depth, begin, block);
        }
      }
    }
  }
}

}  // namespace regroup::attention
