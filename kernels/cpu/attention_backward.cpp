// Grouped-query attention, backward. See attention.h.
//
// With m the dropout factors and p recomputed from log_sum_exp:
//   dv_j = sum_i m_ij p_ij dout_i;  dp_ij = m_ij (dout_i . v_j);  ds_ij = p_ij (dp_ij - dout_i . out_i);
//   dq_i = sum_j ds_ij k_j;  dk_j = sum_i ds_ij q_i;  dbias[j - i + Q - 1] += ds_ij
// (Dao et al. 2022, "FlashAttention", appendix B). An item of work is a group of a sample, or a part of its
// heads where groups are few: it sums dk and dv over its heads and their tiles in order. The parts' sums, and
// dbias over samples, are added up in order at the end. What an item is depends on shapes only, so every sum
// has one order.
#include <limits>

#include <omp.h>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/cpu_backend.h"

namespace regroup::attention {
namespace {

inline constexpr index_t kQueries = 64;  // of a tile

template <class T>
inline constexpr index_t kKeys = 2 * kPanel<T>;  // of a tile

// Rows of a tile begin this far apart. Not a power of two: columns of the tile are read too.
template <class T>
inline constexpr index_t kStride = kKeys<T> + kLanes<stat_t<T>>;

// One thread's memory.
template <class T>
struct BackwardWorkspace {
  using S = stat_t<T>;
  Unit<T>*keys, *values, *key_rows;  // right operands of a group
  Unit<T>*queries, *douts;           // left operands of a tile
  Unit<T>*query_rows, *dout_rows;    // right operands of a tile
  // Of a tile: m p and ds with the terms of a unit along queries, ds with them along keys. For bfloat16 only.
  Unit<T>*probability_units, *dscore_units, *left_dscores;
  S *scores, *dscores;  // of a tile; s, then p; dp, then ds
  S *bias, *dq, *log_sum_exp, *delta, *factors;

  BackwardWorkspace(const Shape& shape, Carver& carver) {
    const index_t depth = round_up(shape.size, kTerms<T>) / kTerms<T>;
    const index_t length = round_up(shape.keys, kKeyMultiple<S>), columns = round_up(shape.size, kLanes<S>);
    keys = carver.take<Unit<T>>(length * depth);
    values = carver.take<Unit<T>>(length * depth);
    key_rows = carver.take<Unit<T>>(length / kTerms<T> * columns);
    queries = carver.take<Unit<T>>(kQueries * depth);
    douts = carver.take<Unit<T>>(kQueries * depth);
    query_rows = carver.take<Unit<T>>(kQueries / kTerms<T> * columns);
    dout_rows = carver.take<Unit<T>>(kQueries / kTerms<T> * columns);
    probability_units = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    dscore_units = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    left_dscores = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    scores = carver.take<S>(kQueries * kStride<T>);
    dscores = carver.take<S>(kQueries * kStride<T>);
    bias = carver.take<S>(HeadBias<S>::workspace(shape, kPanel<T>));
    dq = carver.take<S>(kQueries * columns);
    log_sum_exp = carver.take<S>(kQueries);
    delta = carver.take<S>(kQueries);
    factors = carver.take<S>(kTerms<T> * kKeys<T>);
  }
};

// The items of work and the memory of their sums.
template <class T>
struct Items {
  using S = stat_t<T>;
  index_t parts;          // of a group's heads
  index_t columns, sums;  // of dk or of dv of one item: width of a row, elements of both together
  index_t dbias;          // elements of one head: whole vectors may be added at any diagonal
  index_t count, heads;   // items; heads of all samples

  explicit Items(const Shape& shape) {
    constexpr index_t kEnough = 16;  // items, for as many threads; more cost memory traffic
    const index_t groups = std::max<index_t>(1, shape.samples * shape.groups);
    parts = std::clamp<index_t>(round_up(kEnough, groups) / groups, 1, shape.heads_per_group());
    columns = round_up(shape.size, kLanes<S>);
    sums = 2 * round_up(shape.keys, kKeyMultiple<S>) * columns;
    dbias = round_up(shape.queries + shape.keys - 1 + kKeyMultiple<S>, kLanes<S>);
    count = shape.samples * shape.groups * parts;
    heads = shape.samples * shape.heads;
  }
};

template <class T>
class Backward {
  using S = stat_t<T>;

 public:
  Backward(const BackwardTensors& tensors, const AttentionOptions& options, const Shape& shape,
           BackwardWorkspace<T> workspace)
      : x_(tensors), options_(options), shape_(shape), work_(workspace) {}

  // Keys and values of a group, for heads to follow.
  void pack(index_t sample, index_t group) {
    const index_t length = round_up(shape_.keys, kKeyMultiple<S>);
    const auto rows_of = [&](const Tensor& x) { return head_rows<const T>(x, sample, group, 0); };
    keys_ = pack_right_transposed<T>(rows_of(x_.k), shape_.keys, shape_.size, length, work_.keys);
    values_ = pack_right_transposed<T>(rows_of(x_.v), shape_.keys, shape_.size, length, work_.values);
    key_rows_ = pack_right<T>(rows_of(x_.k), shape_.keys, shape_.size, length, work_.key_rows);
  }

  // dq of a head; adds its part to dk and dv [keys, whole vectors of C], and to dbias (null: not wanted).
  void head(index_t sample, index_t head, S* dk, S* dv, S* dbias) {
    prefetch_after(sample, head);
    const VisibleKeys visible(x_.key_mask, sample, shape_.keys);
    const HeadBias<S> bias(x_.bias, head, shape_, kPanel<T>, work_.bias);
    const HeadDropout dropout(options_, shape_, sample, head);
    for (index_t first = 0; first < shape_.queries; first += kQueries) {
      const index_t rows = std::min(kQueries, shape_.queries - first), padded = round_up(rows, kRows);
      load_queries(sample, head, first, rows, padded);
      const index_t seen = options_.causal ? std::min(visible.count, first + rows) : visible.count;
      std::fill(work_.dq, work_.dq + padded * key_rows_.columns, S{0});
      for (index_t key = 0; key < seen; key += kKeys<T>) {
        const TileSight<T> sight(options_.causal, first, key, std::min(kKeys<T>, seen - key));
        product<T>(padded, queries_, keys_, key, {sight.columns(), 0, keys_.depth}, bias.at(first, key),
                   {work_.scores, kStride<T>}, sight.scores(keys_.depth));
        product<T>(padded, douts_, values_, key, {sight.columns(), 0, values_.depth}, {},
                   {work_.dscores, kStride<T>}, sight.scores(values_.depth));
        for (index_t r = 0; r < padded; r += kTerms<T>) {
          for (index_t t = 0; t < kTerms<T>; ++t) hide(r + t, key, sight, visible);
          if (dropout.active()) {
            for (index_t t = 0; t < kTerms<T>; ++t) {
              dropout.factors(first + r + t, key, sight.columns_of(r), work_.factors + t * kKeys<T>);
            }
            gradient_of_scores<true>(r, sight.columns_of(r));
          } else {
            gradient_of_scores<false>(r, sight.columns_of(r));
          }
        }
        if (dbias) add_to_bias(rows, sight, dbias + shape_.queries - 1 - first + key);
        accumulate(padded, key, sight, dk + key * key_rows_.columns, dv + key * key_rows_.columns);
      }
      unpack<T>({work_.dq, key_rows_.columns}, nullptr, rows, shape_.size,
                head_rows<T>(x_.dq, sample, head, first));
    }
  }

 private:
  void prefetch_after(index_t sample, index_t head) const {
    if (head + 1 == shape_.heads) return;
    for (const Tensor& x : {x_.q, x_.dout, x_.out}) {
      prefetch<T>(head_rows<const T>(x, sample, head + 1, 0), shape_.queries, shape_.size);
    }
    const index_t next = (head + 1) / shape_.heads_per_group();
    if (next == head / shape_.heads_per_group()) return;
    for (const Tensor& x : {x_.k, x_.v}) {
      prefetch<T>(head_rows<const T>(x, sample, next, 0), shape_.keys, shape_.size);
    }
  }

  void load_queries(index_t sample, index_t head, index_t first, index_t rows, index_t padded) {
    const auto q = head_rows<const T>(x_.q, sample, head, first);
    const auto dout = head_rows<const T>(x_.dout, sample, head, first);
    const auto out = head_rows<const T>(x_.out, sample, head, first);
    queries_ = pack_left<T>(q, rows, shape_.size, padded, work_.queries);
    douts_ = pack_left<T>(dout, rows, shape_.size, padded, work_.douts);
    query_rows_ = pack_right<T>(q, rows, shape_.size, padded, work_.query_rows);
    dout_rows_ = pack_right<T>(dout, rows, shape_.size, padded, work_.dout_rows);
    const S* log_sum_exp = x_.log_sum_exp.as<S>() + (sample * shape_.heads + head) * shape_.queries + first;
    for (index_t r = 0; r < padded; ++r) {
      work_.delta[r] =
          r < rows ? dot<T>(dout.data + r * dout.stride, out.data + r * out.stride, shape_.size) : S{0};
      work_.log_sum_exp[r] = r < rows ? log_sum_exp[r] : std::numeric_limits<S>::infinity();
    }
  }

  // Scores that row r of the tile must not see.
  void hide(index_t r, index_t key, const TileSight<T>& sight, const VisibleKeys& visible) {
    constexpr S kHidden = -std::numeric_limits<S>::infinity();
    S* scores = work_.scores + r * kStride<T>;
    const index_t count = sight.keys_of(r);
    std::fill(scores + count, scores + std::max(count, sight.columns_of(r)), kHidden);
    if (visible.mask) {
      for (index_t j = 0; j < count; ++j) scores[j] = visible.mask[key + j] ? scores[j] : kHidden;
    }
  }

  // The unit's rows from r on: m p and ds from scores s and dp, as operands of the products of accumulate().
  template <bool kDropout>
  void gradient_of_scores(index_t r, index_t columns) {
    S* scores = work_.scores + r * kStride<T>;
    S* dscores = work_.dscores + r * kStride<T>;
    for (index_t j = 0; j < columns; j += kLanes<S>) {
      Vector<S> p[kTerms<T>], ds[kTerms<T>];
#pragma GCC unroll 2
      for (index_t t = 0; t < kTerms<T>; ++t) {
        const Vector<S> dp = load<S>(dscores + t * kStride<T> + j);
        p[t] = exponential(load<S>(scores + t * kStride<T> + j), work_.log_sum_exp[r + t]);
        if constexpr (kDropout) {
          const Vector<S> factor = load<S>(work_.factors + t * kKeys<T> + j);
          ds[t] = p[t] * (dp * factor - work_.delta[r + t]);
          p[t] *= factor;
        } else {
          ds[t] = p[t] * (dp - work_.delta[r + t]);
        }
        save<S>(dscores + t * kStride<T> + j, ds[t]);
      }
      if constexpr (kTerms<T> == 2) {
        const index_t pair = r / 2 * kStride<T> + j;
        T* row = reinterpret_cast<T*>(work_.left_dscores) + r * kStride<T> + j;
        save_units(work_.probability_units + pair, p[0], p[1]);
        save_units(work_.dscore_units + pair, ds[0], ds[1]);
        save_as(row, ds[0]);
        save_as(row + kStride<T>, ds[1]);
      } else {
        save<S>(scores + j, p[0]);
      }
    }
  }

  // dbias[c - r] += ds of the tile, row by row.
  void add_to_bias(index_t rows, const TileSight<T>& sight, S* dbias) const {
    for (index_t r = 0; r < rows; ++r) {
      const S* ds = work_.dscores + r * kStride<T>;
      S* row = dbias - r;
      for (index_t c = 0; c < sight.columns_of(r); c += kLanes<S>) {
        save<S>(row + c, load<S>(row + c) + load<S>(ds + c));
      }
    }
  }

  // Adds the tile's part of dq, dk and dv.
  void accumulate(index_t rows, index_t key, const TileSight<T>& sight, S* dk, S* dv) {
    const index_t size = key_rows_.columns, first = key / kTerms<T>, keys = sight.columns();
    Left<T> p{nullptr, 1, kStride<T>}, ds{nullptr, 1, kStride<T>}, left{nullptr, kStride<T> / kTerms<T>, 1};
    if constexpr (kTerms<T> == 2) {
      p.data = work_.probability_units;
      ds.data = work_.dscore_units;
      left.data = work_.left_dscores;
    } else {
      p.data = work_.scores;
      ds.data = left.data = work_.dscores;
    }
    product<T>(rows, left, key_rows_, 0, {size, first, first + keys / kTerms<T>}, {work_.dq, size},
               {work_.dq, size}, sight.over_keys(size, first));
    product<T>(keys, p, dout_rows_, 0, {size, 0, rows / kTerms<T>}, {dv, size}, {dv, size},
               sight.over_queries(size, rows));
    product<T>(keys, ds, query_rows_, 0, {size, 0, rows / kTerms<T>}, {dk, size}, {dk, size},
               sight.over_queries(size, rows));
  }

  BackwardTensors x_;
  AttentionOptions options_;
  Shape shape_;
  BackwardWorkspace<T> work_;
  Right<T> keys_, values_, key_rows_, query_rows_, dout_rows_;
  Left<T> queries_, douts_;
};

template <class T>
index_t thread_workspace(const Shape& shape) {
  Carver counter(nullptr);
  BackwardWorkspace<T>(shape, counter);
  return counter.used();
}

// dk and dv of one group of one sample, from the sums of its parts.
template <class T>
void write_group(const BackwardTensors& x, const Shape& shape, const Items<T>& items, index_t group,
                 stat_t<T>* sums) {
  for (index_t part = 1; part < items.parts; ++part) {
    const stat_t<T>* more = sums + part * items.sums;
    for (index_t n = 0; n < items.sums; ++n) sums[n] += more[n];
  }
  const index_t sample = group / shape.groups, in_sample = group % shape.groups;
  const Rows<const stat_t<T>> dk{sums, items.columns}, dv{sums + items.sums / 2, items.columns};
  unpack<T>(dk, nullptr, shape.keys, shape.size, head_rows<T>(x.dk, sample, in_sample, 0));
  unpack<T>(dv, nullptr, shape.keys, shape.size, head_rows<T>(x.dv, sample, in_sample, 0));
}

// The heads of one item, into its zeroed sums.
template <class T>
void run_item(Backward<T>& backward, const Shape& shape, const Items<T>& items, index_t item, stat_t<T>* sums,
              stat_t<T>* dbias) {
  const index_t group = item / items.parts, part = item % items.parts, each = shape.heads_per_group();
  const index_t sample = group / shape.groups, first = group % shape.groups * each;
  std::fill(sums, sums + items.sums, stat_t<T>{0});
  backward.pack(sample, group % shape.groups);
  for (index_t h = first + part * each / items.parts; h < first + (part + 1) * each / items.parts; ++h) {
    stat_t<T>* diagonals = dbias ? dbias + (sample * shape.heads + h) * items.dbias : nullptr;
    if (dbias) std::fill(diagonals, diagonals + items.dbias, stat_t<T>{0});
    backward.head(sample, h, sums, sums + items.sums / 2, diagonals);
  }
}

template <class T>
void run(const BackwardTensors& x, const AttentionOptions& options, int threads, std::byte* workspace) {
  using S = stat_t<T>;
  const Shape shape(x.q, x.k);
  const Items<T> items(shape);
  const index_t bytes = thread_workspace<T>(shape);
  S* sums = reinterpret_cast<S*>(workspace + threads * bytes);
  S* dbias = x.dbias ? sums + (items.parts == 1 ? threads : items.count) * items.sums : nullptr;
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num();
    Carver carver(workspace + thread * bytes);
    Backward<T> backward(x, options, shape, BackwardWorkspace<T>(shape, carver));
#pragma omp for schedule(dynamic)
    for (index_t item = 0; item < items.count; ++item) {
      S* own = sums + (items.parts == 1 ? thread : item) * items.sums;
      run_item<T>(backward, shape, items, item, own, dbias);
      if (items.parts == 1) write_group<T>(x, shape, items, item, own);
    }
    if (items.parts > 1) {
#pragma omp for schedule(static) nowait
      for (index_t group = 0; group < shape.samples * shape.groups; ++group) {
        write_group<T>(x, shape, items, group, sums + group * items.parts * items.sums);
      }
    }
    if (dbias) {
#pragma omp for schedule(static)
      for (index_t head = 0; head < shape.heads; ++head) {
        S* row = x.dbias.as<S>() + head * x.dbias.stride[0];
        for (index_t sample = 0; sample < shape.samples; ++sample) {
          const S* part = dbias + (sample * shape.heads + head) * items.dbias;
          for (index_t d = 0; d < shape.queries + shape.keys - 1; ++d) row[d] += part[d];
        }
      }
    }
  }
}

}  // namespace

index_t backward_workspace(const Shape& shape, DType dtype, int threads) {
  return dispatch(dtype, [&]<class T>() {
    const Items<T> items(shape);
    const index_t sums = (items.parts == 1 ? threads : items.count) * items.sums;
    return threads * thread_workspace<T>(shape) +
           (sums + items.heads * items.dbias) * index_t{sizeof(stat_t<T>)};
  });
}

void backward(const BackwardTensors& tensors, const AttentionOptions& options, int threads,
              std::byte* workspace) {
  dispatch(tensors.q.dtype, [&]<class T>() { run<T>(tensors, options, threads, workspace); });
}

}  // namespace regroup::attention

namespace regroup {

void CpuBackend::do_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor bias,
                                       Tensor key_mask, Tensor out, Tensor log_sum_exp, Tensor dq, Tensor dk,
                                       Tensor dv, Tensor dbias, const AttentionOptions& options) {
  attention::backward({dout, q, k, v, bias, key_mask, out, log_sum_exp, dq, dk, dv, dbias}, options, threads_,
                      workspace(attention::backward_workspace({q, k}, q.dtype, threads_)));
}

}  // namespace regroup
