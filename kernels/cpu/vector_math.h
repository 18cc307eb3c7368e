// Elementary functions without branches or calls, so that loops over them vectorise (`#pragma omp simd`).
// Reading needs no function: static_cast<float>(bfloat16) is a shift that vectorises too. For writing see
// store(). All are forced inline: a call left in a loop (g++ deems the body of a parallel loop cold) costs
// ten times what the loop does.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/dtype.h"

namespace regroup {

// y = x in y's type, rounded to nearest even. Assigning a bfloat16 copies a class, which g++ 12 does not
// vectorise; assigning its bits does.
[[gnu::always_inline]] inline void store(double& y, double x) { y = x; }
[[gnu::always_inline]] inline void store(float& y, float x) { y = x; }
[[gnu::always_inline]] inline void store(float& y, double x) { y = static_cast<float>(x); }
[[gnu::always_inline]] inline void store(double& y, float x) { y = x; }
[[gnu::always_inline]] inline void store(bfloat16& y, float x) { y.bits = bfloat16(x).bits; }
[[gnu::always_inline]] inline void store(bfloat16& y, double x) {
  y.bits = bfloat16(static_cast<float>(x)).bits;
}

// e^x. Error <= 1 ulp for -86.6 < x < 88.72; 0 below (e^x < 2.5e-38), +inf above, NaN of NaN. Cephes' expf:
// x = n ln 2 + r, |r| <= ln(2)/2, a polynomial of degree 7 for e^r, and n into the exponent.
[[gnu::always_inline]] inline float vector_exp(float x) {
  constexpr float kLowest = -86.6F, kHighest = 89.0F;
  constexpr float kRound = 0x1.8p23F;  // adding it rounds to an integer, held in the low bits
  const float clamped = x < kLowest ? kLowest : (x > kHighest ? kHighest : x);
  const float shifted = clamped * 0x1.715476p+0F + kRound;
  const float n = shifted - kRound;
  const float r = (clamped - n * 0x1.63p-1F) + n * 0x1.bd0106p-13F;  // ln 2 in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  // 2^(n - 1), then doubled: n = 128 would not fit. The subtraction wraps harmlessly where x is NaN.
  const std::uint32_t exponent = std::bit_cast<std::uint32_t>(shifted) - std::bit_cast<std::uint32_t>(kRound);
  const float y = p * std::bit_cast<float>((exponent + 126) << 23);
  return x < kLowest ? 0.0F : y + y;
}
[[gnu::always_inline]] inline double vector_exp(double x) { return std::exp(x); }

// gelu(x) = x/2 (1 + tanh(u)) = x s(2u), s the logistic function and u = sqrt(2/pi) (x + 0.044715 x^3), and
// its derivative s + x s (1 - s) 2 u'(x). Errors <= 4 ulp of x and 8 ulp of 1.
template <class S>
struct Gelu {
  S value, derivative;
};
template <class S>
[[gnu::always_inline]] inline Gelu<S> vector_gelu(S x) {
  constexpr S kTwoRootTwoOverPi = static_cast<S>(1.5957691216057308);
  constexpr S kCubic = static_cast<S>(0.044715);
  constexpr S kFlat = 30;  // beyond it s is 0 or 1; keeps the cube finite
  const S t = x < -kFlat ? -kFlat : (x > kFlat ? kFlat : x);
  const S square = t * t;
  const S twice_u = kTwoRootTwoOverPi * t * (S{1} + kCubic * square);
  // Of the larger of s and 1 - s, and the other from it, so that neither loses digits.
  const S e = vector_exp(-std::abs(twice_u));
  const S large = S{1} / (S{1} + e);
  const S s = twice_u < 0 ? e * large : large;
  const S slope = kTwoRootTwoOverPi * (S{1} + 3 * kCubic * square);
  return {x * s, s + x * (e * large * large) * slope};
}

}  // namespace regroup
