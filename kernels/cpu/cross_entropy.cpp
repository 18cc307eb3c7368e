#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_backend.h"
#include "kernels/cpu/parallel_for.h"
#include "kernels/cpu/vector_math.h"

namespace regroup {
namespace {

constexpr index_t kPadding = 0;  // the target that brings no loss

template <class S>
S maximum(const S* x, index_t size) {
  S result = -std::numeric_limits<S>::infinity();
#pragma omp simd reduction(max : result)
  for (index_t v = 0; v < size; ++v) result = x[v] > result ? x[v] : result;
  return result;
}

// sum_v exp(x[v] - shift), in float64 over pieces summed in S.
template <class S>
double sum_of_exponentials(const S* x, S shift, index_t size) {
  constexpr index_t kPiece = 1024;
  double total = 0;
  for (index_t begin = 0; begin < size; begin += kPiece) {
    const index_t end = std::min(size, begin + kPiece);
    S sum = 0;
#pragma omp simd reduction(+ : sum)
    for (index_t v = begin; v < end; ++v) sum += vector_exp(x[v] - shift);
    total += static_cast<double>(sum);
  }
  return total;
}

// A block of rows for each task: about 64 Ki logits.
index_t row_block(const Tensor& logits) { return rows_per_block(logits[0], logits[1], index_t{1} << 16); }

}  // namespace

void CpuBackend::do_cross_entropy_max(Tensor logits, Tensor row_max) {
  dispatch(logits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const S* const x = logits.as<S>();
    S* const result = row_max.as<S>();
    const index_t columns = logits[1];
    parallel_for(threads_, logits[0], row_block(logits), [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) result[n] = maximum(x + n * columns, columns);
    });
  });
}

void CpuBackend::do_cross_entropy_sums(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                       const CrossEntropyOptions& options) {
  dispatch(logits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const S *const x = logits.as<S>(), *const largest = row_max.as<S>();
    const std::int32_t* const target = targets.as<std::int32_t>();
    S* const exponentials = sums.as<S>();
    S* const chosen = exponentials + logits[0];
    const index_t columns = logits[1];
    parallel_for(threads_, logits[0], row_block(logits), [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) {
        const S* const row = x + n * columns;
        const index_t column = target[n] - options.first_vocabulary_id;
        exponentials[n] = static_cast<S>(sum_of_exponentials(row, largest[n], columns));
        chosen[n] = column >= 0 && column < columns ? row[column] - largest[n] : S{0};
      }
    });
  });
}

// A logarithm for each token: one thread, in the order of the tokens.
void CpuBackend::do_cross_entropy_loss(Tensor row_max, Tensor targets, Tensor sums, Tensor loss,
                                       const CrossEntropyOptions& options) {
  dispatch(row_max.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const S* const largest = row_max.as<S>();
    const std::int32_t* const target = targets.as<std::int32_t>();
    const S* const exponentials = sums.as<S>();
    const S* const chosen = exponentials + row_max[0];
    double cross_entropy = 0, squares = 0;
    for (index_t n = 0; n < row_max[0]; ++n) {
      if (target[n] == kPadding) continue;
      const double log_sum = std::log(static_cast<double>(exponentials[n]));
      const double log_z = static_cast<double>(largest[n]) + log_sum;
      cross_entropy += log_sum - static_cast<double>(chosen[n]);
      squares += log_z * log_z;
    }
    loss.as<double>()[0] += cross_entropy;
    loss.as<double>()[1] += options.z_loss * squares;
  });
}

void CpuBackend::do_cross_entropy_backward(Tensor logits, Tensor row_max, Tensor targets, Tensor sums,
                                           double factor, Tensor dlogits,
                                           const CrossEntropyOptions& options) {
  dispatch(dlogits.dtype, [&]<class T>() {
    using S = stat_t<T>;
    const S *const x = logits.as<S>(), *const largest = row_max.as<S>();
    const S* const exponentials = sums.as<S>();
    const std::int32_t* const target = targets.as<std::int32_t>();
    T* const gradient = dlogits.as<T>();
    const index_t columns = logits[1];
    parallel_for(threads_, logits[0], row_block(logits), [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) {
        const S* const row = x + n * columns;
        T* const out = gradient + n * columns;
        if (target[n] == kPadding) {
          std::fill_n(out, columns, T{});
          continue;
        }
        const S shift = largest[n];
        const double log_z = static_cast<double>(shift) + std::log(static_cast<double>(exponentials[n]));
        const S scale =
            static_cast<S>(factor * (1 + 2 * options.z_loss * log_z) / static_cast<double>(exponentials[n]));
        const index_t column = target[n] - options.first_vocabulary_id;
        const bool here = column >= 0 && column < columns;
        const S at_target = here ? row[column] : S{0};
#pragma omp simd
        for (index_t v = 0; v < columns; ++v) store(out[v], scale * vector_exp(row[v] - shift));
        if (here) store(out[column], scale * vector_exp(at_target - shift) - static_cast<S>(factor));
      }
    });
  });
}

}  // namespace regroup
