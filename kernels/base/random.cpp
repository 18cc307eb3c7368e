#include "kernels/base/random.h"

#include <bit>
#include <cmath>
#include <numbers>

#include "kernels/base/error.h"

namespace regroup {
namespace {

// The finaliser of SplitMix64: a bijection of 64-bit words in which every input bit reaches every output bit.
std::uint64_t mix(std::uint64_t x) {
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

}  // namespace

Philox::Philox(std::uint64_t seed, RandomPurpose purpose, std::uint64_t subkey)
    : key_(mix(mix(mix(seed) ^ static_cast<std::uint64_t>(purpose)) ^ subkey)) {}

Philox Philox::child(std::uint64_t coordinate) const { return from_key(mix(mix(key_) ^ coordinate)); }

std::uint64_t Philox::below(std::uint64_t bound, std::uint64_t index) const {
  check(bound > 0, "a random number below 0 was asked for");
  const std::uint64_t threshold = (0 - bound) % bound;
  for (std::uint64_t attempt = 0;; ++attempt) {
    const auto w = (*this)(index, attempt);
    const std::uint64_t word = (std::uint64_t{w[1]} << 32) | w[0];
    __extension__ using Wide = unsigned __int128;
    const Wide product = static_cast<Wide>(word) * bound;
    if (static_cast<std::uint64_t>(product) >= threshold) return static_cast<std::uint64_t>(product >> 64);
  }
}

double Philox::uniform(std::uint64_t index) const {
  return (static_cast<double>(word(index) >> 11) + 0.5) * 0x1.0p-53;
}

double Philox::normal(std::uint64_t index) const {
  const auto w = (*this)(index);
  const auto unit = [](std::uint32_t high, std::uint32_t low) {
    return (static_cast<double>(((std::uint64_t{high} << 32) | low) >> 11) + 0.5) * 0x1.0p-53;
  };
  return std::sqrt(-2.0 * std::log(unit(w[0], w[1]))) * std::cos(2.0 * std::numbers::pi * unit(w[2], w[3]));
}

std::uint64_t key_of(std::string_view name) {
  std::uint64_t hash = 0xCBF29CE484222325;
  for (const char c : name) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash;
}

FeistelPermutation::FeistelPermutation(const Philox& philox, std::uint64_t size)
    : philox_(philox), size_(size) {
  check(size > 0, "a permutation of nothing was asked for");
  half_bits_ = (std::bit_width(size - 1) + 1) / 2;
  if (half_bits_ == 0) half_bits_ = 1;
}

std::uint64_t FeistelPermutation::operator()(std::uint64_t index) const {
  check(index < size_, "index {} is outside a permutation of {}", index, size_);
  const std::uint64_t mask = (std::uint64_t{1} << half_bits_) - 1;
  constexpr std::uint64_t kRounds = 6;
  do {
    std::uint64_t left = index >> half_bits_;
    std::uint64_t right = index & mask;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      const auto w = philox_(right, round);
      const std::uint64_t next = left ^ (((std::uint64_t{w[1]} << 32) | w[0]) & mask);
      left = right;
      right = next;
    }
    index = (left << half_bits_) | right;
  } while (index >= size_);
  return index;
}

}  // namespace regroup
