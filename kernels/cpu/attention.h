// What attention's forward and backward share: shapes, what a query may see, tiles.
//
// One head at a time and a thread each: a tile of queries against the keys they see, scores in the thread's
// workspace (second-level cache), never in memory. The products are own code rather than oneDNN's because
// here they are small (64 wide), share packed operands over the heads of a group and over several products,
// and begin at the bias.
#pragma once

#include <cstdint>

#include "kernels/backend.h"
#include "kernels/cpu/attention_pack.h"
#include "kernels/cpu/dropout_mask.h"

namespace regroup::attention {

struct Shape {
  index_t samples = 0, queries = 0, keys = 0, heads = 0, groups = 0, size = 0;  // B Q K H G C

  Shape(const Tensor& q, const Tensor& k)
      : samples(q[0]), queries(q[1]), keys(k[1]), heads(q[2]), groups(k[2]), size(q[3]) {}
  index_t heads_per_group() const { return heads / groups; }
};

// Rows of head `head` of sample `sample`, from position `first` on, of a tensor [B, length, heads, C].
template <class T>
Rows<T> head_rows(const Tensor& x, index_t sample, index_t head, index_t first) {
  T* data = static_cast<T*>(x.data) + sample * x.stride[0] + first * x.stride[1] + head * x.stride[2];
  return {data, x.stride[1]};
}

// The keys of one sample that its mask lets through.
struct VisibleKeys {
  const std::int32_t* mask = nullptr;  // only where keys before `count` are hidden
  index_t count = 0;                   // no key at `count` or later is visible

  VisibleKeys(const Tensor& key_mask, index_t sample, index_t keys) : count(keys) {
    if (!key_mask) return;
    const std::int32_t* row = key_mask.as<std::int32_t>() + sample * key_mask.stride[0];
    while (count > 0 && row[count - 1] == 0) --count;
    for (index_t j = 0; j < count && !mask; ++j) {
      if (row[j] == 0) mask = row;
    }
  }
};

// Who sees whom in a tile: row r, its column c where c <= r + diagonal and c < columns. What the products of
// a block of kRows rows need of the tile follows from it.
template <class T>
class TileSight {
 public:
  // Queries from `query` on, `keys` keys from `key` on (the visible ones of the tile).
  TileSight(bool causal, index_t query, index_t key, index_t keys)
      : keys_(keys),
        columns_(round_up(keys, kKeyMultiple<stat_t<T>>)),
        diagonal_(causal ? query - key : columns_) {}

  // Keys that row r sees.
  index_t keys_of(index_t r) const { return std::clamp<index_t>(r + diagonal_ + 1, 0, keys_); }
  // Whole vectors of columns that hold all that the block of row r sees: what there is of it in the tile.
  index_t columns_of(index_t r) const {
    const index_t seen = r / kRows * kRows + kRows + diagonal_;
    return std::clamp<index_t>(round_up(seen, kKeyMultiple<stat_t<T>>), 0, columns_);
  }
  index_t columns() const { return columns_; }

  // Scores: all of the head size, only columns that are seen.
  auto scores(index_t depth) const {
    return [this, depth](index_t m) { return Extent{columns_of(m), 0, depth}; };
  }
  // Sums over keys, for blocks of queries. `first`: the unit of the tile's first key.
  auto over_keys(index_t size, index_t first) const {
    return [this, size, first](index_t m) {
      const index_t seen = std::clamp<index_t>(m + kRows + diagonal_, 0, keys_);
      return Extent{size, first, first + round_up(seen, kTerms<T>) / kTerms<T>};
    };
  }
  // Sums over `queries` queries, for blocks of keys.
  auto over_queries(index_t size, index_t queries) const {
    return [this, size, queries](index_t m) {
      return Extent{size, std::max<index_t>(0, m - diagonal_) / kTerms<T>, queries / kTerms<T>};
    };
  }

 private:
  index_t keys_, columns_, diagonal_;
};

// Bias of one head, with zeros around, so that whole blocks of rows and vectors of columns may be read:
// element (i, j) is data[j - i + queries - 1]. `data` is null where there is no bias.
template <class S>
class HeadBias {
 public:
  static index_t workspace(const Shape& shape, index_t padding) {
    return shape.queries + shape.keys + 2 * padding;
  }
  HeadBias(const Tensor& bias, index_t head, const Shape& shape, index_t padding, S* workspace) {
    if (!bias) return;
    const index_t width = shape.queries + shape.keys - 1;
    const S* row = bias.as<S>() + head * bias.stride[0];
    std::fill(workspace, workspace + padding, S{0});
    std::copy(row, row + width, workspace + padding);
    std::fill(workspace + padding + width, workspace + padding + width + padding, S{0});
    origin_ = workspace + padding + shape.queries - 1;
  }
  // What the scores of queries from i and keys from j begin with.
  Rows<const S> at(index_t i, index_t j) const {
    return origin_ ? Rows<const S>{origin_ + j - i, -1} : Rows<const S>{};
  }

 private:
  const S* origin_ = nullptr;
};

// The dropout factors of row i of one head's probabilities.
class HeadDropout {
 public:
  HeadDropout(const AttentionOptions& options, const Shape& shape, index_t sample, index_t head)
      : mask_(options.dropout_key, options.dropout_rate),
        first_(((options.first_sample + sample) * options.heads + options.first_head + head) * shape.queries *
               shape.keys),
        keys_(shape.keys) {}
  bool active() const { return mask_.active(); }
  template <class S>
  void factors(index_t i, index_t first_key, index_t count, S* factors) const {
    mask_.factors(first_ + i * keys_ + first_key, count, factors);
  }

 private:
  DropoutMask mask_;
  index_t first_, keys_;
};

// Bytes of workspace for `threads` threads, and the two passes over it.
index_t forward_workspace(const Shape& shape, DType dtype, int threads);
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& key_mask,
             const Tensor& out, const Tensor& log_sum_exp, const AttentionOptions& options, int threads,
             std::byte* workspace);
index_t backward_workspace(const Shape& shape, DType dtype, int threads);

struct BackwardTensors {
  Tensor dout, q, k, v, bias, key_mask, out, log_sum_exp, dq, dk, dv, dbias;
};
void backward(const BackwardTensors& tensors, const AttentionOptions& options, int threads,
              std::byte* workspace);

}  // namespace regroup::attention
