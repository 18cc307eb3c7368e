// A call of attention as its kernels see it.
#pragma once

#include <type_traits>

#include "kernels/cuda/attention.h"
#include "kernels/cuda/dropout.cuh"

namespace regroup {

// A tensor [B, length, heads, C] whose rows [heads, C] are dense.
template <class T>
struct HeadRows {
  T* data = nullptr;
  index_t sample_stride = 0, row_stride = 0, size = 0;

  HeadRows() = default;
  explicit HeadRows(const Tensor& x)
      : data(x.as<std::remove_const_t<T>>()),
        sample_stride(x.stride[0]),
        row_stride(x.stride[1]),
        size(x[3]) {}
  __device__ T* at(int sample, int position, int head) const {
    return data + sample * sample_stride + position * row_stride + head * size;
  }
};

// bfloat16 [B, length, heads, C] whose rows begin at multiples of 16 bytes.
inline bool has_aligned_rows(const Tensor& x) {
  return reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && x.stride[0] % 8 == 0 && x.stride[1] % 8 == 0;
}

template <class T>
struct AttentionArguments {
  using S = stat_t<T>;
  HeadRows<const T> q, k, v;
  const S* bias;                 // [H, Q + K - 1], null where there is none
  const std::int32_t* key_mask;  // [B, K], null where there is none
  S* log_sum_exp;                // [B, H, Q]
  int samples, queries, keys, heads, groups, heads_per_group, size;
  bool causal, drops;
  DropoutWords dropout;
  index_t first_sample, first_head, all_heads;

  explicit AttentionArguments(const AttentionCall& call)
      : q(call.q),
        k(call.k),
        v(call.v),
        bias(call.bias ? call.bias.as<S>() : nullptr),
        key_mask(call.key_mask ? call.key_mask.as<std::int32_t>() : nullptr),
        log_sum_exp(call.log_sum_exp.as<S>()),
        samples(narrow<int>(call.q[0])),
        queries(narrow<int>(call.q[1])),
        keys(narrow<int>(call.k[1])),
        heads(narrow<int>(call.q[2])),
        groups(narrow<int>(call.k[2])),
        heads_per_group(heads / groups),
        size(narrow<int>(call.q[3])),
        causal(call.options.causal),
        drops(call.options.dropout_rate > 0),
        dropout(call.options.dropout_key, call.options.dropout_rate),
        first_sample(call.options.first_sample),
        first_head(call.options.first_head),
        all_heads(call.options.heads) {}

  // The global element (0, 0) of one head's probabilities, for dropout.
  __device__ std::uint64_t first_element(int sample, int head) const {
    return static_cast<std::uint64_t>((first_sample + sample) * all_heads + first_head + head) *
           static_cast<std::uint64_t>(queries) * static_cast<std::uint64_t>(keys);
  }
  __device__ index_t statistics_of(int sample, int head) const {  // of log_sum_exp
    return (index_t{sample} * heads + head) * queries;
  }
};

}  // namespace regroup
