// The gradient of T5's bias out of sums along the diagonals of tiles of scores' gradients.
#pragma once

#include "kernels/cuda/cuda_device.h"

namespace regroup {

// One table per (sample, head, tile of `rows` queries), in this order: table[j - i + first + rows - 1] is the
// sum of ds_ij over the tile's queries i >= first on the diagonal j - i.
template <class S>
struct BiasPartials {
  S* data = nullptr;
  int rows = 0;        // queries of a tile
  int tiles = 0;       // tiles of queries
  index_t length = 0;  // of a table, at least K + rows - 1

  // Tables for `queries` x `keys` scores, looked at in tiles of rows x columns.
  BiasPartials(index_t queries, index_t keys, index_t rows, index_t columns)
      : rows(static_cast<int>(rows)),
        tiles(static_cast<int>((queries + rows - 1) / rows)),
        length((keys + columns - 1) / columns * columns + rows) {}
  index_t numel(index_t samples, index_t heads) const { return samples * heads * tiles * length; }
  __device__ S* table(int sample, int heads, int head, int tile) const {
    return data + ((index_t{sample} * heads + head) * tiles + tile) * length;
  }
};

// dbias += the tables' sums over samples and tiles, in an order fixed by the shapes. dbias [H, Q + K - 1].
void add_bias_partials(CudaDevice& device, const BiasPartials<float>& partials, index_t samples, Tensor dbias,
                       index_t queries);
void add_bias_partials(CudaDevice& device, const BiasPartials<double>& partials, index_t samples,
                       Tensor dbias, index_t queries);

}  // namespace regroup
