// Grouped-query attention, forward. See attention.h.
#include "kernels/cpu/attention.h"

#include <cmath>
#include <limits>

#include <omp.h>

#include "kernels/cpu/cpu_backend.h"

namespace regroup::attention {
namespace {

// Queries of a tile: as many as keep its scores within 128 KiB, 16 to 64; a function of the shape only.
template <class T>
index_t queries_per_tile(index_t keys) {
  const index_t fitting = (index_t{1} << 17) / (round_up(keys, kPanel<T>) * index_t{sizeof(stat_t<T>)});
  return std::clamp<index_t>(fitting / kRows * kRows, 16, 64);
}

// One thread's memory.
template <class T>
struct ForwardWorkspace {
  using S = stat_t<T>;
  index_t tile, stride;  // queries of a tile, elements of a row of scores
  Unit<T>*keys, *values, *queries, *probabilities;
  S *scores, *bias, *out, *inverse_sums, *factors;

  ForwardWorkspace(const Shape& shape, Carver& carver)
      : tile(queries_per_tile<T>(shape.keys)), stride(round_up(shape.keys, kPanel<T>) + kLanes<S>) {
    const index_t depth = round_up(shape.size, kTerms<T>) / kTerms<T>;
    const index_t keys_padded = round_up(shape.keys, kKeyMultiple<S>),
                  columns = round_up(shape.size, kLanes<S>);
    keys = carver.take<Unit<T>>(keys_padded * depth);
    values = carver.take<Unit<T>>(keys_padded / kTerms<T> * columns);
    queries = carver.take<Unit<T>>(tile * depth);
    probabilities = carver.take<Unit<T>>(tile * stride / kTerms<T>);
    scores = carver.take<S>(tile * stride);
    bias = carver.take<S>(HeadBias<S>::workspace(shape, kPanel<T>));
    out = carver.take<S>(tile * columns);
    inverse_sums = carver.take<S>(tile);
    factors = carver.take<S>(stride);
  }
};

template <class T>
class Forward {
  using S = stat_t<T>;
  static constexpr S kInfinity = std::numeric_limits<S>::infinity();

 public:
  Forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& key_mask,
          const Tensor& out, const Tensor& log_sum_exp, const AttentionOptions& options, const Shape& shape,
          ForwardWorkspace<T> workspace)
      : q_(q),
        k_(k),
        v_(v),
        bias_(bias),
        key_mask_(key_mask),
        out_(out),
        log_sum_exp_(log_sum_exp),
        options_(options),
        shape_(shape),
        work_(workspace) {}

  // Packs the keys and values of a group; the heads of the group follow.
  void pack(index_t sample, index_t group) {
    const index_t padded = round_up(shape_.keys, kKeyMultiple<S>);
    keys_ = pack_right_transposed<T>(head_rows<const T>(k_, sample, group, 0), shape_.keys, shape_.size,
                                     padded, work_.keys);
    values_ = pack_right<T>(head_rows<const T>(v_, sample, group, 0), shape_.keys, shape_.size, padded,
                            work_.values);
  }

  void head(index_t sample, index_t head) {
    if (head + 1 < shape_.heads) {
      prefetch<T>(head_rows<const T>(q_, sample, head + 1, 0), shape_.queries, shape_.size);
      const index_t next = (head + 1) / shape_.heads_per_group();
      if (next != head / shape_.heads_per_group()) {
        prefetch<T>(head_rows<const T>(k_, sample, next, 0), shape_.keys, shape_.size);
        prefetch<T>(head_rows<const T>(v_, sample, next, 0), shape_.keys, shape_.size);
      }
    }
    const VisibleKeys visible(key_mask_, sample, shape_.keys);
    const HeadBias<S> bias(bias_, head, shape_, kPanel<T>, work_.bias);
    const HeadDropout dropout(options_, shape_, sample, head);
    for (index_t first = 0; first < shape_.queries; first += work_.tile) {
      const index_t rows = std::min(work_.tile, shape_.queries - first), padded = round_up(rows, kRows);
      const index_t seen = options_.causal ? std::min(visible.count, first + rows) : visible.count;
      const TileSight<T> sight(options_.causal, first, 0, seen);
      const Left<T> queries =
          pack_left<T>(head_rows<const T>(q_, sample, head, first), rows, shape_.size, padded, work_.queries);
      product<T>(padded, queries, keys_, 0, {sight.columns(), 0, keys_.depth}, bias.at(first, 0),
                 {work_.scores, work_.stride}, sight.scores(keys_.depth));
      S* log_sum_exp = log_sum_exp_.as<S>() + (sample * shape_.heads + head) * shape_.queries + first;
      for (index_t r = 0; r < rows; ++r) {
        log_sum_exp[r] = softmax(r, sight.keys_of(r), sight.columns_of(r), visible);
        if (dropout.active()) drop(dropout, first + r, r, sight.keys_of(r));
      }
      product<T>(padded, {work_.probabilities, work_.stride / kTerms<T>, 1}, values_, 0,
                 {values_.columns, 0, sight.columns() / kTerms<T>}, {}, {work_.out, values_.columns},
                 sight.over_keys(values_.columns, 0));
      unpack<T>({work_.out, values_.columns}, work_.inverse_sums, rows, shape_.size,
                head_rows<T>(out_, sample, head, first));
    }
  }

 private:
  // Scores of row r to exp(s - max) in T, zeros from `limit` to `columns`; sets the row's inverse sum;
  // returns log(sum(exp(s))).
  S softmax(index_t r, index_t limit, index_t columns, const VisibleKeys& visible) {
    S* scores = work_.scores + r * work_.stride;
    std::fill(scores + limit, scores + columns, -kInfinity);
    if (visible.mask) {
      for (index_t j = 0; j < limit; ++j) scores[j] = visible.mask[j] ? scores[j] : -kInfinity;
    }
    Vector<S> largest = Vector<S>{} - kInfinity;
    for (index_t j = 0; j < columns; j += kLanes<S>) {
      const Vector<S> x = load<S>(scores + j);
      largest = x > largest ? x : largest;
    }
    const S top = largest_of<S>(largest);
    const bool blind = top == -kInfinity;  // sees no key
    const S shift = blind ? S{0} : top;
    T* row = probabilities(r);
    Vector<S> sums{};
    for (index_t j = 0; j < columns; j += kLanes<S>) {
      const Vector<S> e = exponential(load<S>(scores + j), shift);
      sums += e;
      save_as(row + j, e);
    }
    const S sum = sum_of<S>(sums);
    work_.inverse_sums[r] = blind ? S{0} : S{1} / sum;
    return blind ? kInfinity : top + std::log(sum);
  }

  void drop(const HeadDropout& dropout, index_t query, index_t r, index_t limit) {
    T* row = probabilities(r);
    dropout.factors(query, 0, limit, work_.factors);
    for (index_t j = 0; j < limit; ++j) store(row[j], static_cast<S>(row[j]) * work_.factors[j]);
  }

  T* probabilities(index_t r) const { return reinterpret_cast<T*>(work_.probabilities) + r * work_.stride; }

  Tensor q_, k_, v_, bias_, key_mask_, out_, log_sum_exp_;
  AttentionOptions options_;
  Shape shape_;
  ForwardWorkspace<T> work_;
  Right<T> keys_, values_;
};

}  // namespace

index_t forward_workspace(const Shape& shape, DType dtype, int threads) {
  return threads * dispatch(dtype, [&]<class T>() {
           Carver counter(nullptr);
           ForwardWorkspace<T>(shape, counter);
           return counter.used();
         });
}

void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, const Tensor& key_mask,
             const Tensor& out, const Tensor& log_sum_exp, const AttentionOptions& options, int threads,
             std::byte* workspace) {
  const Shape shape(q, k);
  const index_t bytes = forward_workspace(shape, q.dtype, 1);
  dispatch(q.dtype, [&]<class T>() {
#pragma omp parallel num_threads(threads)
    {
      Carver carver(workspace + omp_get_thread_num() * bytes);
      Forward<T> forward(q, k, v, bias, key_mask, out, log_sum_exp, options, shape,
                         ForwardWorkspace<T>(shape, carver));
      index_t packed = -1;  // the group whose keys and values lie in the workspace
#pragma omp for schedule(dynamic)
      for (index_t item = 0; item < shape.samples * shape.heads; ++item) {
        const index_t sample = item / shape.heads, head = item % shape.heads;
        const index_t group = sample * shape.groups + head / shape.heads_per_group();
        if (group != packed) forward.pack(sample, head / shape.heads_per_group());
        packed = group;
        forward.head(sample, head);
      }
    }
  });
}

}  // namespace regroup::attention

namespace regroup {

void CpuBackend::do_attention(Tensor q, Tensor k, Tensor v, Tensor bias, Tensor key_mask, Tensor out,
                              Tensor log_sum_exp, const AttentionOptions& options) {
  attention::forward(q, k, v, bias, key_mask, out, log_sum_exp, options, threads_,
                     workspace(attention::forward_workspace({q, k}, q.dtype, threads_)));
}

}  // namespace regroup
