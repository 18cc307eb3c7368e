// Dropout as a function of global coordinates (Backend, struct Dropout and AttentionOptions).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/base/random.h"
#include "kernels/dtype.h"

namespace regroup {

// Global element e is kept where word e % 4 of Philox at counter e / 4 is >= rate * 2^32.
class DropoutMask {
 public:
  DropoutMask(const Philox& key, double rate)
      : key_(key.key()),
        rate_(rate),
        threshold_(static_cast<std::uint32_t>(std::min(std::ceil(rate * 0x1p32), 0x1p32 - 1))) {}

  bool active() const { return rate_ > 0; }

  // factors[i] = 1 / (1 - rate) where global element first + i is kept, else 0, for 0 <= i < size.
  template <class S>
  void factors(index_t first, index_t size, S* factors) const {
    constexpr index_t kCounters = 64;
    const S kept = static_cast<S>(1.0 / (1.0 - rate_));
    static_assert(kCounters % kVector == 0);
    std::uint32_t words[4 * kCounters];
    while (size > 0) {
      const index_t skipped = first % 4;
      const index_t part = std::min(size, 4 * kCounters - skipped);
      draw(static_cast<std::uint64_t>(first / 4), (skipped + part + 3) / 4, words);
      const std::uint32_t threshold = threshold_;
#pragma omp simd
      for (index_t i = 0; i < part; ++i) factors[i] = words[skipped + i] >= threshold ? kept : S{0};
      first += part;
      factors += part;
      size -= part;
    }
  }

 private:
  static constexpr index_t kVector = 16;

  // Philox::operator()(counter + i) for i < count rounded up to whole vectors, written so that the loop over
  // i vectorises.
  void draw(std::uint64_t counter, index_t count, std::uint32_t* words) const {
    const auto key_low = static_cast<std::uint32_t>(key_), key_high = static_cast<std::uint32_t>(key_ >> 32);
#pragma omp simd
    for (index_t i = 0; i < (count + kVector - 1) / kVector * kVector; ++i) {
      const std::uint64_t position = counter + static_cast<std::uint64_t>(i);
      auto c0 = static_cast<std::uint32_t>(position), c1 = static_cast<std::uint32_t>(position >> 32);
      std::uint32_t c2 = 0, c3 = 0, k0 = key_low, k1 = key_high;
#pragma GCC unroll 10
      for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c0, p1 = std::uint64_t{0xCD9E8D57} * c2;
        c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<std::uint32_t>(p1);
        c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<std::uint32_t>(p0);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
      }
      words[4 * i] = c0;
      words[4 * i + 1] = c1;
      words[4 * i + 2] = c2;
      words[4 * i + 3] = c3;
    }
  }

  std::uint64_t key_;
  double rate_;
  std::uint32_t threshold_;
};

}  // namespace regroup
