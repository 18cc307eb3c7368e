// From rows of q, k, v in memory to the operands of product().
#pragma once

#include <algorithm>
#include <cstddef>

#include "kernels/cpu/attention_product.h"

namespace regroup::attention {

// Bump allocation inside a thread's workspace; over no memory it only counts.
class Carver {
 public:
  explicit Carver(std::byte* memory) : memory_(memory) {}

  template <class U>
  U* take(index_t count) {
    std::byte* place = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count * static_cast<index_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(place);
  }
  index_t used() const { return used_; }

 private:
  std::byte* memory_;
  index_t used_ = 0;
};

// Asks for rows that will be packed soon: they lie far apart, where the processor does not foresee them.
template <class T>
void prefetch(Rows<const T> x, index_t rows, index_t columns) {
  constexpr index_t kLine = 64 / sizeof(T);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t n = 0; n < columns; n += kLine) __builtin_prefetch(x.data + r * x.stride + n, 0, 2);
  }
}

// `rows` x `columns` as the left operand, contraction over the columns: dense rows of divide_up(columns,
// kTerms) units, zeros up to `padded_rows`.
template <class T>
Left<T> pack_left(Rows<const T> x, index_t rows, index_t columns, index_t padded_rows, Unit<T>* packed) {
  const index_t depth = round_up(columns, kTerms<T>) / kTerms<T>;
  for (index_t r = 0; r < rows; ++r) {
    const T* row = x.data + r * x.stride;
    Unit<T>* units = packed + r * depth;
    const index_t whole = columns / kTerms<T>;
    std::memcpy(units, row, static_cast<std::size_t>(whole * kTerms<T>) * sizeof(T));
    if (whole < depth) units[whole] = make_unit(row[columns - 1], T{});
  }
  std::fill(packed + rows * depth, packed + padded_rows * depth, Unit<T>{});
  return {packed, depth, 1};
}

// `rows` x `columns` as the right operand, contraction over the rows: zeros up to `padded_rows` (a multiple
// of kTerms) and to whole vectors of columns.
template <class T>
Right<T> pack_right(Rows<const T> x, index_t rows, index_t columns, index_t padded_rows, Unit<T>* packed) {
  const Right<T> right{packed, padded_rows / kTerms<T>, round_up(columns, kLanes<stat_t<T>>)};
  for (index_t column = 0; column < right.columns; column += kPanel<T>) {
    const index_t width = right.width(column), filled = std::clamp<index_t>(columns - column, 0, width);
    Unit<T>* panel = packed + column * right.depth;
    for (index_t k = 0; k < right.depth; ++k) {
      Unit<T>* units = panel + k * width;
      const index_t row = k * kTerms<T>;
      const T* first = x.data + row * x.stride + column;
      if (row + kTerms<T> <= rows) {
        const T* second = first + (kTerms<T> - 1) * x.stride;
        interleave<T>(first, second, filled, units);
      } else if (row < rows) {
        for (index_t n = 0; n < filled; ++n) units[n] = make_unit(first[n], T{});
      } else {
        std::fill(units, units + filled, Unit<T>{});
      }
      std::fill(units + filled, units + width, Unit<T>{});
    }
  }
  return right;
}

// The transpose of `rows` x `columns` as the right operand, contraction over the columns; zeros up to
// `padded_rows`, a multiple of kLanes.
template <class T>
Right<T> pack_right_transposed(Rows<const T> x, index_t rows, index_t columns, index_t padded_rows,
                               Unit<T>* packed) {
  constexpr index_t kBlock = kLanes<stat_t<T>>;  // units of a register, too
  const index_t depth = round_up(columns, kTerms<T>) / kTerms<T>;
  const Right<T> right{packed, depth, padded_rows};
  for (index_t first = 0; first < padded_rows; first += kBlock) {
    const index_t panel = first / kPanel<T> * kPanel<T>, width = right.width(panel);
    Unit<T>* units = packed + panel * depth + (first - panel);
    for (index_t k = 0; k < depth; k += kBlock) {
      const index_t count = std::min(kBlock, depth - k);  // of units
      const index_t terms = std::min(kBlock * kTerms<T>, columns - k * kTerms<T>);
      Vector<Unit<T>> block[kBlock] = {};
      for (index_t r = 0; r < std::min(kBlock, rows - first); ++r) {
        const T* row = x.data + (first + r) * x.stride + k * kTerms<T>;
        if (terms == kBlock * kTerms<T>) {
          std::memcpy(&block[r], row, sizeof block[r]);
        } else {
          std::memcpy(&block[r], row, static_cast<std::size_t>(terms) * sizeof(T));
        }
      }
      transpose<Unit<T>>(block);
      for (index_t u = 0; u < count; ++u) save<Unit<T>>(units + (k + u) * width, block[u]);
    }
  }
  return right;
}

// y [rows, columns] = factor * x in T; factors == nullptr: 1. x has whole vectors of columns.
template <class T>
void unpack(Rows<const stat_t<T>> x, const stat_t<T>* factors, index_t rows, index_t columns, Rows<T> y) {
  for (index_t r = 0; r < rows; ++r) {
    const stat_t<T>* row = x.data + r * x.stride;
    T* out = y.data + r * y.stride;
    const stat_t<T> factor = factors ? factors[r] : stat_t<T>{1};
    index_t n = 0;
    for (; n + kLanes<stat_t<T>> <= columns; n += kLanes<stat_t<T>>) {
      save_as(out + n, load<stat_t<T>>(row + n) * factor);
    }
    for (; n < columns; ++n) store(out[n], row[n] * factor);
  }
}

}  // namespace regroup::attention
