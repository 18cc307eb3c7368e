#include "kernels/cpu/cpu_backend.h"

namespace regroup {
namespace {

index_t bucket_of(index_t offset, index_t queries, index_t buckets, const RelativeBiasOptions& options) {
  return relative_position_bucket(offset - queries + 1, options.bidirectional, buckets, options.max_distance);
}

}  // namespace

// Small beside everything else (one logarithm for each distance), so one thread does it.
void CpuBackend::do_relative_bias(Tensor table, index_t queries, Tensor bias,
                                  const RelativeBiasOptions& options) {
  dispatch(table.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const T* const from = table.as<T>();
    S* const to = bias.as<S>();
    const index_t heads = table[1], offsets = bias[1];
    for (index_t offset = 0; offset < offsets; ++offset) {
      const T* const row = from + bucket_of(offset, queries, table[0], options) * heads;
      for (index_t h = 0; h < heads; ++h) to[h * offsets + offset] = static_cast<S>(row[h]);
    }
  });
}

void CpuBackend::do_relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable,
                                           const RelativeBiasOptions& options) {
  dispatch(dbias.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const S* const from = dbias.as<S>();
    S* const to = dtable.as<S>();
    const index_t heads = dbias[0], offsets = dbias[1];
    for (index_t offset = 0; offset < offsets; ++offset) {
      S* const row = to + bucket_of(offset, queries, dtable[0], options) * heads;
      for (index_t h = 0; h < heads; ++h) row[h] += from[h * offsets + offset];
    }
  });
}

}  // namespace regroup
