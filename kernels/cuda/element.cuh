// Elements in kernels: T is read and written, S = stat_t<T> computed in.
#pragma once

#include <cuda_bf16.h>

#include "kernels/dtype.h"

namespace regroup {

// x as the S that a kernel computes in.
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(float x) { return x; }
__device__ inline float widen(bfloat16 x) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{x.bits}));
}

// x rounded to T, to nearest even.
template <class T>
__device__ T rounded(stat_t<T> x) {
  return x;
}
template <>
__device__ inline bfloat16 rounded<bfloat16>(float x) {
  bfloat16 result;
  result.bits = __nv_bfloat16_raw(__float2bfloat16_rn(x)).x;
  return result;
}

// N neighbouring elements that move in one access of sizeof(T) N <= 16 bytes.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};
template <class T>
constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

template <int N, class T>
__device__ Pack<T, N> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, N>*>(from);
}
template <int N, class T>
__device__ void store_pack(T* to, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// x = N neighbouring elements, in accesses of at most 16 bytes: `from` is aligned to 16 bytes, or to
// N sizeof(T) where that is less.
template <int N, class T, class S>
__device__ void load_values(const T* from, S (&x)[N]) {
  constexpr int kPart = N < kPackSize<T> ? N : kPackSize<T>;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    const Pack<T, kPart> pack = load_pack<kPart>(from + part);
#pragma unroll
    for (int i = 0; i < kPart; ++i) x[part + i] = static_cast<S>(widen(pack.at[i]));
  }
}
// The inverse: rounded to T.
template <int N, class T, class S>
__device__ void store_values(T* to, const S (&x)[N]) {
  constexpr int kPart = N < kPackSize<T> ? N : kPackSize<T>;
#pragma unroll
  for (int part = 0; part < N; part += kPart) {
    Pack<T, kPart> pack;
#pragma unroll
    for (int i = 0; i < kPart; ++i) pack.at[i] = rounded<T>(static_cast<stat_t<T>>(x[part + i]));
    store_pack<kPart>(to + part, pack);
  }
}

}  // namespace regroup
