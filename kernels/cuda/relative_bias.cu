#include <bit>
#include <vector>

#include "kernels/cuda/block_reduce.cuh"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/elementwise.cuh"

namespace regroup {
namespace {

// bucket[d] of d = offset - queries + 1.
template <class T>
struct RelativeBias {
  const T* table;
  const std::int32_t* bucket;
  stat_t<T>* bias;
  index_t queries, offsets, heads;

  template <int N>
  __device__ void apply(index_t i) const {
    static_assert(N == 1);
    const index_t head = quotient(i, offsets), distance = i - head * offsets - queries + 1;
    bias[i] = widen(table[bucket[distance] * heads + head]);
  }
};

// A warp for each bucket and head: lanes take every 32nd offset, of which they keep those in the bucket.
template <class S>
__global__ void backward_kernel(const S* dbias, const std::int32_t* bucket, S* dtable, index_t queries,
                                index_t offsets, index_t heads) {
  const index_t head = blockIdx.x, of = index_t{blockIdx.y};
  const S* const from = dbias + head * offsets;
  S sum = 0;
#pragma unroll 4
  for (index_t offset = threadIdx.x; offset < offsets; offset += kWarpThreads) {
    if (bucket[offset - queries + 1] == of) sum += from[offset];
  }
  sum = warp_sum(sum);
  if (threadIdx.x == 0) dtable[of * heads + head] += sum;
}

index_t reach_of(index_t queries, index_t offsets) { return std::max(queries - 1, offsets - queries); }

}  // namespace

const std::int32_t* BucketTables::of(CudaDevice& device, const RelativeBiasOptions& options, index_t buckets,
                                     index_t reach) {
  Table& table = tables_[{
      .bidirectional = options.bidirectional, .max_distance = options.max_distance, .buckets = buckets}];
  if (table.reach < reach) {
    // Rounded up, so that growing lengths seldom need another.
    const auto longest = static_cast<index_t>(std::bit_ceil(static_cast<std::uint64_t>(reach)));
    std::vector<std::int32_t> host;
    for (index_t distance = -longest; distance <= longest; ++distance) {
      host.push_back(narrow<std::int32_t>(
          relative_position_bucket(distance, options.bidirectional, buckets, options.max_distance)));
    }
    const auto bytes = static_cast<index_t>(host.size() * sizeof(std::int32_t));
    table.memory = device.allocate(bytes);
    device.upload(host.data(), table.memory.data(), bytes);
    table.reach = longest;
  }
  return static_cast<const std::int32_t*>(table.memory.data()) + table.reach;
}

void CudaBackend::do_relative_bias(Tensor table, index_t queries, Tensor bias,
                                   const RelativeBiasOptions& options) {
  const std::int32_t* const bucket =
      bucket_tables_.of(device_, options, table[0], reach_of(queries, bias[1]));
  dispatch(table.dtype, [&]<class T>() {
    const RelativeBias<T> op{.table = table.as<T>(),
                             .bucket = bucket,
                             .bias = bias.as<stat_t<T>>(),
                             .queries = queries,
                             .offsets = bias[1],
                             .heads = table[1]};
    map<1>(device_, op, bias.numel(), false);
  });
}

void CudaBackend::do_relative_bias_backward(Tensor dbias, index_t queries, Tensor dtable,
                                            const RelativeBiasOptions& options) {
  const std::int32_t* const bucket =
      bucket_tables_.of(device_, options, dtable[0], reach_of(queries, dbias[1]));
  dispatch(dbias.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const Grid grid{.blocks = dim3(block_count(dbias[0], 1), block_count(dtable[0], 1)),
                    .threads = kWarpThreads};
    launch(device_, grid, backward_kernel<S>, dbias.as<S>(), bucket, dtable.as<S>(), queries, dbias[1],
           dbias[0]);
  });
}

}  // namespace regroup
