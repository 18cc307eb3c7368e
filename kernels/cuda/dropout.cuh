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
};

}  // namespace regroup
