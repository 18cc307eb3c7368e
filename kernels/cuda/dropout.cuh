// Dropout in kernels: the same words of the same counters as kernels/cpu/dropout_mask.h.
#pragma once

#include <cmath>

#include "kernels/backend.h"

namespace regroup {

// Global element e is kept where word e % 4 of Philox at counter e / 4 is >= rate 2^32. Passed by value into
// kernels.
struct DropoutWords {
  Philox key;
  std::uint32_t threshold = 0;
  double kept = 1;  // 1 / (1 - rate)

  DropoutWords(const Philox& words, double rate)
      : key(words),
        threshold(static_cast<std::uint32_t>(std::fmin(std::ceil(rate * 0x1p32), 0x1p32 - 1))),
        kept(1.0 / (1.0 - rate)) {}

  // The factors of elements 4 i .. 4 i + 3: `kept` or 0.
  template <class S>
  __device__ void four(std::uint64_t i, S (&factors)[4]) const {
    const auto words = key(i);
    for (int j = 0; j < 4; ++j) factors[j] = words[j] >= threshold ? static_cast<S>(kept) : S{0};
  }
  template <class S>
  __device__ S one(std::uint64_t element) const {
    return key(element / 4)[element % 4] >= threshold ? static_cast<S>(kept) : S{0};
  }
  // The factors of elements first .. first + N - 1: one draw for every four that lie in one counter.
  template <int N, class S>
  __device__ void factors(std::uint64_t first, S (&result)[N]) const {
    constexpr int kCounters = (N + 6) / 4;  // that N elements touch at most
    const auto skipped = static_cast<unsigned>(first % 4);
    std::uint32_t words[4 * kCounters] = {};
#pragma unroll
    for (int c = 0; c < kCounters; ++c) {
      if (4 * c >= static_cast<int>(skipped) + N) break;
      const auto four = key(first / 4 + static_cast<unsigned>(c));
#pragma unroll
      for (int j = 0; j < 4; ++j) words[4 * c + j] = four[static_cast<std::size_t>(j)];
    }
    // Moved down by `skipped`, in two steps that leave the words in registers.
#pragma unroll
    for (int j = 0; j + 1 < 4 * kCounters; ++j) words[j] = (skipped & 1) != 0 ? words[j + 1] : words[j];
#pragma unroll
    for (int j = 0; j + 2 < 4 * kCounters; ++j) words[j] = (skipped & 2) != 0 ? words[j + 2] : words[j];
#pragma unroll
    for (int j = 0; j < N; ++j) result[j] = words[j] >= threshold ? static_cast<S>(kept) : S{0};
  }
};

// Dropout of the rows of a [rows, columns] matrix (struct Dropout). Passed by value into kernels.
class DropoutFactors {
 public:
  DropoutFactors(const Dropout& dropout, index_t columns)
      : words_(dropout.key, dropout.rate),
        active_(dropout.rate > 0),
        columns_(columns),
        global_columns_(dropout.columns),
        first_(dropout.first_row * dropout.columns + dropout.first_column) {}

  // The factors of elements (row, column) .. (row, column + N - 1).
  template <int N, class S>
  __device__ void at(index_t row, index_t column, S (&result)[N]) const {
    if (active_) {
      words_.factors(static_cast<std::uint64_t>(first_ + row * global_columns_ + column), result);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) result[j] = S{1};
    }
  }
  __host__ __device__ index_t columns() const { return columns_; }

 private:
  DropoutWords words_;
  bool active_;
  index_t columns_, global_columns_, first_;
};

}  // namespace regroup
