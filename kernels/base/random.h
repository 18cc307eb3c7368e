// Counter-based random numbers: every draw is a pure function of (seed, purpose, global coordinates), so no
// draw depends on how a run is laid out or how often it was interrupted.
#pragma once

#include <array>
#include <cstdint>
#include <string_view>

namespace regroup {

// What a draw is for; keeps the streams of one seed apart.
enum class RandomPurpose : std::uint32_t {
  kInitialise = 1,
  kDropout,
  kSpanMask,
  kSampleOrder,
  kHeadChoice,
  kTest
};

// Philox4x32-10 (Salmon et al., SC 2011): 128-bit counter and 64-bit key to four independent 32-bit words.
// Trivially copyable and drawn from by a constexpr function, so that it works in kernels too.
class Philox {
 public:
  Philox() = default;
  // `subkey` is the draw's outer coordinate: a step, an epoch, a parameter (see key_of()).
  Philox(std::uint64_t seed, RandomPurpose purpose, std::uint64_t subkey = 0);

  // The four words at the 128-bit counter (high, low).
  constexpr std::array<std::uint32_t, 4> operator()(std::uint64_t low, std::uint64_t high = 0) const {
    std::array<std::uint32_t, 4> c = {static_cast<std::uint32_t>(low), static_cast<std::uint32_t>(low >> 32),
                                      static_cast<std::uint32_t>(high),
                                      static_cast<std::uint32_t>(high >> 32)};
    auto k0 = static_cast<std::uint32_t>(key_);
    auto k1 = static_cast<std::uint32_t>(key_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const std::uint64_t p0 = std::uint64_t{0xD2511F53} * c[0];
      const std::uint64_t p1 = std::uint64_t{0xCD9E8D57} * c[2];
      c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
           static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
      k0 += 0x9E3779B9;
      k1 += 0xBB67AE85;
    }
    return c;
  }

  // A generator whose draws are independent of this one's and a function of it and `coordinate`.
  Philox child(std::uint64_t coordinate) const;

  // The 64-bit word number `index` of the stream.
  std::uint64_t word(std::uint64_t index) const {
    const auto w = (*this)(index);
    return (std::uint64_t{w[1]} << 32) | w[0];
  }
  // Uniform in [0, bound) without bias (Lemire's multiplication with rejection), a function of `index`.
  std::uint64_t below(std::uint64_t bound, std::uint64_t index) const;
  // Uniform in (0, 1), 53 bits.
  double uniform(std::uint64_t index) const;
  // Standard normal (Box-Muller).
  double normal(std::uint64_t index) const;

  std::uint64_t key() const { return key_; }
  static Philox from_key(std::uint64_t key) {
    Philox philox;
    philox.key_ = key;
    return philox;
  }

 private:
  std::uint64_t key_ = 0;
};

// A stable 64-bit number for a name (FNV-1a), for use as a coordinate.
std::uint64_t key_of(std::string_view name);

// A pseudo-random permutation of [0, size) in O(1) memory: a balanced Feistel network of Philox rounds over
// the next even power of two, with cycle walking. A function of (philox, size) only.
class FeistelPermutation {
 public:
  FeistelPermutation(const Philox& philox, std::uint64_t size);
  std::uint64_t operator()(std::uint64_t index) const;

 private:
  Philox philox_;
  std::uint64_t size_;
  int half_bits_;
};

}  // namespace regroup
