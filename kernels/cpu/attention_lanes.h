// Vectors of one register and what attention's products keep in a lane.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "kernels/cpu/vector_math.h"
#include "kernels/dtype.h"

namespace regroup::attention {

// The widest register of the processor compiled for.
#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class S>
struct VectorOf {
  using type [[gnu::vector_size(kVectorBytes)]] = S;
};
// A register of S, with the arithmetic of GCC's vector extension.
template <class S>
using Vector = typename VectorOf<S>::type;
template <class S>
inline constexpr index_t kLanes = kVectorBytes / sizeof(S);

inline constexpr index_t round_up(index_t n, index_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// A unit is what one lane of an operand holds: one number, or for bfloat16 two consecutive terms of the
// contraction (the first in the low half), as vdpbf16ps wants them.
template <class T>
using Unit = std::conditional_t<std::is_same_v<T, bfloat16>, std::uint32_t, T>;
template <class T>
inline constexpr index_t kTerms = std::is_same_v<T, bfloat16> ? 2 : 1;

// The contraction's first term and second; the second does not exist but for bfloat16.
template <class T>
Unit<T> make_unit(T first, [[maybe_unused]] T second) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return first.bits | std::uint32_t{second.bits} << 16;
  } else {
    return first;
  }
}

template <class S>
inline Vector<S> load(const S* p) {
  Vector<S> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
inline void save(S* p, const Vector<S>& v) {
  std::memcpy(p, &v, sizeof v);
}

// Makes g++ hold v in a register where it would rather load it again at every use.
template <class V>
inline void hold([[maybe_unused]] V& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
}

// sum += a b, lane by lane, over the terms of a unit.
template <class S>
inline void multiply_add(Vector<S>& sum, S a, const Vector<S>& b) {
  sum += a * b;
}
inline void multiply_add(Vector<float>& sum, std::uint32_t a, const Vector<std::uint32_t>& b) {
#if defined(__AVX512BF16__)
  sum = (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                                        (__m512bh)b);
#else
  constexpr std::uint32_t kSecond = 0xFFFF0000;
  sum += std::bit_cast<float>(a & kSecond) * std::bit_cast<Vector<float>>(b & kSecond);
  sum += std::bit_cast<float>(a << 16) * std::bit_cast<Vector<float>>(b << 16);
#endif
}

// Sixteen-bit halves of a register's lanes.
using HalfVector [[gnu::vector_size(kVectorBytes / 2)]] = std::uint16_t;

// y[l] = x[l] in T, of one register of x.
template <class T>
inline void save_as(T* y, const Vector<stat_t<T>>& x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
#if defined(__AVX512BF16__)
    const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
    std::memcpy(static_cast<void*>(y), &rounded, sizeof rounded);
#else
    for (index_t l = 0; l < kLanes<float>; ++l) store(y[l], x[l]);
#endif
  } else {
    save<T>(y, x);
  }
}

// One register of x in S.
template <class T>
inline Vector<stat_t<T>> load_as(const T* x) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    HalfVector half;
    std::memcpy(&half, x, sizeof half);
    return std::bit_cast<Vector<float>>(__builtin_convertvector(half, Vector<std::uint32_t>) << 16);
  } else {
    return load<T>(x);
  }
}

// Two rows of one register, interleaved into units: y[l] = (first[l], second[l]).
inline void save_units(std::uint32_t* y, const Vector<float>& first, const Vector<float>& second) {
#if defined(__AVX512BF16__)
  const auto widened = [](const Vector<float>& x) {
    return __builtin_convertvector((HalfVector)_mm512_cvtneps_pbh((__m512)x), Vector<std::uint32_t>);
  };
  save<std::uint32_t>(y, widened(first) | widened(second) << 16);
#else
  for (index_t l = 0; l < kLanes<float>; ++l) y[l] = make_unit(bfloat16(first[l]), bfloat16(second[l]));
#endif
}

// units[n] = (first[n], second[n])
template <class T>
inline void interleave(const T* first, const T* second, index_t count, Unit<T>* units) {
  if constexpr (kTerms<T> == 1) {
    std::memcpy(units, first, static_cast<std::size_t>(count) * sizeof(T));
  } else {
#pragma omp simd
    for (index_t n = 0; n < count; ++n) units[n] = first[n].bits | std::uint32_t{second[n].bits} << 16;
  }
}

// Swaps the lanes l of a with bit Distance and the lanes l - Distance of b.
template <int Distance, class V, int... L>
inline void exchange(V& a, V& b, std::integer_sequence<int, L...>) {
  constexpr int kCount = sizeof...(L);
  const V upper = __builtin_shufflevector(a, b, (L & Distance ? kCount + L - Distance : L)...);
  b = __builtin_shufflevector(a, b, (L & Distance ? kCount + L : L + Distance)...);
  a = upper;
}

// rows[i][l] <-> rows[l][i]: swaps ever smaller off-diagonal blocks.
template <class U, int Distance = kVectorBytes / sizeof(U) / 2>
inline void transpose(Vector<U>* rows) {
  constexpr int kCount = kVectorBytes / sizeof(U);
#pragma GCC unroll 16
  for (int i = 0; i < kCount; ++i) {
    if (i & Distance) continue;
    exchange<Distance>(rows[i], rows[i + Distance], std::make_integer_sequence<int, kCount>{});
  }
  if constexpr (Distance > 1) transpose<U, Distance / 2>(rows);
}

// e^(x - shift) for x <= shift up to rounding: 2^n 2^f, |f| <= 1/2, a polynomial of degree 6 for 2^f. Error
// <= 2 ulp + 2^-23 (shift - x); 0 below 2^-125 (hidden scores: e^-inf = 0), NaN of NaN.
inline Vector<float> exponential(const Vector<float>& x, float shift) {
  constexpr float kLowest = -125, kRound = 0x1.8p23F;
  const Vector<float> t = (x - shift) * 0x1.715476p+0F;
  const Vector<float> shifted = t + kRound, f = t - (shifted - kRound);
  Vector<float> p = 1.5461444696e-4F * f + 1.3400428177e-3F;
  p = p * f + 9.6180566785e-3F;
  p = p * f + 5.5503272267e-2F;
  p = p * f + 2.4022650922e-1F;
  p = p * f + 6.9314720670e-1F;
  p = p * f + 1.0F;
  const auto n = std::bit_cast<Vector<std::uint32_t>>(shifted) - std::bit_cast<std::uint32_t>(kRound);
  p *= std::bit_cast<Vector<float>>((n + 127) << 23);
  return t < kLowest ? Vector<float>{} : p;
}
inline Vector<double> exponential(const Vector<double>& x, double shift) {
  Vector<double> y;
  for (index_t l = 0; l < kLanes<double>; ++l) y[l] = vector_exp(x[l] - shift);
  return y;
}

// All lanes combined by `combine`, in the order of a tree.
template <class S, class Combine>
inline S fold(const Vector<S>& x, Combine combine) {
  S y[kLanes<S>];
  save<S>(y, x);
#pragma GCC unroll 4
  for (index_t half = kLanes<S> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (index_t l = 0; l < half; ++l) y[l] = combine(y[l], y[l + half]);
  }
  return y[0];
}
template <class S>
inline S sum_of(const Vector<S>& x) {
  return fold<S>(x, [](S a, S b) { return a + b; });
}
template <class S>
inline S largest_of(const Vector<S>& x) {
  return fold<S>(x, [](S a, S b) { return a > b ? a : b; });
}

// sum_n x[n] y[n]
template <class T>
inline stat_t<T> dot(const T* x, const T* y, index_t count) {
  using S = stat_t<T>;
  constexpr index_t kWidth = kLanes<S>;
  Vector<S> sums{};
  index_t n = 0;
  for (; n + kWidth <= count; n += kWidth) sums += load_as(x + n) * load_as(y + n);
  S rest = 0;
  for (; n < count; ++n) rest += static_cast<S>(x[n]) * static_cast<S>(y[n]);
  return sum_of<S>(sums) + rest;
}

}  // namespace regroup::attention
