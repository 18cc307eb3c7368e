// What nvcc adds to C++ in a .cu file, for g++. Included before the first line of every emulated .cu file.
#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#include "kernels/base/error.h"
#include "tests/cuda_emulation/machine.h"

// Blocks run one after another, so that one copy serves them all.
#undef __shared__
#define __shared__ static
#define __launch_bounds__(...)

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = regroup::emulation::kWarpSize;

// ---- Barriers and warps

inline void __syncthreads() { regroup::emulation::synchronize_block("__syncthreads"); }
inline int __syncthreads_count(int vote) {
  return regroup::emulation::synchronize_block("__syncthreads_count", vote != 0);
}
inline int __syncthreads_or(int vote) { return __syncthreads_count(vote) > 0; }
inline int __syncthreads_and(int vote) { return __syncthreads_count(vote == 0) == 0; }

namespace regroup::emulation {

// f(lane, values) of the values of all lanes, in every lane; a missing lane's value is 0xFF...
template <class T, class F>
T exchange(const char* what, unsigned mask, T value, F f) {
  check(mask == 0xFFFFFFFFU, "{} with mask {:#x}: only whole warps are emulated", what, mask);
  T result = value;
  struct Slot {
    T value, *result;
  };
  Slot mine{value, &result};
  collective(what, mine, [&f](const Slots<Slot>& slots) {
    std::array<T, kWarpSize> values;
    for (int i = 0; i < kWarpSize; ++i) {
      if (slots[i] != nullptr) values[i] = slots[i]->value;
      if (slots[i] == nullptr) std::fill_n(reinterpret_cast<unsigned char*>(&values[i]), sizeof(T), 0xFF);
    }
    for (int i = 0; i < kWarpSize; ++i) {
      if (slots[i] != nullptr) *slots[i]->result = f(i, values);
    }
  });
  return result;
}

// The value of lane source(i) of the segment of `width` lanes that lane i is in; its own where that is
// outside.
template <class T, class F>
T shuffle(const char* what, unsigned mask, T value, int width, F source) {
  // Lanes may ask for different sources: each brings its own.
  struct Asked {
    T value;
    int from;
  };
  const int me = lane(), first = me / width * width, from = source(me - first);
  const int lane_asked = from >= 0 && from < width ? first + from : me;
  return exchange(what, mask, Asked{value, lane_asked},
                  [](int i, const std::array<Asked, kWarpSize>& all) {
                    const auto at = static_cast<std::size_t>(all[static_cast<std::size_t>(i)].from);
                    return Asked{all[at].value, 0};
                  })
      .value;
}

}  // namespace regroup::emulation

inline void __syncwarp(unsigned mask = 0xFFFFFFFFU) {
  regroup::emulation::exchange("__syncwarp", mask, 0, [](int, const auto&) { return 0; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize) {
  return regroup::emulation::shuffle("__shfl_sync", mask, value, width, [=](int) { return lane % width; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return regroup::emulation::shuffle("__shfl_xor_sync", mask, value, width,
                                     [=](int i) { return i ^ lane_mask; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = warpSize) {
  return regroup::emulation::shuffle("__shfl_down_sync", mask, value, width,
                                     [=](int i) { return i + delta; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = warpSize) {
  return regroup::emulation::shuffle("__shfl_up_sync", mask, value, width, [=](int i) { return i - delta; });
}
inline unsigned __ballot_sync(unsigned mask, int vote) {
  return regroup::emulation::exchange("__ballot_sync", mask, unsigned{vote != 0}, [](int, const auto& votes) {
    unsigned bits = 0;
    for (unsigned i = 0; i < 32; ++i) bits |= (votes[i] == 1 ? 1U : 0U) << i;
    return bits;
  });
}
inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote == 0) == 0; }

// ---- Memory

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
// Threads take turns.
template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address + value);
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::max(*address, value));
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, std::min(*address, value));
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address | value);
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, value);
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return *address == expected ? std::exchange(*address, value) : *address;
}

// ---- Numbers

inline float rsqrtf(float x) { return 1.0F / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((static_cast<unsigned long long>(a) * b) >> 32);
}
template <class T>
constexpr T min(T a, std::type_identity_t<T> b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, std::type_identity_t<T> b) {
  return a < b ? b : a;
}
