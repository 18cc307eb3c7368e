// Grouped-query attention, backward. See attention.h.
//
// With m the dropout factors and p recomputed from log_sum_exp:
//   dv_j = sum_i m_ij p_ij dout_i;  dp_ij = m_ij (dout_i . v_j);  ds_ij = p_ij (dp_ij - dout_i . out_i);
//   dq_i = sum_j ds_ij k_j;  dk_j = sum_i ds_ij q_i;  dbias[j - i + Q - 1] += ds_ij
// (Dao et al. 2022, "FlashAttention", appendix B). A thread owns a group of a sample and sums dk and dv over
// the group's heads and their tiles in order; dbias is summed over samples in order at the end.
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
  Unit<T>*keys, *values, *key_rows;                // right operands of a group
  Unit<T>*queries, *douts;                         // left operands of a tile
  Unit<T>*query_rows, *dout_rows;                  // right operands of a tile
  Unit<T>*probabilities, *dscores, *dscores_left;  // terms along queries, queries, keys
  S *scores, *dprobabilities, *bias, *dq, *dk, *dv, *log_sum_exp, *delta, *factors;

  BackwardWorkspace(const Shape& shape, Carver& carver) {
    const index_t depth = round_up(shape.size, kTerms<T>) / kTerms<T>;
    const index_t length = round_up(shape.keys, kLanes<S>), columns = round_up(shape.size, kLanes<S>);
    keys = carver.take<Unit<T>>(length * depth);
    values = carver.take<Unit<T>>(length * depth);
    key_rows = carver.take<Unit<T>>(length / kTerms<T> * columns);
    queries = carver.take<Unit<T>>(kQueries * depth);
    douts = carver.take<Unit<T>>(kQueries * depth);
    query_rows = carver.take<Unit<T>>(kQueries / kTerms<T> * columns);
    dout_rows = carver.take<Unit<T>>(kQueries / kTerms<T> * columns);
    probabilities = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    dscores = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    dscores_left = carver.take<Unit<T>>(kQueries / kTerms<T> * kStride<T>);
    scores = carver.take<S>(kQueries * kStride<T>);
    dprobabilities = carver.take<S>(kQueries * kStride<T>);
    bias = carver.take<S>(HeadBias<S>::workspace(shape, kPanel<T>));
    dq = carver.take<S>(kQueries * columns);
    dk = carver.take<S>(length * columns);
    dv = carver.take<S>(length * columns);
    log_sum_exp = carver.take<S>(kQueries);
    delta = carver.take<S>(kQueries);
    factors = carver.take<S>(kKeys<T>);
  }
};

// Elements of one head's part of the bias gradient: whole vectors may be added at any diagonal.
template <class S>
index_t dbias_width(const Shape& shape) {
  return round_up(shape.queries + shape.keys - 1 + kLanes<S>, kLanes<S>);
}

template <class T>
class Backward {
  using S = stat_t<T>;

 public:
  Backward(const BackwardTensors& tensors, const AttentionOptions& options, const Shape& shape,
           BackwardWorkspace<T> workspace)
      : x_(tensors), options_(options), shape_(shape), work_(workspace) {}

  // dq, dk, dv of a group of a sample. dbias: [heads per group, dbias_width], written; null: not wanted.
  void group(index_t sample, index_t group, S* dbias) {
    const VisibleKeys visible(x_.key_mask, sample, shape_.keys);
    const index_t length = round_up(shape_.keys, kLanes<S>);
    const auto rows_of = [&](const Tensor& x) { return head_rows<const T>(x, sample, group, 0); };
    keys_ = pack_right_transposed<T>(rows_of(x_.k), shape_.keys, shape_.size, length, work_.keys);
    values_ = pack_right_transposed<T>(rows_of(x_.v), shape_.keys, shape_.size, length, work_.values);
    key_rows_ = pack_right<T>(rows_of(x_.k), shape_.keys, shape_.size, length, work_.key_rows);
    std::fill(work_.dk, work_.dk + length * key_rows_.columns, S{0});
    std::fill(work_.dv, work_.dv + length * key_rows_.columns, S{0});
    for (index_t h = 0; h < shape_.heads_per_group(); ++h) {
      const index_t width = dbias_width<S>(shape_);
      if (dbias) std::fill(dbias + h * width, dbias + (h + 1) * width, S{0});
      head(sample, group * shape_.heads_per_group() + h, visible, dbias ? dbias + h * width : nullptr);
    }
    const Rows<const S> dk{work_.dk, key_rows_.columns}, dv{work_.dv, key_rows_.columns};
    unpack<T>(dk, nullptr, shape_.keys, shape_.size, head_rows<T>(x_.dk, sample, group, 0));
    unpack<T>(dv, nullptr, shape_.keys, shape_.size, head_rows<T>(x_.dv, sample, group, 0));
  }

 private:
  void head(index_t sample, index_t head, const VisibleKeys& visible, S* dbias) {
    const HeadBias<S> bias(x_.bias, head, shape_, kPanel<T>, work_.bias);
    const HeadDropout dropout(options_, shape_, sample, head);
    for (index_t first = 0; first < shape_.queries; first += kQueries) {
      const index_t rows = std::min(kQueries, shape_.queries - first), padded = round_up(rows, kRows);
      load_queries(sample, head, first, rows, padded);
      const index_t seen = options_.causal ? std::min(visible.count, first + rows) : visible.count;
      std::fill(work_.dq, work_.dq + padded * key_rows_.columns, S{0});
      for (index_t key = 0; key < seen; key += kKeys<T>) {
        const index_t columns = round_up(std::min(kKeys<T>, seen - key), kLanes<S>);
        product<T>(padded, columns, queries_, keys_, key, 0, keys_.depth, bias.at(first, key),
                   {work_.scores, kStride<T>});
        product<T>(padded, columns, douts_, values_, key, 0, values_.depth, {},
                   {work_.dprobabilities, kStride<T>});
        for (index_t r = 0; r < padded; ++r) {
          const index_t limit = options_.causal ? std::min(visible.count, first + r + 1) : visible.count;
          gradient_of_scores(r, first + r, key, limit, columns, visible, dropout);
          if (dbias && r < rows) add_to_bias(r, columns, dbias + shape_.queries - 1 - (first + r) + key);
        }
        store_units(padded, columns);
        accumulate(padded, columns, key);
      }
      unpack<T>({work_.dq, key_rows_.columns}, nullptr, rows, shape_.size,
                head_rows<T>(x_.dq, sample, head, first));
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

  // Row r of the tile (query i): scores become m p, dprobabilities become ds.
  void gradient_of_scores(index_t r, index_t i, index_t key, index_t limit, index_t columns,
                          const VisibleKeys& visible, const HeadDropout& dropout) {
    constexpr S kHidden = -std::numeric_limits<S>::infinity();
    S* p = work_.scores + r * kStride<T>;
    S* ds = work_.dprobabilities + r * kStride<T>;
    const index_t count = std::clamp<index_t>(limit - key, 0, columns);
    std::fill(p + count, p + columns, kHidden);
    if (visible.mask) {
      for (index_t j = 0; j < count; ++j) p[j] = visible.mask[key + j] ? p[j] : kHidden;
    }
    const S shift = work_.log_sum_exp[r], delta = work_.delta[r];
    if (dropout.active()) {
      std::fill(work_.factors + count, work_.factors + columns, S{0});
      dropout.factors(i, key, count, work_.factors);
    }
    for (index_t j = 0; j < columns; j += kLanes<S>) {
      const Vector<S> probability = exponential<S>(load<S>(p + j), shift), dp = load<S>(ds + j);
      if (dropout.active()) {
        const Vector<S> factor = load<S>(work_.factors + j);
        save<S>(p + j, probability * factor);
        save<S>(ds + j, probability * (dp * factor - delta));
      } else {
        save<S>(p + j, probability);
        save<S>(ds + j, probability * (dp - delta));
      }
    }
  }

  void add_to_bias(index_t r, index_t columns, S* dbias) const {
    const S* ds = work_.dprobabilities + r * kStride<T>;
    for (index_t j = 0; j < columns; j += kLanes<S>) save<S>(dbias + j, load<S>(dbias + j) + load<S>(ds + j));
  }

  // The tile as left operands.
  void store_units(index_t rows, index_t columns) {
    if constexpr (kTerms<T> == 1) {
      return;
    } else {
      for (index_t r = 0; r < rows; r += 2) {
        const S* p = work_.scores + r * kStride<T>;
        const S* ds = work_.dprobabilities + r * kStride<T>;
        T* row = reinterpret_cast<T*>(work_.dscores_left) + r * kStride<T>;
        for (index_t j = 0; j < columns; j += kLanes<S>) {
          const Vector<S> first = load<S>(ds + j), second = load<S>(ds + kStride<T> + j);
          save_units(work_.probabilities + r / 2 * kStride<T> + j, load<S>(p + j),
                     load<S>(p + kStride<T> + j));
          save_units(work_.dscores + r / 2 * kStride<T> + j, first, second);
          save_as(row + j, first);
          save_as(row + kStride<T> + j, second);
        }
      }
    }
  }

  // Adds the tile's part of dq, dk and dv.
  void accumulate(index_t rows, index_t columns, index_t key) {
    const Unit<T>*p, *ds, *ds_left;
    if constexpr (kTerms<T> == 1) {
      p = work_.scores;
      ds = ds_left = work_.dprobabilities;
    } else {
      p = work_.probabilities;
      ds = work_.dscores;
      ds_left = work_.dscores_left;
    }
    const index_t size = key_rows_.columns;
    const auto add = [](S* sums, index_t stride) {
      return std::pair<Rows<const S>, Rows<S>>{{sums, stride}, {sums, stride}};
    };
    const auto [dq_start, dq] = add(work_.dq, size);
    const auto [dk_start, dk] = add(work_.dk + key * size, size);
    const auto [dv_start, dv] = add(work_.dv + key * size, size);
    product<T>(rows, size, {ds_left, kStride<T> / kTerms<T>, 1}, key_rows_, 0, key / kTerms<T>,
               (key + columns) / kTerms<T>, dq_start, dq);
    product<T>(columns, size, {p, 1, kStride<T>}, dout_rows_, 0, 0, rows / kTerms<T>, dv_start, dv);
    product<T>(columns, size, {ds, 1, kStride<T>}, query_rows_, 0, 0, rows / kTerms<T>, dk_start, dk);
  }

  BackwardTensors x_;
  AttentionOptions options_;
  Shape shape_;
  BackwardWorkspace<T> work_;
  Right<T> keys_, values_, key_rows_, query_rows_, dout_rows_;
  Left<T> queries_, douts_;
};

template <class S>
index_t dbias_workspace(const Shape& shape) {
  return shape.samples * shape.heads * dbias_width<S>(shape) * index_t{sizeof(S)};
}

template <class T>
index_t thread_workspace(const Shape& shape) {
  Carver counter(nullptr);
  BackwardWorkspace<T>(shape, counter);
  return counter.used();
}

template <class T>
void run(const BackwardTensors& x, const AttentionOptions& options, int threads, std::byte* workspace) {
  using S = stat_t<T>;
  const Shape shape(x.q, x.k);
  const index_t bytes = thread_workspace<T>(shape), width = dbias_width<S>(shape);
  S* parts = x.dbias ? reinterpret_cast<S*>(workspace + threads * bytes) : nullptr;
#pragma omp parallel num_threads(threads)
  {
    Carver carver(workspace + omp_get_thread_num() * bytes);
    Backward<T> backward(x, options, shape, BackwardWorkspace<T>(shape, carver));
#pragma omp for schedule(dynamic)
    for (index_t item = 0; item < shape.samples * shape.groups; ++item) {
      backward.group(item / shape.groups, item % shape.groups,
                     parts ? parts + item * shape.heads_per_group() * width : nullptr);
    }
    if (parts) {
#pragma omp for schedule(static)
      for (index_t head = 0; head < shape.heads; ++head) {
        S* dbias = x.dbias.as<S>() + head * x.dbias.stride[0];
        for (index_t sample = 0; sample < shape.samples; ++sample) {
          const S* part = parts + (sample * shape.heads + head) * width;
          for (index_t d = 0; d < shape.queries + shape.keys - 1; ++d) dbias[d] += part[d];
        }
      }
    }
  }
}

}  // namespace

index_t backward_workspace(const Shape& shape, DType dtype, int threads) {
  return dispatch(dtype, [&]<class T>() {
    return threads * thread_workspace<T>(shape) + dbias_workspace<stat_t<T>>(shape);
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
